"""Outside of ordinary training: evaluation, function transforms, threads, fake tensors."""

import threading

import pytest
import torch
from common import (
    error,
    every_recomputing_scheduler,
    every_scheduler,
    grads,
    law,
    leaves,
    loss,
    net,
    train,
)
from torch import nn
from torch.func import functional_call

from revlib import Reversible, ReversibleSequence, engine
from revlib.testing import LiveBytes


# ---------------------------------------------------------------------------------------------- without gradients
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_takes_the_memory_of_a_step_and_leaves_nothing(mode, monkeypatch):
    monkeypatch.setattr(engine, "Tape", None)
    stack, xs = net(Reversible(), depth=10), [torch.randn(512, 4, dtype=torch.float64) for _ in range(2)]
    unit = xs[0].nbytes
    with mode(), LiveBytes([*xs, *stack.parameters()]) as live:
        outputs = stack(*xs)
        assert live.now <= 2 * unit
        assert live.peak <= 9 * unit  # the hidden layer is twice as wide
    assert len(outputs) == 2


# ---------------------------------------------------------------------------------------------- function transforms
def parameters_of(stack):
    return {k: p.detach().clone().requires_grad_() for k, p in stack.named_parameters()}


@pytest.mark.parametrize("masked", [False, True])
@law
def test_functional_call_with_backward_outside(scheduler, masked):
    """The modules hold other parameters again by the time that backward runs."""
    stack, xs = net(scheduler), leaves()
    mine = parameters_of(stack)
    passed = {k: p * 2 for k, p in mine.items()} if masked else mine
    outputs = functional_call(stack, passed, tuple(xs))
    with torch.no_grad():
        for p in stack.parameters():
            p.zero_()
    loss(outputs).backward()
    assert all(p.grad is None for p in stack.parameters())
    return [*outputs, *grads(*xs, *mine.values())]


# ---------------------------------------------------------------------------------------------- threads
def in_threads(count, work):
    """What ``work(i)`` returns in each of several threads that start together."""
    results, errors, start = [None] * count, [], threading.Barrier(count)

    def run(i):
        try:
            start.wait()
            results[i] = work(i)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


class Masked(nn.Module):
    """A learned row, of which each element is dropped or doubled: outputs and gradients both show the mask."""

    def __init__(self, width):
        super().__init__()
        self.row = nn.Parameter(torch.ones(width, dtype=torch.float64))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.row.expand_as(x))


@every_recomputing_scheduler
def test_threads_that_share_the_default_generator_replay_their_own_masks(scheduler):
    def work(i):
        stack = ReversibleSequence([(Masked(8), nn.Identity()) for _ in range(3)], scheduler=scheduler)
        for _ in range(15):
            stack.zero_grad()
            x = torch.zeros(16, 8, dtype=torch.float64)
            y, mask = x, []
            for pair in stack:  # one block at a time, so that each output shows one mask
                before = y
                y, _ = ReversibleSequence([pair], scheduler=scheduler)(y, torch.zeros_like(x))
                mask.append((y - before).detach())
            y.sum().backward()
            for pair, m in zip(stack, mask, strict=True):
                assert set(m.unique().tolist()) <= {0.0, 2.0}
                assert torch.equal(pair.F.row.grad, m.sum(0)), f"thread {i} replayed another mask"
        return True

    assert in_threads(4, work) == [True] * 4


@every_scheduler
def test_threads_without_random_numbers_train_as_alone(scheduler):
    stacks = []
    for i in range(4):
        torch.manual_seed(i)
        stacks.append((net(scheduler), [leaves(16, 4) for _ in range(10)]))

    def work(i):
        stack, batches = stacks[i]
        for xs in batches:
            train(stack, *xs)
        return [g.clone() for g in grads(stack)]

    together = in_threads(4, work)
    for stack, _ in stacks:
        stack.zero_grad()
    assert error(together, [work(i) for i in range(4)]) < 1e-10
