"""Images of one's own: read from disk or held in memory, with files that are broken, interrupted and resumed."""

import dataclasses
import gc
import itertools
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest
import test_train
import torch
import typer
from PIL import Image
from test_train import TINY, assert_identical, run, saved, squeeze, timeless, train_tiny

from research import train
from research.data import decoding, folders, streamed
from research.data.augment import Moves
from research.data.batches import Batches
from research.data.decoding import CORRUPT, Refuse, Skip
from research.data.streamed import Reading, Streamed
from research.training import loop
from revlib.testing import LiveBytes

_leave_no_trace = test_train._leave_no_trace  # of the training script

MOVES = Moves(padding=2, flip=True, magnitude=9)


def pictures(root: Path, each: int = 10, classes: tuple[str, ...] = ("ash", "elm", "oak"), side: int = 16) -> Path:
    """Noise about a level of each class; of several sizes."""
    draws = torch.Generator().manual_seed(0)
    for level, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = torch.randint(60, (side + number % 3, side, 3), generator=draws) + 80 * level
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / name / f"{number}.png")
    return root


def both(root: Path, cache: Path, **reading: Any) -> tuple[Any, Any]:
    """The same images, in memory and on disk."""
    found = [folders.folder(root, cache, 16, Reading(above, **reading)) for above in (float("inf"), 0)]
    assert [isinstance(data.train, Streamed) for data in found] == [False, True]
    return found[0], found[1]


