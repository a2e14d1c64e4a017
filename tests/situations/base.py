"""What a situation is, and the verdict that playing it gives: supported, refused, or not applicable."""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import random
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ByHand, error, grads, leaves, loss, mlp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import revlib
from revlib import (
    Additive,
    Anchored,
    Budget,
    Checkpoint,
    Coupling,
    ExactAdditive,
    Functional,
    KeepLast,
    Naive,
    PaReprop,
    Reversible,
    ReversibleSequence,
    Step,
    reversible,
)
from revlib.bijections import Bijection
from revlib.couplings.family import Affine, Scaled
from revlib.schedulers import Scheduler

TABLE = Path(__file__).parent / "table.csv"

SCHEDULERS: dict[str, Scheduler] = {
    "Naive()": Naive(),
    "Reversible()": Reversible(),
    "PaReprop()": PaReprop(),
    "Checkpoint()": Checkpoint(),
    "Checkpoint(every=2)": Checkpoint(every=2),
    "Anchored(3)": Anchored(3),
    "KeepLast(1)": KeepLast(1),
    "Budget(fraction=0.5)": Budget(fraction=0.5),
    "Functional()": Functional(),
}
COUPLINGS: dict[str, Coupling] = {
    "Additive()": Additive(),
    "ExactAdditive()": ExactAdditive(),
    "Scaled(0.9, 0.5)": Scaled(0.9, 0.5),
    "Affine()": Affine(),
}
SUPPORTED, REFUSED, NOT_APPLICABLE, NOT_RUN = "supported", "refused", "not applicable", "not run"


# ---------------------------------------------------------------------------------------------- playing
def as_pair(module: Any, args: Any, f: Tensor) -> tuple[Tensor, Tensor]:
    """What a function returned, as the log-scale and the shift that the affine coupling takes."""
    return f.sin(), f


@dataclass(frozen=True)
class Setting:
    """The scheduler and the coupling under which a situation is played."""

    scheduler: Scheduler
    coupling: Coupling
    meddle: bool = True  # whether what is changed between forward and backward is

    def fit(self, fn: Any) -> Any:
        """The function, returning what the coupling takes. Modules stay what they are, and get a forward hook."""
        if not isinstance(self.coupling, Affine):
            return fn
        if not isinstance(fn, nn.Module):
            return functools.wraps(fn)(lambda *args, **context: as_pair(fn, args, fn(*args, **context)))
        if as_pair not in fn._forward_hooks.values():
            fn.register_forward_hook(as_pair)
        return fn

    def fit_step(self, fn: Any, streams: int | None = None) -> Step:
        """The function as one step."""
        return Step(self.fit(fn), self.coupling, streams)

    def stack(self, make: Callable[[], nn.Module] = mlp, depth: int = 2) -> ReversibleSequence:
        """Pairs of functions, each from one call of ``make``."""
        return self.sequence(*((make(), make()) for _ in range(depth)))

    def sequence(self, *items: Any) -> ReversibleSequence:
        """Of these pairs and Steps."""
        fitted = [i if isinstance(i, (Step, Bijection)) else tuple(map(self.fit, i)) for i in items]
        return ReversibleSequence(fitted, self.coupling, self.scheduler)

    def run(self, functions: Sequence[Any], *streams: Tensor, **context: Any) -> tuple[Tensor, ...]:
        """Plain functions, without modules."""
        fitted = [f if isinstance(f, Step) else tuple(map(self.fit, f)) for f in functions]
        return reversible(fitted, *streams, coupling=self.coupling, scheduler=self.scheduler, context=context)


def train(stack: ReversibleSequence, *shape: int, steps: int = 2, **context: Any) -> list[Any]:
    """Two steps of training: outputs and gradients of each, then parameters and buffers."""
    return train_on([leaves(*shape) for _ in range(steps)], stack, **context)


def train_on(batches: Sequence[Sequence[Tensor]], stack: ReversibleSequence, **context: Any) -> list[Any]:
    learned = [p for p in stack.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.01) if learned else None
    found: list[Any] = []
    for streams in batches:
        outputs = stack(*streams, **context)
        loss(outputs).backward()
        found += [*outputs, *grads(*streams, stack)]
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return [*found, *everything(stack)]


def everything(*modules: nn.Module) -> list[Any]:
    """Parameters and buffers, as they are now."""
    return [t.detach().clone() for m in modules for t in (*m.parameters(), *m.buffers())]


# ---------------------------------------------------------------------------------------------- registering
class Situation(NamedTuple):
    name: str
    play: Callable[[Setting], Any]
    tolerance: float  # of the schedulers that invert, with couplings that round
    bitwise: bool  # what repeats bits must equal plain autograd's
    couplings: frozenset[str]  # those under which it is run
    without: str | None  # a scheduler under which it is not
    slow: bool
    pending: str | None  # what has to be fixed first: it is in no table yet
    refusable: bool  # in the end

    @property
    def theme(self) -> str:
        return self.play.__module__.rpartition(".")[2]


