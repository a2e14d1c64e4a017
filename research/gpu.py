"""Everything that wants a GPU and is not measured yet, most telling first, resumable.

    python -m research.gpu --data cifar10.tar.xz --minutes 9 --out runs/gpu

Run it again to go on: finished jobs are skipped, training and benchmarks resume where they were. What it writes
belongs under research/results/gpu once it is whole. `--device cpu --tiny` rehearses every job in a few minutes.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from research.files import replacing
from research.machine import environment, pick_device

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Job:
    """A command, and the folder of its results. ``resumable``: it takes --resume where its folder holds a last.pt.
    The benchmark goes on by itself. ``sanitized``: under torch's CUDA sanitizer, which looks for races of streams."""

    name: str
    command: list[str]
    resumable: bool = False
    sanitized: bool = False


def jobs(device: str, data: Path | None, out: Path, tiny: bool) -> list[Job]:
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=-ra"]
    streams = [*pytest, "tests/test_gpu.py", "tests/test_replay.py"]
    found = [Job("tests-of-streams", streams)]
    if device != "cpu":
        found.append(Job("sanitizer", streams, sanitized=True))
    toy = "--width 32 --heads 2 --tokens 16 --depths 1,2 --batch-sizes 2 --repeats 1".split()
    ways = "reversible,pareprop,pareprop-always,pareprop-always-at-once,torch-checkpoint"
    for name, width, heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12), ("large", 1024, 16)):
        sizes = f"--width {width} --heads {heads} --depths 12 --batch-sizes 1,4,16,64,256 --repeats 20".split()
        for amp in ([], ["--amp"]):
            flags = ["--device", device, "--contenders", ways, *(toy if tiny else sizes), *amp]
            found.append(Job(f"pareprop-{name}{'-amp' if amp else ''}", [*python, "research.benchmark", *flags]))
    small = "--depths 4,12,24,48,64 --batch-sizes 16,64".split()
    base = "--width 768 --heads 12 --depths 4,12,24 --batch-sizes 16,64".split()
    for name, sizes in (("small", small), ("base", base)):
        for compiled in ([], ["--compiled"]):
            flags = ["--device", device, "--contenders", "all", *(toy if tiny else sizes), *compiled]
            suffix = "-compiled" if compiled else ""
            found.append(Job(f"benchmark-{name}{suffix}", [*python, "research.benchmark", *flags]))
    found.append(Job("tests", [*pytest, "tests/test_laws.py" if tiny else "tests"]))
    source = ["--dataset", "cifar10", "--data-dir", str(data), "--cache-dir", str(data)] if data else []
    few = ["--limit-train", "256", "--limit-test", "64", "--epochs", "2"] if tiny else []
    for amp in (["--amp"], []):
        for scheduler in ("reversible", "naive"):
            name = f"cifar10-vit-{scheduler}{'-amp' if amp else ''}"
            flags = ["--scheduler", scheduler, "--device", device, "--no-deterministic", *amp, *source, *few]
            found.append(Job(name, [*python, "research.train", *flags], resumable=True))
    return [
        j if "pytest" in j.command else replace(j, command=[*j.command, "--out", str(out / j.name)])
        for j in found
        if data or not j.resumable or tiny
    ]


def run(job: Job, folder: Path, seconds: float) -> bool:
    """Run a job for at most so long. -> whether it finished; its output goes to the screen and to output.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    command = job.command
    if job.resumable:
        command = [*command, "--resume" if (folder / "last.pt").exists() else "--overwrite"]
    began = time.perf_counter()
    with (folder / "output.txt").open("a") as log:
        try:
            env = os.environ | ({"TORCH_CUDA_SANITIZER": "1"} if job.sanitized else {})
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, env=env).returncode
        except subprocess.TimeoutExpired:
            return False
    record = {
        "command": command[1:],
        "exit_status": code,
        "seconds": time.perf_counter() - began,
        "environment": environment(pick_device("auto")),
    }
    with replacing(folder / ("failed.json" if code else "done.json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    return True


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for results; carry it from call to call.")] = Path("runs/gpu"),
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as a tar of {train,test}/CLASS/*.jpg.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop after so long; run again to go on.")] = 9.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Rehearse every job at toy sizes.")] = False,
) -> None:
    """Run the jobs that are not done, most telling first."""
    deadline = time.perf_counter() + 60 * minutes
    pick_device(device)
    unpacked = None
    if data is not None:
        if not data.is_file():
            raise typer.BadParameter(f"expected a tar file, {data} is none", param_hint="--data")
        unpacked = Path(tempfile.gettempdir()) / "revlib-cifar10"
        if not unpacked.exists():
            typer.echo(f"unpacking {data}")
            with tarfile.open(data) as tar, tempfile.TemporaryDirectory(dir=unpacked.parent) as fresh:
                tar.extractall(fresh, filter="data")
                (root,) = Path(fresh).iterdir()
                os.rename(root, unpacked)
    for job in jobs(device, unpacked, out, tiny):
        folder, left = out / job.name, deadline - time.perf_counter()
        if (folder / "done.json").exists():
            typer.echo(f"{job.name}: done before")
        elif left < 20:
            typer.echo(f"{job.name}: not started, time is up")
        elif run(job, folder, left):
            failed = "" if (folder / "done.json").exists() else "FAILED, "
            typer.echo(f"{job.name}: {failed}see {folder}/output.txt")
        else:
            typer.echo(f"{job.name}: time is up; run this again to go on")
    typer.echo(f"torch {torch.__version__}; results in {out}")


if __name__ == "__main__":
    app()
