"""One run on several processes, each with its part of every batch.

Up to rounding, gradients and scores are those of one process; only dropout draws other numbers.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor

from research.settings.config import Config
from research.shared.machine import pick_device


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started."""

    rank: int = 0
    count: int = 1

    def part(self, batch: Tensor) -> Tensor:
        """As DistributedSampler deals them, but none twice: of a last batch some may get less than others, or none."""
        return batch[self.rank :: self.count]

    def loss(self, logits: Tensor, labels: Tensor, images: int, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of a part, which averages over processes to that of the batch of so many images."""
        if self.count == 1:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        total = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        return total * (self.count / images)

    def sum(self, scores: Tensor, device: torch.device) -> Tensor:
        if self.count > 1:
            dist.all_reduce(scores := scores.to(device))
        return scores.cpu()

    def seed(self, seed: int, epoch: int) -> None:
        """Numbers of each process's own for an epoch's dropout; one process goes on with its stream."""
        if self.count > 1:
            torch.manual_seed((seed * 1_000_003 + epoch) * self.count + self.rank)

    @contextmanager
    def first_first(self) -> Iterator[None]:
        """The first process does this before the others do: it may fill a cache for them."""
        if self.rank > 0:
            dist.barrier()
        yield
        if self.rank == 0 and self.count > 1:
            dist.barrier()


ALONE = Processes()


@contextmanager
def join(config: Config) -> Iterator[tuple[Processes, torch.device]]:
    """Meet the other processes, if torchrun started any. -> who this one is, and its device."""
    device, count = pick_device(config.device), int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE, device
        return
    for wrong, flag, problem in (
        (config.graph, "--graph", f"captures the step of one process, and these are {count}; drop it."),
        (config.batch_size % count, "--batch-size", f"expected a multiple of {count}, the number of processes."),
        (":" in config.device, "--device", f"expected a kind of device, one for each of {count} processes; say cuda."),
    ):
        if wrong:
            raise typer.BadParameter(problem, param_hint=flag)
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Processes(dist.get_rank(), count), device
    dist.destroy_process_group()
