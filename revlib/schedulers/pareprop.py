"""PaReprop: recover the next step on a side stream, next to the gradients of this one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from revlib import cuda_streams
from revlib._numbers import whole
from revlib.engine import PassOptions, Plan
from revlib.schedulers.base import Scheduler, Signature, Wrapper, checked, signature
from revlib.schedulers.plans import Reversible
from revlib.step import BoundStep, State

__all__ = ["PaReprop"]

# The first passes of each kind are not timed, since allocator and libraries still adapt to them.
_WARM = 2


@dataclass(frozen=True)
class PaReprop(Wrapper):
    """Overlap the recovery of each step with the gradients of the step above it, on a side CUDA stream.

    When the gradients of step k begin, step k - 1 is recovered next to them. That gains where single kernels leave the
    GPU partly idle. Where they fill it, two streams only share it; where the host is too slow to keep even one busy,
    there is nothing to share; and where memory is short, the look-ahead makes it shorter. So PaReprop measures: for
    each shape of input, its first backward passes run alternately with and without look-ahead, timed on the device,
    and the faster way is kept (without, if look-ahead ever runs out of memory, which costs that one launch and raises
    nothing). The host never waits for the device.

    Cost beside that of ``of``: the activations of one more step. For a pre-norm ViT that raises the peak by 6 stream
    tensors; kernels and gradients are the same. On a CPU, and for a backward pass that retains its graph, it is the
    same as ``of``. In a distributed run all ranks look ahead, without measuring: functions may communicate, and all
    ranks must then do so in the same order. While a CUDA graph is captured nothing can be timed; it looks ahead unless
    it has found out before that it should not.

    Args:
        of: what is kept, and so what there is to recover.
        trials: backward passes of each kind to time; 0 to look ahead always.

    Raises:
        TypeError: if ``of`` is no scheduler.
        ValueError: if ``trials`` is no whole number from 0 up.

    Source: Zhu and Mangalam, *PaReprop: Fast Parallelized Reversible Backpropagation*, 2023.

    Example:
        >>> PaReprop().plan(6) == Reversible().plan(6)  # the same is kept, and recovered beside the gradients
        True
    """

    of: Scheduler = field(default_factory=Reversible)
    trials: int = 5
    _tuners: dict[Signature, _Autotuner] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        checked(self.of, "PaReprop(of=...)")
        whole("PaReprop(trials=...)", self.trials, 0, of="backward passes")

    def __getstate__(self) -> dict[str, Any]:
        """Without what was measured, which holds for this process and device only."""
        return {**self.__dict__, "_tuners": {}}

    @property
    def inner(self) -> Scheduler:
        return self.of

    def plan(self, length: int) -> Plan:
        """The plan of the scheduler ``of``."""
        return self.of.plan(length)

    def prepare(self, steps: Sequence[BoundStep], state: State) -> tuple[Plan, PassOptions]:
        plan, options = self.of.prepare(steps, state)
        if steps and torch.is_grad_enabled() and cuda_streams.driver.serves(state[0]):
            key = signature(steps, state)
            if key not in self._tuners:
                if len(self._tuners) > 256:  # most are of shapes that never come again
                    self._tuners.clear()
                self._tuners[key] = _Autotuner(0 if _distributed() else self.trials)
            options = replace(options, look_ahead=self._tuners[key].policy())
        return plan, options


def _distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


class _Autotuner:
    """Backward passes of one kind of forward, timed with and without look-ahead until it is clear which is faster."""

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self.verdict: bool | None = None if passes else True
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.pending: list[tuple[bool, Any, Any]] = []

    def policy(self) -> cuda_streams.LookAheadPolicy:
        if cuda_streams.driver.capturing():
            return _TimedPass(self, self.verdict is not False, timed=False)
        while self.pending and self.pending[0][2].query():
            ahead, began, ended = self.pending.pop(0)
            self.seconds[ahead].append(began.elapsed_time(ended))
        if self.verdict is None and all(
            len(s) >= self.passes + _WARM for s in self.seconds.values()
        ):
            without, ahead_of_it = (
                statistics.median(self.seconds[kind][_WARM:]) for kind in (False, True)
            )
            self.verdict = ahead_of_it < without
            self.pending.clear()
        if self.verdict is not None:
            return _TimedPass(self, self.verdict, timed=False)
        # Take the kind that has been timed less. The two do not just alternate, since some forwards have no backward.
        counts = {
            k: len(s) + sum(ahead is k for ahead, _, _ in self.pending)
            for k, s in self.seconds.items()
        }
        return _TimedPass(self, counts[True] <= counts[False], timed=True)


class _TimedPass(cuda_streams.LookAheadPolicy):
    """One backward pass, with or without look-ahead."""

    def __init__(self, trial: _Autotuner, ahead: bool, *, timed: bool) -> None:
        self.trial, self.ahead, self.timed = trial, ahead, timed
        self.began: Any = None

    def started(self, device: torch.device) -> None:
        if self.timed:
            self.began, self.timed = cuda_streams.driver.mark(device), False

    def ended(self, device: torch.device) -> None:
        if self.began is not None:
            self.trial.pending.append((self.ahead, self.began, cuda_streams.driver.mark(device)))
            self.began = None

    def failed(self, failure: Exception) -> None:
        self.ahead, self.began = False, None
        if isinstance(failure, torch.OutOfMemoryError):
            self.trial.verdict = False
