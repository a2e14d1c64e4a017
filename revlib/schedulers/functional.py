"""Functional: the reversible backward as a pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from revlib import functional
from revlib.engine import Plan
from revlib.schedulers.base import Scheduler
from revlib.step import Branch, State

__all__ = ["Functional"]


@dataclass(frozen=True)
class Functional(Scheduler):
    """Keep the last state only, as ``Reversible`` does, in one ``autograd.Function``, without hooks.

    The others save memory by saved-tensor hooks, which ``torch.func`` refuses (they keep everything there) and the
    compiler breaks its graph at. This one also saves it under ``grad``, ``vjp``, ``jacrev``, ``vmap``, and the vmap of
    a grad; and ``torch.compile(model, fullgraph=True)`` takes forward and backward as a graph each. Second derivatives
    are right, and stored. Forward mode keeps nothing in any case.

    Cost in units of one forward: time 4; memory the last state and the input, the activations of the last step, of
    another one in backward, the gradients of the state at both ends, and those of all weights until backward is done.

    Not where ``Reversible`` serves, since functions must be pure here. Gradients reach streams, parameters, and tensors
    in the context. Refused with an error: a function that uses another tensor which needs a gradient (by closure, or as
    a plain attribute); that leaves a result behind (in a list, or by a forward hook) without ``detach()``; that turns a
    stream's dtype into another; batch norm in train mode under a transform. ``jacrev`` maps over backward, where
    ``vmap`` allows no dropout. ``grad`` of a ``vmap`` computes the gradients of what is not mapped for each sample, and
    adds them up then. Threads must not share modules.

    In a whole compiled graph, which takes torch 2.14, functions must also be modules, without dropout, drop path, or a
    tensor by a global variable (the one thing here that nobody could notice). What came back is compared with what went
    in inside the graph, and on CUDA a difference ends the process there.

    Args:
        tolerance: the relative error of the recovered inputs of the whole stack up to which backward goes on.
    """

    tolerance: float | None = None

    def plan(self, length: int) -> Plan:
        return Plan(states=(length,))

    def run(self, branches: Sequence[Branch], state: State, context: Mapping[str, Any]) -> State:
        return functional.run(branches, state, context, self.tolerance)
