"""What research.gpu runs: every command that wants a GPU, most telling first."""

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A command, and the folder of its results. ``resumable``: it takes --resume where its folder holds a last.pt.
    The benchmark goes on by itself. ``sanitized``: under torch's CUDA sanitizer, which looks for races of streams.
    ``minutes``: it is stopped after so long, and not started again. ``at_once``: it runs next to so many, itself
    included, of those that are listed beside it."""

    name: str
    command: list[str]
    resumable: bool = False
    sanitized: bool = False
    minutes: float | None = None
    at_once: int = 1


PYTHON = [sys.executable, "-m"]
PYTEST = [*PYTHON, "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=-ra"]
STREAMS = [*PYTEST, "tests/test_gpu.py", "tests/test_replay.py"]
TOY = "--width 32 --heads 2 --tokens 16 --depths 1,2 --batch-sizes 2 --repeats 1".split()
WIDTHS = {
    name: f"--width {width} --heads {heads}".split()
    for name, width, heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12), ("large", 1024, 16))
}


def jobs(device: str, data: Path | None, out: Path, tiny: bool) -> list[Job]:
    """All jobs; those that train on CIFAR-10 only if its data are there."""

    def benchmark(name: str, contenders: str, sizes: list[str], *flags: str) -> Job:
        rest = ["--device", device, "--contenders", contenders, *flags, "--out", str(out / name)]
        return Job(name, [*PYTHON, "research.benchmark", *(TOY if tiny else sizes), *rest])

    def pareprop(name: str, width: str, contenders: str, repeats: int, *flags: str) -> list[Job]:
        sizes = [*WIDTHS[width], *f"--depths 12 --batch-sizes 1,4,16,64,256 --repeats {repeats}".split()]
        precisions: list[tuple[str, list[str]]] = [("", []), ("-amp", ["--amp"])]
        return [benchmark(name + suffix, contenders, sizes, *flags, *amp) for suffix, amp in precisions]

    found = [Job("tests-of-streams", [*STREAMS, "tests/test_captured.py"], minutes=3)]
    ways = "reversible,reversible-exact,pareprop-always,torch-checkpoint"
    for width in ("tiny", "small", "base"):
        found += pareprop(f"pareprop-graphs-{width}", width, ways, 10, *([] if device == "cpu" else ["--graphs"]))
    if data or tiny:
        found += trainings(device, data, out, tiny)
    small = [*WIDTHS["small"], *"--depths 4,12,24,48,64 --batch-sizes 16,64".split()]
    base = [*WIDTHS["base"], *"--depths 4,12,24 --batch-sizes 16,64".split()]
    found += [benchmark("benchmark-small", "all", small), benchmark("benchmark-base", "all", base)]
    if device != "cpu":
        found.append(Job("sanitizer", STREAMS, sanitized=True, minutes=2))
    ways = "reversible,pareprop,pareprop-always,torch-checkpoint"
    for width in WIDTHS:
        found += pareprop(f"pareprop-{width}", width, ways, 20)
    found.append(benchmark("benchmark-small-compiled", "all", small, "--compiled"))
    found.append(benchmark("benchmark-base-compiled", "all", base, "--compiled"))
    found.append(Job("tests", [*PYTEST, "tests/test_laws.py" if tiny else "tests"], minutes=3))
    return found


def trainings(device: str, data: Path | None, out: Path, tiny: bool) -> list[Job]:
    """The runs on CIFAR-10, several at once: each leaves most of a large GPU idle. The same seed all along."""
    amp = ["--amp"]
    runs: dict[str, list[str]] = {
        "minrev-vit-reversible": ["--recipe", "minrev-vit"],
        "minrev-vit-pareprop": ["--recipe", "minrev-vit", "--scheduler", "pareprop"],
        "minrev-mvit": ["--recipe", "minrev-mvit"],
        "tuned-vit": ["--recipe", "tuned-vit"],
        "tuned-mvit": ["--recipe", "tuned-mvit"],
        "minrev-swin": ["--recipe", "minrev-swin"],
        "tuned-swin": ["--recipe", "tuned-swin"],
        "minrev-vit-naive": ["--recipe", "minrev-vit", "--scheduler", "naive"],
        "minrev-vit-exact": ["--recipe", "minrev-vit", "--coupling", "exact"],
        "minrev-plain-vit": ["--recipe", "minrev-vit", "--model", "plain-vit"],
        "minrev-vit-reversible-amp": ["--recipe", "minrev-vit", *amp],
        "minrev-vit-pareprop-amp": ["--recipe", "minrev-vit", "--scheduler", "pareprop", *amp],
        "minrev-vit-naive-amp": ["--recipe", "minrev-vit", "--scheduler", "naive", *amp],
        "minrev-vit-exact-amp": ["--recipe", "minrev-vit", "--coupling", "exact", *amp],
        "minrev-plain-vit-amp": ["--recipe", "minrev-vit", "--model", "plain-vit", *amp],
    }
    source = (
        ["--data-dir", str(data), "--cache-dir", str(data)]
        if data
        else ["--dataset", "digits", "--statistics", "measured"]
    )
    few = "--limit-train 256 --limit-test 64 --epochs 2 --warmup-epochs 0".split() if tiny else []
    fast = ["--no-deterministic", *([] if device == "cpu" else ["--graph"])]
    found = []
    for name, flags in runs.items():
        rest = [*flags, "--device", device, *fast, *source, *few, "--out", str(out / name)]
        found.append(Job(name, [*PYTHON, "research.train", *rest], resumable=True, at_once=5))
    seeds = "2" if tiny else "5"
    study = ["--recipe", "minrev-vit", "--epochs", "30", "--seeds", seeds, "--device", device, *fast, *source, *few]
    found.append(Job("parity-vit", [*PYTHON, "research.parity", *study, "--out", str(out / "parity-vit")]))
    return found
