"""Look-ahead: a tape that recovers the next step on a side CUDA stream, next to the gradients of the step above.

Source: Zhu and Mangalam, *PaReprop: Fast Parallelized Reversible Backpropagation*, 2023.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from revlib import cuda_streams
from revlib._torch import bypass_compiler, graph_is_kept, graph_task
from revlib.core import SHARED, Guard, Key, Placeholder, Plan, Tape
from revlib.step import Layout

__all__ = ["LookAheadTape"]


class LookAheadTape(Tape):
    """Recovers step k - 1 on the side stream as soon as the first tensor of step k has been asked for."""

    def __init__(
        self,
        plan: Plan,
        layouts: Sequence[Layout],
        m: int,
        guard: Guard,
        policy: cuda_streams.LookAheadPolicy,
        device: torch.device,
    ) -> None:
        super().__init__(plan, layouts, m, guard)
        self.policy, self.device = policy, device
        # The launch that is under way, at each step that it recovers.
        self.launches: dict[int, cuda_streams.Launch] = {}

    @bypass_compiler
    def unpack(self, placeholder: Placeholder) -> Tensor:
        if placeholder.step in self.launches:
            self.need(placeholder.step)
        tensor = super().unpack(placeholder)
        if self.policy.ahead and graph_task() != -1 and not graph_is_kept():
            self._look_ahead(placeholder.step - 1)
        return tensor

    def need(self, k: int) -> None:
        task = graph_task()
        with self.lock:
            if k in self.launches and self.is_recovered(k, task):
                self.records[k].guard.check()  # nobody may have edited meanwhile what it read
            if k in self.launches or not self.is_recovered(k, task):
                cuda_streams.settle(self.launches)
            super().need(k)
            if k == self.lowest:
                self.policy.ended(self.device)

    def _look_ahead(self, k: int) -> None:
        with self.lock:
            progress = self.progress.get(SHARED)
            if not progress or progress.index != k + 1 or k < self.lowest or self.launches:
                return
            if not self.records[k].repeated:
                return
            lowest = k
            # Nobody asks for a step of which autograd has saved nothing.
            while lowest > self.lowest and not self.records[lowest].placeholders:
                lowest -= 1
            self.join_pass(graph_task(), SHARED)
            work = partial(self.undo_down_to, lowest, progress, SHARED, keeps=False)
            launch = cuda_streams.Launch(
                self.device, work, held=(progress.state, self.records[lowest : k + 1])
            )
            self.launches.update(dict.fromkeys(range(lowest, k + 1), launch))
            if launch.failure is not None:
                # Whoever needs the step recovers it once more, and meets the failure then.
                self.policy.failed(launch.failure)

    def join_pass(self, task: int, key: Key) -> Any:
        ending = super().join_pass(task, key)
        if ending is not None:
            # After an exception in backward the ending is dropped, and not called.
            weakref.finalize(ending, cuda_streams.settle, self.launches)
            if key == SHARED:
                self.policy.started(self.device)
        return ending

    @bypass_compiler
    def finish(self, task: int, key: Key) -> None:
        cuda_streams.settle(self.launches)
        super().finish(task, key)
