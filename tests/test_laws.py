"""The laws: inversion, equality of schedulers, composition. Naive autograd is the oracle."""

import copy
import pickle

import pytest
import torch
from common import examples, mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revlib import Additive, Checkpoint, ExactAdditive, Naive, Reversible, ReversibleSequence, Step, invert, reversible
from revlib.step import Pair
from revlib.testing import assert_inverts, assert_same_gradients, assert_unmerges, strategies


@given(strategies.cases())
def test_inverse_undoes_forward(case):
    assert_inverts(case.stack, *case.streams, context=case.context)


@examples(150)
@given(strategies.cases(), strategies.schedulers(), strategies.seeds())
def test_every_scheduler_has_the_gradients_of_naive(case, scheduler, seed):
    assert_same_gradients(case.stack, *case.streams, context=case.context, schedulers=[scheduler], seed=seed)


@given(strategies.cases(dtype=torch.float32))
def test_and_in_single_precision(case):
    assert_same_gradients(case.stack, *case.streams, context=case.context)


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 12, 48])
def test_depths(depth):
    torch.manual_seed(depth)
    # Bounded branches: of any at random, 48 copies may amplify so much that no sum in floating point inverts.
    stack = ReversibleSequence([(mlp(), mlp()) for _ in range(depth)]).double()
    streams = [torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert_same_gradients(stack, *streams)
    assert_inverts(stack, *streams)


@given(strategies.cases(), st.data())
def test_slices_compose(case, data):
    cut = data.draw(st.integers(0, len(case.stack)))
    stack = case.stack.eval()
    routed = {} if cut in (0, len(stack)) and len(stack) else case.context
    whole = stack(*case.streams, **routed)
    first, second = stack[:cut], stack[cut:]
    parts = second(*first(*case.streams, **(routed if len(first) else {})), **(routed if len(second) else {}))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert list(first) + list(second) == list(stack)


@given(strategies.cases(), strategies.schedulers())
def test_the_functional_form_is_the_same_function(case, scheduler):
    stack = case.stack.eval()
    items = [item if isinstance(item, Step) else tuple(item) for item in stack]
    kwargs = {"coupling": stack.coupling, "context": case.context}
    out = reversible(items, *case.streams, scheduler=scheduler, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(out, stack(*case.streams, **case.context), strict=True))
    back = invert(items, *out, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(back, stack.inverse(*out, **case.context), strict=True))


@given(strategies.cases(), strategies.schedulers())
def test_outputs_and_state_do_not_depend_on_the_scheduler(case, scheduler):
    stack = case.stack.eval()
    keys, want = list(stack.state_dict()), stack(*case.streams, **case.context)
    stack.scheduler = scheduler
    assert list(stack.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(stack(*case.streams, **case.context), want, strict=True))


@given(strategies.cases())
def test_copies_and_pickles_are_equal(case):
    stack = case.stack.eval()
    for again in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert again.scheduler == stack.scheduler and again.coupling == stack.coupling
        assert repr(again) == repr(stack)
        outputs = again(*case.streams, **case.context), stack(*case.streams, **case.context)
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@given(strategies.seeds(), st.lists(st.integers(1, 4), max_size=3), strategies.dtypes())
def test_additive_unmerges_what_it_merged(seed, shape, dtype):
    torch.manual_seed(seed)
    s, f = torch.randn(shape, dtype=dtype) + 3, torch.randn(shape, dtype=dtype)
    assert_unmerges(Additive(), s, f)


def test_the_pair_is_the_published_block():
    """y1 = x1 + F(x2), y2 = x2 + G(y1): Gomez et al. 2017, equation 6."""
    F, G = nn.Linear(3, 5), nn.Linear(5, 3)
    x1, x2 = torch.randn(2, 5), torch.randn(2, 3)
    y1 = x1 + F(x2)
    for got in (ReversibleSequence([(F, G)])(x1, x2), reversible([(F, G)], x1, x2)):
        assert torch.equal(got[0], y1) and torch.equal(got[1], x2 + G(y1))


def test_it_is_a_container_like_sequential():
    pairs = [(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)]
    stack = ReversibleSequence(pairs, scheduler=Checkpoint())
    assert len(stack) == 3 and len(stack[1:]) == 2 and stack[1:].scheduler == Checkpoint()
    assert [tuple(block) for block in stack] == pairs
    assert tuple(stack[-1]) == pairs[-1] and stack[0].F is pairs[0][0]
    assert list(stack.state_dict())[:2] == ["0.F.weight", "0.F.bias"]
    assert "Pair" in repr(stack) and f"scheduler={Checkpoint()}" in repr(stack)
    with pytest.raises(IndexError):
        stack[3]
    assert len(ReversibleSequence()) == 0
    x = torch.randn(2, 2)
    assert ReversibleSequence()(x, x) == (x, x)


def test_schedulers_are_values():
    assert Reversible() == Reversible() and hash(Reversible()) == hash(Reversible()) and Reversible() != Naive()
    with pytest.raises(AttributeError):
        Reversible().tolerance = 1.0


def test_items_are_moved_as_in_sequential():
    a, b, c, d = ((nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(4))
    stack, plain = ReversibleSequence([a], scheduler=Checkpoint()), [a]
    held = lambda stack: [tuple(pair) for pair in stack]  # noqa: E731
    for act in (
        lambda s: s.extend([b, c]),
        lambda s: s.insert(0, d),
        lambda s: s.insert(-1, Pair(*d)) if isinstance(s, ReversibleSequence) else s.insert(-1, d),
        lambda s: s.__delitem__(1),
        lambda s: s.__delitem__(slice(0, 1)),
        lambda s: s.insert(2, a),
    ):
        act(stack)
        act(plain)
        assert held(stack) == plain and list(stack._modules) == [str(i) for i in range(len(plain))]
    assert stack.insert(len(stack), b) is stack and stack.extend([]) is stack
    assert tuple(stack.pop()) == b and tuple(stack.pop(0)) == plain.pop(0) and held(stack) == plain
    both = stack + ReversibleSequence([d, Step(nn.Tanh())])
    assert held(both[:-1]) == [*plain, d] and both.scheduler == Checkpoint()
    assert len(both.bound_steps) == 2 * len(both) - 1
    with pytest.raises(IndexError, match="no place 9 to insert at"):
        stack.insert(9, a)
    with pytest.raises(ValueError, match="one coupling"):
        stack + ReversibleSequence([a], coupling=ExactAdditive())
    with pytest.raises(TypeError):
        stack + [a]  # noqa: RUF005
    x = torch.randn(2, 2)
    y = stack(x, x)
    stack.insert(0, d)  # the steps that were remembered are not used again
    assert not torch.equal(stack(x, x)[0], y[0])
