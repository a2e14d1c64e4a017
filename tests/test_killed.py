"""What is left of a run that was killed, or could not write: everything but the epoch under way."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_train
import torch
from research_cases import read
from test_train import TINY, assert_identical, run, saved, squeeze, timeless, train_tiny

from research import train
from research.shared import files
from research.training import checkpoint, loop, plots
from research.training.log import Log, duration

_leave_no_trace = test_train._leave_no_trace  # of the training script


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_killed_at_any_moment_of_saving_it_goes_on_bit_for_bit(tmp_path, every):
    straight = train_tiny(tmp_path / "straight", "--epochs", 3)
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path / "killed"), str(every)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent.parent)}
    done = subprocess.run(
        [*command, *map(str, TINY), "--epochs", "3"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    moments = [int(moment) for moment in done.stdout.splitlines()[-1].split()]
    assert len(moments) >= 8 / every  # opening, moving and removing of three files, and half a checkpoint
    names = {"log.jsonl", "curve.png", "last.pt"}
    after_epoch = set()
    for moment in moments:
        folder = tmp_path / "killed" / str(moment)
        log = read(folder)
        assert timeless(log) == timeless(straight), moment
        assert_identical(saved(folder)["run"], saved(tmp_path / "straight")["run"])
        assert {file.name for file in folder.iterdir()} == names, moment
        after_epoch |= set(log.resumed)
    assert after_epoch == {1, 2}  # killed before the second was saved, and after


@pytest.mark.some(1)
@pytest.mark.parametrize("place", [(torch, "save"), (checkpoint, "save"), (Log, "write")], ids=str)
def test_a_full_disk_ends_the_run_with_what_it_has(tmp_path, monkeypatch, place):
    straight = train_tiny(tmp_path / "straight", "--epochs", 3)
    original, full = getattr(*place), []

    def write(*args: Any) -> Any:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    def evaluate(*args: Any) -> Any:
        epochs.append(0)
        full.extend([0] * (len(epochs) == 2))
        return evaluated(*args)

    epochs, evaluated = [], loop.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(*place, write)
        patch.setattr(loop, "evaluate", evaluate)
        code, output = run(train.app, *TINY, "--out", tmp_path / "full", "--epochs", 3)
    assert code == 1 and squeeze("epoch 2 could not be written") in output and "--resume" in output, output
    assert len(saved(tmp_path / "full")["log"]["rows"]) == 1
    resumed = train_tiny(tmp_path / "full", "--epochs", 3, "--resume")
    assert timeless(resumed) == timeless(straight)
    assert_identical(saved(tmp_path / "full")["run"], saved(tmp_path / "straight")["run"])


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path, monkeypatch):
    def trained(*args: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(loop, "train_epoch", trained)
    code, output = run(train.app, *TINY, "--out", "/proc/revlib", "--epochs", 1)
    assert code == 2 and "--out" in output and squeeze("/proc/revlib is none") in output
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    code, output = run(train.app, *TINY, "--out", tmp_path / "run", "--epochs", 1)
    assert code == 2 and "--out" in output and squeeze("1,000 are free") in output
    assert not list((tmp_path / "run").iterdir())


def test_what_is_left_of_a_killed_save_goes(tmp_path):
    train_tiny(tmp_path, "--epochs", 2, "--stop-after", 1)
    for name in (".123-last.pt", ".7-curve.png", ".notes-last.pt", ".7-mine.txt"):
        (tmp_path / name).write_bytes(b"half")
    train_tiny(tmp_path, "--epochs", 2, "--resume")
    found = {file.name for file in tmp_path.iterdir()}
    assert found == {"log.jsonl", "curve.png", "last.pt", ".notes-last.pt", ".7-mine.txt"}


def test_the_line_of_an_epoch_tells_speed_and_time_left(tmp_path):
    code, output = run(train.app, *TINY, "--out", tmp_path, "--epochs", 3)
    assert code == 0 and output.count("images/s") == 3 and output.count("left") == 2
    assert [duration(seconds) for seconds in (5.4, 125, 7500)] == ["5 s", "2 min 05 s", "2 h 05 min"]


def test_the_curve_marks_where_a_run_was_resumed(tmp_path, monkeypatch):
    marks: list[Any] = []
    original = plots.draw_curves
    monkeypatch.setattr(loop, "draw_curves", lambda runs, path, resumed: marks.append(list(resumed)))
    train_tiny(tmp_path, "--epochs", 3, "--stop-after", 1)
    train_tiny(tmp_path, "--epochs", 3, "--resume")
    train_tiny(tmp_path, "--epochs", 3, "--resume")  # of a finished run, which goes on nowhere
    assert marks == [[], [1], [1]] and read(tmp_path).resumed == [1]
    pictures = []
    for resumed in ([], [1]):
        original({"run": read(tmp_path).rows}, tmp_path / "curve.png", resumed)
        pictures.append((tmp_path / "curve.png").read_bytes())
    assert pictures[0] != pictures[1]
