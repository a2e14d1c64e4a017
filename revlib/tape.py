"""The tape: what one forward pass leaves behind, and how backward gets the rest back.

Of every tensor that autograd wants to save for a dropped step, the graph keeps an empty :class:`Holder`. The first
holder of step k that is asked for its tensor makes the tape recover step k: it finds the nearest state it knows above,
and undoes one step at a time. Each undoing evaluates the step's function once, which serves both to invert the step and
to refill its holders, in the order in which they were made.

States are numbered like fence posts: step k leads from state k to state k + 1. State k holds the streams
k, ..., k + m - 1; step k merges stream k away and appends stream k + m.
"""

from __future__ import annotations

import math
import threading
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from revlib import loop
from revlib.record import FOR_GOOD, Holder, Record, Saved
from revlib.replay import Autocast, Randomness
from revlib.step import State, evaluate, merge

__all__ = ["Tape"]


@dataclass
class Cursor:
    """How far a graph task has come: the lowest state it knows, and the steps it has recovered."""

    index: int = -1
    state: State = ()
    done: set[int] = field(default_factory=set)
    witnesses: list[loop.Witness] = field(default_factory=list)


def _task() -> tuple[int, bool]:
    """The running graph task (-1: none), and whether it keeps its graph for another pass."""
    task = torch._C._current_graph_task_id()
    return task, task == -1 or torch._C._autograd._get_current_graph_task_keep_graph()


