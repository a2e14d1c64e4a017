"""The training script: same seed same log, resuming bit for bit, readers, errors, comparing runs."""

import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import typer
from common import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V
from typer.testing import CliRunner

from research import compare, train
from research.data import readers
from research.data.augment import random_crop, random_flip
from research.data.batches import Batches, normalizer
from research.data.split import Dataset, Split
from research.settings import config
from research.settings.schedulers import EXAMPLES, scheduler
from research.shared import machine
from research.shared.files import replacing
from research.studies.differences import largest_differences
from research.training import checkpoint, loop, networks
from research.training.build import build
from research.training.distributed import Processes
from research.training.log import Log, Row, read_log
from revlib.schedulers import Anchored, Budget, Checkpoint, Functional, KeepLast, Naive, PaReprop, Reversible

TINY = [
    "--limit-train",
    96,
    "--limit-test",
    40,
    "--embed-dim",
    16,
    "--num-heads",
    2,
    "--depth",
    2,
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Undo the script's process-wide settings, and keep it out of the user's cache and working folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def run(app: typer.Typer, *args: Any) -> tuple[int, str]:
    """Exit code and output, the output without spaces and boxes, which depend on the terminal's width."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, squeeze(result.output)


def squeeze(text: str) -> str:
    return re.sub(r"[\s─-╿]", "", text)


def train_tiny(out: Path, *args: Any) -> Log:
    code, output = run(train.app, *TINY, "--out", out, *args)
    assert code == 0, output
    return read_log(out / "log.jsonl")


def timeless(log: Log) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in log.rows]


def saved(out: Path) -> dict[str, Any]:
    return torch.load(out / "last.pt", weights_only=True)


def assert_identical(a: Any, b: Any, where: str = "run") -> None:
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_identical(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


# One run


def test_the_log_tells_what_ran_and_one_line_an_epoch(tmp_path):
    log = train_tiny(tmp_path / "run", "--epochs", 2, "--seed", 7)
    assert log.header["config"]["seed"] == 7 and log.header["config"]["embed_dim"] == 16
    assert log.header["config"].keys() == {field.name for field in dataclasses.fields(config.Config)}
    assert log.header["environment"].keys() == {"torch", "python", "device", "threads", "processes"}
    assert log.header["environment"]["torch"] == torch.__version__
    assert [row["epoch"] for row in log.rows] == [1, 2]
    assert all(row.keys() == get_type_hints(Row).keys() for row in log.rows)
    assert [row["lr"] for row in log.rows] == pytest.approx([2e-3, 1e-3])  # the cosine at 0 and at half-way
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[2]) == log.rows[1]
    assert Image.open(tmp_path / "run" / "curve.png").size == (1200, 480)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"log.jsonl", "curve.png", "last.pt"}


def test_it_learns(tmp_path):
    args = ["--limit-train", 400, "--limit-test", 200, "--epochs", 8]
    rows = train_tiny(tmp_path, *args).rows
    assert rows[0]["train_loss"] == pytest.approx(np.log(10), rel=0.1)
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"] and rows[-1]["test_accuracy"] > 0.3


def test_same_seed_same_bits(tmp_path):
    args = "--epochs", 2
    first, again = (train_tiny(tmp_path / name, *args) for name in ("first", "again"))
    other = train_tiny(tmp_path / "other", *args, "--seed", 1)
    assert timeless(first) == timeless(again) != timeless(other)
    assert_identical(saved(tmp_path / "first")["run"], saved(tmp_path / "again")["run"])


@pytest.mark.parametrize("scheduler", ["reversible", "checkpoint"])
def test_schedulers_give_the_losses_of_naive(tmp_path, scheduler):
    naive, other = (train_tiny(tmp_path / name, "--scheduler", name, "--epochs", 3) for name in ("naive", scheduler))
    for a, b in zip(naive.rows, other.rows, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("naive", Naive()),
        ("reversible", Reversible()),
        ("functional", Functional()),
        ("pareprop", PaReprop()),
        ("checkpoint", Checkpoint()),
        ("checkpoint:2", Checkpoint(2)),
        ("keep-last:4", KeepLast(4)),
        ("anchored:8", Anchored(8)),
        ("budget:0.5", Budget(fraction=0.5)),
        ("budget:2000000000", Budget(bytes=2_000_000_000)),
    ],
)
def test_the_model_gets_the_scheduler_named(name, wanted):
    chosen = config.Config(scheduler=name)
    model = build(chosen, readers.digits(None, chosen.cache_dir), torch.device("cpu")).model
    assert model.blocks.scheduler == scheduler(name) == wanted and name in EXAMPLES
    assert ":" not in chosen.folder.name


@pytest.mark.parametrize("name", ["best", "naive:1", "checkpoint:", "checkpoint:0", "keep-last", "keep-last:x",
                                  "anchored:1.5", "budget", "budget:x", "budget:-3", "budget:1.5e"])  # fmt: skip
def test_a_wrong_scheduler_is_named_with_what_there_is(tmp_path, name):
    code, output = run(train.app, *TINY, "--out", tmp_path, "--scheduler", name)
    assert code == 2 and "--scheduler" in output and squeeze(f"got {name}") in output and "keep-last:4" in output
    assert not list(tmp_path.iterdir())


def test_amp_runs_in_the_format_named(tmp_path):
    precisions = [], ["--amp"], ["--amp", "--amp-dtype", "float16"]
    losses = [train_tiny(tmp_path / str(i), "--epochs", 1, *p).rows[0]["train_loss"] for i, p in enumerate(precisions)]
    assert len(set(losses)) == 3 and losses == pytest.approx([losses[0]] * 3, rel=0.02)


def test_amp_on_a_processor_that_emulates_it_is_said_to_be_slow(tmp_path, monkeypatch):
    """Its products took up to a hundred times as long on a processor without bfloat16 instructions."""
    monkeypatch.setattr(loop, "slowdown", lambda dtype, device: 90.0 if dtype.itemsize == 2 else 1.0)
    for name, amp, told in (("plain", [], False), ("amp", ["--amp"], True)):
        code, output = run(train.app, *TINY, "--out", tmp_path / name, "--epochs", 1, *amp)
        assert code == 0 and ("90times" in output) == told


def test_formats_are_compared_by_the_fastest_product_of_each(monkeypatch):
    took = [5.0, 4.0, 6.0, 3.0, 2.0, 8.0]  # seconds: three products in the format, three in float32
    readings = [now for k, t in enumerate(took) for now in (100.0 * k, 100.0 * k + t)]
    monkeypatch.setattr("research.shared.machine.time.perf_counter", iter(readings).__next__)
    assert machine.slowdown(torch.bfloat16, torch.device("cpu")) == 4.0 / 2.0
    assert machine.slowdown(torch.bfloat16, torch.device("meta")) == 1.0


def test_a_diverged_run_stops_and_says_so(tmp_path):
    code, output = run(train.app, *TINY, "--out", tmp_path / "run", "--lr", 1e30, "--epochs", 3)
    assert code == 1 and "lower--lr" in output
    assert not (tmp_path / "run" / "last.pt").exists()


@examples(20)
@given(n=st.integers(1, 40), size=st.integers(1, 40))
def test_the_means_do_not_depend_on_the_batch_size(n: int, size: int):
    draws = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, 1, 2, 2), generator=draws, dtype=torch.uint8)
    split = Split(images, torch.randint(3, (n,), generator=draws))
    batches = Batches(Dataset(split, split, list("abc"), 0, False), size)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(4, 3))
    loss, accuracy = loop.evaluate(model, batches.test("test"), torch.autocast("cpu", enabled=False))
    logits = model[2](batches.normalize(images).flatten(1))  # evaluation drops nothing
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, split.labels).item(), rel=1e-4)
    assert accuracy == pytest.approx((logits.argmax(1) == split.labels).float().mean().item())


# Resuming


@pytest.mark.some(1)
@pytest.mark.parametrize("precision", ["", "--amp", "--amp --amp-dtype float16"])
def test_stopping_and_resuming_changes_no_bit(tmp_path, precision):
    args = "--epochs", 3, *precision.split()
    straight = train_tiny(tmp_path / "straight", *args)
    halves = tmp_path / "halves"
    assert len(train_tiny(halves, *args, "--stop-after", 1).rows) == 1
    resumed = train_tiny(halves, *args, "--resume")
    assert timeless(resumed) == timeless(straight)
    assert_identical(saved(halves)["run"], saved(tmp_path / "straight")["run"])


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "place", [(loop, "evaluate"), (checkpoint, "save"), (loop, "draw_curves")], ids=lambda place: place[1]
)
def test_an_interrupted_epoch_is_done_again_bit_for_bit(tmp_path, monkeypatch, place):
    straight = train_tiny(tmp_path / "straight", "--epochs", 3)

    class KilledError(Exception):
        pass

    original, calls = getattr(*place), []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KilledError
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(*place, interrupted)
        train_tiny(tmp_path / "killed", "--epochs", 3)
    resumed = train_tiny(tmp_path / "killed", "--epochs", 3, "--resume")
    assert timeless(resumed) == timeless(straight)
    assert_identical(saved(tmp_path / "killed")["run"], saved(tmp_path / "straight")["run"])


def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    train_tiny(tmp_path / "begun", "--epochs", 2, "--stop-after", 1)
    monkeypatch.setattr(loop, "evaluate", interrupted)
    for name, words in (("begun", "last.pt has the last whole epoch: repeat"), ("new", "nothing kept")):
        args = ["--resume"] if name == "begun" else []
        code, output = run(train.app, *TINY, "--out", tmp_path / name, "--epochs", 2, *args)
        assert code == 130 and squeeze(words) in output, output


def test_an_out_that_is_a_file_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "run"):
        code, output = run(train.app, *TINY, "--out", out)
        assert code == 2 and "--out" in output and squeeze("notes.txt; name another") in output, output
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    done = train_tiny(tmp_path, "--epochs", 1)
    assert train_tiny(tmp_path, "--epochs", 1, "--resume") == dataclasses.replace(done)


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    train_tiny(tmp_path, "--epochs", 1)
    code, output = run(train.app, *TINY, "--out", tmp_path, "--epochs", 2)
    assert code == 2 and "--out" in output and "--resume" in output and "--overwrite" in output
    assert len(train_tiny(tmp_path, "--epochs", 2, "--overwrite").rows) == 2


def test_an_overwritten_run_cannot_be_resumed(tmp_path, monkeypatch):
    def interrupted(*args: Any) -> None:
        raise InterruptedError

    train_tiny(tmp_path, "--epochs", 1)
    monkeypatch.setattr(loop, "evaluate", interrupted)
    with pytest.raises(InterruptedError):
        train_tiny(tmp_path, "--epochs", 1, "--overwrite")
    code, output = run(train.app, *TINY, "--out", tmp_path, "--epochs", 1, "--resume")
    assert code == 2 and squeeze("last.pt, found none") in output


def test_resuming_with_other_flags_names_the_flag(tmp_path):
    train_tiny(tmp_path, "--epochs", 2, "--stop-after", 1)
    code, output = run(train.app, *TINY, "--out", tmp_path, "--epochs", 3, "--resume")
    assert code == 2 and squeeze("--epochs: the run") in output and "has2,thiscall3" in output


def test_resuming_elsewhere_says_that_bits_may_change(tmp_path, monkeypatch):
    train_tiny(tmp_path, "--epochs", 2, "--stop-after", 1)
    here = machine.environment(torch.device("cpu"))
    monkeypatch.setattr(loop, "environment", lambda device: here | {"torch": "1.0"})
    code, output = run(train.app, *TINY, "--out", tmp_path, "--epochs", 2, "--resume")
    assert code == 0 and squeeze(f"torch was {torch.__version__}, is 1.0") in output


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(InterruptedError), replacing(file) as temporary:
        temporary.write_text("ne")
        raise InterruptedError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with replacing(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


# Several processes


def torchrun(out: Path, *args: Any) -> tuple[int, str]:
    """Exit code and output of the script on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "research.train", *map(str, TINY), "--out", str(out), *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """The last batches of an epoch, of 1 training and 7 test images, deal less to one process than to the other."""
    args = "--epochs", 2, "--batch-size", 8, "--drop-path", 0, "--limit-train", 97, "--limit-test", 23
    alone = train_tiny(tmp_path / "alone", *args)
    code, output = torchrun(tmp_path / "both", *args)
    assert code == 0, output
    assert output.count("epoch 1/2") == output.count("2 of 2 epochs done") == 1
    both = read_log(tmp_path / "both" / "log.jsonl")
    assert both.header["environment"]["processes"] == 2 and len(both.rows) == 2
    for a, b in zip(alone.rows, both.rows, strict=True):
        for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    pairs = zip(*(saved(tmp_path / name)["run"]["model"].items() for name in ("alone", "both")), strict=True)
    for (name, a), (same, b) in pairs:
        assert name == same
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_stop_and_resume_and_change_no_bit(tmp_path):
    """With numbers drawn at random: each process draws its own."""
    for out, *more in (["straight"], ["halves", "--stop-after", 1], ["halves", "--resume"]):
        code, output = torchrun(tmp_path / out, "--epochs", 2, "--drop-path", 0.3, *more)
        assert code == 0, output
    straight, halves = (read_log(tmp_path / name / "log.jsonl") for name in ("straight", "halves"))
    assert timeless(straight) == timeless(halves)
    assert_identical(saved(tmp_path / "halves")["run"], saved(tmp_path / "straight")["run"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--batch-size 9", ["--batch-size", "expected a multiple of 2"]),
        ("--graph", ["--graph", "one process, and these are 2"]),
        ("--device cpu:0", ["--device", "one for each of 2 processes"]),
    ],
)
def test_what_several_processes_cannot_do_is_refused(tmp_path, monkeypatch, args, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, output = run(train.app, *TINY, "--out", tmp_path, *args.split())
    assert code == 2 and all(squeeze(word) in output for word in words), output


def test_parts_make_up_each_batch():
    labels, logits = torch.randint(3, (7,)), torch.randn(7, 3, dtype=torch.float64)
    for count in (1, 2, 3, 9):
        everyone = [Processes(rank, count) for rank in range(count)]
        assert sorted(torch.cat([p.part(torch.arange(7)) for p in everyone]).tolist()) == list(range(7))
        losses = [p.loss(p.part(logits), p.part(labels), 7) for p in everyone]
        torch.testing.assert_close(torch.stack(losses).mean(), torch.nn.functional.cross_entropy(logits, labels))


# Flags


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--dataset mnist", ["--dataset", "mnist", "fashion-mnist"]),
        ("--scheduler magic", ["--scheduler", "magic", "reversible"]),
        ("--epochs 0", ["--epochs", "a whole number of at least 1, got 0"]),
        ("--drop-path 1", ["--drop-path", "0 <= x < 1, got 1"]),
        ("--lr nan", ["--lr", "got nan"]),
        ("--batch-size many", ["--batch-size", "whole number of at least 1, got many"]),
        ("--embed-dim 17", ["--embed-dim", "17 features", "2 heads", "choose a multiple of 2"]),
        ("--patch-size 3", ["--patch-size", "got 3 for 8x8", "divisor"]),
        ("--device gpu", ["--device", "gpu is none", "auto"]),
        ("--amp-dtype float16", ["--amp-dtype", "without --amp"]),
        ("--graph", ["--graph", "needs CUDA, this run is on cpu"]),
        ("--graph --amp --amp-dtype float16", ["--graph", "overflow", "--amp-dtype bfloat16"]),
        ("--resume", ["--resume", "last.pt, found none", "drop --resume"]),
        ("--resume --overwrite", ["--resume", "--overwrite", "give one"]),
        ("--dataset folder", ["--data-dir", "DIR/CLASS/*", "got none"]),
        ("--dataset folder --data-dir /nowhere", ["--data-dir", "/nowhere/CLASS/*; found no such folder"]),
        ("--image-size 16", ["--image-size", "images of digits stay", "--dataset folder"]),
        ("--data-dir /nowhere", ["--data-dir", "digits comes with scikit-learn", "/nowhere"]),
        (
            "--dataset cifar10 --data-dir /nowhere",
            ["--data-dir", "/nowhere/train/CLASS/*.jpg", "no such folder"],
        ),
        (
            "--dataset fashion-mnist --data-dir /nowhere",
            ["--data-dir", "train-images-idx3-ubyte.gz", "no such"],
        ),
    ],
)
def test_a_bad_flag_is_named_with_what_to_do(tmp_path, args, words):
    code, output = run(train.app, *TINY, "--out", tmp_path, *args.split())
    assert code == 2
    assert all(squeeze(word) in output for word in words), output
    assert not list(tmp_path.iterdir())


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(readers.datasets, "CIFAR10", type("CIFAR10", (), {"__init__": offline}))
    code, output = run(train.app, "--dataset", "cifar10", "--out", tmp_path)
    assert code == 2 and "--data-dir" in output and "nonetwork" in output


