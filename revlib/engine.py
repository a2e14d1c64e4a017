"""The engine: a stack's forward under a plan, put together from the core and the guards that watch it.

The core is the mechanism (:mod:`revlib.core`), and knows no guard. The guards (:mod:`revlib.guards`) each know one
thing that a repetition depends on. This is the one place where both meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from revlib import cuda_streams
from revlib._torch import (
    exporting,
    forward_mode_active,
    in_transform,
    missing,
    saved_tensor_hooks_allowed,
    tracing,
    tree_leaves,
    tree_map,
)
from revlib.core import Guard, Plan, Tape, surrounding_tape
from revlib.guards import (
    EarlyStop,
    Edits,
    Guards,
    Measure,
    ModuleStates,
    Randomness,
    RecoveryCheck,
    Settings,
    StepCost,
    raise_pending,
)
from revlib.guards.modules import parameters_of
from revlib.guards.randomness import devices_of
from revlib.guards.recovery_check import refuse_opaque
from revlib.look_ahead import LookAheadTape
from revlib.step import BoundStep, State, advance, layouts, route, through_blocks

__all__ = ["PassOptions", "Plan", "run"]


@dataclass(frozen=True)
class PassOptions:
    """What a scheduler may want of a pass besides its plan: ``Scheduler.prepare`` returns one.

    Args:
        tolerance: the relative error up to which backward may recover a stream. ``None``: that of its precision.
        look_ahead: when to recover steps on a side stream, ahead of their gradients, as ``PaReprop`` does.
        costs: a list to which forward adds, for each step, what its activations would take to keep. ``Budget``
            decides by them.
        on_backward: called when backward reaches the stack.

    Example:
        >>> from revlib.schedulers import Scheduler
        >>> class Telling(Scheduler):
        ...     def plan(self, length):
        ...         return Plan(states=[length])
        ...
        ...     def prepare(self, steps, state):
        ...         return self.plan(len(steps)), PassOptions(on_backward=lambda: print("backward begins"))
        >>> from revlib import ReversibleSequence
        >>> y1, y2 = ReversibleSequence([(torch.nn.Tanh(), torch.nn.Tanh())], scheduler=Telling())(
        ...     torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
        ... )
        >>> y1.sum().backward()
        backward begins
    """

    tolerance: float | None = None  # how far backward may err, relatively
    look_ahead: cuda_streams.LookAheadPolicy | None = None  # a side stream, and when to use it
    # Forward adds what the activations of each step would take to keep.
    costs: list[StepCost] | None = None
    on_backward: Callable[[], None] | None = None  # called when backward reaches the stack


def run(
    steps: Sequence[BoundStep],
    state: State,
    context: Mapping[str, Any],
    plan: Plan,
    options: PassOptions | None = None,
) -> State:
    """Run the steps in order on ``state`` and return the last state, differentiable in everything they use."""
    contexts = route(steps, len(state), context)
    if not torch.is_grad_enabled() or exporting() or tracing():
        return advance(steps, state, contexts)
    options = options or PassOptions()
    parameters: list[Tensor] = []
    recording = any(k not in plan.activations for k in range(len(steps)))
    if recording:
        parameters = [p for step in steps for p in parameters_of(step) if p is not None]
    if recording and _can_record(parameters):
        state = _record(steps, state, contexts, parameters, plan, options)
    else:
        state = advance(steps, state, contexts)
    if options.on_backward is not None:
        for s in state:
            if s.requires_grad and not s.is_leaf:
                s.register_hook(partial(_notify, options.on_backward))
    return state


def _notify(call: Callable[[], None], gradient: Tensor) -> None:
    call()


def _can_record(parameters: Sequence[Tensor]) -> bool:
    """Function transforms and forward-mode differentiation do not go through saved tensors, and the first call of a
    lazy module is unlike its second."""
    if in_transform() or forward_mode_active() or not saved_tensor_hooks_allowed():
        return False
    lazy = (UninitializedParameter, UninitializedBuffer)
    return not any(issubclass(kind, lazy) for kind in set(map(type, parameters)))


def _record(
    steps: Sequence[BoundStep],
    state: State,
    contexts: list[dict[str, Any]],
    parameters: Sequence[Tensor],
    plan: Plan,
    options: PassOptions,
) -> State:
    if missing():
        raise RuntimeError(
            f"torch {torch.__version__} lacks {', '.join(missing())}, which recomputation needs; use a version that "
            "this release of revlib was tested with (2.11 to 2.14), or scheduler=Naive()"
        )
    raise_pending(wait=False)
    refuse_opaque(state)
    plan.check(len(steps))
    tensors = [*state, *parameters]
    if any(contexts):
        tensors += [t for t in tree_leaves(contexts) if isinstance(t, Tensor)]
    guard, recovery = _guards(len(steps), tensors, options)
    tape = _tape(steps, state, plan, guard, options)
    tape.recovery = recovery  # type: ignore[attr-defined]

    def run_step(step: BoundStep, state: State, context: dict[str, Any]) -> State:
        # A repetition gets containers as this step finds them: functions may append to the user's.
        found = tree_map(lambda leaf: leaf, context) if context else context
        return tape.run(step, state, context, found)

    state = through_blocks(steps, state, contexts, run_step)
    tape.keep_state(state)
    guard.forward_done(state)
    return state


def _tape(
    steps: Sequence[BoundStep], state: State, plan: Plan, guard: Guard, options: PassOptions
) -> Tape:
    policy, device, m = options.look_ahead, state[0].device, len(state)
    if policy is None or not all(
        cuda_streams.driver.serves(s) and s.device == device for s in state
    ):
        return Tape(plan, layouts(steps, m), m, guard)
    return LookAheadTape(plan, layouts(steps, m), m, guard, policy, device)


def _guards(
    length: int, tensors: Sequence[Tensor], options: PassOptions
) -> tuple[Guards, RecoveryCheck]:
    """Everything that is watched, in the order in which it is entered."""
    outer, devices = surrounding_tape(), devices_of(tensors)
    recovery = RecoveryCheck(length, options.tolerance, getattr(outer, "recovery", None))
    guards: list[Guard] = [
        Randomness(devices),
        Settings(devices),
        ModuleStates(),
        Edits(recovery),
        recovery,
        EarlyStop(),
    ]
    if options.costs is not None:
        guards.append(Measure(options.costs))
    return Guards(guards), recovery
