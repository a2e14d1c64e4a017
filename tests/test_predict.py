"""Predictions: a checkpoint and images in, names of classes and probabilities out."""

import contextlib
import importlib
import io
import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import test_train
import torch
import typer
from PIL import Image
from test_folders import pictures
from test_train import TINY, run, saved, squeeze, train_tiny
from typer.testing import CliRunner

from research import predict, train
from research.data import readers
from research.data.batches import Batches
from research.settings.config import Config
from research.training import trained
from research.training.loop import evaluate

_leave_no_trace = test_train._leave_no_trace  # of the training script

OFF = torch.autocast("cpu", enabled=False)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that tells dark, grey and light images apart, and the folder of these images."""
    place = tmp_path_factory.mktemp("learnt")
    root = pictures(place / "trees", 20)
    args = ["--dataset", "folder", "--data-dir", root, "--image-size", 16, "--cache-dir", place / "cache",
            "--epochs", 20, "--batch-size", 8, "--lr", 3e-3, "--seed", 1, "--limit-train", 48]  # fmt: skip
    log = train_tiny(place / "run", *args)
    assert log.rows[-1]["test_accuracy"] == 1.0
    return place / "run", root


def lines(*args: Any) -> list[dict[str, Any]]:
    """The lines of JSON that the command prints."""
    result = CliRunner().invoke(predict.app, [*map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.some(1)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_images_gets_the_right_names(learnt, workers):
    out, root = learnt
    found = lines(out, root, "--batch-size", 7, "--workers", workers)
    assert len(found) == 60 and [line["image"] for line in found] == sorted(line["image"] for line in found)
    for line in found:
        assert line["class"] == Path(line["image"]).parent.name
        assert list(line["probabilities"]) == ["ash", "elm", "oak"] and line["probabilities"][line["class"]] > 1 / 3
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_files_and_folders_in_the_order_given(learnt):
    out, root = learnt
    given = [root / "oak" / "3.png", root / "ash", root / "elm" / "1.png"]
    assert [line["class"] for line in lines(out / "last.pt", *given)] == ["oak", *["ash"] * 20, "elm"]


def test_the_table_shows_whole_paths(learnt, tmp_path):
    out, root = learnt
    path = tmp_path / f"{'a-long-name-' * 9}.png"
    Image.open(root / "oak" / "0.png").save(path)
    result = CliRunner().invoke(predict.app, [str(out), str(path)])
    rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    assert "".join(row[1].strip() for row in rows) == str(path) and rows[0][2].strip() == "oak"


def test_images_of_other_sizes_and_kinds(learnt, tmp_path):
    out, root = learnt
    image = Image.open(root / "oak" / "0.png")
    image.resize((160, 160), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("RGBA").save(tmp_path / "see-through.webp", lossless=True)
    image.convert("P").save(tmp_path / "palette.png", transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as Pillow would
        assert [line["class"] for line in lines(out, tmp_path)] == ["oak"] * 4


def test_the_probabilities_are_those_that_the_run_was_tested_by(learnt):
    """Read and normalised by another path: that of the training script, which logged the loss of the test images."""
    out, root = learnt
    network = trained.load(out)
    state = saved(out)["log"]
    data = readers.folder(root, out.parent / "cache", 16).prepare(48, None, torch.device("cpu"))
    loss, accuracy = evaluate(network.model, Batches(data, 8).test(""), OFF)
    assert (loss, accuracy) == (pytest.approx(state["rows"][-1]["test_loss"], rel=1e-5), 1.0)
    files = [root / name for name in state["header"]["data"]["held_out"]]
    shares = torch.stack([row for _, row in predict.predict(network, files)])
    picked = shares[torch.arange(len(files)), data.test.labels]
    assert picked.log().mean().item() == pytest.approx(-loss, rel=1e-4)


def test_the_terminal_shows_the_best_classes_first(learnt):
    out, root = learnt
    code, output = run(predict.app, out, root / "oak" / "3.png", root / "ash" / "4.png", "--top", 2)
    shares = [line["probabilities"] for line in lines(out, root / "oak" / "3.png", root / "ash" / "4.png")]
    assert code == 0
    for row in shares:
        first, second = sorted(row, key=row.__getitem__, reverse=True)[:2]
        assert f"{first}{row[first]:.1%}{second}{row[second]:.1%}" in output
    code, output = run(predict.app, out, root / "oak" / "3.png", "--top", 99)
    assert code == 0 and all(name in output for name in ("ash", "elm", "oak"))


def test_what_cannot_be_read_is_refused_or_skipped(learnt, tmp_path):
    out, root = learnt
    for name in ("a", "c"):
        Image.open(root / "oak" / "0.png").save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    code, output = run(predict.app, out, tmp_path)
    assert code == 2 and "IMAGES" in output and squeeze("b.png is not an image") in output
    assert "--corrupt" in output and "--resume" not in output  # there is no training to go on with
    result = CliRunner().invoke(predict.app, [str(out), str(tmp_path), "--corrupt", "skip", "--json"])
    assert result.exit_code == 0 and f"skipped {tmp_path}/b.png" in result.stderr
    assert [Path(json.loads(line)["image"]).name for line in result.stdout.splitlines()] == ["a.png", "c.png"]


def test_wrong_arguments_are_named(learnt, tmp_path):
    out, root = learnt
    (tmp_path / "empty").mkdir()
    (tmp_path / "last.pt").write_bytes(b"nothing")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    for args, words in [
        ([tmp_path / "no-run", root], ["RUN", "there is no", "/no-run."]),
        ([tmp_path / "empty", root], ["RUN", "there is no", "/empty/last.pt."]),
        ([tmp_path, root], ["RUN", "last.pt is none"]),
        ([tmp_path / "other.pt", root], ["RUN", "other.pt is none", "KeyError"]),
        ([out, tmp_path / "nowhere"], ["IMAGES", "nowhere does not exist"]),
        ([out, tmp_path / "empty"], ["IMAGES", "empty holds no image"]),
        ([out, root, "--top", 0], ["--top", "at least 1, got 0"]),
        ([out, root, "--device", "gpu"], ["--device", "gpu is none"]),
    ]:
        code, output = run(predict.app, *args)
        assert code == 2 and all(squeeze(word) in output for word in words), output


@pytest.mark.parametrize("args", [["--ema", 0.5], ["--amp"], ["--coupling", "exact"], ["--model", "plain-vit"]])
def test_every_kind_of_run_predicts_as_it_was_tested(tmp_path, args):
    """Of one with averaged weights these count; one of mixed precision computes in it."""
    log = train_tiny(tmp_path / "run", "--epochs", 2, "--limit-train", 400, *args)
    network = trained.load(tmp_path / "run")
    data = readers.digits(None, tmp_path).prepare(400, 40, torch.device("cpu"))
    shares = network.probabilities(data.test.images)
    loss = -shares[torch.arange(40), data.test.labels].log().mean().item()
    assert loss == pytest.approx(log.rows[-1]["test_loss"], rel=2e-2 if "--amp" in args else 1e-4)
    for i in (0, 1):
        Image.fromarray(data.test.images[i, 0].numpy()).save(tmp_path / f"{i}.png")
    found = [line["probabilities"] for line in lines(tmp_path / "run", tmp_path / "0.png", tmp_path / "1.png")]
    for row, want in zip(found, shares[:2].tolist(), strict=True):
        assert list(row.values()) == pytest.approx(want, rel=0.1 if "--amp" in args else 1e-3, abs=1e-5)


def strip(out: Path) -> None:
    """Make a checkpoint as earlier versions wrote it."""
    state = saved(out)
    del state["log"]["header"]["data"]
    for name in ("stream_above", "workers", "corrupt"):
        del state["log"]["header"]["config"][name]
    torch.save(state, out / "last.pt")


def test_a_checkpoint_from_before_is_completed_by_its_data_set(tmp_path):
    root = pictures(tmp_path / "trees")
    args = ["--dataset", "folder", "--data-dir", root, "--image-size", 16, "--cache-dir", tmp_path / "cache"]
    train_tiny(tmp_path / "run", *args, "--epochs", 1)
    want = trained.load(tmp_path / "run").inputs
    strip(tmp_path / "run")
    said: list[str] = []
    assert trained.load(tmp_path / "run", say=said.append).inputs == want and "earlier version" in said[0]
    (root).rename(tmp_path / "moved")
    code, output = run(predict.app, tmp_path / "run", tmp_path / "moved")
    assert code == 2 and "--data-dir" in output and squeeze("does not tell its classes and normalisation") in output
    found = lines(tmp_path / "run", tmp_path / "moved" / "ash", "--data-dir", tmp_path / "moved")
    assert len(found) == 10 and list(found[0]["probabilities"]) == ["ash", "elm", "oak"]


def test_weights_of_another_number_of_heads_do_not_load_unseen(tmp_path):
    """They have the same shapes. What tells them apart is in the checkpoint, which is where the number comes from."""
    train_tiny(tmp_path / "run", "--epochs", 1)
    network = trained.load(tmp_path / "run")
    images = readers.digits(None, tmp_path).test.images[:8]
    other = trained.network(Config(embed_dim=16, num_heads=4, depth=2), (1, 8, 8), 10)
    with torch.no_grad():
        for name, parameter in network.model.named_parameters():
            parameter *= 30 if "qkv.weight" in name else 1  # after an epoch all tokens attend to all alike
    other.load_state_dict(network.model.state_dict())  # torch sees no difference
    normal = network.inputs.normalizer(torch.device("cpu"))(images)
    assert (other.eval()(normal) - network.model(normal)).abs().max() > 1e-3
    assert network.config.num_heads == 2
    code, output = run(train.app, *TINY, "--out", tmp_path / "run", "--epochs", 1, "--num-heads", 4, "--resume")
    assert code == 2 and "--num-heads" in output and squeeze("has 2, this call 4") in output


def test_settings_that_do_not_fit_the_weights_are_named(tmp_path):
    train_tiny(tmp_path / "run", "--epochs", 1)
    state = saved(tmp_path / "run")
    state["log"]["header"]["data"]["classes"].append("eleven")
    torch.save(state, tmp_path / "run" / "last.pt")
    with pytest.raises(typer.BadParameter, match="not those of the network that its settings name"):
        trained.load(tmp_path / "run")


# The page


PAGE = (Path(predict.__file__).parent / "README.md").read_text()
SIZES = "--epochs 1 --embed-dim 16 --num-heads 2 --depth 2 --batch-size 8 --device cpu".split()


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_commands_on_images_of_ones_own_run_as_they_are_printed(tmp_path, monkeypatch):
    """Word for word, on a small folder; only the networks are smaller, by flags after those that are printed."""
    monkeypatch.chdir(tmp_path)
    root = pictures(tmp_path / "trees", 6)
    Image.open(root / "oak" / "0.png").save("photo.jpg")
    pictures(tmp_path / "more-photos", 2)
    (tmp_path / "more-photos" / "broken.png").write_bytes(b"")
    blocks = [block for title in ("Train on your own images", "Predict")
              for block in re.findall(r"```sh\n(.*?)```", section(title), re.DOTALL)]  # fmt: skip
    commands = [line for block in blocks for line in block.splitlines()]
    assert [line.split()[2] for line in commands].count("research.predict") == 2 and len(commands) >= 6
    front = (Path(predict.__file__).parent.parent / "README.md").read_text().split("To train on your own images")[1]
    assert set(re.search(r"```sh\n(.*?)```", front, re.DOTALL)[1].splitlines()) <= set(commands)
    for line in commands:
        words = shlex.split(line.replace("DIR", str(root)))
        assert words[:2] == ["python", "-m"], line
        words, target = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
        name, args = words[2], words[3:]
        if name == "research.train":
            args += SIZES
        if name == "research.predict" and "skip" not in args:
            (tmp_path / "more-photos" / "broken.png").unlink()
        result = CliRunner().invoke(importlib.import_module(name).app, args)
        assert result.exit_code == 0, (line, result.output)
        if name == "research.predict" and "skip" not in args:
            assert "photo.jpg" in squeeze(result.output) and result.output.count(".png") == 6
            (tmp_path / "more-photos" / "broken.png").write_bytes(b"")
        if target:
            (tmp_path / target).write_text(result.stdout)
    assert len([json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]) == 6
    for name in ("folder-vit-reversible", "folder-vit-naive", "streamed"):
        assert {f.name for f in (tmp_path / "runs" / name).iterdir()} == {"log.jsonl", "curve.png", "last.pt"}
    told = json.loads((tmp_path / "runs" / "streamed" / "log.jsonl").read_text().splitlines()[0])["data"]
    assert told["streamed"] and told["image_size"] == 64
    (block,) = re.findall(r"```py\n(.*?)```", section("Predict"), re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "<a block of research/README.md>", "exec"), {})
    assert re.match(r"photo.jpg (ash|elm|oak) tensor\(0\.\d+\)", printed.getvalue())