def test_every_name_has_its_value():
    assert tuple(networks.MODELS) == get_args(config.ModelName)
    assert tuple(config.RECIPES) == get_args(config.RecipeName)
    assert tuple(loop.AMP_DTYPES) == get_args(config.AmpDtypeName)
    assert tuple(readers.DATASETS) == tuple(config.DATASET_DEFAULTS) == get_args(config.DatasetName)


def test_a_data_set_brings_its_defaults_and_flags_win():
    seen: list[config.Config] = []
    app = typer.Typer()
    app.command()(config.flags(seen.append))
    for args in ["", "--dataset cifar10", "--epochs 3 --dataset cifar10"]:
        assert run(app, *args.split())[0] == 0
    digits, cifar10, short = seen
    assert digits == config.Config()
    assert cifar10 == config.Config(dataset="cifar10", **config.DATASET_DEFAULTS["cifar10"])
    assert (cifar10.embed_dim, cifar10.depth, cifar10.num_heads, cifar10.lr) == (128, 6, 8, 1e-3)  # minREV's
    assert short == dataclasses.replace(cifar10, epochs=3)


# Batches


@examples(25)
@given(n=st.integers(1, 9), channels=st.integers(1, 3), h=st.integers(1, 6), w=st.integers(1, 6),
       padding=st.integers(0, 4), seed=st.integers(0, 99))  # fmt: skip
