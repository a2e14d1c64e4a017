"""Simulated steps take the bytes that real ones do, and what is said to fit does fit, and no more."""

import gc
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from research import parts
from research.simulate import Line, app, solve
from research.studies.footprints import CONTENDERS, MODELS, Point, Setting, build, count

TINY = Setting(img_size=64)  # 16 tokens of width 40: streams of which samples of any offset are equally large


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Counting collects garbage first; what the imports left need not be searched each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def point(depth=3, batch=5, **bytes_):
    fields = ("held", "peak", "images", "weights", "gradients", "optimizer")
    return Point("s", "naive", depth, batch, **{**dict.fromkeys(fields, 0), **bytes_}, seconds=0.0)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        (TINY, list(CONTENDERS)),
        (replace(TINY, dropout=0.2), ["naive", "reversible", "timm-checkpoint"]),
        (replace(TINY, amp="bfloat16"), ["reversible", "checkpoint", "timm"]),
    ],
    ids=["plain", "dropout", "amp"],
)
def test_a_fake_step_takes_the_bytes_of_a_real_one(setting, names):
    real = count("tiny", names, 2, [2], setting, fake=False)
    fake = count("tiny", names, 2, [2], setting)
    assert [p.contender for p in real] == names
    assert [replace(p, seconds=0.0) for p in fake] == [replace(p, seconds=0.0) for p in real]
    assert all(p.peak > p.held > 0 for p in real)
    held = {p.contender: p.held for p in real}
    for less, more in (("reversible", "checkpoint"), ("checkpoint", "naive"), ("timm-checkpoint", "timm")):
        assert not {less, more} <= set(held) or held[less] < held[more]


