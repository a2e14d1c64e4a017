"""Training steps captured once as CUDA graphs and replayed: the host launches one graph, not thousands of kernels.

Inside a capture revlib compares nothing, so its checks are made by the steps that warm up.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revlib import raise_pending

WARM_UPS = 3  # after so many steps libraries have chosen their kernels, and the optimizer has its state

Step = Callable[[Tensor, Tensor], Tensor]  # images, labels -> scores


class CUDA:
    """What a CUDA device does for a capture. Tests on a CPU put another class in its place."""

    def warm_up(self, work: Callable[[], object], times: int = WARM_UPS) -> None:
        """Do the work on a side stream, as torch asks before a capture."""
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(times):
                work()
        main.wait_stream(side)
        raise_pending()

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Note what the work would do. Returns a function that does it, and the place where it leaves its result."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        return graph.replay, result


class Graph(NamedTuple):
    """A step for batches of one size, which uses the same memory each time."""

    images: Tensor
    labels: Tensor
    replay: Callable[[], None]
    result: Tensor


class Captured:
    """``step``, captured when the first batch of a size comes; an epoch's last may be smaller. It changes ``modules``
    (the model, and a running average of it) and ``optimizer``; neither they nor random numbers notice the warm-up."""

    def __init__(
        self, step: Step, modules: Collection[nn.Module], optimizer: torch.optim.Optimizer, device: CUDA | None = None
    ):
        self.step, self.modules, self.optimizer, self.device = step, modules, optimizer, device or CUDA()
        self.graphs: dict[torch.Size, Graph] = {}

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        graph = self.graphs.get(images.shape)
        if graph is None:
            graph = self.graphs[images.shape] = self._capture(images.clone(), labels.clone())
        graph.images.copy_(images)
        graph.labels.copy_(labels)
        graph.replay()
        return graph.result.clone()

    def _capture(self, images: Tensor, labels: Tensor) -> Graph:
        def work() -> Tensor:
            return self.step(images, labels)

        with torch.cuda.device_of(images):
            with torch.random.fork_rng([images.device] if images.is_cuda else []), undone(self.modules, self.optimizer):
                self.device.warm_up(work)
            return Graph(images, labels, *self.device.capture(work))


@contextmanager
def undone(modules: Collection[nn.Module], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put back what the block changes, in place. What Adam makes in its first step stays, at zero, where it begins:
    made within the capture, it would begin anew with each replay."""

    def tensors() -> list[Tensor]:
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [*(t for module in modules for t in chain(module.parameters(), module.buffers())), *states]

    before = {t: t.detach().clone() for t in tensors()}
    yield
    with torch.no_grad():
        for t in tensors():
            t.copy_(before[t]) if t in before else t.zero_()