def test_random_crop_is_torchvisions_with_a_draw_per_image(n, channels, h, w, padding, seed):
    images = torch.randint(256, (n, channels, h, w), dtype=torch.uint8)
    moved = random_crop(images, padding, torch.Generator().manual_seed(seed))
    top, left = torch.randint(2 * padding + 1, (2, n), generator=torch.Generator().manual_seed(seed)).tolist()
    padded = V.pad(images, [padding])
    assert moved.dtype == torch.uint8
    assert torch.equal(moved, torch.stack([V.crop(padded[i], top[i], left[i], h, w) for i in range(n)]))


def test_crops_reach_every_offset_and_flips_are_fair():
    draws = torch.Generator().manual_seed(0)
    dot = torch.zeros(4000, 1, 9, 9)
    dot[:, :, 4, 4] = 1
    found = random_crop(dot, 2, draws).nonzero()[:, 2:]
    assert found.unique(dim=0).tolist() == [[y, x] for y in range(2, 7) for x in range(2, 7)]
    edge = torch.zeros(4000, 1, 1, 2)
    edge[..., 0] = 1
    flipped = random_flip(edge, draws)
    assert flipped.sum() == 4000 and 1850 < flipped[..., 1].sum() < 2150


def test_an_epoch_visits_every_image_once_in_a_new_order():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    split = Split(images, torch.arange(10))
    batches, draws = Batches(Dataset(split, split, ["a"], 0, True), 4), torch.Generator().manual_seed(0)
    first, second = ([labels.tolist() for _, labels in batches.train(draws, "train")] for _ in range(2))
    assert [len(labels) for labels in first] == [4, 4, 2] and first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10))
    for pixels, labels in batches.train(draws, "train"):
        assert torch.equal(pixels.argsort(0).flatten(), labels.argsort())  # each image keeps its label


