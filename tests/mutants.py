"""A mutation check: break the library on purpose, one line at a time, and see that a test fails.

    python -m tests.mutants                 every mutant, two at a time; a minute or so each
    python -m tests.mutants --only tape     those of files or reasons that contain the word
    python -m tests.mutants --jobs 1

A mutant that no test notices survives. It is named at the end, and the command fails. Either a test is missing, or the
line does nothing. To add a mutant, add it to ``MUTANTS``; ``test_mutants.py`` sees that each still fits its file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = ("tests/test_laws.py", "tests/test_exact.py", "tests/test_regressions.py", "tests/test_situations.py")
SECONDS = 600  # A mutant that runs longer than this hangs, which also counts as noticed.


@dataclass(frozen=True)
class Mutant:
    """One change of one file: ``before``, which the file contains exactly once, becomes ``after``."""

    file: str
    before: str
    after: str
    breaks: str  # what the change breaks, in a few words
    tests: tuple[str, ...] = CORE  # in which a test must fail, the quickest first

    def __str__(self) -> str:
        return f"{self.file}: {self.breaks}"


COUPLINGS = ("tests/test_laws.py", "tests/test_couplings.py", "tests/test_exact.py")
SCHEDULERS = ("tests/test_schedulers.py",)
MUTANTS = [
    Mutant("revlib/couplings/additive.py", "return merged - f\n", "return merged + f\n", "inversion", COUPLINGS),
    Mutant("revlib/couplings/additive.py", ".round_(), alpha", ".floor_(), alpha", "rounding to the grid", COUPLINGS),
    Mutant(
        "revlib/couplings/additive.py",
        "(gradient if ctx.sign > 0 else -gradient)",
        "gradient",
        "the gradient of the exact inverse",
        COUPLINGS,
    ),
    Mutant(
        "revlib/couplings/family.py",
        "return (merged - shift) / self._scale(log_scale)",
        "return merged / self._scale(log_scale) - shift",
        "inversion of the affine coupling",
        COUPLINGS,
    ),
    Mutant(
        "revlib/couplings/family.py",
        "return s if self.keep == 1 else s / self.keep",
        "return s",
        "inversion of the scaled coupling",
        COUPLINGS,
    ),
    Mutant(
        "revlib/schedulers/plans.py",
        "return Plan(states=[*range(self.every, length, self.every), length])",
        "return Plan(states=[length])",
        "the anchors of Anchored",
        SCHEDULERS,
    ),
    Mutant(
        "revlib/schedulers/plans.py",
        "streams=range(length - 1, -1, -self.every)",
        "streams=range(length - 2, -1, -self.every)",
        "which streams Checkpoint keeps",
        SCHEDULERS,
    ),
]


def survives(mutant: Mutant | None) -> bool:
    """Whether the mutant's tests pass; without a mutant, whether the quickest do with nothing broken."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("revlib", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "research").symlink_to(ROOT / "research")
        if mutant is not None:
            file = copy / mutant.file
            file.write_text(file.read_text().replace(mutant.before, mutant.after))
        return all(_passes(test, copy) for test in (CORE[:1] if mutant is None else mutant.tests))


def _passes(test: str, copy: Path) -> bool:
    # The path puts the copy before the checkout, which may be installed in editable mode.
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", test]
    try:
        ended = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=SECONDS, text=True)
    except subprocess.TimeoutExpired:
        return False
    if ended.returncode not in (0, 1, 2):  # passed; a test failed; a file of tests could not be imported
        raise RuntimeError(f"{test} was not run: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return ended.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a word of the file or of what the mutant breaks")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if arguments.only in str(m)]
    if not survives(None):
        print(f"{CORE[0]} fails without any mutant; repair that first")
        return 2
    survivors = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutant, alive in zip(chosen, pool.map(survives, chosen), strict=True):
            print("survived" if alive else "noticed ", mutant, flush=True)
            survivors += [mutant] * alive
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants noticed; survivors:")
    for mutant in survivors:
        print(f"  {mutant}\n    - {mutant.before.strip()}\n    + {mutant.after.strip()}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