@pytest.mark.some(1)
@pytest.mark.parametrize("model", ["tiny-swin", "tiny-mvit"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_so_do_those_of_models_in_stages(model, dropout):
    names, setting = ["naive", "reversible", "checkpoint", "timm", "timm-checkpoint"], replace(TINY, dropout=dropout)
    real = count(model, names, MODELS[model].depth, [2], setting, fake=False)
    fake = count(model, names, MODELS[model].depth, [2], setting)
    assert [replace(p, seconds=0.0) for p in fake] == [replace(p, seconds=0.0) for p in real]
    held = {p.contender: p.held for p in real}
    assert held["reversible"] < held["checkpoint"] < held["naive"] and held["timm-checkpoint"] < held["timm"]


def test_models_in_stages_grow_in_their_longest():
    assert MODELS["swin-t"].at(24) == {"depths": MODELS["swin-s"].stages} and MODELS["swin-t"].depth == 12
    assert MODELS["mvit-b"].at(32) == {"depths": (1, 2, 27, 2)} and MODELS["mvit-b"].depth == 16
    with pytest.raises(ValueError, match="at least 7 for rev_swin_tiny, got 6"):
        MODELS["swin-t"].at(6)
    for model in ("swin-t", "mvit-b"):
        with torch.device("meta"):
            blocks = [sum(type(m).__name__ in names for m in build(model, 20, Setting(), ours).modules())
                      for ours, names in ((True, ["Pair", "MultiScaleBlock"]),
                                          (False, ["SwinTransformerBlock", "MultiScaleBlock"]))]  # fmt: skip
        assert blocks == [20, 20]


def test_everything_else_is_counted_once():
    (found,) = count("tiny", ["reversible"], 3, [2], replace(TINY, dtype="bfloat16"))
    number = sum(p.numel() for p in build("tiny", 3, TINY).parameters())
    assert (found.weights, found.gradients, found.optimizer) == (2 * number, 2 * number, 8 * number)
    assert found.images == 2 * 3 * 64 * 64 * 2
    assert point(held=1, peak=2, images=4, weights=8, gradients=16, optimizer=32).total == 62


def test_the_published_sizes():
    millions = {"s": 22, "b": 87, "l": 305}  # of parameters: table 1 of the paper
    for model, wanted in millions.items():
        with torch.device("meta"):
            net = build(model, MODELS[model].depth, Setting())
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(wanted, rel=0.02)


def test_dropout_reaches_every_block_of_both_architectures():
    for reversible in (True, False):
        net = build("tiny", 2, replace(TINY, dropout=0.2), reversible)
        assert sum(isinstance(m, nn.Dropout) and m.p == 0.2 for m in net.blocks.modules()) == 2 * 3
        assert max(getattr(m, "drop_prob", 0.0) or 0.0 for m in net.modules()) == pytest.approx(0.2)


@pytest.mark.parametrize(("limit", "largest"), [(99, 0), (106, 0), (107, 1), (113, 1), (114, 2), (800, 100)])
def test_the_largest_on_a_line(limit, largest):
    line = Line(5, 100 + 7 * 5, 10, 100 + 7 * 10)
    assert line.largest(limit) == largest
    assert line.slope == 7
    assert line.error(20, 100 + 7 * 20) == 0 and line.error(20, 480) == pytest.approx(0.5)


def test_solving_a_made_up_function():
    def made_up(depth, batch, extra=0):  # 10^6 bytes of weights a block
        activations = 10**5 * depth * batch + extra
        return point(depth, batch, held=20 * batch, peak=activations, images=1000 * batch, weights=10**6 * depth)

    points = [made_up(3, 5), made_up(3, 10), made_up(6, 5), made_up(3, 20, 10**6), made_up(12, 5)]
    row = solve(points, 3, 5, [1, 2])
    for gb, (batch, depth) in row.fits.items():
        assert made_up(3, batch).total <= gb * 10**9 < made_up(3, batch + 1).total
        assert made_up(depth, 5).total <= gb * 10**9 < made_up(depth + 1, 5).total
    assert (row.fixed, row.held_per_image, row.peak_per_image) == (3 * 10**6, 20, 3 * 10**5)
    assert row.batch_error == pytest.approx(10**6 / made_up(3, 20, 10**6).total) and row.depth_error == 0


def run(tmp_path, *flags):
    return CliRunner().invoke(app, ["--out", str(tmp_path), *flags])


@pytest.mark.slow
def test_the_command_line(tmp_path):
    flags = ["--model", "tiny", "--img-size", "64", "--schedulers", "naive,reversible", "--memory", "1,2"]
    result = run(tmp_path, *flags, "--batch-size", "256", "--depths", "3")
    assert result.exit_code == 0, result.output
    table, found = (tmp_path / "table.md").read_text(), json.loads((tmp_path / "simulation.json").read_text())
    assert table.strip() in result.output and (tmp_path / "memory.png").stat().st_size > 1000
    assert [(p["depth"], p["batch"]) for p in found["points"] if p["contender"] == "naive"] == [
        (2, 1), (2, 256), (2, 512), (2, 1024), (4, 256), (8, 256), (3, 4096)]  # fmt: skip
    rows = {row["contender"]: row for row in found["rows"]}
    assert list(rows) == ["naive", "reversible"]
    assert rows["reversible"]["peak_per_image"] < rows["naive"]["peak_per_image"] / 2
    for name, row in rows.items():
        batch, depth = row["fits"]["1"]
        assert f"| tiny | {name} | {batch:,} / {depth:,} | " in table
        fits, too_many = count("tiny", [name], 2, [batch, batch + 1], TINY)
        assert fits.total <= 10**9 < too_many.total


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--model", "xl"], "tiny, s, b, l, tiny-swin"), (["--schedulers", "none"], "naive, reversible"),
     (["--memory", "16GB"], "whole numbers"), (["--depths", "0"], "whole numbers"),
     (["--img-size", "100"], "multiple of 16"), (["--memory", ""], "whole numbers"),
     (["--model", "mvit-b", "--img-size", "112"], "multiple of 32 for mvit-b"),
     (["--model", "swin-t", "--depths", "6"], "at least 7 blocks for swin-t")],
)  # fmt: skip
def test_wrong_flags_are_refused(tmp_path, flags, message):
    result = run(tmp_path, *flags)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_what_taking_a_batch_in_parts_costs(tmp_path):
    """At toy size; fewer images at once take less memory."""
    sizes = {"models": "rev_mvit_cifar10,rev_swin_cifar10", "batches": "8", "size": 32, "rounds": 1}
    parts.main(**sizes, out=tmp_path)
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[4:]]
    assert [row[2] for row in rows] == [parts.WHOLE, parts.TRANSITIONS, parts.GIVEN, parts.WHOLE, parts.GIVEN]
    peaks = [float(row[4]) for row in rows]
    assert peaks[2] <= peaks[1] < peaks[0] and peaks[4] < peaks[3] and float(rows[0][3]) == 1
    assert "--models rev_mvit_cifar10,rev_swin_cifar10 --batches 8" in (tmp_path / "command.txt").read_text()