def test_the_training_images_are_normalised():
    images = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8) // torch.tensor([1, 2, 5]).view(3, 1, 1)
    pixels = normalizer(Split(images.to(torch.uint8), torch.zeros(50)))(images.to(torch.uint8))
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)


# Readers


def test_digits_are_split_once_and_for_all(tmp_path):
    digits = readers.digits(None, tmp_path)
    assert digits.train.images.shape == (1437, 1, 8, 8) and digits.test.images.shape == (360, 1, 8, 8)
    assert digits.train.images.dtype == torch.uint8 and digits.train.images.max() == 240
    assert digits.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert torch.equal(digits.test.images, readers.digits(None, tmp_path).test.images)


def test_limits_draw_from_all_classes():
    split = Split(torch.zeros(100, 1, 1, 1), torch.arange(10).repeat_interleave(10))
    few = split.take(30)
    assert len(few) == 30 and len(few.labels.unique()) == 10
    assert torch.equal(few.labels, split.take(30).labels)
    assert split.take(None) is split and len(split.take(1000)) == 100


COLOURS = {
    "train": {"cat": (200, 30, 30), "dog": (10, 180, 60)},
    "test": {"cat": (0, 0, 90), "dog": (90, 0, 0)},
}


def make_tree(root: Path) -> Path:
    for split, classes in COLOURS.items():
        for name, colour in classes.items():
            (root / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8), colour).save(root / split / name / f"{number}.jpg", quality=95)
    return root


