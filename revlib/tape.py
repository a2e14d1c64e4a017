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

from revlib import loop, streams
from revlib.record import Record, Weight, intercept
from revlib.replay import Autocast, Randomness
from revlib.saved import FOR_GOOD, Holder, Shelf
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

    def __init__(
        self,
        m: int,
        randomness: Randomness,
        autocast: Autocast,
        tolerance: float | None,
        pace: streams.Pace | None,
        weights: list[Weight] | None,
    ) -> None:
        self.randomness, self.autocast, self.tolerance = randomness, autocast, tolerance
        self.pace, self.weights = pace, weights
        self.sampler = loop.Sampler()
        self.records: list[Record] = []
        self.shelf = Shelf(m)
        self.cursors: dict[Any, Cursor] = {}
        self.watched: set[int] = set()
        self.launches: dict[int, streams.Launch] = {}  # by the step they recover
        self.lowest = -1  # step that backward may evaluate
        self.dtypes: set[torch.dtype] = set()
        self.finite: Tensor | None = None  # whether the last state is
        self.lock = threading.RLock()

    # ------------------------------------------------------------------------------------------ forward
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
                guard = partial(intercept, weakref.WeakMethod(self.before_gradient), k)
                f = guard(f) if isinstance(f, Tensor) else tree_map(guard, f)
            with hooks:
                merged = merge(record.branch, s, f)
            if record.dropped and self.tolerance != math.inf:
                record.sample(self.sampler, s, merged, unseen=k == 0 and len(record.holders) == record.split)
            if self.weights is not None:
                self.weights.append(record.weigh(k, (*state, merged)))
        finally:
            for holder in record.living():
                holder.fresh = None
        self.dtypes.update(t.dtype for t in (s, merged, *tree_leaves(f)))
        return (*inputs, merged)

    def end(self, state: State) -> None:
        """After the last step."""
        self.lowest = next((k for k, record in enumerate(self.records) if record.guarded), -1)
        if self.pace and not all(streams.driver.serves(s) and s.device == state[0].device for s in state):
            self.pace = None
        self.device = state[0].device
        if self.tolerance != math.inf:
            with torch.no_grad():
                sums = [s.sum(dtype=loop.wide(s)).isfinite().to(self.device) for s in state]
                self.finite = torch.stack(sums).all()

    # ------------------------------------------------------------------------------------------ backward
    def unpack(self, holder: Holder) -> Tensor:
        if holder.fresh is not None:
            return holder.fresh.get()
        task, keeps = _task()
        value = holder.get(task)
        if value is None or holder.step in self.launches:
            self.need(holder.step, task, keeps)
            value = holder.get(task)
            if task == -1:
                self.forget(task)
            assert value is not None, "a holder of a recovered step is empty"
        return value

    def before_gradient(self, k: int) -> None:
        """Recover step k before any gradient enters its function: an optimizer may step inside backward."""
        self.need(k, *_task())

    def need(self, k: int, task: int, keeps: bool) -> None:
        """Have step k recovered, and with a side stream the next one on its way."""
        with self.lock:
            launch = self.launches.pop(k, None)
            if launch is not None:
                launch.join()
            cursors = (self.cursors.get(FOR_GOOD), self.cursors.get(task))
            if not any(c is not None and k in c.done for c in cursors):
                self.recover(k, task, keeps)
            if self.pace and not keeps:
                if k == self.lowest:
                    self.pace.ended(self.device)
                elif self.pace.ahead:
                    self.look_ahead(k - 1, self.pace)

    def look_ahead(self, k: int, pace: streams.Pace) -> None:
        """Recover step k on a side stream, next to the gradients of the step above."""
        cursor = self.cursors[FOR_GOOD]
        if cursor.index == k + 1 and self.records[k].guarded and k not in self.launches:
            work = partial(self._run, k, cursor, FOR_GOOD, fill=True)
            launch = self.launches[k] = streams.Launch(self.device, work, held=(cursor.state, self.records[k]))
            if launch.failure is not None:  # for whoever needs the step, if anyone does
                pace.failed(launch.failure)

    def recover(self, k: int, task: int, keeps: bool) -> None:
        """Refill the holders of step k, undoing the steps above it that this task has not undone yet."""
        key = task if keeps else FOR_GOOD
        cursor = self.cursors.setdefault(key, Cursor())
        if task != -1 and task not in self.watched:
            self.watched.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(partial(self.finish, task, key))
            if self.pace and not keeps:
                self.pace.started(self.device)
        try:
            if keeps:  # nodes of other steps have run; should one still ask, it is served by another recovery
                self._clear(key, cursor.done - {k})
            self._start(k, cursor, consume=not keeps)
            if cursor.index == k:
                self._run(k, cursor, key, fill=True)
            while cursor.index > k:  # what is recovered for this task alone need not be kept on the way
                self._run(cursor.index - 1, cursor, key, fill=not keeps or cursor.index - 1 == k)
        except BaseException:
            if keeps:
                self.forget(key)
            raise

    def _start(self, k: int, cursor: Cursor, *, consume: bool) -> None:
        """Put the cursor on the nearest known state from k upwards; a kept one is exact, so it wins a tie."""
        kept = self.shelf.nearest(k)
        if kept is not None and (cursor.index < k or kept <= cursor.index):
            cursor.index, cursor.state = kept, self.shelf.state(kept)
            if consume and not (kept < len(self.records) and self.records[kept].guarded):  # step `kept` repeats from it
                self.shelf.drop(kept)  # autograd releases the graph as it goes, and this with it
        elif cursor.index < k and self.cursors.get(FOR_GOOD, cursor).index >= k:  # where an earlier task has left off
            cursor.index, cursor.state = self.cursors[FOR_GOOD].index, self.cursors[FOR_GOOD].state
        elif cursor.index < k:
            raise RuntimeError(
                "backward asked a reversible sequence for activations that it has released, or has not made yet. "
                "Specify retain_graph=True to go backward a second time; differentiate only after its forward is done."
            )

    def _run(self, k: int, cursor: Cursor, key: Any, *, fill: bool) -> None:
        """Recover step k from the state after it or, if the cursor is there already, the state before it."""
        record = self.records[k]
        before = cursor.index == k
        inputs = cursor.state[1:] if before else cursor.state[:-1]
        known, merged = (cursor.state[0], None) if before else (self.shelf.stream(k), cursor.state[-1])
        with self.autocast.replaying():
            s, found = record.again(inputs, known, merged, key, self.randomness, fill=fill)
        for i, sample in record.samples.items():
            if i in found:
                again, reference = self.sampler(found[i]), record.reference
                cursor.witnesses.append(loop.Witness(record.branch.name, sample, again, reference))
        cursor.index, cursor.state = k, (s, *inputs)
        if fill:
            cursor.done.add(k)
            if key is FOR_GOOD:
                self.shelf.drop(k)

    # ------------------------------------------------------------------------------------------ endings
    def finish(self, task: int, key: Any) -> None:
        """At the end of a graph task: compare what it recovered, and release what was recovered for it alone."""
        self.watched.discard(task)
        while self.launches:
            self.launches.popitem()[1].join()
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
