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
from collections.abc import Sequence
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
GRAPH = ("tests/test_autograd.py", "tests/test_regressions.py", "tests/test_laws.py", "tests/test_situations.py")
LIFETIME = ("tests/test_lifetime.py",)
MISUSE = ("tests/test_misuse.py", "tests/test_regressions.py", "tests/test_guards.py", "tests/test_situations.py")
REPLAY = ("tests/test_replay.py", "tests/test_modes.py", "tests/test_situations.py")
BIJECTIONS = ("tests/test_bijections.py",)
STATE = ("tests/test_kinds_state.py", "tests/test_kinds_reach.py")

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
    Mutant(
        "revlib/schedulers/budget.py", "free = self.bytes - sum(least)", "free = self.bytes", "a budget", SCHEDULERS
    ),
    Mutant(
        "revlib/guards/measure.py",
        "                counted.add(storage)\n",
        "",
        "what is saved twice counts once",
        SCHEDULERS,
    ),
    Mutant(
        "revlib/core/tape.py",
        "self.kept.holds(numbers)\n",
        "k in self.plan.streams\n",
        "the streams of a kept state",
        SCHEDULERS,
    ),
    Mutant(
        "revlib/core/tape.py",
        "self.kept.holds(numbers)\n",
        "False\n",
        "a kept stream spares the inversion",
        SCHEDULERS,
    ),
    Mutant(
        "revlib/core/tape.py",
        "repeated = dropped or (self.needed_below and not kept)",
        "repeated = dropped",
        "a step whose activations are kept is undone where a lower one needs it",
        GRAPH,
    ),
    Mutant(
        "revlib/core/tape.py",
        "                        node.register_prehook(partial(_before_gradient, weakref.ref(self), k))\n",
        "                        pass\n",
        "recovery before any gradient, and so before an optimizer inside backward",
        GRAPH,
    ),
    Mutant(
        "revlib/core/tape.py",
        "self._empty(key, progress.recovered - {k})",
        "pass",
        "one step at a time under retain_graph",
        LIFETIME,
    ),
    Mutant(
        "revlib/core/tape.py",
        "            self.records, progress.state = [], ()\n",
        "            pass\n",
        "letting go of the modules after backward",
        LIFETIME,
    ),
    Mutant(
        "revlib/core/saved_tensors.py",
        "if version >= 0 and version_of(tensor) != version:",
        "if version >= 0 and False:",
        "edits of what autograd saves",
        GRAPH,
    ),
    Mutant(
        "revlib/core/saved_tensors.py",
        "if stream is not None and version_of(stream) == version:",
        "if stream is not None:",
        "edits of a stream that was opened already",
        MISUSE,
    ),
    Mutant("revlib/core/saved_tensors.py", "if not self.uses[i]:", "if False:", "release of kept states", LIFETIME),
    Mutant(
        "revlib/guards/early_stop.py",
        "return not self.ends_in_reading",
        "return False",
        "a repetition that stops while its last kernel still writes",
        ("tests/test_kinds_early_stop.py", *MISUSE),
    ),
    Mutant(
        "revlib/guards/early_stop.py",
        "return not self.ends_in_reading",
        "return True",
        "repetitions that stop early",
        SCHEDULERS,
    ),
    Mutant(
        "revlib/guards/several.py",
        "            self.entered.pop().exit_repetition()",
        "            self.entered.pop()",
        "leaving a repetition",
        REPLAY,
    ),
    Mutant(
        "revlib/step.py", "if versions_of(watched) != before:", "if False:", "edits of a stream by its function", MISUSE
    ),
    Mutant(
        "revlib/guards/randomness.py",
        "            for device, state in self.drawn:\n",
        "            for device, state in ():\n",
        "the same random numbers again",
        REPLAY,
    ),
    Mutant(
        "revlib/guards/randomness.py",
        "            for device, state in self.present:\n",
        "            for device, state in ():\n",
        "the caller's random numbers after a repetition",
        REPLAY,
    ),
    Mutant("revlib/guards/settings.py", "cache_enabled=False", "cache_enabled=True", "the cache of autocast", REPLAY),
    Mutant(
        "revlib/guards/settings.py",
        "            _set(self.of.values, self.of.modes)\n",
        "",
        "the default dtype of forward",
        REPLAY,
    ),
    Mutant(
        "revlib/guards/edits.py",
        "            if version_of(t) != version:\n",
        "            if False:\n",
        "edits of the context",
        MISUSE,
    ),
    Mutant(
        "revlib/guards/edits.py",
        "                if version_of(source) != version:\n",
        "                if False:\n",
        "edits of what a function captures",
        MISUSE,
    ),
    Mutant(
        "revlib/guards/edits.py",
        "if view_base(t) is not constant:",
        "if False:",
        "captured tensors that were replaced",
        MISUSE,
    ),
    Mutant("revlib/guards/recovery_check.py", "if error > allowed:", "if False:", "the comparison", MISUSE),
    Mutant(
        "revlib/guards/recovery_check.py",
        "                self._sample_last_activation(run)",
        "                pass",
        "the activation before a last layer that starts at zero",
        MISUSE,
    ),
    Mutant(
        "revlib/functional/vjp.py",
        "    if activations and program.environment is not None:",
        "    if False:",
        "the same under Functional()",
        MISUSE,
    ),
    Mutant("revlib/guards/recovery_check.py", "if not size < limit:", "if False:", "the range of a grid", COUPLINGS),
    Mutant(
        "revlib/guards/recovery_check.py",
        "self.offset = next(_serial)",
        "self.offset = 0",
        "samples that move from one forward to the next",
        MISUSE,
    ),
    Mutant(
        "revlib/guards/recovery_check.py",
        "same = (gaps == originals) | (gaps.isnan() & originals.isnan())",
        "same = torch.zeros_like(gaps, dtype=torch.bool)",
        "infinities that came back",
        MISUSE,
    ),
    Mutant("revlib/guards/module_state.py", "if m.training != training:", "if False:", "switched modes", MISUSE),
    Mutant(
        "revlib/guards/module_state.py",
        "if versions_of(self.parameters) != self.versions:\n            names",
        "if False:\n            names",
        "edits of parameters",
        MISUSE,
    ),
    Mutant(
        "revlib/guards/module_state.py",
        "in self.buffers.for_repetition(fresh):",
        "in ():",
        "buffers as the first run found them",
        REPLAY,
    ),
    Mutant(
        "revlib/guards/module_state.py",
        "        self._bind_hooks()\n",
        "",
        "hooks that came or went since forward",
        MISUSE,
    ),
    Mutant(
        "revlib/step.py",
        "return others[:first] + some + others[first:]",
        "return others + some",
        "streams that stay before the step's own, of a bijection",
        BIJECTIONS,
    ),
    Mutant(
        "revlib/core/record.py",
        "part, whole=step.merge_reads)[1]",
        "part, whole=False)[1]",
        "a bijection runs to its end again",
        BIJECTIONS,
    ),
    Mutant(
        "revlib/core/record.py",
        "like_strided(s.detach().to(dtype), stride)",
        "s.detach()",
        "strides of what a bijection is given back",
        BIJECTIONS,
    ),
    Mutant(
        "revlib/functional/autograd_function.py",
        "            inner = k\n",
        "            inner = len(steps)\n",
        "gradients of outputs that steps behind a bijection read",
        BIJECTIONS,
    ),
    Mutant(
        "revlib/bijections/base.py",
        "with torch.autocast(kind, enabled=False):",
        "if True:",
        "a bijection runs in the precision of its streams",
        BIJECTIONS,
    ),
    Mutant(
        "revlib/bijections/reshaping.py",
        "part.clone() for part",
        "part for part",
        "a bijection that splits gives streams memory of their own",
        BIJECTIONS,
    ),
    Mutant(
        "revlib/bijections/sums.py",
        "return (total - self._term(s, f), s)",
        "return (total, s)",
        "the inverse of a sum beside a bijection",
        BIJECTIONS,
    ),
    Mutant(
        "revlib/guards/recovery_check.py",
        "range(view.step.sums, len(run.taken))",
        "range(view.step.sums, view.step.sums + 1)",
        "every stream of a bijection is compared",
        BIJECTIONS,
    ),
    Mutant(
        "revlib/sequence.py",
        "if not step.merge_reads), steps[k])",
        "if True), steps[k])",
        "streams enter for the coupling behind a bijection",
        BIJECTIONS,
    ),
    Mutant(
        "revlib/guards/modules.py",
        'held = (*stored_by(code, "STORE_GLOBAL"), *read)',
        'held = stored_by(code, "STORE_GLOBAL")',
        "global variables that a function only reads",
        STATE,
    ),
    Mutant(
        "revlib/guards/modules.py",
        "            if any(map(_holds_a_tensor, values)):",
        "            if False:",
        "tensors among default arguments",
        STATE,
    ),
    Mutant(
        "revlib/guards/randomness.py",
        "if isinstance(thing, numpy.RandomState):",
        "if False:",
        "NumPy's older generators",
        STATE,
    ),
    Mutant(
        "revlib/guards/module_state.py",
        " or bool(((t == before) | (t.isnan() & before.isnan())).all())",
        "",
        "NaN is no change",
        STATE,
    ),
    Mutant(
        "revlib/functional/pure_stack.py",
        "            environment.refuse_edited(k, mine)",
        "            pass",
        "a captured tensor of the context that a function edits unseen",
        STATE,
    ),
    Mutant(
        "revlib/functional/purity.py",
        " and id(t) not in put_back:",
        ":",
        "captured tensors that several functions move, under Functional()",
        STATE,
    ),
    Mutant(
        "revlib/tensors.py",
        "if node is None or node.name() != name:",
        "if node is None:",
        "activations are compared where both graphs lead in the same way",
        ("tests/test_situations.py",),
    ),
    Mutant(
        "revlib/guards/recovery_check.py",
        "others_of = torch.where(others_of > 0, others_of, others_of.max())",
        "pass",
        "activations beside a stream of zeros",
        MISUSE,
    ),
]


def survives(mutant: Mutant | None, tests: Sequence[str]) -> bool:
    """Whether these tests pass with the mutant; without one, whether they do with nothing broken."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("revlib", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "research").symlink_to(ROOT / "research")
        if mutant is not None:
            file = copy / mutant.file
            file.write_text(file.read_text().replace(mutant.before, mutant.after))
        return all(_passes(test, copy) for test in tests)


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
    survivors = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        failing = [
            t for t, passes in zip(tests, pool.map(lambda t: survives(None, [t]), tests), strict=True) if not passes
        ]
        if failing:
            print(f"{', '.join(failing)} fail without any mutant, and so would notice nothing; repair that first")
            return 2
        for mutant, alive in zip(chosen, pool.map(lambda m: survives(m, m.tests), chosen), strict=True):
            print("survived" if alive else "noticed ", mutant, flush=True)
            survivors += [mutant] * alive
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants noticed; survivors:")
    for mutant in survivors:
        print(f"  {mutant}\n    - {mutant.before.strip()}\n    + {mutant.after.strip()}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