SITUATIONS: dict[str, Situation] = {}
PENDING: dict[str, Situation] = {}


def situation(
    name: str,
    *,
    tolerance: float = 1e-10,
    bitwise: bool = True,
    only: str | None = None,
    slow: bool = False,
    without: str | None = None,
    pending: str | None = None,
    refusable: bool = False,
) -> Callable[[Callable[[Setting], Any]], Callable[[Setting], Any]]:
    """Registers a function that plays a piece of training in a setting, in float64, and returns all that a user sees.

    It is run ``only`` with one coupling where it takes long, and ``without`` a scheduler where that has no answer that
    could be told. While it is ``pending``, some scheduler gets it wrong, or refuses what is not ``refusable``; then
    take the word away, and write its rows with ``python -m situations --play``.
    """

    def register(play: Callable[[Setting], Any]) -> Callable[[Setting], Any]:
        assert name not in SITUATIONS | PENDING, f"two situations are called {name!r}"
        couplings = frozenset(COUPLINGS if only is None else [only])
        made = Situation(name, play, tolerance, bitwise, couplings, without, slow, pending, refusable)
        (PENDING if pending else SITUATIONS)[name] = made
        return play

    return register


# ---------------------------------------------------------------------------------------------- judging
class Played(NamedTuple):
    found: Any = None
    raised: BaseException | None = None


@contextlib.contextmanager
def world() -> Iterator[None]:
    """The same for every cell: float64, and seeds."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def play(s: Situation, scheduler: Scheduler, coupling: Coupling, meddle: bool = True) -> Played:
    with world():
        try:
            found = s.play(Setting(copy.deepcopy(scheduler), coupling, meddle))  # a copy has measured nothing yet
            return Played([found, torch.rand(1)])  # the caller's random numbers go on as by hand
        except Exception as raised:
            return Played(raised=raised)


def by_hand(s: Situation, coupling: Coupling, meddle: bool = True) -> Played:
    return play(s, ByHand(), coupling, meddle)


def _same_bits(got: Any, want: Any) -> bool:
    pairs = zip(tree_leaves(got), tree_leaves(want), strict=True)
    both = lambda g, w: isinstance(g, Tensor) and isinstance(w, Tensor)  # noqa: E731
    return all(torch.equal(g, w) if both(g, w) else type(g) is type(w) and g == w for g, w in pairs)


def raised_by_revlib(raised: BaseException) -> bool:
    """By a ``raise`` in the library, not by what a function did."""
    last = traceback.extract_tb(raised.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(revlib.__file__).parent) and (last.line or "").startswith("raise")


def verdict(s: Situation, scheduler: str, coupling: str, want: Played) -> tuple[str, str]:
    """The verdict that playing it gives, and the error, if any. Whatever is not one of those in a table is a fault."""
    if coupling not in s.couplings or scheduler == s.without:
        return NOT_RUN, ""
    got = play(s, SCHEDULERS[scheduler], COUPLINGS[coupling])
    if got.raised is not None:
        told = f"{type(got.raised).__name__}: {got.raised}"
        if raised_by_revlib(got.raised):
            return REFUSED, told
        same = want.raised is not None and type(got.raised) is type(want.raised)
        return NOT_APPLICABLE if same else "broken", told
    if want.raised is not None:  # the edit that autograd refuses may be one that reaches nothing here
        refused, want = want.raised, by_hand(s, COUPLINGS[coupling], meddle=False)
        if want.raised is not None:
            return "wrong", f"returned, where plain autograd raises {type(refused).__name__}: {refused}"
    exact = scheduler in ("Naive()", "Checkpoint()") or coupling == "ExactAdditive()"
    exact &= scheduler != "Functional()"  # adds gradients of what several steps share in another order
    if _same_bits(got.found, want.found):
        return SUPPORTED, ""
    try:
        far = error(got.found, want.found)
    except AssertionError as unlike:
        return "wrong", f"not like plain autograd's: {unlike}"
    if s.bitwise and exact:
        return "wrong", f"other bits; {far:.1e} from plain autograd"
    return (SUPPORTED, "") if far < s.tolerance else ("wrong", f"{far:.1e} from plain autograd")


# ---------------------------------------------------------------------------------------------- the table
class Row(NamedTuple):
    """Of the table: a situation with a coupling."""

    verdicts: dict[str, str]  # by scheduler
    error: str  # "Type: pattern" of what refuses
    functional: str  # the same under Functional(), which is another engine

    def pattern(self, scheduler: str) -> str:
        return self.functional if scheduler == "Functional()" else self.error


def expected() -> dict[tuple[str, str], Row]:
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {
        (r["situation"], r["coupling"]): Row({s: r[s] for s in SCHEDULERS}, r["error"], r["error under Functional()"])
        for r in rows
    }
    assert len(found) == len(rows), "a row of the table is there twice"
    return found


def fits(told: str, pattern: str) -> bool:
    kind, _, message = pattern.partition(": ")
    came, _, text = told.partition(": ")
    return bool(pattern) and came == kind and re.search(message, text, re.DOTALL) is not None
