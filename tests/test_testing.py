"""The assertions that users get: they pass what is right, and say what is wrong."""

from dataclasses import dataclass

import pytest
import torch
from common import leaves, mlp, net
from hypothesis import find, settings
from torch import nn

from revlib import Coupling, Naive, Reversible, ReversibleSequence, Step
from revlib.schedulers import Scheduler
from revlib.testing import (
    LiveBytes,
    assert_inverts,
    assert_memory_flat,
    assert_same_gradients,
    assert_unmerges,
    footprint,
    strategies,
)


@dataclass(frozen=True)
class Lossy(Coupling):
    def merge(self, s, f):
        return s + f

    def unmerge(self, merged, f):
        return merged - 0.99 * f


@dataclass(frozen=True)
class Detaching(Scheduler):
    """Forgets the gradient of the streams into the functions."""

    def plan(self, length):
        raise NotImplementedError

    def run(self, branches, state, context):
        for branch in branches:
            s, *inputs = state
            state = (*inputs, *branch.merge((s,), branch.fn(*(t.detach() for t in inputs), **context)))
        return state


def test_a_lossy_coupling_is_found():
    s, f = torch.randn(3, 4), torch.randn(3, 4)
    with pytest.raises(AssertionError, match=r"Lossy\(\) does not unmerge .*\n  s \(3, 4\): relative error"):
        assert_unmerges(Lossy(), s, f)
    with pytest.raises(AssertionError, match=r"a stack of 2 steps does not invert: .*\n  stream \d \(3, 4\)"):
        assert_inverts(ReversibleSequence([Step(mlp(), Lossy())] * 2).double(), *leaves())


def test_a_wrong_scheduler_is_found_and_the_tensor_named():
    message = r"Detaching\(\) against Naive\(\) on 6 steps: \d+ of \d+ tensors differ\n  gradient of .*relative error"
    with pytest.raises(AssertionError, match=message):
        assert_same_gradients(net(Reversible()), *leaves(), schedulers=[Detaching()])


@pytest.mark.slow
def test_hypothesis_shrinks_a_wrong_scheduler_to_the_shallowest_stack():
    def wrong(case):
        try:
            assert_same_gradients(case.stack, *case.streams, context=case.context, schedulers=[Detaching()])
        except AssertionError:
            return True
        return False

    case = find(strategies.cases(), wrong, settings=settings(max_examples=300, deadline=None))
    assert len(case.stack.bound_steps) <= 2 and case.context == {}


def test_the_stack_is_left_as_it_was():
    stack, xs = net(Naive()), leaves()
    before = [p.clone() for p in stack.parameters()]
    torch.manual_seed(5)
    assert_same_gradients(stack, *xs)
    assert_inverts(stack, *xs)
    assert torch.initial_seed() == 5 and stack.scheduler == Naive() and stack.training
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(stack.parameters(), before, strict=True))
    assert all(x.grad is None for x in xs)


def test_memory_that_grows_with_depth_is_found():
    x = torch.randn(8, 1024, 4, requires_grad=True)
    assert_memory_flat(lambda depth: net(Reversible(), depth=depth, dtype=torch.float32), x, x, depths=(2, 8), rtol=0.2)
    with pytest.raises(AssertionError, match=r"grows with depth .*\n  depth 2: held .* B, peak .* B\n  depth 8"):
        assert_memory_flat(lambda depth: net(Naive(), depth=depth, dtype=torch.float32), x, x, depths=(2, 8), rtol=0.2)


def test_live_bytes_counts_storages_from_birth_to_death():
    x = torch.zeros(10)
    with LiveBytes([x]) as live:
        a = x + 1
        b = a.view(5, 2)
        assert (live.now, live.peak) == (40, 40)
        c = torch.cat([a, a])
        assert (live.now, live.peak) == (120, 120)
        del a
        assert live.now == 120, "the view keeps its storage"
        del b, c
        assert (live.now, live.peak) == (0, 120)


@pytest.mark.parametrize(
    ("given", "kind"), [(nn.Linear(2, 2), "Linear"), (nn.Sequential(nn.Tanh()), "Sequential"), ([1], "int")]
)
def test_what_is_known_beforehand_must_be_tensors(given, kind):
    with pytest.raises(TypeError, match=rf"known=...\) takes tensors, such as model.parameters\(\), got {kind}"):
        LiveBytes(given)
    with pytest.raises(TypeError, match=rf"parameters=...\) takes tensors, such as model.parameters\(\), got {kind}"):
        footprint(lambda t: (t,), [torch.ones(2)], given)


def test_the_footprint_of_one_multiplication():
    x = torch.randn(25, requires_grad=True)
    found = footprint(lambda t: (t.exp(),), [x])
    assert found.held == 104, "what exp saves, its output, and the loss"
    assert found.peak >= 300, "and backward multiplies it by a gradient into another"


def test_a_coupling_without_its_call():
    with pytest.raises(TypeError, match=r"coupling must be a Coupling value .*; call it to make one"):
        assert_unmerges(Lossy, *leaves())
