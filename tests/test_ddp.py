"""Distributed data parallelism: two processes on halves of a batch have the gradients of one on the whole."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from common import ByHand, grads, mlp, net
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from revlib import Checkpoint, Naive, Reversible

RANKS, BATCHES = 2, 3
CASES = {
    f"{type(scheduler).__name__}-{reduction}-{rhythm}": (scheduler, reduction == "find_unused", rhythm == "no_sync")
    for scheduler in (Reversible(), Checkpoint(), Naive())
    for reduction in ("all_used", "find_unused")
    for rhythm in ("each_step", "no_sync")
}


class Model(nn.Module):
    """With a head on one stream, and a part that the second batch does not use."""

    def __init__(self, scheduler, dropout, sometimes_unused):
        super().__init__()
        self.blocks = net(scheduler, lambda: mlp(dropout=dropout))
        self.head = nn.Linear(4, 2).double()
        self.extra = nn.Linear(4, 2).double() if sometimes_unused else None

    def forward(self, x1, x2, use_extra=True):
        y1, y2 = self.blocks(x1, x2)
        out = self.head(y1 + y2).sin()
        return out + self.extra(y1) if self.extra is not None and use_extra else out


def batches():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(BATCHES, 2, 2 * RANKS, 4, dtype=torch.float64, generator=generator)


def on_one_rank(model, rank, per_rank, accumulate, seeds):
    """The training that a rank does; a list of gradients, one for each step."""
    found = []
    for i, (x1, x2) in enumerate(batches()):
        half = slice(rank * per_rank, (rank + 1) * per_rank)
        torch.manual_seed(seeds + rank + 10 * i)
        last = i == BATCHES - 1
        hold = accumulate and not last and isinstance(model, DistributedDataParallel)
        with model.no_sync() if hold else nullcontext():
            model(x1[half], x2[half], i != 1).square().mean().backward()
        if not accumulate or last:
            found.append(grads(model))
            model.zero_grad()
    return found


def train(rank, path):
    """Every case in turn: starting processes is what takes time here."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=RANKS)
    try:
        for name, (scheduler, unused, accumulate) in CASES.items():
            torch.manual_seed(0)
            model = DistributedDataParallel(Model(scheduler, 0.3, unused), find_unused_parameters=unused)
            torch.save(on_one_rank(model, rank, 2, accumulate, seeds=100), f"{path}/{name}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("ddp"))
    spawn(train, (path,), nprocs=RANKS)
    return path


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradients_of_one(trained, name):
    """Dropout on: each process draws its own masks, which one process draws again here from the same seeds."""
    _, unused, accumulate = CASES[name]
    alone = []
    for rank in range(RANKS):
        torch.manual_seed(0)
        alone.append(on_one_rank(Model(ByHand(), 0.3, unused), rank, 2, accumulate, seeds=100))
    for rank in range(RANKS):
        together = torch.load(f"{trained}/{name}-{rank}.pt")
        assert len(together) == (1 if accumulate else BATCHES)
        for got, *alike in zip(together, *alone, strict=True):
            for g, *parts in zip(got, *alike, strict=True):
                parts = [p for p in parts if p is not None]
                if g is None:
                    assert not parts
                else:  # a parameter that no process used keeps its zeros
                    want = torch.stack([torch.zeros_like(g), *parts]).sum(0) / RANKS
                    torch.testing.assert_close(g, want, rtol=1e-10, atol=1e-12)


def test_one_process_on_the_joint_batch_is_the_mean_of_its_halves():
    """What the test above compares with is what one process would do."""
    for half in (False, True):
        torch.manual_seed(0)
        model = Model(ByHand(), 0.0, False)
        if half:
            found = [on_one_rank(model, rank, 2, True, seeds=0)[0] for rank in range(RANKS)]
            halves = [(a + b) / RANKS for a, b in zip(*found, strict=True)]
        else:
            (joint,) = on_one_rank(model, 0, 2 * RANKS, True, seeds=0)
    for a, b in zip(halves, joint, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