def test_an_image_tree_is_decoded_once(tmp_path, monkeypatch):
    root, cache = make_tree(tmp_path / "tree"), tmp_path / "cache"
    tree = readers.cifar10(root, cache)
    assert (
        tree.classes == ["cat", "dog"] and tree.train.labels.tolist() == tree.test.labels.tolist() == [0] * 3 + [1] * 3
    )
    for split, images in (("train", tree.train.images), ("test", tree.test.images)):
        expected = torch.tensor([COLOURS[split][name] for name in ("cat", "dog")]).repeat_interleave(3, 0)
        assert images.shape == (6, 3, 8, 8) and images.dtype == torch.uint8
        assert (images - expected[:, :, None, None]).abs().max() <= 4  # JPEG rounds colours
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        again = readers.cifar10(root, cache)  # from the cache: no image can be opened
    assert torch.equal(again.train.images, tree.train.images)
    Image.new("RGB", (8, 8), (255, 255, 255)).save(root / "train" / "cat" / "1.jpg")
    assert readers.cifar10(root, cache).train.images[1].min() > 250  # a changed image is read anew


def test_an_image_tree_trains(tmp_path):
    log = train_tiny(tmp_path / "run", "--dataset", "cifar10", "--data-dir", make_tree(tmp_path / "tree"),
                     "--cache-dir", tmp_path / "cache", "--epochs", 1)  # fmt: skip
    assert len(log.rows) == 1 and log.header["config"]["patch_size"] == 4


