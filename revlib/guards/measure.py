"""Measuring what the activations of each step would take to keep. It watches only, and refuses nothing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from revlib._torch import storage_id, tree_leaves
from revlib.core.guard import FirstRun, Guard, StepGuard, StepView
from revlib.guards.modules import ModuleTree, current_tree
from revlib.step import State, apart, together
from revlib.tensors import is_parameter

__all__ = ["Measure", "StepCost"]


class StepCost(NamedTuple):
    """What keeping the activations of a step would take."""

    own: int  # bytes that this step alone would keep
    saved: frozenset[int]  # streams, by number, which other steps may keep as well
    before: tuple[int, ...]  # the streams before the step, by number
    taken: tuple[int, ...]  # those of them that it takes away
    after: tuple[int, ...]  # the streams after it
    bytes: dict[int, int]  # of all of these


class Measure(Guard):
    """Appends the cost of each step to a list."""

    def __init__(self, into: list[StepCost]) -> None:
        self.into = into

    def step(self, view: StepView, state: State) -> StepGuard:
        return _StepMeasure(view, self.into)


class _StepMeasure(StepGuard):
    def __init__(self, view: StepView, into: list[StepCost]) -> None:
        self.view, self.into = view, into
        self.tree: ModuleTree = current_tree(view.step)

    def first_run_done(self, run: FirstRun) -> None:
        view = self.view
        state = dict(zip((*view.numbers, *view.new), (*run.state, *run.made), strict=True))
        there = [
            t
            for m in self.tree.modules
            for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
        ]
        there += [t for t in tree_leaves(view.context) if isinstance(t, Tensor)]
        counted = {storage_id(t) for t in there}
        streams = {storage_id(t): i for i, t in state.items()}
        own, saved = 0, set[int]()
        for _, placeholder in run.saved:
            t = placeholder.tensor
            if t is None or is_parameter(t):
                continue
            storage = storage_id(t)
            if storage in streams:
                saved.add(streams[storage])
            elif storage not in counted:
                own += t.untyped_storage().nbytes() if storage > 0 else t.nbytes
                counted.add(storage)
        taken, others = apart(view.numbers, view.layout.taken)
        after = together(view.new, view.layout.made, others)
        sizes = {i: t.nbytes for i, t in state.items()}
        self.into.append(StepCost(own, frozenset(saved), view.numbers, taken, after, sizes))
