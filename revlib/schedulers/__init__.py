"""Schedulers: how backward gets each step's activations back. Immutable values, swapped at any time.

A scheduler answers one question, :meth:`Scheduler.plan`: of a stack of n steps, which steps keep their activations,
and which states are kept whole? The engine recovers everything else. So a new scheduler is a few lines::

    @dataclass(frozen=True)
    class EveryKth(Scheduler):
        "Keep a state every k steps: inversion never runs further than k steps, so rounding errors cannot build up."

        k: int

        def plan(self, length: int) -> Plan:
            return Plan(states=[*range(self.k, length, self.k), length])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from revlib import engine
from revlib.engine import Plan
from revlib.step import Branch, State

__all__ = ["Checkpoint", "Naive", "Plan", "Reversible", "Scheduler"]


class Scheduler(ABC):
    """What forward keeps, so that backward can have the rest.

    Subclasses are frozen dataclasses that define :meth:`plan`. ``tolerance`` is the relative error up to which backward
    may recover a stream: ``None`` for the default of its precision (see :func:`revlib.loop.default_tolerance`),
    ``math.inf`` to compare nothing.
    """

    tolerance: float | None = None

    @abstractmethod
    def plan(self, length: int) -> Plan:
        """What to keep of a stack of ``length`` steps."""

    def run(self, branches: Sequence[Branch], state: State, context: Mapping[str, Any]) -> State:
        """Run the steps on ``state``; override it to do more than keep and recover."""
        return engine.run(branches, state, context, self.plan(len(branches)), self.tolerance)


@dataclass(frozen=True)
class Naive(Scheduler):
    """Keep every activation, as plain autograd does: the oracle that every other scheduler must equal.

    Cost for n steps, in units of one forward: time 3, memory n times the activations of a step.
    Not for deep stacks: 16 stream tensors a block of a pre-norm transformer.
    """

    def plan(self, length: int) -> Plan:
        return Plan(activations=range(length))


@dataclass(frozen=True)
class Reversible(Scheduler):
    """Keep the last state only, and invert step by step.

    Cost in units of one forward: time 4 (each function once forward, once to invert and refill, and its gradient),
    memory the last state and the activations of a single step, at any depth.
    Not for stacks whose activations fit anyway, nor for branches in low precision that must be exact at great depth:
    the recovered streams drift.

    Source: Gomez et al. 2017, algorithm 1; Mangalam et al. 2022, section 3.1.
    """

    tolerance: float | None = None

    def plan(self, length: int) -> Plan:
        return Plan(states=(length,))


@dataclass(frozen=True)
class Checkpoint(Scheduler):
    """Keep every step's input and repeat the step from it, as activation checkpointing does.

    Cost in units of one forward: time 4, memory one stream a step. The recovered activations are exact, and no
    coupling needs to be inverted. Here for comparison, and for streams that do not invert accurately.

    Source: Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016, with one segment a step.
    """

    tolerance: float | None = None

    def plan(self, length: int) -> Plan:
        return Plan(states=range(length))
