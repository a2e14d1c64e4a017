"""A step in parts is the step, at the memory of a part."""

import pytest
import torch
from common import ByHand, SelfAttention, error, examples, grads, leaves, loss, mlp, vit_block
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revlib import Coupling, Reversible, ReversibleSequence, Step, positionwise
from revlib.testing import assert_inverts, assert_same_gradients, footprint, strategies


def stacks(depth, chunks, dim=1, dropout=0.0):
    """The same functions, whole and in parts."""
    torch.manual_seed(0)
    blocks = [(SelfAttention(4, 2), mlp(dropout=dropout)) for _ in range(depth)]
    parts = [item for F, G in blocks for item in (Step(F), *positionwise(G, chunks, dim))]
    return ReversibleSequence(blocks).double(), ReversibleSequence(parts).double()


@given(st.integers(1, 3), st.integers(1, 4), st.integers(4, 7), strategies.seeds())
def test_parts_are_the_whole(depth, chunks, tokens, seed):
    found = []
    for stack in stacks(depth, chunks):
        torch.manual_seed(seed)
        xs = leaves(2, tokens, 4)
        outputs = stack(*xs)
        loss(outputs).backward()
        modules = [m for m in stack.modules() if isinstance(m, nn.Linear)]
        unique = list(dict.fromkeys(p for m in modules for p in m.parameters()))
        found.append([*outputs, *grads(*xs), *(p.grad for p in unique)])
    assert error(found[1], found[0]) < 1e-12


@examples(30)
@given(st.integers(1, 3), st.integers(1, 3), strategies.schedulers(), strategies.seeds())
def test_under_every_scheduler(depth, chunks, scheduler, seed):
    torch.manual_seed(seed)
    stack = stacks(depth, chunks, dropout=0.3)[1]
    xs = leaves(2, 5, 4)
    assert_same_gradients(stack, *xs, schedulers=[scheduler], seed=seed)
    assert_inverts(stack, *xs)


@pytest.mark.parametrize("dim", [0, 1, -2])
def test_along_any_dimension(dim):
    whole, parts = stacks(2, 2, dim)
    xs = leaves(2, 5, 4)
    assert error(parts(*xs), whole(*xs)) < 1e-12


def test_context_and_other_couplings():
    class Scaled(Coupling):
        def merge(self, s, f):
            return 2 * s + f

        def unmerge(self, merged, f):
            return (merged - f) / 2

    class Gained(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, gain):
            return self.linear(x) * gain

    found = []
    fn = Gained()
    for items in ([Step(fn, Scaled())], positionwise(fn, 3, coupling=Scaled())):
        stack = ReversibleSequence(items).double()
        stack.zero_grad()
        torch.manual_seed(0)
        xs, gain = leaves(2, 5, 4), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        outputs = stack(*xs, gain=gain)
        loss(outputs).backward()
        found.append([*outputs, *grads(*xs, gain, fn)])
    assert error(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("chunks", [2, 4])
def test_the_peak_of_a_vit_falls_to_that_of_its_attention(chunks):
    torch.manual_seed(0)
    blocks = [vit_block() for _ in range(3)]
    x = torch.randn(8, 197, 192)

    def peak(items):
        stack = ReversibleSequence(items)
        return footprint(lambda a: stack(a, a), [x], stack.parameters()).peak / x.nbytes

    whole = peak(blocks)
    parts = peak([item for F, G in blocks for item in (Step(F), *positionwise(G, chunks))])
    assert whole > 17 and parts < 13.6


def test_wrong_numbers():
    with pytest.raises(ValueError, match="a whole number from 1 up, got 0"):
        positionwise(mlp(), 0)
    with pytest.raises(
        ValueError, match=r"positionwise\(chunks=5, dim=1\) cannot divide a stream of shape \(2, 3, 4\)"
    ):
        ReversibleSequence(positionwise(mlp(), 5))(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))


def test_by_hand_too():
    """The recurrence of steps, without the engine, is the same function: turns give the streams back in order."""
    stack = stacks(2, 3)[1]
    xs = leaves(2, 5, 4)
    want = stack(*xs)
    stack.scheduler = ByHand()
    assert error(stack(*xs), want) < 1e-12
    stack.scheduler = Reversible()