def test_a_broken_image_tree_is_named(tmp_path):
    def rejected(word: str) -> None:
        with pytest.raises(typer.BadParameter, match=re.escape(word)):
            readers.cifar10(root, tmp_path / "cache")

    root = make_tree(tmp_path / "tree")
    odd = root / "train" / "dog" / "9.jpg"
    Image.new("RGB", (5, 8)).save(odd)
    rejected(f"{odd} is (3, 8, 5)")
    odd.write_bytes(b"no picture")
    rejected(f"{odd} is not an image")
    odd.unlink()
    (root / "test" / "dog").rename(root / "test" / "wolf")
    rejected("must agree")
    for file in (root / "train" / "cat").iterdir():
        file.unlink()
    rejected("train/CLASS/*, but")


def make_folder(root: Path, each: int = 7) -> Path:
    """Images of one's own: three classes, each image of another size and kind."""
    for level, name in enumerate(("ash", "elm", "oak")):
        (root / name).mkdir(parents=True)
        for number in range(each):
            mode, colour = (("RGB", (80 * level,) * 3), ("L", 80 * level), ("RGBA", (80 * level,) * 3 + (9,)))[
                number % 3
            ]
            Image.new(mode, (20 + number, 31 - level), colour).save(root / name / f"{number}.png")
    (root / "ash" / "notes.txt").write_text("no image")
    return root


