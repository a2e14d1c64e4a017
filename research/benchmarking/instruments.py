"""What a training step costs, in bytes and seconds: one instrument for every contender, eager or compiled.

On a CPU the bytes are those of every allocation and release that torch's allocator reports to its profiler. For eager
code that equals ``revlib.testing.footprint`` to the byte, plus what operations do not return: generator states that
torch's checkpointing stores, storages that other libraries resize. Compiled code allocates outside of the dispatcher,
where ``footprint`` cannot see, and its dispatch mode would moreover have torch run the eager code instead.

On CUDA a step can also be captured as a graph, whose replay leaves the host nothing to do: what is timed then is the
device alone. Its bytes are those that the capture sets aside.
"""

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from research.shared.captured import CUDA

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each start and stop

Run = Callable[[Tensor], Sequence[Tensor]]
Step = Callable[[Tensor], object]  # a forward and backward pass
BACKWARD = "the backward pass of a measured step"


@dataclass(frozen=True)
class Cost:
    """Activation bytes ``held`` between forward and backward, and the ``peak`` of backward. On CUDA also the most that
    was ``allocated`` in the whole step, weights and gradients included, and the most that was ``reserved`` for it."""

    held: int
    peak: int
    allocated: int | None = None
    reserved: int | None = None


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """The sum of the outputs' mean squares."""
    return torch.stack([y.float().square().mean() for y in outputs]).sum()


def eager(run: Run) -> Step:
    """A step that runs one operation after another."""
    return lambda x: loss_of(run(x)).backward()


def cost(run: Run, x: Tensor, parameters: Sequence[Tensor]) -> Cost:
    """The cost of one step. Gradients are allocated beforehand, as zeros, so that they do not count as activations."""
    for t in (x, *parameters):
        t.grad = torch.zeros_like(t)
    gc.collect()
    if not x.is_cuda:
        return _cpu_cost(run, x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # else what earlier contenders reserved would count
    return _cuda_cost(run, x)


def _cpu_cost(run: Run, x: Tensor) -> Cost:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = loss_of(run(x))
        with record_function(BACKWARD):
            loss.backward()
    now = held = peak = 0
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]  # events() leaves out what operations took
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == BACKWARD:
            held = peak = now
        elif event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return Cost(held, peak)


def _cuda_cost(run: Run, x: Tensor) -> Cost:
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    loss = loss_of(run(x))
    held, forward = torch.cuda.memory_allocated() - base, torch.cuda.max_memory_allocated()
    reserved = torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    backward = torch.cuda.max_memory_allocated()
    return Cost(held, backward - base, max(forward, backward), max(reserved, torch.cuda.max_memory_reserved()))


class Replay:
    """A step as a CUDA graph, captured after steps on a side stream that warm up. It always reads the same ``x``.

    Args:
        warm_up: number of those steps.
        pool: that of another graph whose memory it may share, since they never run at the same time.

    ``cost`` is that of the step; what is reserved for it cannot be told from what others reserve in the same pool.
    """

    def __init__(self, run: Run, x: Tensor, parameters: Sequence[Tensor], warm_up: int, pool: Any = None) -> None:
        for t in (x, *parameters):
            t.grad = torch.zeros_like(t) if t.grad is None else t.grad
        self.grads = [t.grad for t in (x, *parameters) if t.grad is not None]  # every graph adds to these
        CUDA().warm_up(lambda: eager(run)(x), warm_up)
        gc.collect()  # what is freed within a capture stays reserved
        self.graph = torch.cuda.CUDAGraph()
        here = torch.cuda.stream(torch.cuda.current_stream())  # torch leaves a capture's stream only if it succeeds
        with here, torch.cuda.graph(self.graph, pool=pool):
            found = _cuda_cost(run, x)
        self.cost = replace(found, reserved=None)
        for grad in self.grads:
            grad.zero_()
        self(x)  # so that gradients are those of one step

    def __call__(self, x: Tensor) -> None:
        self.graph.replay()


def step_seconds(step: Step, x: Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
    """The seconds of one forward and backward pass."""
    if x.is_cuda:
        torch.cuda.synchronize()
    began = clock()
    step(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - began
