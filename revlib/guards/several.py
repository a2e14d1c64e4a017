"""Several guards of one pass as one, and one guard around a function that no tape runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from revlib.core.guard import FirstRun, Guard, StepGuard, StepView
from revlib.step import State

__all__ = ["Guards", "StepGuards", "first_run", "repetition"]


class Guards(Guard):
    """Several guards of one pass: entered in order, and left in reverse order."""

    def __init__(self, guards: Sequence[Guard]) -> None:
        self.guards = guards

    def step(self, view: StepView, state: State) -> StepGuards:
        return StepGuards(
            [g for guard in self.guards if (g := guard.step(view, state)) is not None]
        )

    def forward_done(self, state: State) -> None:
        for guard in self.guards:
            guard.forward_done(state)

    def backward_done(self, key: Hashable) -> None:
        for guard in self.guards:
            guard.backward_done(key)

    def forget(self, key: Hashable) -> None:
        for guard in self.guards:
            guard.forget(key)


class _Acting(NamedTuple):
    """The places, among some guards, of those that do something at each point."""

    first_run: tuple[int, ...]
    first_run_done: tuple[int, ...]
    saved_tensors_dropped: tuple[int, ...]
    needs_end: tuple[int, ...]
    check: tuple[int, ...]
    repetition: tuple[int, ...]
    repeated: tuple[int, ...]


@lru_cache(maxsize=64)
def _acting(kinds: tuple[type[StepGuard], ...]) -> _Acting:
    def places(*methods: str) -> tuple[int, ...]:
        idle = [getattr(StepGuard, name) for name in methods]
        return tuple(
            i for i, kind in enumerate(kinds) if [getattr(kind, name) for name in methods] != idle
        )

    return _Acting(
        first_run=places("enter_first_run", "exit_first_run"),
        first_run_done=places("first_run_done"),
        saved_tensors_dropped=places("saved_tensors_dropped"),
        needs_end=places("needs_end"),
        check=places("check"),
        repetition=places("enter_repetition", "exit_repetition"),
        repeated=places("repeated"),
    )


class StepGuards(StepGuard):
    """Asks only those that do something: of five guards, one or two at most points."""

    def __init__(self, guards: list[StepGuard]) -> None:
        self.guards, self.acting = guards, _acting(tuple(map(type, guards)))
        self.entered: list[StepGuard] = []

    def enter_first_run(self) -> None:
        for i in self.acting.first_run:
            self.guards[i].enter_first_run()
            self.entered.append(self.guards[i])

    def first_run_done(self, run: FirstRun) -> None:
        for i in self.acting.first_run_done:
            self.guards[i].first_run_done(run)

    def exit_first_run(self) -> None:
        while self.entered:
            self.entered.pop().exit_first_run()

    def saved_tensors_dropped(self) -> None:
        for i in self.acting.saved_tensors_dropped:
            self.guards[i].saved_tensors_dropped()

    def needs_end(self) -> bool:
        return any(self.guards[i].needs_end() for i in self.acting.needs_end)

    def check(self) -> None:
        for i in self.acting.check:
            self.guards[i].check()

    def enter_repetition(self) -> None:
        for i in self.acting.repetition:
            self.guards[i].enter_repetition()
            self.entered.append(self.guards[i])

    def exit_repetition(self) -> None:
        while self.entered:
            self.entered.pop().exit_repetition()

    def repeated(
        self, key: Hashable, inputs: State, saved: Sequence[Tensor], streams: State
    ) -> None:
        for i in self.acting.repeated:
            self.guards[i].repeated(key, inputs, saved, streams)


def first_run(guard: StepGuard) -> AbstractContextManager[None]:
    """Around the first run of a function, for whoever runs it outside of a tape."""
    return _between(guard.enter_first_run, guard.exit_first_run)


def repetition(guard: StepGuard) -> AbstractContextManager[None]:
    """Around a repetition of a function, for whoever runs it outside of a tape."""
    return _between(guard.enter_repetition, guard.exit_repetition)


@contextmanager
def _between(enter: Callable[[], None], leave: Callable[[], None]) -> Iterator[None]:
    try:
        enter()
        yield
    finally:
        leave()
