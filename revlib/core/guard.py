"""The protocol through which a pass is watched, without the core knowing what is watched or why.

A *pass* is one forward through a stack, with every backward through its graph. The core asks the guard of a pass for
one :class:`StepGuard` per step, calls that at fixed points, and does nothing else with it.

A guard must not keep a tensor of the graph alive: after an exception in forward the graph holds the tape, and the tape
holds the guard. Therefore :class:`StepView`, which a guard may keep, holds no such tensor, and :class:`FirstRun`, which
holds some, must not be kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from revlib.core.saved_tensors import Placeholder
from revlib.step import BoundStep, Layout, State

__all__ = ["FirstRun", "Guard", "StepGuard", "StepView"]


class StepView(NamedTuple):
    """What a guard may keep of a step."""

    number: int
    step: BoundStep
    context: dict[str, Any]
    dropped: bool  # the tensors that autograd saves for it are replaced by placeholders
    streams_kept: bool  # what it takes away is kept, so that backward need not invert it
    layout: Layout
    numbers: tuple[int, ...]  # of the streams before the step
    new: tuple[int, ...]  # and of those that it makes


class FirstRun(NamedTuple):
    """What a step did in forward. It exists while the tensors that autograd saved are alive."""

    state: State  # the streams before the step
    taken: State  # those of them that the step takes away
    result: Sequence[Any]  # the tensors among what the function returned
    made: State  # the new streams
    saved: list[tuple[int, Placeholder]]  # what autograd saved: its position and its placeholder
    function_saves: int  # the function saved the tensors before this position, merge the others


class StepGuard:
    """Watches one step. Every method does nothing unless it is overridden."""

    def enter_first_run(self) -> None:
        """Before the step runs in forward."""

    def first_run_done(self, run: FirstRun) -> None:
        """After the step has run in forward without an exception, while what it saved is alive."""

    def exit_first_run(self) -> None:
        """After the step has run in forward, also after an exception. Must not raise."""

    def saved_tensors_dropped(self) -> None:
        """After the first run, when nothing but the user holds the tensors that the step has saved."""

    def needs_end(self) -> bool:
        """After the first run: whether a repetition must go on to the end of the function, where it could stop once it
        has saved the last tensor, because what comes after that changes what was saved."""
        return False

    def check(self) -> None:
        """Before a repetition: raises if the function would not do again what it did. Must not change anything."""

    def enter_repetition(self) -> None:
        """Before the function runs again."""

    def exit_repetition(self) -> None:
        """After the function has run again, also after an exception. Must not raise."""

    def repeated(
        self, key: Hashable, inputs: State, saved: Sequence[Tensor], streams: State
    ) -> None:
        """After a repetition within the pass ``key``.

        Args:
            inputs: the streams that the step ran on.
            saved: what autograd saved this time.
            streams: the streams that inversion gave back; none where they were kept.
        """


class Guard:
    """Watches one pass. Every method does nothing unless it is overridden."""

    def step(self, view: StepView, state: State) -> StepGuard | None:
        """Before a step runs in forward on these streams. -> the guard of the step, if there is anything to watch."""
        return None

    def forward_done(self, state: State) -> None:
        """After the last step of forward."""

    def backward_done(self, key: Hashable) -> None:
        """At the end of the backward pass ``key``. May raise."""

    def forget(self, key: Hashable) -> None:
        """What was recovered for the pass ``key`` has been dropped, as it is after an exception."""
