"""The study of parity, and the page of all results."""

import dataclasses
import json
import shlex

import pytest
import test_train
import typer
from PIL import Image
from research_cases import rows
from test_train import TINY, run, squeeze

from research import parity, report
from research.settings import config
from research.settings.config import RECIPES, Config
from research.training import loop

_leave_no_trace = test_train._leave_no_trace  # of the training script


# Parity


@pytest.mark.slow
def test_a_study_runs_and_goes_on(tmp_path, monkeypatch):
    args = [*TINY, "--out", tmp_path, "--epochs", 2]
    assert run(parity.app, *args, "--seeds", 1)[0] == 0
    made, original = [], loop.train_epoch

    def counted(*given):
        made.append(given)
        return original(*given)

    monkeypatch.setattr(loop, "train_epoch", counted)
    code, output = run(parity.app, *args, "--seeds", 2)
    assert code == 0 and "pareprop,seed1" in output
    assert len(made) == 2 * len(parity.VARIANTS)  # epochs of the second seed alone
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {(line["variant"], line["seed"]) for line in lines} == {(v, s) for v in parity.VARIANTS for s in (0, 1)}
    last = {(line["variant"], line["seed"]): line["test_loss"] for line in lines}
    for seed in (0, 1):
        assert last["reversible", seed] == pytest.approx(last["naive", seed], rel=1e-4)
        assert last["plain", seed] != pytest.approx(last["naive", seed], rel=1e-4)
    assert last["naive", 0] != last["naive", 1]
    assert Image.open(tmp_path / "curves.png").size == (1200, 480)
    assert "over 2 seeds" in (tmp_path / "table.md").read_text()
    code, output = run(parity.app, *args, "--seeds", 1, "--lr", 1e-3)
    assert code == 2 and squeeze("--lr: the run") in output  # one study is of one setting


@pytest.mark.parametrize("model", ["vit", "swin", "mvit"])
def test_variants_differ_in_what_they_are_named_after(tmp_path, model):
    recipe = RECIPES[f"minrev-{model}"]
    for variant in parity.VARIANTS:
        found = parity.variant_of(recipe, variant, 3, tmp_path)
        changed = {f.name for f in dataclasses.fields(Config) if getattr(found, f.name) != getattr(recipe, f.name)}
        assert (
            changed - {"seed", "out"}
            <= {
                "plain": {"model", "scheduler", "fusion"},
                "naive": {"scheduler"},
                "pareprop": {"scheduler"},
                "reversible": set(),
                "exact": {"coupling"},
            }[variant]
        )
        assert found.seed == 3 and (found.model == f"plain-{model}") == (variant == "plain")


def test_a_study_of_a_plain_model_is_refused(tmp_path):
    code, output = run(parity.app, "--model", "plain-vit", "--out", tmp_path)
    assert code == 2 and "--model" in output and squeeze("comes by itself") in output


def test_the_table_has_means_deviations_and_largest_differences():
    study = {name: {0: rows([0.5, 0.25]), 1: rows([0.5, 0.75])} for name in parity.VARIANTS}
    study["pareprop"][1] = rows([0.625, 0.75])
    study["exact"][0] = rows([8.5, 0.25])  # other sums: not among the schedulers
    table = parity.table(study)
    assert "| naive | 0.5000 ± 0.3536 | 1.0000 ± 0.7071 | 50.00% ± 35.36% | 50.00% ± 0.00% |" in table
    assert "| 0 | 0 | 0 | 0 | 0 |" in table
    assert "| 1 | 0.12 | 0.25 | 0.12 | 0 |" in table and "| any | 0.12 | 0.25 | 0.12 | 0 |" in table
    assert "| any, naive and exact | 8 | 16 | 8 | 0 |" in table


# Report


def test_the_committed_page_is_what_is_rendered():
    assert (report.RESULTS / "README.md").read_text() == report.render(report.RESULTS), "python -m research.report"


def test_the_page_tells_what_is_there(tmp_path):
    log = test_train.train_tiny(tmp_path / "run", "--epochs", 2)
    (tmp_path / "a-study").mkdir()
    (tmp_path / "a-study" / "table.md").write_text("| a | table |\n")
    (tmp_path / "a-study" / "command.txt").write_text("python -m research.a_study\n")
    test_train.train_tiny(tmp_path / "a-study" / "below", "--epochs", 1)
    test_train.train_tiny(tmp_path / "stopped", "--epochs", 2, "--stop-after", 1)
    page = report.render(tmp_path)
    accuracy = f"{log.rows[-1]['test_accuracy']:.2%}"
    line = f"| [run](run/log.jsonl) | 96 | 2 of 2 | vit, additive, reversible | {log.rows[-1]['train_accuracy']:.2%} "
    assert line + f"| {accuracy} | **short** |" in page
    assert "1 of 2" in page and "**short**, **not finished**" in page
    assert "| a | table |" in page and "`python -m research.a_study`" in page and "below/log.jsonl" not in page
    assert f"cpu, {log.header['environment']['torch']}" not in page and log.header["environment"]["torch"] in page
    assert "![run/curve](run/curve.png)" in page and "- tests-of-streams: " in page
    (tmp_path / "gpu" / "tests-of-streams").mkdir(parents=True)
    assert "- tests-of-streams: " not in report.render(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        "--dataset digits --model vit",
        "--dataset cifar10 --model mvit --depth 5 --amp --graph --no-deterministic",
        "--recipe tuned-vit --no-amp --epochs 3 --warmup-epochs 1 --ema 0.9",
    ],
)
def test_the_command_told_is_the_one_given(flags):
    seen: list[Config] = []
    app = typer.Typer()
    app.command()(config.flags(seen.append))
    assert run(app, *flags.split())[0] == 0
    told = report.command(seen[0].as_json())
    assert set(told.split()) == {"python", "-m", "research.train", *flags.split()}
    assert run(app, *shlex.split(told)[3:])[0] == 0 and seen[0] == seen[1]
