"""Everything that wants a GPU and is not measured yet, most telling first, resumable.

    python -m research.gpu --data cifar10.tar.xz --minutes 9 --out runs/gpu
    python -m research.gpu --data cifar10.tar.xz --list
    python -m research.gpu --only tests-of-streams,pareprop-graphs-small

Run it again to go on: finished jobs are skipped, training and benchmarks resume where they were. What it writes
belongs under research/results/gpu once it is whole. `--device cpu --tiny` rehearses every job in a few minutes.
The runs on CIFAR-10 share the GPU, so their seconds tell nothing.
"""

import json
import math
import os
import subprocess
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer

from research.data.readers import cifar10
from research.shared.files import replacing
from research.shared.machine import environment, pick_device
from research.studies.jobs import Job, jobs

app = typer.Typer(add_completion=False)


def run(job: Job, folder: Path, left: float) -> str:
    """Run a job for as long as it may run, and no longer than the time that is ``left``. Returns what became of it; its
    output is in output.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    command = job.command
    if job.resumable:
        command = [*command, "--resume" if (folder / "last.pt").exists() else "--overwrite"]
    limit = min(left, 60 * (job.minutes or math.inf))
    began = time.perf_counter()
    with (folder / "output.txt").open("a") as log:
        try:
            env = os.environ | ({"TORCH_CUDA_SANITIZER": "1"} if job.sanitized else {})
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, env=env).returncode
        except subprocess.TimeoutExpired:
            if limit == left:
                return "time is up; run this again to go on"
            code = None
    record = {
        "command": command[1:],
        "exit_status": code,
        "seconds": time.perf_counter() - began,
        "environment": environment(pick_device("auto")),
    }
    end = "stopped" if code is None else "failed" if code else "done"
    with replacing(folder / f"{end}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    return f"{end}, see {folder}/output.txt"


def ended(folder: Path) -> str | None:
    """How a job ended that is not to be started again."""
    return next((end for end in ("done", "stopped") if (folder / f"{end}.json").exists()), None)


def choose(found: list[Job], only: str) -> list[Job]:
    """The jobs that a flag names, in their own order."""
    names = only.split(",")
    if unknown := set(names) - {job.name for job in found}:
        raise typer.BadParameter(
            f"expected some of {', '.join(job.name for job in found)} (all trainings want --data); "
            f"got {', '.join(sorted(unknown))}",
            param_hint="--only",
        )
    return [job for job in found if job.name in names]


def unpack(data: Path) -> Path:
    """The folder of the tar's images."""
    if not data.is_file():
        raise typer.BadParameter(f"expected a tar file, {data} is none", param_hint="--data")
    unpacked = Path(tempfile.gettempdir()) / "revlib-cifar10"
    if not unpacked.exists():
        typer.echo(f"unpacking {data}")
        with tarfile.open(data) as tar, tempfile.TemporaryDirectory(dir=unpacked.parent) as fresh:
            tar.extractall(fresh, filter="data")
            (root,) = Path(fresh).iterdir()
            os.rename(root, unpacked)
    return unpacked


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for results; carry it from call to call.")] = Path("runs/gpu"),
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as a tar of {train,test}/CLASS/*.jpg.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop after so long; run again to go on.")] = 9.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Rehearse every job at toy sizes.")] = False,
    only: Annotated[str | None, typer.Option(help="Names of jobs, comma-separated, instead of all.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the jobs, and run none.")] = False,
) -> None:
    """Run the jobs that are not done, most telling first."""
    deadline = time.perf_counter() + 60 * minutes
    if not list_:
        pick_device(device)
    unpacked = None if data is None else data if list_ else unpack(data)
    chosen = jobs(device, unpacked, out, tiny)
    chosen = chosen if only is None else choose(chosen, only)
    if list_:
        return typer.echo("\n".join(f"{job.name}: {ended(out / job.name) or 'to do'}" for job in chosen))
    todo = [job for job in chosen if not ended(out / job.name)]

    def attempt(job: Job) -> None:
        left = deadline - time.perf_counter()
        result = run(job, out / job.name, left) if left > 20 else "not started, time is up"
        typer.echo(f"{job.name}: {result}")

    for at_once, group in groupby(todo, key=lambda job: job.at_once):
        if at_once > 1 and unpacked is not None and time.perf_counter() < deadline - 20:
            cifar10(unpacked, unpacked)  # this decodes the images once, and all runs find the result
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(attempt, group))
    typer.echo(f"{len(chosen) - len(todo)} jobs were done before; torch {torch.__version__}; results in {out}")


if __name__ == "__main__":
    app()
