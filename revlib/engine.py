"""The engine: runs a stack under a plan that says what forward keeps; backward recovers the rest.

The graph is the one that naive autograd builds. Forward only runs dropped steps under
:func:`torch.autograd.graph.saved_tensors_hooks`, so that the graph keeps empty holders instead of tensors, and a
:class:`~revlib.tape.Tape` fills them when backward asks. Hooks, closures, double backward, ``autograd.grad``, frozen
parameters and partial losses need no special case here, because nothing about the graph is special.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from revlib import loop
from revlib.modules import modules_of
from revlib.record import Record, Weight
from revlib.replay import Autocast, Randomness
from revlib.step import Branch, State, advance, exporting, route
from revlib.streams import Pace
from revlib.tape import Tape

__all__ = ["Extras", "Plan", "run"]


@dataclass(frozen=True)
class Plan:
    """What forward keeps: the activations of these steps, and these whole states. Backward recovers the rest.

    Step k leads from state k to state k + 1, so a stack of n steps has the states 0, ..., n. A step whose activations
    are not kept is repeated from state k if that is kept, and is otherwise undone, together with all steps between,
    from the nearest state above that is kept or already recovered. Stream k is the one that step k merges away: a step
    whose stream is kept need not be inverted, so its function stops as soon as its activations are back.
    """

    activations: Collection[int] = ()
    states: Collection[int] = ()
    streams: Collection[int] = ()

    def check(self, length: int) -> None:
        for k in range(length):
            if k not in self.activations and not any(k <= j <= length for j in self.states):
                raise ValueError(
                    f"the plan of this scheduler keeps neither the activations of step {k} nor any of the states "
                    f"{k}, ..., {length}, so backward could not recover the step; keep state {length}, the last."
                )


@dataclass(frozen=True)
class Extras:
    """What a scheduler may want besides: how far backward may err, a side stream for it, and to be told things."""

    tolerance: float | None = None
    pace: Pace | None = None
    weights: list[Weight] | None = None  # forward adds what each step would take to keep
    backward: Callable[[], None] | None = None  # called when backward reaches the stack


def run(
    branches: Sequence[Branch], state: State, context: Mapping[str, Any], plan: Plan, extras: Extras | None = None
) -> State:
    """Run the steps in order on ``state`` and return the last state, differentiable in everything they use."""
    contexts = route(branches, len(state), context)
    if torch.is_grad_enabled() and not exporting():
        extras = extras or Extras()
        state = _run(branches, state, contexts, plan, extras)
        if extras.backward is not None:
            _notify(extras.backward, state)
        return state
    return advance(branches, state, contexts)


@torch.compiler.disable
def _notify(backward: Callable[[], None], state: State) -> None:
    for s in state:
        if s.requires_grad and not s.is_leaf:
            s.register_hook(torch.compiler.disable(lambda _: backward()))


def _hooks_impossible() -> bool:
    """Function transforms and forward-mode differentiation do not go through saved tensors."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or not torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    )


def _run(branches: Sequence[Branch], state: State, contexts: list[dict[str, Any]], plan: Plan, extras: Extras) -> State:
    if all(k in plan.activations for k in range(len(branches))):
        return advance(branches, state, contexts)
    return _taped(branches, state, contexts, plan, extras)


@torch.compiler.disable  # the hooks run in backward, where a compiled frame could not be recompiled
def _taped(
    branches: Sequence[Branch], state: State, contexts: list[dict[str, Any]], plan: Plan, extras: Extras
) -> State:
    modules = [modules_of(b.owner) for b in branches]
    parameters = [p for ms in modules for m in ms for p in m._parameters.values() if p is not None]
    if _hooks_impossible() or any(is_lazy(p) for p in parameters):  # a lazy module's first call is unlike its second
        return advance(branches, state, contexts)
    loop.raise_pending(wait=False)
    plan.check(len(branches))
    tensors = [*state, *parameters, *(t for t in tree_leaves(contexts) if isinstance(t, Tensor))]
    tape = Tape(
        len(state),
        len(branches),
        Randomness(tensors),
        Autocast(tensors),
        extras.tolerance,
        pace=extras.pace,
        weights=extras.weights,
    )
    copies = tree_map(lambda leaf: leaf, contexts)  # containers of our own: functions may append to the user's
    below = False  # backward needs the state before this step, to recover those below it
    for k, (branch, context) in enumerate(zip(branches, contexts, strict=True)):
        dropped = k not in plan.activations
        if k in plan.states:
            tape.shelf.put(k, state)
        if k in plan.streams:
            tape.shelf.put(k, state[:1])
        known = k in tape.shelf
        # Backward evaluates a step to refill its holders, or to get past it.
        record = Record(branch, copies[k], modules[k], dropped, known, guarded=dropped or (below and not known))
        below = (dropped or below) and k not in plan.states
        state = tape.advance(record, state, context)
    if len(branches) in plan.states:
        tape.shelf.put(len(branches), state)
    tape.end(state)
    return state
