"""What a scheduler is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from revlib import engine
from revlib._numbers import real
from revlib._torch import exporting, tracing
from revlib.engine import PassOptions, Plan
from revlib.step import BoundStep, State

__all__ = ["Scheduler", "Wrapper", "checked", "signature"]


class Scheduler(ABC):
    """What forward keeps, so that backward can recover the rest.

    Subclasses are frozen dataclasses that define :meth:`plan`. ``tolerance`` is the relative error up to which backward
    may recover a stream: ``None`` for the default of its precision (float64 6e-8, float32 1.4e-3, float16 0.13,
    bfloat16 0.35), ``math.inf`` to compare nothing.

    Cost: memory for what the plan keeps. In backward, each step whose activations it does not keep runs once more.

    Raises:
        TypeError: in forward, if :meth:`plan` returns anything but a :class:`~revlib.schedulers.Plan`.
        ValueError: for a tolerance that is no number from 0 up; in forward, if some step could not be recovered from
            what the plan keeps.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class KeepFirst(Scheduler):  # the activations of the first k steps, and the last state
        ...     k: int
        ...
        ...     def plan(self, length: int) -> Plan:
        ...         return Plan(activations=range(min(self.k, length)), states=[length])
        >>> KeepFirst(2).plan(6)
        Plan(activations=range(0, 2), states=[6], streams=())
    """

    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            accepts = lambda t: t >= 0 and not math.isnan(t)  # noqa: E731
            wanted = "a number from 0 up, or None for the default"
            real(f"{type(self).__name__}(tolerance=...)", self.tolerance, accepts, wanted)

    @abstractmethod
    def plan(self, length: int) -> Plan:
        """What to keep of a stack of ``length`` steps."""

    def prepare(self, steps: Sequence[BoundStep], state: State) -> tuple[Plan, PassOptions]:
        """The plan of this forward, and other options of its pass. Override it if they depend on steps or streams."""
        plan = self.plan(len(steps))
        if not isinstance(plan, Plan):
            raise TypeError(
                f"{type(self).__name__}.plan(length) must return a Plan, got {type(plan).__name__}"
            )
        return plan, PassOptions(self.tolerance)

    def run(self, steps: Sequence[BoundStep], state: State, context: Mapping[str, Any]) -> State:
        """Run the steps on ``state`` and return the last state. A stack's forward calls this."""
        # Without gradients there is no backward to keep anything for; a trace keeps everything itself.
        if exporting() or tracing() or not torch.is_grad_enabled():
            return engine.run(steps, state, context, Plan())
        if torch.compiler.is_compiling() and not self.keeps_all(len(steps)):
            # The compiler cannot trace placeholders, so it must leave the stack alone. The functions that tell it so
            # load the compiler, and are therefore imported only here.
            from revlib.uncompiled import run_uncompiled

            return run_uncompiled(self, steps, state, context)
        return self.record(steps, state, context)

    def record(self, steps: Sequence[BoundStep], state: State, context: Mapping[str, Any]) -> State:
        """Run the steps, outside of the compiler, and keep what the plan says."""
        return engine.run(steps, state, context, *self.prepare(steps, state))

    def keeps_all(self, length: int) -> bool:
        """Whether every activation of such a stack is kept. Then it is plain autograd, and can be compiled."""
        kept = self.plan(length).activations
        return all(k in kept for k in range(length))


class Wrapper(Scheduler):
    """A scheduler that leaves some steps, or all, to another one. It tolerates the errors that the other one does."""

    @property
    @abstractmethod
    def inner(self) -> Scheduler:
        """The scheduler that this one leaves steps to."""

    @property
    def tolerance(self) -> float | None:  # type: ignore[override]
        return self.inner.tolerance


def checked(scheduler: object, name: str) -> Scheduler:
    if not isinstance(scheduler, Scheduler):
        raise TypeError(
            f"{name} must be a value from revlib.schedulers such as Reversible(), got {scheduler!r}"
            + ("; call it to make one" if isinstance(scheduler, type) else "")
        )
    return scheduler


class Signature(NamedTuple):
    """What a forward runs on. Two forwards of the same signature take the same memory and time."""

    functions: tuple[Hashable, ...]
    streams: tuple[tuple[torch.Size, torch.dtype, torch.device, bool], ...]
    autocast: torch.dtype | None


def signature(steps: Sequence[BoundStep], state: State) -> Signature:
    owners = [step.owner for step in steps]
    functions = tuple(
        (id(f), f.training, step.name) if isinstance(f, nn.Module) else step.name
        for step, f in zip(steps, owners, strict=True)
    )
    streams = tuple((s.shape, s.dtype, s.device, s.requires_grad) for s in state)
    kind = state[0].device.type
    autocast = (
        torch.get_autocast_dtype(kind)
        if kind != "meta" and torch.is_autocast_enabled(kind)
        else None
    )
    return Signature(functions, streams, autocast)