def test_a_folder_of_ones_own_images(tmp_path):
    root, cache = make_folder(tmp_path / "trees"), tmp_path / "cache"
    trees = readers.folder(root, cache, 16)
    assert trees.classes == ["ash", "elm", "oak"]
    assert trees.train.images.shape == (18, 3, 16, 16) and trees.test.images.shape == (3, 3, 16, 16)
    for split in (trees.train, trees.test):  # every image is of the level of its class
        assert (split.images == (80 * split.labels.to(torch.uint8))[:, None, None, None]).all()
    assert torch.equal(readers.folder(root, cache, 16).test.images, trees.test.images)
    assert readers.folder(root, cache).train.images.shape == (18, 3, 32, 32)

    for name in ("train", "val"):
        make_folder(tmp_path / "split" / name, 4 if name == "train" else 2)
    split = readers.folder(tmp_path / "split", cache)
    assert split.classes == trees.classes and (len(split.train), len(split.test)) == (12, 6)


def test_a_folder_trains_and_resumes(tmp_path):
    args = ["--dataset", "folder", "--data-dir", make_folder(tmp_path / "trees"), "--image-size", 16,
            "--cache-dir", tmp_path / "cache", "--epochs", 2]  # fmt: skip
    straight = train_tiny(tmp_path / "straight", *args)
    train_tiny(tmp_path / "halves", *args, "--stop-after", 1)
    assert timeless(train_tiny(tmp_path / "halves", *args, "--resume")) == timeless(straight)
    assert straight.header["config"]["image_size"] == 16


def test_a_broken_folder_is_named(tmp_path):
    def rejected(root: Path, *words: str) -> None:
        with pytest.raises(typer.BadParameter) as caught:
            readers.folder(root, tmp_path / "cache")
        assert all(word in caught.value.message for word in words), caught.value.message

    root = make_folder(tmp_path / "trees")
    rejected(root / "ash" / "0.png", "found a file")
    rejected(root / "ash", "Sort the images into a folder for each class")
    (root / "elm" / "0.png").write_bytes(b"")
    rejected(root, "elm/0.png is not an image")
    (root / "elm" / "0.png").unlink()
    (root / "yew").mkdir()
    rejected(root, "classes yew")
    Image.new("RGB", (9, 9)).save(root / "yew" / "0.png")
    rejected(root, "yew has one image only")
    (root / "yew").rename(root / "test")
    rejected(root, "expected train and test")
    for name in ("elm", "oak", "test"):
        (root / name).rename(tmp_path / name)
    rejected(root, "one class only, ash")


def write_idx(file: Path, array: np.ndarray) -> None:
    magic = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    opener = gzip.open if file.suffix == ".gz" else open
    file.parent.mkdir(parents=True, exist_ok=True)
    with opener(file, "wb") as out:
        out.write(magic + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_where_they_lie(tmp_path, inner, suffix):
    rng = np.random.default_rng(0)
    images = {"train": rng.integers(0, 256, (5, 28, 28)), "t10k": rng.integers(0, 256, (3, 28, 28))}
    for prefix, array in images.items():
        write_idx(tmp_path / inner / f"{prefix}-images-idx3-ubyte{suffix}", array)
        write_idx(tmp_path / inner / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(len(array)))
    before = sorted(tmp_path.rglob("*"))
    read = readers.fashion_mnist(tmp_path, tmp_path)
    assert read.train.images.squeeze(1).tolist() == images["train"].tolist()
    assert read.test.images.squeeze(1).tolist() == images["t10k"].tolist()
    assert read.test.labels.tolist() == [0, 1, 2] and read.test.labels.dtype == torch.int64
    assert len(read.classes) == 10 and sorted(tmp_path.rglob("*")) == before


def test_broken_idx_files_are_named(tmp_path):
    labels = tmp_path / "train-labels-idx1-ubyte"
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((5, 28, 28)))
    with pytest.raises(typer.BadParameter, match="expected train-labels-idx1-ubyte or"):
        readers.fashion_mnist(tmp_path, tmp_path)
    for content, word in [
        (b"", "not idx"),
        (b"\0\0\x08\x03" + b"\0" * 12, "not idx"),
        (b"<html>", "not idx"),
    ]:
        labels.write_bytes(content)
        with pytest.raises(typer.BadParameter, match=word):
            readers.fashion_mnist(tmp_path, tmp_path)
    write_idx(labels, np.zeros(4))
    with pytest.raises(typer.BadParameter, match="5 train images but 4 labels"):
        readers.fashion_mnist(tmp_path, tmp_path)