class Tape:
    """The memory of one forward pass through a stack of m streams, shared by all backward passes through its graph."""

    def __init__(self, m: int, randomness: Randomness, autocast: Autocast, tolerance: float | None) -> None:
        self.m, self.randomness, self.autocast, self.tolerance = m, randomness, autocast, tolerance
        self.sampler = loop.Sampler()
        self.records: list[Record] = []
        self.kept: dict[int, Saved] = {}  # the streams of the kept states
        self.states: set[int] = set()
        self.cursors: dict[Any, Cursor] = {}
        self.watched: set[int] = set()
        self.dtypes: set[torch.dtype] = set()
        self.finite: Tensor | None = None  # whether the last state is
        self.lock = threading.RLock()

    # ------------------------------------------------------------------------------------------ forward
    def keep(self, index: int, state: State) -> None:
        """Store a whole state; neighbouring states share their streams."""
        self.states.add(index)
        for i, stream in enumerate(state, index):
            if i not in self.kept:
                self.kept[i] = Saved(stream)

    def advance(self, record: Record, state: State, context: dict[str, Any]) -> State:
        """The first run of a step."""
        k, (s, *inputs) = len(self.records), state
        self.records.append(record)
        record.observe(state)
        hooks = saved_tensors_hooks(record.packer(k), self.unpack) if record.dropped else nullcontext()
        try:
            with self.randomness.recording(record.drawn), self.autocast.replaying(), hooks:
                f = evaluate(record.branch, tuple(inputs), context)
            record.module.seal()
            record.split = len(record.holders)
            if record.guarded:
                guard = partial(_before_gradient, weakref.ref(self), k)
                f = guard(f) if isinstance(f, Tensor) else tree_map(guard, f)
            with hooks:
                merged = merge(record.branch, s, f)
        finally:
            for holder in record.living():
                holder.fresh = None
        self.dtypes.update(t.dtype for t in (s, merged, *tree_leaves(f)))
        if record.dropped and self.tolerance != math.inf:
            record.sample = self.sampler(merged if record.repeated else s)
            if k == 0 and len(record.holders) == record.split:
                # No function sees the first stream: it may be tiny beside what is merged into it.
                record.reference = self.sampler(merged)
        return (*inputs, merged)

    def end(self, state: State) -> None:
        """After the last step."""
        if self.tolerance != math.inf:
            with torch.no_grad():
                self.finite = torch.stack([s.sum(dtype=loop.wide(s)).isfinite() for s in state]).all()

    # ------------------------------------------------------------------------------------------ backward
    def unpack(self, holder: Holder) -> Tensor:
        if holder.fresh is not None:
            return holder.fresh.get()
        task, keeps = _task()
        value = holder.get(task)
        if value is None:
            with self.lock:
                self.recover(holder.step, task, keeps)
            value = holder.get(task)
            if task == -1:
                self.forget(task)
            assert value is not None, "a holder of a recovered step is empty"
        return value

    def before_gradient(self, k: int) -> None:
        """Recover step k before any gradient enters its function: an optimizer may step inside backward."""
        task, keeps = _task()
        with self.lock:
            cursors = (self.cursors.get(FOR_GOOD), self.cursors.get(task))
            if not any(c is not None and k in c.done for c in cursors):
                self.recover(k, task, keeps)

    def recover(self, k: int, task: int, keeps: bool) -> None:
        """Refill the holders of step k, undoing the steps above it that this task has not undone yet."""
        key = task if keeps else FOR_GOOD
        cursor = self.cursors.setdefault(key, Cursor())
        if task != -1 and task not in self.watched:
            self.watched.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(partial(self.finish, task, key))
        try:
            if keeps:  # nodes of other steps have run; should one still ask, it is served by another recovery
                self._clear(key, cursor.done - {k})
            self._start(k, cursor, consume=not keeps)
            if cursor.index == k:
                self._repeat(k, cursor, key)
            while cursor.index > k:  # what is recovered for this task alone need not be kept on the way
                self._undo(cursor.index - 1, cursor, key, fill=not keeps or cursor.index - 1 == k)
        except BaseException:
            if keeps:
                self.forget(key)
            raise

    def _start(self, k: int, cursor: Cursor, *, consume: bool) -> None:
        """Put the cursor on the nearest known state from k upwards; a kept one is exact, so it wins a tie."""
        kept = min((j for j in self.states if j >= k), default=None)
        if kept is not None and (cursor.index < k or kept <= cursor.index):
            cursor.index, cursor.state = kept, tuple(self.kept[i].get() for i in range(kept, kept + self.m))
            if consume:  # autograd releases the graph as it goes, and this with it
                self.states.discard(kept)
                needed = {i for j in self.states for i in range(j, j + self.m)}
                self.kept = {i: saved for i, saved in self.kept.items() if i in needed}
        elif cursor.index < k and self.cursors.get(FOR_GOOD, cursor).index >= k:  # where an earlier task has left off
            cursor.index, cursor.state = self.cursors[FOR_GOOD].index, self.cursors[FOR_GOOD].state
        elif cursor.index < k:
            raise RuntimeError(
                "backward asked a reversible sequence for activations that it has released, or has not made yet. "
                "Specify retain_graph=True to go backward a second time; differentiate only after its forward is done."
            )

    def _undo(self, k: int, cursor: Cursor, key: Any, *, fill: bool) -> None:
        """From state k + 1 to state k."""
        record, (*inputs, merged) = self.records[k], cursor.state
        with self.autocast.replaying():
            f = self._evaluate(record, tuple(inputs), key, fill=fill)
            with torch.no_grad():
                s = record.branch.coupling.unmerge(merged, tree_map(Tensor.detach, f)).to(record.dtype)
                if s.stride() != record.stride and record.dense:  # kernels may depend on the layout
                    s = torch.empty_strided(s.shape, record.stride, dtype=s.dtype, device=s.device).copy_(s)
            if len(record.holders) > record.split:
                again = s.detach().requires_grad_(record.needs[0])
                record.refill(key, slice(record.split, None), partial(merge, record.branch, again, f), fill=fill)
        if not record.repeated:  # whose sample is of the stream it makes, not of the one it merges away
            self._witness(record, s, cursor)
        cursor.index, cursor.state = k, (s, *inputs)
        if fill:
            cursor.done.add(k)

    def _repeat(self, k: int, cursor: Cursor, key: Any) -> None:
        """Step k once more, from state k."""
        record, (s, *inputs) = self.records[k], cursor.state
        with self.autocast.replaying():
            f = self._evaluate(record, tuple(inputs), key, fill=True)
            again = s.detach().requires_grad_(record.needs[0])
            run = partial(merge, record.branch, again, f)
            merged = record.refill(key, slice(record.split, None), run, fill=True)
        self._witness(record, merged, cursor)
        cursor.done.add(k)

    def _evaluate(self, record: Record, inputs: State, key: Any, *, fill: bool) -> Any:
        record.check()
        inputs = tuple(t.detach().requires_grad_(n) for t, n in zip(inputs, record.needs[1:], strict=True))
        with self.randomness.replaying(record.drawn), record.module.bound():
            context = tree_map(lambda leaf: leaf, record.context) if record.context else {}
            run = partial(evaluate, record.branch, inputs, context)
            return record.refill(key, slice(0, record.split), run, fill=fill)

    # ------------------------------------------------------------------------------------------ endings
    def _witness(self, record: Record, stream: Tensor, cursor: Cursor) -> None:
        if record.sample is not None:
            cursor.witnesses.append(
                loop.Witness(record.branch.name, record.sample, self.sampler(stream), record.reference)
            )

    def finish(self, task: int, key: Any) -> None:
        """At the end of a graph task: compare what it recovered, and release what was recovered for it alone."""
        self.watched.discard(task)
        cursor = self.cursors[key]
        witnesses, cursor.witnesses = cursor.witnesses, []
        if key is not FOR_GOOD:
            self.forget(key)
        elif all(k in cursor.done or not r.guarded for k, r in enumerate(self.records)):
            # All is recovered for good. A module may hold a tensor whose graph holds this tape: let go of the module.
            self.records, cursor.state = [], ()
        loop.close(witnesses, self.tolerance, self.dtypes, self.finite)

    def forget(self, key: Any) -> None:
        cursor = self.cursors.pop(key, None)
        if cursor is not None:
            self._clear(key, cursor.done)

    def _clear(self, key: Any, steps: set[int]) -> None:
        for k in steps:
            for holder in self.records[k].living():
                holder.values.pop(key, None)
        steps.clear()


def _before_gradient(tape: weakref.ref[Tape], k: int, t: Any) -> Any:
    """A view of what a function returned, whose gradient reaches the tape before it reaches the function."""
    if not isinstance(t, Tensor) or not t.requires_grad:
        return t
    view = t.view_as(t)  # its own node: the function may have returned a stream, a parameter or a captured tensor

    def hook(_: Tensor) -> None:
        alive = tape()
        if alive is not None:
            alive.before_gradient(k)

    view.register_hook(hook)
    return view
