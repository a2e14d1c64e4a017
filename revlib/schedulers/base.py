"""What a scheduler is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from revlib import engine
from revlib.engine import Extras, Plan
from revlib.step import Branch, State, exporting

__all__ = ["Scheduler", "checked", "signature"]


class Scheduler(ABC):
    """What forward keeps, so that backward can have the rest.

    Subclasses are frozen dataclasses that define :meth:`plan`. ``tolerance`` is the relative error up to which backward
    may recover a stream: ``None`` for the default of its precision (see :func:`revlib.loop.default_tolerance`),
    ``math.inf`` to compare nothing.
    """

    tolerance: float | None = None

    @abstractmethod
    def plan(self, length: int) -> Plan:
        """What to keep of a stack of ``length`` steps."""

    def prepare(self, branches: Sequence[Branch], state: State) -> tuple[Plan, Extras]:
        """What to keep in this very forward, and what else it needs; override it where the plan depends on them."""
        plan = self.plan(len(branches))
        if not isinstance(plan, Plan):
            raise TypeError(f"{type(self).__name__}.plan(length) must return a Plan, got {type(plan).__name__}")
        return plan, Extras(self.tolerance)

    def run(self, branches: Sequence[Branch], state: State, context: Mapping[str, Any]) -> State:
        """Run the steps on ``state``."""
        if exporting():  # nothing is kept for a backward, and what prepares for one cannot be traced
            return engine.run(branches, state, context, Plan())
        return engine.run(branches, state, context, *self.prepare(branches, state))


def checked(scheduler: Any, name: str) -> Scheduler:
    if not isinstance(scheduler, Scheduler):
        raise TypeError(
            f"{name} must be a value from revlib.schedulers such as Reversible(), got {scheduler!r}"
            + ("; call it to make one" if isinstance(scheduler, type) else "")
        )
    return scheduler


def signature(branches: Sequence[Branch], state: State) -> tuple[Hashable, ...]:
    """Forwards that have it in common take the same memory and time."""
    owners = [b.owner for b in branches]
    functions = tuple(
        (id(f), f.training) if isinstance(f, nn.Module) else b.name for b, f in zip(branches, owners, strict=True)
    )
    streams = tuple((s.shape, s.dtype, s.device, s.requires_grad) for s in state)
    kind = state[0].device.type
    autocast = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
    return functions, streams, autocast