# Comparing runs


def write_log(folder: Path, losses: list[float]) -> Path:
    rows = [
        Row(
            epoch=t,
            train_loss=x,
            test_loss=2 * x,
            train_accuracy=1 - x,
            test_accuracy=0.5,
            lr=0.1,
            seconds=1.0,
        )
        for t, x in enumerate(losses, start=1)
    ]
    Log({"config": {}}, rows).write(folder / "log.jsonl")
    return folder


def test_compare_finds_the_largest_difference(tmp_path):
    a, b = write_log(tmp_path / "a", [0.9, 0.5, 0.25]), write_log(tmp_path / "b", [0.9, 0.75, 0.125])
    c = write_log(tmp_path / "c", [0.9, 0.25])
    found = largest_differences(compare.read_runs([a, b / "log.jsonl", c]))
    assert found["train_loss"] == (0.5, 2, ("b", "c")) and found["test_loss"] == (1.0, 2, ("b", "c"))
    assert found["train_accuracy"] == (0.5, 2, ("b", "c")) and found["test_accuracy"][0] == 0
    code, output = run(compare.app, a, b, "--out", tmp_path / "compare.png")
    assert code == 0 and squeeze("test loss 0.5 2 a and b") in output and squeeze("87.50% 50.00%") in output
    assert Image.open(tmp_path / "compare.png").size == (1200, 480)


def test_of_runs_that_are_the_same_none_hides_another(tmp_path):
    """Each has its own colour in both panels, although all of their curves are one."""
    folders = [write_log(tmp_path / name, [0.9, 0.5, 0.25]) for name in ("a", "b", "c")]
    assert run(compare.app, *folders, "--out", tmp_path / "compare.png")[0] == 0
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "compare.png").convert("RGB"))).int()
    curves = pixels[160:]  # below the legends, which have all colours anyhow
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E), (0x2C, 0xA0, 0x2C)):  # matplotlib's first three
        for panel in curves.split(600, dim=1):
            assert ((panel - torch.tensor(colour)).abs().sum(-1) < 30).sum() > 100


def test_compare_rejects_what_it_cannot_compare(tmp_path):
    a = write_log(tmp_path / "a", [0.9])
    cases = [
        ([a], "two or more"),
        ([a, a], "two or more"),
        ([a, tmp_path / "none"], "none cannot be read (No such file or directory); name folders"),
    ]
    for text, word in [
        ("{}\n", "no finished epoch"),
        ("{}\nnope\n", "line 2"),
        ('{}\n{"epoch": 1}\n', "lacks lr"),
    ]:
        (tmp_path / word).write_text(text)
        cases.append(([a, tmp_path / word], word))
    for logs, word in cases:
        code, output = run(compare.app, *logs, "--out", tmp_path / "compare.png")
        assert code == 2 and "LOGS" in output and squeeze(word) in output
    assert not (tmp_path / "compare.png").exists()


def test_compare_keeps_runs_of_one_name_apart(tmp_path):
    runs = compare.read_runs([write_log(tmp_path / side / "run", [0.5]) for side in ("a", "b")])
    assert list(runs) == [str(tmp_path / side / "run" / "log.jsonl") for side in ("a", "b")]
