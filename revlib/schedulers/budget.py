"""Budget: keep as many of the last activations as fit into a number of bytes, and recover the rest."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from revlib._numbers import real, whole
from revlib._torch import saved_tensor_hooks
from revlib.engine import PassOptions, Plan
from revlib.guards import StepCost
from revlib.schedulers.base import Scheduler, Signature, Wrapper, checked, signature
from revlib.schedulers.plans import KeepLast, Reversible
from revlib.step import BoundStep, State

__all__ = ["Budget"]

_MANY = 256
Runs = tuple[Signature, ...]  # the stacks of a model that run in one forward pass, in order


@dataclass(frozen=True)
class Budget(Wrapper):
    """Keep the activations of as many last steps as fit into a budget, and leave the rest to another scheduler.

    The first forward of each shape keeps no activations, and measures what each step would take; from the second on,
    the budget is used: for activations, and what is left for single streams (see :class:`Checkpoint`). It bounds what
    all stacks that share this object keep between one forward pass and its backward (give several stages of a model the
    same ``Budget``, not an equal one, and the last steps of the last stage come first). The peak of backward is higher
    by what differentiating a step takes, as it is for ``Naive``. The very last step is always kept: backward starts
    with it, so keeping it costs no peak.

    Cost where k of n equal steps fit, in units of one forward: time 4 - k/n over ``Reversible``.

    Args:
        bytes: to keep at most; or
        fraction: of the bytes that ``Naive`` would keep, between 0 and 1.
        below: the scheduler of the steps that do not fit. What it keeps itself counts too, if it keeps states or
            streams (``Checkpoint``, ``Anchored``).

    A forward pass is what runs between two backward passes. Steps are measured again when shapes, dtypes, autocast or
    the modules' modes change; freezing parameters later is not noticed. :meth:`report` tells what is kept.

    Raises:
        ValueError: if not exactly one of ``bytes`` and ``fraction`` is given, if it is out of range, or if ``below``
            keeps activations itself.
        TypeError: if ``below`` is no scheduler.

    Source: our own; keeping the last activations costs no peak, since backward uses and releases them first.

    Example:
        >>> from revlib import ReversibleSequence
        >>> stack = ReversibleSequence([(torch.nn.Tanh(), torch.nn.Tanh())] * 4, scheduler=Budget(fraction=0.5))
        >>> x = torch.randn(250, 1000, requires_grad=True)
        >>> sum(y.sum() for y in stack(x, x)).backward()  # the first pass only measures
        >>> print(stack.scheduler.report())
        first stream         steps  kept  streams     MB  MB of Naive()  time
        (250, 1000) float32      8     2        2    4.0            8.0   3.8
    """

    bytes: int | None = None
    fraction: float | None = None
    below: Scheduler = field(default_factory=Reversible)
    _ledger: _Ledger = field(
        default_factory=lambda: _Ledger(), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        checked(self.below, "Budget(below=...)")
        if (self.bytes is None) == (self.fraction is None):
            raise ValueError(
                "Budget takes either bytes=..., or fraction=... of what Naive would keep"
            )
        if self.bytes is not None:
            advice = "; 2 * 2**30 is two gibibytes"
            if isinstance(self.bytes, float) and 0 <= self.bytes <= 1:
                advice = f"; say Budget(fraction={self.bytes}) for a part of what Naive would keep"
            whole("Budget(bytes=...)", self.bytes, 0, of="bytes", advice=advice)
        if self.fraction is not None:
            accepted = "a number from 0 to 1"
            real("Budget(fraction=...)", self.fraction, lambda x: 0 <= x <= 1, accepted)
        if self.below.plan(4).activations:
            raise ValueError(
                f"Budget(below=...) takes a scheduler that keeps no activations itself, got {self.below}"
            )

    @property
    def inner(self) -> Scheduler:
        """The scheduler of the steps that do not fit."""
        return self.below

    def plan(self, length: int) -> Plan:
        """The plan before anything has been measured, which is that of ``below``; see :meth:`report` for the later."""
        return self.below.plan(length)

    def report(self) -> str:
        """What a forward pass like the last one keeps from now on: a table with a row for each stack that ran in it.

        The columns: the first stream of the stack; its steps; of how many last steps the activations are kept; how many
        single streams are kept below them; the bytes of all this until backward, in units of $10^6$, and those that
        ``Naive()`` would keep; and the expected time of a training step in units of one forward, $4 - k/n$ for k of n
        equal steps. The last row has the sums. PaReprop's own budget is asked as ``stack.scheduler.of.report()``.

        Outputs that a loss keeps, and what runs between stacks, count nothing here.
        """
        ledger = self._ledger
        with ledger.lock:
            runs = ledger.last_pass()
            sizes = [list(ledger.sizes.get(run, [])) for run in runs]
        if not runs or any(
            len(costs) != len(run.functions) for costs, run in zip(sizes, runs, strict=True)
        ):
            return "nothing has been measured yet: run forward and backward once"
        rows = []
        for run, costs, (kept, extra) in zip(runs, sizes, self._share(sizes), strict=True):
            shape, dtype, *_ = run.streams[0]
            below = self._streams(costs, kept, extra)
            found = _Kept(
                len(costs),
                kept,
                len(below),
                self._held(costs, kept, extra),
                self._held(costs, len(costs)),
            )
            rows.append((f"{tuple(shape)} {str(dtype).removeprefix('torch.')}", found))
        if len(rows) > 1:
            rows.append(
                ("together", _Kept(*map(sum, zip(*(found for _, found in rows), strict=True))))
            )
        wide = max(len("first stream"), *(len(name) for name, _ in rows))
        lines = [f"{'first stream':<{wide}}  steps  kept  streams     MB  MB of Naive()  time"]
        return "\n".join([*lines, *(f"{name:<{wide}}  {found}" for name, found in rows)])

    def prepare(self, steps: Sequence[BoundStep], state: State) -> tuple[Plan, PassOptions]:
        if not steps or not torch.is_grad_enabled() or _packed():
            return self.below.prepare(steps, state)
        key, ledger = signature(steps, state), self._ledger
        with ledger.lock:
            place, runs = ledger.expect(key)
            sizes = [ledger.sizes.get(run, []) for run in runs]
            known = bool(runs) and all(
                len(costs) == len(run.functions) for costs, run in zip(sizes, runs, strict=True)
            )
            if known and runs not in ledger.shares:
                ledger.shares[runs] = self._share(sizes)
            last, extra = ledger.shares[runs][place] if known else (0, 0)
            costs: list[StepCost] | None = None
            if not known:
                costs = ledger.sizes[key] = []
        plan, options = KeepLast(last, self.below).prepare(steps, state)
        plan = replace(plan, streams={*plan.streams, *_singles(len(steps) - last)[:extra]})
        return plan, replace(options, costs=costs, on_backward=ledger.close)

    def _share(self, sizes: Sequence[Sequence[StepCost]]) -> list[tuple[int, int]]:
        """How many of the last steps each run of a forward pass keeps, and how many streams of those below them."""
        steps = [0] * len(sizes)
        extra = [0] * len(sizes)
        least = [self._held(costs, 0) for costs in sizes]
        if self.bytes is not None:
            free = self.bytes - sum(least)
        else:
            free = int(
                (self.fraction or 0) * sum(self._held(costs, len(costs)) for costs in sizes)
            ) - sum(least)
        for i in reversed(range(len(sizes))):
            costs, allowed = sizes[i], free + least[i]
            steps[i] = bisect.bisect_right(
                range(1, len(costs) + 1), allowed, key=partial(self._held, costs)
            )
            if i == len(sizes) - 1:
                steps[i] = max(1, steps[i])
            held = partial(self._held, costs, steps[i])
            extra[i] = bisect.bisect_right(range(1, len(costs) - steps[i] + 1), allowed, key=held)
            free = allowed - held(extra[i])
            if steps[i] < len(costs):
                break
        return list(zip(steps, extra, strict=True))

    def _held(self, costs: Sequence[StepCost], steps: int, extra: int = 0) -> int:
        """Bytes that a run keeps with the activations of so many last steps, and so many streams below them."""
        length, streams = len(costs), self._streams(costs, steps, extra)
        for cost in costs[length - steps :]:
            streams |= cost.saved
        sizes = {i: size for cost in costs for i, size in cost.bytes.items()}
        return sum(sizes[i] for i in streams) + sum(c.own for c in costs[length - steps :])

    def _streams(self, costs: Sequence[StepCost], steps: int, extra: int) -> set[int]:
        """The streams that are kept below the last steps."""
        length = len(costs)
        plan = self.below.plan(length - steps) if steps < length else Plan()
        states = [*(cost.before for cost in costs), costs[-1].after]
        streams = {i for j in plan.states for i in states[j]}
        for k in (*plan.streams, *_singles(length - steps)[:extra]):
            streams.update(costs[k].taken)
        return streams


class _Kept(NamedTuple):
    """The row of a stack in the report: what is kept of it."""

    length: int
    steps: int
    streams: int
    bytes: int
    naive: int

    def __str__(self) -> str:
        time = 4 - self.steps / self.length
        return (
            f"{self.length:>5}  {self.steps:>4}  {self.streams:>7}  {self.bytes / 1e6:>5.1f}  "
            f"{self.naive / 1e6:>13.1f}  {time:>4.1f}"
        )


def _singles(length: int) -> list[int]:
    """Streams to keep where less than a step's activations fits, the best first: a step whose stream is kept need not
    be inverted. Of pairs (F, G), that saves most in G, whose last linear layer is the largest."""
    return [*range(length - 1, -1, -2), *range(length - 2, -1, -2)]


def _packed() -> bool:
    """Whether hooks of others handle saved tensors, as those of an outer stack or a checkpoint do. They run the stack
    again in backward, where it must keep what it kept in forward."""
    return saved_tensor_hooks(ignore_disabled=False) is not None


class _Ledger:
    """The costs that have been measured, and the order in which the stacks of a model run."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sizes: dict[Signature, list[StepCost]] = {}
        # What ran after a signature at a place of a pass, when it last ran there.
        self.following: dict[tuple[int, Signature], Runs] = {}
        # How many last steps and how many streams each run of a pass keeps.
        self.shares: dict[Runs, list[tuple[int, int]]] = {}
        self.current: list[Signature] = []
        self.latest: Runs = ()  # the runs of the pass before this one
        self.closed = False

    def __reduce__(self) -> tuple[type[_Ledger], tuple[()]]:
        """A copied model starts afresh."""
        return _Ledger, ()

    def close(self) -> None:
        """A backward has begun: the next forward starts a new pass."""
        self.closed = True

    def last_pass(self) -> Runs:
        """The runs of the last forward pass that a backward has followed."""
        return tuple(self.current) if self.closed else self.latest

    def expect(self, key: Signature) -> tuple[int, Runs]:
        """Note a run. Returns its place in its pass, and all runs of the pass, or none if later ones are not known."""
        if self.closed or len(self.current) > _MANY:
            for place, run in enumerate(self.current):
                self.following[place, run] = tuple(self.current[place + 1 :])
            self.latest = tuple(self.current)
            self.current, self.closed = [], False
        memories: list[dict[Any, Any]] = [self.sizes, self.following, self.shares]
        for memory in memories:
            if len(memory) > _MANY:  # most are of shapes that never come again
                memory.clear()
        place = len(self.current)
        self.current.append(key)
        after = self.following.get((place, key))
        return place, () if after is None else (*self.current, *after)
