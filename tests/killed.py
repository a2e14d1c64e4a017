"""Trains, and kills itself with SIGKILL at the n-th moment of writing the second epoch; run by test_killed.py.

Called with a folder, a number and the flags of a run. It imports once, and forks a process for each moment, or for one
in so many, until one run ends without having met its moment. It prints the moments that were met.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from research import train
from research.training import checkpoint
from research.training.log import Log

# What the operating system is asked for while files are written, by the names of Python's audit events.
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree", "os.truncate"}


def run(*args: str) -> None:
    result = CliRunner().invoke(train.app, list(args))
    if result.exit_code:
        raise SystemExit(result.output)


def child(moment: int, folder: Path, args: list[str]) -> None:
    """Do not come back from the moment; write a half of the checkpoint too, and die there."""
    seen, armed = 0, False

    def passing() -> None:
        nonlocal seen
        if armed:
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    def audited(event: str, details: Any) -> None:
        if event in EVENTS and (event != "open" or str(folder) in str(details[0])):
            passing()

    original_save, original_write = torch.save, checkpoint.save

    def in_halves(value: Any, path: Path) -> None:
        original_save(value, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        passing()
        path.write_bytes(whole)

    def second(path: Path, state: Any, log: Any) -> None:
        original_write(path, state, log)
        passing()

    original_append = Log.append

    def append(log: Any, row: Any, path: Path) -> None:
        nonlocal armed
        armed = row["epoch"] == 2
        original_append(log, row, path)

    torch.save, checkpoint.save, Log.append = in_halves, second, append  # type: ignore[method-assign]
    sys.addaudithook(audited)
    run("--out", str(folder), *args)


def main() -> None:
    folder, every, args = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    for moment in range(1, 200, every):
        mine = folder / str(moment)
        process = os.fork()
        if process == 0:
            child(moment, mine, args)
            os._exit(0)
        status = os.waitpid(process, 0)[1]
        if not os.WIFSIGNALED(status):
            if status:
                raise SystemExit(status)
            print(*range(1, moment, every))
            return
        process = os.fork()
        if process == 0:
            run("--out", str(mine), *args, "--resume")
            os._exit(0)
        if os.waitpid(process, 0)[1]:
            raise SystemExit(f"could not be resumed after moment {moment}")


main()