def everything(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def spoil(root: Path) -> dict[str, bytes]:
    """Break files in the ways that they break. -> what was in them."""
    whole = (root / "elm" / "3.png").read_bytes()
    broken = {"ash/2.png": b"", "ash/5.png": b"no picture", "elm/3.png": whole[: len(whole) // 2],
              "oak/7.png": whole[:30] + bytes(40) + whole[70:]}  # fmt: skip
    kept = {name: (root / name).read_bytes() for name in broken}
    for name, content in broken.items():
        (root / name).write_bytes(content)
    return kept


# Reading


@pytest.mark.parametrize("workers", [0, 2])
def test_images_on_disk_are_those_in_memory(tmp_path, workers):
    memory, disk = both(pictures(tmp_path / "trees"), tmp_path / "cache", workers=workers)
    assert disk.classes == memory.classes == ["ash", "elm", "oak"]
    assert disk.train.shape == memory.train.shape == (3, 16, 16) and len(disk.train) == len(memory.train) == 24
    assert disk.held_out == memory.held_out and len(disk.held_out) == len(disk.test) == 6
    for theirs, ours in (
        (memory.train, disk.train),
        (memory.test, disk.test),
        (memory.test.take(4), disk.test.take(4)),
    ):
        for want, got in zip(everything(theirs.ordered(5)), everything(ours.ordered(5)), strict=True):
            assert torch.equal(got, want)
    for want, got in zip(memory.train.measured(), disk.train.measured(), strict=True):
        torch.testing.assert_close(got, want)
    assert [tuple(images.shape) for images, _ in disk.train.ordered(10)] == [(10, 3, 16, 16)] * 2 + [(4, 3, 16, 16)]


def test_neither_the_workers_nor_torchs_own_numbers_change_what_is_drawn(tmp_path):
    root, found = pictures(tmp_path / "trees"), []
    for workers, outside in ((0, 0), (0, 1), (1, 0), (2, 0)):
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        split = both(root, tmp_path / "cache", workers=workers)[1].train
        found.append(everything(split.shuffled(7, torch.Generator().manual_seed(5), MOVES)))
        assert torch.equal(torch.get_rng_state(), before)  # dropout goes on as if nothing had been read
    for images, labels in found[1:]:
        assert torch.equal(images, found[0][0]) and torch.equal(labels, found[0][1])


def test_an_epoch_visits_every_image_once_and_moves_it_anew(tmp_path):
    split = both(pictures(tmp_path / "trees"), tmp_path / "cache", workers=0)[1].train
    draws, still = torch.Generator().manual_seed(0), Moves(0, False)
    first, second = (everything(split.shuffled(7, draws, still)) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    want = everything(split.ordered(7))[0].flatten(1).unique(dim=0)
    for images, labels in (first, second):
        assert torch.equal(images.flatten(1).unique(dim=0), want) and labels.bincount().tolist() == [8, 8, 8]
        assert (images.float().mean((1, 2, 3)).sub(29.5 + 80 * labels).abs() < 9).all()  # each keeps its label
    moved = everything(split.shuffled(7, draws, Moves(4, True)))[0]
    assert ((moved == 0).all(1).flatten(1).sum(1) > 0).float().mean() > 0.5  # black comes in


def test_the_numbers_are_normalised_by_what_was_measured(tmp_path):
    disk = both(pictures(tmp_path / "trees"), tmp_path / "cache", workers=0)[1]
    batches = Batches(disk, 8)
    pixels = torch.cat([batches.normalize(images) for images, _ in disk.train.ordered(8)])
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)


def test_colours_are_measured_on_some_of_many_images(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "MEASURED", 6)
    split = both(pictures(tmp_path / "trees"), tmp_path / "cache", workers=0)[1].train
    some = everything(split.take(6).ordered(6))[0].float().div(255)
    torch.testing.assert_close(split.measured()[0], some.mean((0, 2, 3)))
    torch.testing.assert_close(split.measured()[0], split.measured()[0])


def held(root: Path) -> tuple[int, int]:
    """Most bytes of tensors, and of Python's own objects, while the images are found, measured and read once."""
    # The notes of what measures, of LiveBytes on tensors and of tracemalloc, do not count.
    most, measures = 0, [tracemalloc.Filter(False, module.__file__) for module in (weakref, tracemalloc)]
    tracemalloc.start()
    with LiveBytes([]) as live:
        data = folders.folder(root, root, 16, Reading(0, workers=0))
        batches = itertools.chain([None], Batches(data, 8).train(torch.Generator().manual_seed(0), ""))
        for _ in itertools.islice(batches, 0, None, 7):  # The first before any image is read.
            gc.collect()  # What waits for the collector depends on what has run in this process before.
            traces = tracemalloc.take_snapshot().filter_traces(measures).traces
            most = max(most, sum(trace.size for trace in traces))
    tracemalloc.stop()
    return live.peak, most


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """In memory, 240 more images of 768 bytes would be 184,320 bytes, several times over while they are moved."""
    held(pictures(tmp_path / "warm-up", 4))
    few, many = (held(pictures(tmp_path / str(each), each)) for each in (40, 120))
    images = 3 * (120 - 40)
    assert many[0] - few[0] <= 40 * images, "tensors: numbers of files and seeds, of 8 bytes each"
    assert many[1] - few[1] <= 600 * images, "paths"


@pytest.mark.parametrize(("above", "on_disk"), [(30 * 768 - 1, True), (30 * 768, False)])
def test_the_size_above_which_images_stay_on_disk(tmp_path, above, on_disk):
    data = folders.folder(pictures(tmp_path / "trees"), tmp_path / "cache", 16, Reading(above))
    assert isinstance(data.train, Streamed) == isinstance(data.test, Streamed) == on_disk
    assert (tmp_path / "cache").exists() != on_disk  # nothing decoded is kept there


def test_folders_for_training_and_testing_may_stay_on_disk(tmp_path):
    for name, each in (("train", 4), ("val", 2)):
        pictures(tmp_path / "trees" / name, each)
    memory, disk = both(tmp_path / "trees", tmp_path / "cache", workers=0)
    assert (len(disk.train), len(disk.test), disk.held_out) == (12, 6, []) and "train and val" in disk.origin
    assert torch.equal(everything(disk.test.ordered(3))[0], everything(memory.test.ordered(3))[0])


# Broken files


def test_every_kind_of_broken_file_is_found(tmp_path):
    root = pictures(tmp_path / "trees")
    names = spoil(root)
    for data in (tmp_path / "cache", None):
        said: list[str] = []
        reading = Reading(float("inf") if data else 0, 0, Skip(said.append))
        found = folders.folder(root, tmp_path / "cache", 16, reading)
        labels = torch.cat([everything(split.ordered(8))[1] for split in (found.train, found.test)])
        assert labels.bincount().tolist() == [8, 9, 9]
        assert len(said) == 4 and all(any(f"{root / name}: it is not" in line for line in said) for name in names)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_refused_by_name(tmp_path, workers):
    root = pictures(tmp_path / "trees")
    (root / "oak" / "7.png").write_bytes(b"no picture")
    data = folders.folder(root, tmp_path / "cache", 16, Reading(0, workers, Refuse()))
    with pytest.raises(typer.BadParameter, match=r"oak/7.png is not an image .* --corrupt skip"):
        everything(data.train.ordered(4)), everything(data.test.ordered(4))
    with pytest.raises(typer.BadParameter, match=r"oak/7.png is not an image"):
        folders.folder(root, tmp_path / "cache", 16, Reading(corrupt=Refuse()))


def test_what_was_skipped_is_named_again_from_the_cache_and_refused_without_the_flag(tmp_path):
    root, said = pictures(tmp_path / "trees"), list[str]()
    (root / "oak" / "7.png").write_bytes(b"no picture")
    for _ in range(2):
        data = folders.folder(root, tmp_path / "cache", 16, Reading(corrupt=Skip(said.append)))
        assert len(data.train) + len(data.test) == 29 and "oak/7.png" not in data.held_out
    assert len(said) == 2 and len(list((tmp_path / "cache").iterdir())) == 1
    with pytest.raises(typer.BadParameter, match=r"oak/7.png is not an image"):
        folders.folder(root, tmp_path / "cache", 16, Reading(corrupt=Refuse()))


def test_a_batch_of_broken_files_alone_is_left_out(tmp_path):
    root, said = pictures(tmp_path / "trees", 2), list[str]()
    for number in range(2):
        (root / "ash" / f"{number}.png").write_bytes(b"")
    tree = folders.find_classes(root)
    split = folders.on_disk(tree, 16, Reading(0, 0, Skip(said.append)))[0]
    assert [labels.tolist() for _, labels in split.ordered(2)] == [[1, 1], [2, 2]] and len(said) == 2
    for _ in split.ordered(2):
        pass
    assert len(said) == 2  # each is named once a run


def test_hidden_folders_are_no_classes(tmp_path):
    root = pictures(tmp_path / "trees", 2)
    want = folders.find_classes(root).samples
    (root / ".ipynb_checkpoints").mkdir()
    (root / ".thumbnails").mkdir()
    Image.open(root / "oak" / "0.png").save(root / ".thumbnails" / "0.png")
    tree = folders.find_classes(root)
    assert tree.classes == ["ash", "elm", "oak"] and tree.samples == want
    (tmp_path / "other" / ".thumbnails").mkdir(parents=True)
    with pytest.raises(typer.BadParameter, match=r"find any class folder in .*; found .thumbnails\. Sort the images"):
        folders.find_classes(tmp_path / "other")


def test_no_readable_image_is_an_error(tmp_path):
    root = pictures(tmp_path / "trees", 2)
    for file in root.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(typer.BadParameter, match="no file below"):
        folders.folder(root, tmp_path / "cache", 16, Reading(corrupt=Skip(lambda line: None)))


def test_names_of_what_to_do_with_broken_files():
    assert {name: make().__class__ for name, make in CORRUPT.items()} == {"refuse": Refuse, "skip": Skip}
    assert decoding.CorruptName.__args__ == tuple(CORRUPT)


# Training


def folder_args(tmp_path: Path, *more: Any) -> list[Any]:
    root = tmp_path / "trees"
    if not root.exists():
        pictures(root)
    return ["--dataset", "folder", "--data-dir", root, "--image-size", 16, "--cache-dir", tmp_path / "cache",
            "--batch-size", 8, "--stream-above", 0, *more]  # fmt: skip


@pytest.mark.some(1)
@pytest.mark.parametrize("workers", [0, 2])
def test_stopping_and_resuming_changes_no_bit(tmp_path, workers):
    """Another number of workers afterwards, too, changes none."""
    args = [*folder_args(tmp_path), "--epochs", 3, "--rand-augment", 9, "--mixup", 0.8, "--ema", 0.9]
    straight = train_tiny(tmp_path / "straight", *args, "--workers", 0)
    train_tiny(tmp_path / "halves", *args, "--workers", workers, "--stop-after", 1)
    resumed = train_tiny(tmp_path / "halves", *args, "--workers", 2 - workers, "--resume")
    assert timeless(resumed) == timeless(straight) and len(straight.rows) == 3
    assert_identical(saved(tmp_path / "halves")["run"], saved(tmp_path / "straight")["run"])
    assert straight.rows[-1]["train_loss"] != straight.rows[0]["train_loss"]


@pytest.mark.some(1)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_interrupted_in_the_middle_is_done_again_bit_for_bit(tmp_path, monkeypatch, workers):
    args = [*folder_args(tmp_path), "--epochs", 2, "--workers", workers]
    straight = train_tiny(tmp_path / "straight", *args)
    original, calls = loop.score, []

    def interrupted(*given: Any) -> torch.Tensor:
        calls.append(0)
        if len(calls) == 7:  # of 3 steps and a test of each epoch: the third step of the second
            raise KeyboardInterrupt
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "score", interrupted)
        code, output = run(train.app, *TINY, "--out", tmp_path / "cut", *args)
    assert code == 130 and squeeze("add --resume") in output and len(saved(tmp_path / "cut")["log"]["rows"]) == 1
    resumed = train_tiny(tmp_path / "cut", *args, "--resume")
    assert timeless(resumed) == timeless(straight)
    assert_identical(saved(tmp_path / "cut")["run"], saved(tmp_path / "straight")["run"])


def test_a_file_that_breaks_ends_the_run_which_goes_on_once_it_is_repaired(tmp_path):
    args = [*folder_args(tmp_path), "--epochs", 2, "--workers", 2]
    straight = train_tiny(tmp_path / "straight", *args)
    train_tiny(tmp_path / "cut", *args, "--stop-after", 1)
    kept = spoil(tmp_path / "trees")
    code, output = run(train.app, *TINY, "--out", tmp_path / "cut", *args, "--resume")
    assert code == 2 and "isnotanimage" in output and squeeze("--corrupt skip") in output
    for name, content in kept.items():
        (tmp_path / "trees" / name).write_bytes(content)
    resumed = train_tiny(tmp_path / "cut", *args, "--resume")
    assert timeless(resumed) == timeless(straight)
    assert_identical(saved(tmp_path / "cut")["run"], saved(tmp_path / "straight")["run"])


@pytest.mark.parametrize("above", [0, 2])
def test_a_run_that_skips_broken_files_names_each_once(tmp_path, above):
    args = [*folder_args(tmp_path), "--stream-above", above, "--corrupt", "skip", "--epochs", 2]
    names = spoil(tmp_path / "trees")
    code, output = run(train.app, *TINY, "--out", tmp_path / "run", *args)
    assert code == 0 and output.count("skipped") == 4, output
    assert all(squeeze(f"skipped {tmp_path / 'trees' / name}") in output for name in names)
    assert squeeze("2 of 2 epochs done") in output


def test_the_log_and_the_checkpoint_hold_classes_sizes_normalisation_and_the_split(tmp_path):
    log = train_tiny(tmp_path / "run", *folder_args(tmp_path), "--epochs", 1)
    told = log.header["data"]
    assert told == saved(tmp_path / "run")["log"]["header"]["data"]
    assert (told["classes"], told["channels"], told["image_size"]) == (["ash", "elm", "oak"], 3, 16)
    assert (told["train"], told["test"], told["streamed"]) == (24, 6, True)
    data = folders.folder(tmp_path / "trees", tmp_path / "cache", 16)
    mean, std = data.train.measured()
    assert told["mean"] == pytest.approx(mean.tolist()) and told["std"] == pytest.approx(std.tolist())
    assert told["held_out"] == data.held_out and len(told["held_out"]) == 6 and "fifth" in told["split"]
    levels = {name: level for level, name in enumerate(told["classes"])}
    got = {tuple(Image.open(tmp_path / "trees" / name).size) for name in told["held_out"]}
    assert got and data.test.labels.tolist() == [levels[name.split("/")[0]] for name in told["held_out"]]


def test_a_run_is_not_resumed_with_other_images(tmp_path):
    args = [*folder_args(tmp_path), "--epochs", 3]
    train_tiny(tmp_path / "run", *args, "--stop-after", 1)

    def resumed(*more: Any) -> tuple[int, str]:
        return run(train.app, *TINY, "--out", tmp_path / "run", *args, *more, "--resume", "--stop-after", 1)

    code, output = resumed("--stream-above", 2)
    assert code == 2 and "--stream-above" in output and squeeze("read from disk, and with this call") in output
    (tmp_path / "trees" / "oak" / "11.png").write_bytes((tmp_path / "trees" / "oak" / "1.png").read_bytes())
    code, output = resumed()
    assert code == 0 and squeeze("note: train of the images is 25, was 24: not bit for bit") in output, output
    (tmp_path / "trees" / "oak").rename(tmp_path / "trees" / "yew")
    code, output = resumed()
    assert code == 2 and "--data-dir" in output and squeeze("there are now ash, elm, yew") in output


def test_a_checkpoint_from_before_goes_on_and_then_tells(tmp_path):
    args = [*folder_args(tmp_path), "--stream-above", 2, "--epochs", 2]
    straight = train_tiny(tmp_path / "straight", *args)
    train_tiny(tmp_path / "old", *args, "--stop-after", 1)
    state = saved(tmp_path / "old")
    del state["log"]["header"]["data"]
    for name in ("stream_above", "workers", "corrupt"):
        del state["log"]["header"]["config"][name]
    torch.save(state, tmp_path / "old" / "last.pt")
    code, output = run(train.app, *TINY, "--out", tmp_path / "old", *args, "--stream-above", 0, "--resume")
    assert code == 2 and squeeze("has its images held in memory") in output
    assert timeless(train_tiny(tmp_path / "old", *args, "--resume")) == timeless(straight)
    assert saved(tmp_path / "old")["log"]["header"]["data"] == straight.header["data"]


@pytest.mark.parametrize("args", [["--stream-above", 1], ["--corrupt", "skip"]])
def test_flags_of_ones_own_images_are_for_these(tmp_path, args):
    code, output = run(train.app, *TINY, "--out", tmp_path, *args)
    assert code == 2 and args[0] in output and squeeze("choose --dataset folder") in output


def test_a_progress_bar_counts_the_batches(tmp_path, monkeypatch):
    seen: list[tuple[str, int]] = []

    def bar(pairs: Any, desc: str, total: int, **rest: Any) -> Any:
        seen.append((desc, total))
        return pairs

    monkeypatch.setattr("research.data.batches.tqdm", bar)
    train_tiny(tmp_path / "run", *folder_args(tmp_path), "--epochs", 1, "--workers", 0)
    assert seen == [("epoch 1/1 train", 3), ("epoch 1/1 test", 1)]


def test_reading_is_a_value():
    assert dataclasses.replace(Reading(), workers=5).workers == 5 and Reading().above == float("inf")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Each decodes every batch, and takes its part of it."""
    args = folder_args(tmp_path, "--epochs", 2, "--drop-path", 0, "--rand-augment", 9, "--corrupt", "skip")
    spoil(tmp_path / "trees")
    alone = train_tiny(tmp_path / "alone", *args)
    code, output = test_train.torchrun(tmp_path / "both", *args)
    assert code == 0, output
    for a, b in zip(alone.rows, test_train.read_log(tmp_path / "both" / "log.jsonl").rows, strict=True):
        for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)
