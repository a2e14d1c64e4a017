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
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from revlib import loop, streams
from revlib.record import Record, Weight, intercept
from revlib.replay import Autocast, Randomness, Settings
from revlib.saved import FOR_GOOD, Cursor, Holder, Shelf, graph_task, surrounding
from revlib.step import State, evaluate, merge
from revlib.tensors import local

__all__ = ["Tape"]


class Tape:
    """The memory of one forward pass through so many steps on m streams, shared by all backward passes of its graph."""

    def __init__(
        self,
        m: int,
        steps: int,
        randomness: Randomness,
        autocast: Autocast,
        tolerance: float | None,
        pace: streams.Pace | None,
        weights: list[Weight] | None,
    ) -> None:
        self.randomness, self.autocast, self.tolerance = randomness, autocast, tolerance
        self.pace, self.weights = pace, weights
        self.settings, self.steps, self.sampler = Settings(), steps, loop.Sampler(steps)
        self.records: list[Record] = []
        self.shelf = Shelf(m)
        self.cursors: dict[Any, Cursor] = {}
        self.watched: set[int] = set()
        self.launches: dict[int, streams.Launch] = {}  # the one under way, by the steps it recovers
        self.lowest = -1  # step that backward may evaluate
        self.dtypes: set[torch.dtype] = set()
        self.finite: Tensor | None = None  # whether the last state is
        self.extents: list[loop.Extent] = []
        self.lock = threading.RLock()
        self.outer = surrounding(Tape)  # it has to recover what this one starts from

    @property
    def exact(self) -> bool:
        """Whether every step is, here and around."""
        outer = self.outer() if self.outer else None
        return len(self.extents) == self.steps and (self.outer is None or (outer is not None and outer.exact))

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
            with hooks:
                merged = merge(record.branch, s, f)
            if record.guarded:
                intercept(weakref.WeakMethod(self.before_gradient), k, merged)
            if record.dropped and self.tolerance != math.inf:
                record.sample(self.sampler, s, merged, unseen=k == 0 and len(record.holders) == record.split)
            if self.weights is not None:
                self.weights.append(record.weigh(k, (*state, merged)))
        finally:
            record.close()
        self.dtypes.update(t.dtype for t in (s, merged, *tree_leaves(f)))
        self.extents += loop.extents(record.branch.name, merged, record.branch.coupling.limit_of(merged.dtype))
        return (*inputs, merged)

    def end(self, state: State) -> None:
        """After the last step."""
        self.lowest = next((k for k, record in enumerate(self.records) if record.guarded), -1)
        self.device = state[0].device
        if not all(streams.driver.serves(s) and s.device == self.device for s in state):
            self.pace = None
        if self.tolerance != math.inf:
            with torch.no_grad():
                sums = [local(s).sum(dtype=loop.wide(s)).isfinite().to(self.device) for s in state]
                self.finite = torch.stack(sums).all()

    # ------------------------------------------------------------------------------------------ backward
    @torch.compiler.disable
    def unpack(self, holder: Holder) -> Tensor:
        if holder.fresh is not None:
            return holder.fresh.get()
        task, keeps = graph_task()
        value = holder.get(task)
        if value is None or holder.step in self.launches:
            self.need(holder.step, task, keeps)
            value = holder.get(task)
            if task == -1:
                self.forget(task)
            assert value is not None, "a holder of a recovered step is empty"
        if self.pace and self.pace.ahead and not keeps:
            self.look_ahead(holder.step - 1, task)
        return value

    @torch.compiler.disable
    def before_gradient(self, k: int) -> None:
        """Recover step k before any gradient enters its function: an optimizer may step inside backward."""
        self.need(k, *graph_task())

    def need(self, k: int, task: int, keeps: bool) -> None:
        """Have step k recovered."""
        with self.lock:
            cursors = (self.cursors.get(FOR_GOOD), self.cursors.get(task))
            done = any(c is not None and k in c.done for c in cursors)
            if done and k in self.launches:
                self.records[k].check()  # nobody may have edited meanwhile what it read
            if not done or k in self.launches:
                streams.settle(self.launches)
            if not done:
                self.recover(k, task, keeps)
            if self.pace and k == self.lowest:
                self.pace.ended(self.device)

    def look_ahead(self, k: int, task: int) -> None:
        """Recover step k on a side stream, next to the gradients of the step above."""
        with self.lock:
            cursor = self.cursors.get(FOR_GOOD)
            if not cursor or cursor.index != k + 1 or k < self.lowest or self.launches or not self.records[k].guarded:
                return
            lowest = k
            while lowest > self.lowest and not self.records[lowest].holders:  # nobody will ask for it
                lowest -= 1

            self.watch(task, FOR_GOOD)
            work = partial(self._descend, lowest, cursor, FOR_GOOD, keeps=False)
            launch = streams.Launch(self.device, work, held=(cursor.state, self.records[lowest : k + 1]))
            self.launches.update(dict.fromkeys(range(lowest, k + 1), launch))
            if launch.failure is not None and self.pace:  # for whoever needs the step, if anyone does
                self.pace.failed(launch.failure)

    def watch(self, task: int, key: Any) -> None:
        """Have :meth:`finish` called at the end of a graph task."""
        if task != -1 and task not in self.watched:
            self.watched.add(task)
            ending = partial(self.finish, task, key)
            weakref.finalize(ending, streams.settle, self.launches)  # after an exception in backward it is only dropped
            if key is not FOR_GOOD:
                weakref.finalize(ending, self.forget, key)
            torch.autograd.Variable._execution_engine.queue_callback(ending)
            if self.pace and key is FOR_GOOD:
                self.pace.started(self.device)

    def recover(self, k: int, task: int, keeps: bool) -> None:
        """Refill the holders of step k, undoing the steps above it that this task has not undone yet."""
        key = task if keeps else FOR_GOOD
        cursor = self.cursors.setdefault(key, Cursor())
        self.watch(task, key)
        try:
            if keeps:  # nodes of other steps have run; should one still ask, it is served by another recovery
                self._clear(key, cursor.done - {k})
            self._start(k, cursor, consume=not keeps)
            if cursor.index == k:
                self._run(k, cursor, key, fill=True)
            self._descend(k, cursor, key, keeps=keeps)
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

    def _descend(self, k: int, cursor: Cursor, key: Any, *, keeps: bool) -> None:
        while cursor.index > k:  # what is recovered for this task alone need not be kept on the way
            self._run(cursor.index - 1, cursor, key, fill=not keeps or cursor.index - 1 == k)

    def _run(self, k: int, cursor: Cursor, key: Any, *, fill: bool) -> None:
        """Recover step k from the state after it or, if the cursor is there already, the state before it."""
        record = self.records[k]
        before = cursor.index == k
        inputs = cursor.state[1:] if before else cursor.state[:-1]
        known, merged = (cursor.state[0], None) if before else (self.shelf.stream(k), cursor.state[-1])
        with self.settings.replaying(), self.autocast.replaying():
            s, found = record.again(inputs, known, merged, key, self.randomness, fill=fill)
        for i in record.samples.keys() & found.keys():
            samples = record.samples[i], self.sampler(found[i]), record.reference
            cursor.witnesses.append(loop.Witness(record.branch.name, *samples))
        cursor.witnesses += record.read.compared(record.branch.name, inputs[0])
        cursor.index, cursor.state = k, (s, *inputs)
        if fill:
            cursor.done.add(k)
            if key is FOR_GOOD:
                self.shelf.drop(k)

    # ------------------------------------------------------------------------------------------ endings
    @torch.compiler.disable
    def finish(self, task: int, key: Any) -> None:
        """At the end of a graph task: compare what it recovered. What was recovered for it alone goes with the task."""
        self.watched.discard(task)
        streams.settle(self.launches)
        cursor = self.cursors[key]
        witnesses, cursor.witnesses = cursor.witnesses, []
        if key is FOR_GOOD and all(k in cursor.done or not r.guarded for k, r in enumerate(self.records)):
            # All is recovered for good. A module may hold a tensor whose graph holds this tape: let go of the module.
            self.records, cursor.state = [], ()
        loop.close(witnesses, self.extents, self.exact, self.tolerance, self.dtypes, self.finite)

    @torch.compiler.disable
    def forget(self, key: Any) -> None:
        cursor = self.cursors.pop(key, None)
        if cursor is not None and self.records:
            self._clear(key, cursor.done)

    def _clear(self, key: Any, steps: set[int]) -> None:
        for k in steps:
            for _, holder in self.records[k].living():
                holder.values.pop(key, None)
        steps.clear()
