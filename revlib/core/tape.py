"""The tape: what one forward leaves behind, and how backward gets the rest back. See :mod:`revlib.core`, its rules."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revlib._torch import (
    at_end_of_backward,
    bypass_compiler,
    graph_is_kept,
    graph_task,
)
from revlib.core.guard import Guard, StepView
from revlib.core.plan import Plan
from revlib.core.record import StepRecord
from revlib.core.saved_tensors import SHARED, KeptStates, Key, Placeholder, Progress, unedited
from revlib.step import BoundStep, Layout, State, apart, numbered, together

__all__ = ["Tape", "surrounding_tape"]


class Tape:
    """The memory of one forward through some steps, shared by all backward passes through its graph."""

    def __init__(self, plan: Plan, layouts: Sequence[Layout], m: int, guard: Guard) -> None:
        self.plan, self.layouts, self.guard = plan, layouts, guard
        self.numbers = numbered(layouts, m)  # of the streams of each state
        self.records: list[StepRecord] = []
        self.kept = KeptStates()
        self.needed_below = False  # whether steps below the present state may have to be reached
        self.progress: dict[Key, Progress] = {}
        self.passes: set[int] = set()  # that will call backward_done
        self.lowest = -1  # the lowest step that backward may evaluate
        self.lock = threading.RLock()

    # ------------------------------------------------------------------------------------------ forward
    def run(
        self, step: BoundStep, state: State, context: dict[str, Any], copy: dict[str, Any]
    ) -> State:
        """The first run of a step. ``copy`` is its context again, in containers that nobody else edits."""
        k = len(self.records)
        layout, before, after = self.layouts[k], self.numbers[k], self.numbers[k + 1]
        self.keep_state(state)
        taken, others = apart(state, layout.taken)
        numbers, new = apart(before, layout.taken)[0], apart(after, layout.made)[0]
        if k in self.plan.streams:
            self.kept.keep(self.kept.taken, k, numbers, taken)
        dropped, kept = k not in self.plan.activations, self.kept.holds(numbers)
        repeated = dropped or (self.needed_below and not kept)
        self.needed_below = (dropped or self.needed_below) and k not in self.plan.states
        step.prepare(taken)
        view = StepView(k, step, copy, dropped, kept, layout, before, new)
        guard = self.guard.step(view, state)
        assert guard is not None
        record = StepRecord(view, repeated, guard)
        self.records.append(record)
        pack = record.pack_hook(k)
        hooks = saved_tensors_hooks(pack, self.unpack) if dropped else nullcontext()
        around = surrounding_tape()
        try:
            _running.tape = self
            made = record.first_run(state, context, hooks)
        finally:
            _running.tape = around
        if repeated:
            self.lowest = k if self.lowest < 0 else self.lowest
            if record.differentiable:
                # On the nodes themselves, and not on views of the results: a view would hand the same gradient to two
                # users in two tensors, and autograd would take both for the .grad of leaves without a copy.
                earlier = [s.grad_fn for s in taken]
                for node in (s.grad_fn for s in made):
                    if node is not None and node not in earlier:
                        node.register_prehook(partial(_before_gradient, weakref.ref(self), k))
        return together(made, layout.made, others)

    def keep_state(self, state: State) -> None:
        """Keep the present state, if the plan says so."""
        k = len(self.records)
        if k in self.plan.states:
            self.kept.keep(self.kept.states, k, self.numbers[k], state)

    # ------------------------------------------------------------------------------------------ backward
    @bypass_compiler
    def unpack(self, placeholder: Placeholder) -> Tensor:
        """What autograd calls when it needs the tensor that a placeholder stands for."""
        tensor = placeholder.tensor
        if tensor is not None:
            return unedited(tensor, placeholder.version)
        task = graph_task()
        tensor = placeholder.get(task)
        if tensor is None:
            self.need(placeholder.step)
            tensor = placeholder.get(task)
            if task == -1:  # outside of a backward pass, somebody looks at what a node has saved
                self.forget(task)
            assert tensor is not None, "the placeholder of a recovered step is empty"
        return tensor

    def need(self, k: int) -> None:
        """Have step k recovered for the running backward pass."""
        task = graph_task()
        keeps = task == -1 or graph_is_kept()
        with self.lock:
            if not self.is_recovered(k, task):
                self.recover(k, task, keeps)

    def is_recovered(self, k: int, task: int) -> bool:
        return any(
            p is not None and k in p.recovered
            for p in (self.progress.get(SHARED), self.progress.get(task))
        )

    def recover(self, k: int, task: int, keeps: bool) -> None:
        """Refill the placeholders of step k, undoing the steps above it that this pass has not undone yet."""
        key: Key = task if keeps else SHARED
        progress = self.progress.setdefault(key, Progress())
        self.join_pass(task, key)
        try:
            if keeps:  # with retain_graph, the activations of one step are kept at a time
                self._empty(key, progress.recovered - {k})
            self._go_to_nearest_state(k, progress, consume=not keeps)
            if progress.index == k:
                self._undo(k, progress, key, fill=True)
            self.undo_down_to(k, progress, key, keeps=keeps)
        except BaseException:
            if keeps:
                self.forget(key)
            raise

    def _go_to_nearest_state(self, k: int, progress: Progress, *, consume: bool) -> None:
        """Start from the nearest known state from k upwards. A kept state is exact, so it wins a tie."""
        kept, shared = self.kept.nearest(k), self.progress.get(SHARED, progress)
        if kept is not None and (progress.index < k or kept <= progress.index):
            progress.index, progress.state = kept, self.kept.get(self.kept.states[kept])
            progress.rounded = False
            repeats_from_it = kept < len(self.records) and self.records[kept].repeated
            if consume and not repeats_from_it:
                # Autograd releases the graph as it goes, and this state with it.
                self.kept.drop(kept)
        elif progress.index < k and shared.index >= k:
            progress.index, progress.state = shared.index, shared.state
            progress.rounded = shared.rounded
        elif progress.index < k:
            raise RuntimeError(
                "backward asked a reversible sequence for activations that it has released, or has not made yet. "
                "Specify retain_graph=True to go backward a second time; differentiate only after its forward is done."
            )

    def undo_down_to(self, k: int, progress: Progress, key: Key, *, keeps: bool) -> None:
        """Undo step by step until state k is known."""
        while progress.index > k:
            below = progress.index - 1
            self._undo(below, progress, key, fill=not keeps or below == k)

    def _undo(self, k: int, progress: Progress, key: Key, *, fill: bool) -> None:
        """Recover step k from the state after it or, if the pass is there already, from the state before it."""
        record, made, known = self.records[k], None, None
        if progress.index == k:
            known, others = apart(progress.state, record.layout.taken)
        else:
            if self.kept.holds(record.numbers):
                known = self.kept.get(record.numbers)
            made, others = apart(progress.state, record.layout.made)
        taken = record.repeat(others, known, made, key, fill=fill, rounded=progress.rounded)
        progress.rounded |= known is None and not record.inverts_exactly
        progress.index, progress.state = k, together(taken, record.layout.taken, others)
        if fill:
            progress.recovered.add(k)
            if key == SHARED:
                self.kept.drop(k)

    # ------------------------------------------------------------------------------------------ endings
    def join_pass(self, task: int, key: Key) -> Any:
        """Have :meth:`finish` called at the end of the running pass. -> what will be called, if that is news."""
        if task == -1 or task in self.passes:
            return None
        self.passes.add(task)
        ending = partial(self.finish, task, key)
        if key != SHARED:
            # After an exception in backward it is dropped and not called.
            weakref.finalize(ending, self.forget, key)
        at_end_of_backward(ending)
        return ending

    @bypass_compiler
    def finish(self, task: int, key: Key) -> None:
        """At the end of a backward pass."""
        self.passes.discard(task)
        progress = self.progress[key]
        done = progress.recovered
        if key == SHARED and all(k in done or not r.repeated for k, r in enumerate(self.records)):
            # Nothing is left to recover, so let go of the modules: one may hold a tensor whose graph holds this tape.
            self.records, progress.state = [], ()
        self.guard.backward_done(key)

    @bypass_compiler
    def forget(self, key: Key) -> None:
        """Drop what was recovered for a pass."""
        progress = self.progress.pop(key, None)
        self.guard.forget(key)
        if progress is not None and self.records:
            self._empty(key, progress.recovered)

    def _empty(self, key: Key, steps: set[int]) -> None:
        for k in steps:
            for _, placeholder in self.records[k].living():
                placeholder.empty(key)
        steps.clear()


@bypass_compiler
def _before_gradient(tape: weakref.ref[Tape], k: int, gradients: Any) -> None:
    """Recovers step k before any gradient enters its function, since an optimizer may step inside backward."""
    alive = tape()
    if alive is not None:
        alive.need(k)


_running = threading.local()


def surrounding_tape() -> Tape | None:
    """The tape of the sequence that this one runs inside, as part of one of its functions. It recovers our inputs.

    It is found also where something stands between the two, such as :func:`torch.utils.checkpoint.checkpoint`.
    """
    return getattr(_running, "tape", None)
