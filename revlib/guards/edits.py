"""Edits: tensors that a function reads besides its streams and modules must be those that forward read.

Catches: tensors of the context, and tensors that the function captured, edited in place since forward (raises, as
autograd does for a tensor that it has saved); captured tensors that were replaced by others (compared with these by
the recovery check, as any recovered tensor is); hooks that the function registers on these tensors or on parameters
while it runs, which a repetition would register once more (taken away again).
Cannot see: tensors that autograd does not save, such as the second operand of a sum; edits through ``.data``. The
recovery check notices both where they change a stream.
Cost: a weak reference for each tensor that autograd saves, and a version for each that outlives the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from revlib._torch import keep_alive, tree_leaves, version_of, view_base
from revlib.core.guard import FirstRun, Guard, StepGuard, StepView
from revlib.guards.modules import current_tree
from revlib.guards.recovery_check import Comparison, RecoveryCheck
from revlib.step import State
from revlib.tensors import is_parameter, leaves_of

__all__ = ["Edits", "hooks_of"]


_hooks, _hooks_after = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")


def hooks_of(t: Tensor | None) -> list[dict[int, Any]]:
    """The hooks of a tensor, through which somebody may edit its gradient, where it has or had any."""
    if t is None:
        return []
    return [hooks for hooks in (_hooks(t), _hooks_after(t)) if hooks is not None]


class Edits(Guard):
    """What the functions of a stack read of the user's."""

    def __init__(self, recovery: RecoveryCheck) -> None:
        self.recovery = recovery

    def step(self, view: StepView, state: State) -> StepGuard:
        return _StepEdits(view, self.recovery)


_View = tuple[Any, Any, Any]  # size, stride and offset
# A tensor that autograd saved, or the base of one that is a view: its place, itself, its version, the view where a
# recovered tensor will be compared with it, and whether the function saved it, and not the coupling.
_Read = tuple[int, Callable[[], Tensor | None], int, _View | None, bool]


class _StepEdits(StepGuard):
    def __init__(self, view: StepView, recovery: RecoveryCheck) -> None:
        self.step, self.recovery, self.tree = view.step, recovery, current_tree(view.step)
        self.compares = view.streams_kept  # else the recovered stream tells
        self.context: list[tuple[str, Tensor, int]] = []
        for key, value in view.context.items():
            self.context += (
                (key, t, version_of(t)) for t in tree_leaves(value) if isinstance(t, Tensor)
            )
        self.read: list[_Read] = []
        self.leaves: list[weakref.ref[Tensor]] = []  # of the graph, where hooks may be registered
        self.constants: dict[int, tuple[Tensor, _View | None]] = {}
        self.hooked: list[Callable[[], Tensor | None]] = []  # tensors of the user's that have hooks
        self.hooks: list[tuple[dict[int, Any], set[int]]] = []  # of these, before a repetition

    def first_run_done(self, run: FirstRun) -> None:
        # Streams come back as they were, whatever is edited, and the modules' parameters have a guard of their own.
        known = {*self.tree.parameter_ids, *(id(view_base(s)) for s in run.state)}
        compares, read = self.compares, self.read
        for place, placeholder in run.saved:
            t = placeholder.tensor
            if t is None or id(t) in known:
                continue
            source = view_base(t)
            if id(source) not in known:
                view = None
                if compares and source is not t and type(t) is Tensor:
                    view = t.shape, t.stride(), t.storage_offset()
                of_function = place < run.function_saves
                read.append((place, weakref.ref(source), placeholder.version, view, of_function))
        if self.tree.registers:
            differentiable = [t for t in run.result if isinstance(t, Tensor) and t.requires_grad]
            self.leaves = list(map(weakref.ref, leaves_of(differentiable)))

    def saved_tensors_dropped(self) -> None:
        """What is alive now belongs to the user. Intermediate results of the function are gone."""
        self.read = [r for r in self.read if r[1]() is not None]
        # A hook may also have been taken away again, where a repetition stops before.
        mine = [p for p in self.tree.parameters if p is not None]
        if self.context or self.read or self.leaves:
            mine += [t for _, t, _ in self.context]
            mine += [t for r in self.read if (t := r[1]()) is not None]
            mine += [t for ref in self.leaves if (t := ref()) is not None]
        none = [None] * len(mine)
        if list(map(_hooks, mine)) != none or list(map(_hooks_after, mine)) != none:
            self.hooked = [weakref.ref(t) for t in mine if hooks_of(t)]
        if not self.read:
            return
        # The run edited these, and a repetition gets copies.
        own = self.step.memory.get("put back", ())
        self.read = [r for r in self.read if id(r[1]()) not in own]
        if self.compares:
            slots = self.tree.buffer_slots
            buffers = {id(view_base(b)) for named in slots for b in named.values() if b is not None}
            for place, alive, _, view, of_function in self.read:
                t = alive()
                if (
                    t is not None
                    and of_function
                    and not (t.requires_grad or is_parameter(t) or id(t) in buffers)
                ):
                    self.constants[place] = t, view

    def check(self) -> None:
        for key, t, version in self.context:
            if version_of(t) != version:
                raise RuntimeError(
                    f"context tensor {key!r} of {self.step.name} was modified by an inplace operation between forward "
                    "and backward; edit a clone of it instead."
                )
        for _, alive, version, _, _ in self.read:
            source = alive()
            if source is not None:
                keep_alive(source)
                if version_of(source) != version:
                    raise RuntimeError(
                        f"a tensor of shape {tuple(source.shape)} that {self.step.name} reads was modified by an "
                        "inplace operation between forward and backward; edit a clone of it instead."
                    )

    def enter_repetition(self) -> None:
        if not self.hooked:
            return
        self.hooks = [(hooks, set(hooks)) for ref in self.hooked for hooks in hooks_of(ref())]

    def exit_repetition(self) -> None:
        for hooks, before in self.hooks:
            for key in hooks.keys() - before:
                del hooks[key]
        self.hooks = []

    def repeated(
        self, key: Hashable, inputs: State, saved: Sequence[Tensor], streams: State
    ) -> None:
        """Compare a constant with what came in its place, which may be a small difference of streams."""
        for place, (constant, view) in self.constants.items():
            t = saved[place] if place < len(saved) else constant
            if view_base(t) is not constant:
                before = constant if view is None else constant.as_strided(*view)
                # A view may also show the same memory in another dtype, which is not compared.
                if before.shape == t.shape and before.dtype == t.dtype:
                    reference = inputs[0].detach() if before.is_floating_point() else None
                    self.recovery.compare(
                        key, Comparison(self.step.name, before, t.detach(), reference)
                    )
