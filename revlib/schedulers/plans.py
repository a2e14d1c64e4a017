"""Schedulers that are nothing but a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from revlib._numbers import whole
from revlib.engine import PassOptions, Plan
from revlib.schedulers.base import Scheduler, Wrapper, checked
from revlib.step import BoundStep, State

__all__ = ["Anchored", "Checkpoint", "KeepLast", "Naive", "Reversible"]


@dataclass(frozen=True)
class Naive(Scheduler):
    """Keep every activation, as plain autograd does: the oracle that every other scheduler must equal.

    Cost for n steps, in units of one forward: time 3, memory n times the activations of a step.
    Not for deep stacks: 16 stream tensors a block of a pre-norm transformer.

    Example:
        >>> Naive().plan(6)
        Plan(activations=range(0, 6), states=(), streams=())
    """

    def plan(self, length: int) -> Plan:
        return Plan(activations=range(length))


@dataclass(frozen=True)
class Reversible(Scheduler):
    """Keep the last state only, and invert step by step.

    Cost in units of one forward: time 4 (each function once forward, once to invert and refill, and its gradient),
    memory the last state and the activations of a single step, at any depth.
    Not for stacks whose activations fit anyway, nor for steps in low precision that must be exact at great depth:
    the recovered streams drift.

    Args:
        tolerance: the relative error of a recovered stream from which backward refuses. By default it depends on the
            precision; ``math.inf`` compares nothing.

    Raises:
        RuntimeError: in backward, if a stream was recovered with a larger error than that.

    Source: Gomez et al. 2017; Mangalam et al. 2022.

    Example:
        >>> Reversible().plan(6)
        Plan(activations=(), states=(6,), streams=())
    """

    tolerance: float | None = None

    def plan(self, length: int) -> Plan:
        return Plan(states=(length,))


@dataclass(frozen=True)
class Checkpoint(Scheduler):
    """Keep the stream that every ``every``-th step merges away, counted from the last; invert the others.

    A step whose stream is kept need not be inverted, so its function is repeated only as far as its activations need.
    Of a transformer's MLP that leaves out the second linear layer, a third of a block's multiplications in forward.

    ``every=1``: every step is repeated from its own input, as activation checkpointing does. The recovered activations
    are exact, and no coupling needs to be inverted. Cost in units of one forward: time 4, less what the functions do
    after their last saved tensor; memory one stream a step.

    ``every=2``: of pairs (F, G), the stream that G adds to is kept, and F is inverted. Cost: one stream a block, the
    time of checkpointing a one-stream block. The kept stream is exact, the other drifts as under ``Reversible``.

    Args:
        every: keep the stream of every so many steps, from 1 up.
        tolerance: as of :class:`Reversible`; also of the last activations of a step whose stream is kept.

    Raises:
        ValueError: if ``every`` is no whole number from 1 up.
        RuntimeError: in backward, if a stream or an activation was recovered with a larger error than ``tolerance``.

    Source: Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016, with one segment a step.

    Example:
        >>> sorted(Checkpoint(every=2).plan(6).streams)
        [1, 3, 5]
    """

    every: int = 1
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("Checkpoint(every=...)", self.every, 1)

    def plan(self, length: int) -> Plan:
        return Plan(states=(max(length - 1, 0),), streams=range(length - 1, -1, -self.every))


@dataclass(frozen=True)
class Anchored(Scheduler):
    """Keep a whole state every ``every`` steps: no inversion runs further, so rounding errors cannot build up.

    Cost in units of one forward: time 4; memory one state (two streams) every ``every`` steps.
    For steps in low precision at great depth. ``every`` should be even for pairs, and larger than 2: with two
    streams, ``every=2`` keeps as much as ``Checkpoint()``.

    Args:
        every: the steps between two states that are kept, from 1 up.
        tolerance: as of :class:`Reversible`.

    Raises:
        ValueError: if ``every`` is no whole number from 1 up.
        RuntimeError: in backward, if a stream was recovered with a larger error than ``tolerance``.

    Source: checkpoints at regular intervals, Chen et al. 2016, with inversion in place of recomputation between them.

    Example:
        >>> Anchored(4).plan(10).states
        [4, 8, 10]
    """

    every: int
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("Anchored(every=...)", self.every, 1)

    def plan(self, length: int) -> Plan:
        return Plan(states=[*range(self.every, length, self.every), length])


@dataclass(frozen=True)
class KeepLast(Wrapper):
    """Keep the activations of the last ``steps`` steps, and leave those below to another scheduler.

    They are used and released first, so they cost no peak beside what is kept: of one step, none at all.
    Cost for k of n steps, in units of one forward: time 4 - k/n over ``Reversible``, memory k times the activations of
    a step. Where memory is known in bytes, use :class:`~revlib.Budget`.

    Args:
        steps: how many, from 0 up; all steps of a shorter stack.
        below: the scheduler of the steps before them.

    Raises:
        ValueError: if ``steps`` is no whole number from 0 up.
        TypeError: if ``below`` is no scheduler.

    Example:
        >>> KeepLast(2).plan(6)
        Plan(activations=[4, 5], states=(4,), streams=())
    """

    steps: int
    below: Scheduler = field(default_factory=Reversible)

    def __post_init__(self) -> None:
        whole("KeepLast(steps=...)", self.steps, 0)
        checked(self.below, "KeepLast(below=...)")

    @property
    def inner(self) -> Scheduler:
        """The scheduler of the steps below."""
        return self.below

    def plan(self, length: int) -> Plan:
        """The plan of ``below`` for the steps before the last ones, whose activations are kept."""
        return self._over(self.below.plan(max(length - self.steps, 0)), length)

    def prepare(self, steps: Sequence[BoundStep], state: State) -> tuple[Plan, PassOptions]:
        length = len(steps)
        plan, options = self.below.prepare(steps[: max(length - self.steps, 0)], state)
        return self._over(plan, length), options

    def _over(self, plan: Plan, length: int) -> Plan:
        kept = range(max(length - self.steps, 0), length)
        if len(kept) == length:
            return Plan(activations=kept)
        return replace(plan, activations=[*plan.activations, *kept])
