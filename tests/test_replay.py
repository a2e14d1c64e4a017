"""Backward repeats each function as forward ran it: random numbers, autocast, buffers, modes."""

import pytest
import torch
from common import (
    ByHand,
    SelfAttention,
    error,
    every_recomputing_scheduler,
    every_scheduler,
    grads,
    law,
    leaves,
    loss,
    mlp,
    net,
    train,
)
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import DropPath
from torch import nn

from revlib import Checkpoint, Functional, Naive, Reversible, ReversibleSequence
from revlib.testing import assert_same_gradients, strategies

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])


# ---------------------------------------------------------------------------------------------- random numbers
def next_numbers(device):
    return torch.rand(2, dtype=torch.float64, device=device)


def trained_twice(stack, *shape, device="cpu"):
    """Two steps of training and the caller's random numbers after and between them."""
    xs = [t.detach().to(device).requires_grad_() for t in leaves(*shape)]
    stack = stack.to(device)
    return [train(stack, *xs), next_numbers(device), train(stack, *xs), next_numbers(device)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp(dropout=0.4),
        lambda: nn.Sequential(mlp(), DropPath(0.5)),
        lambda: SelfAttention(4, 2, dropout=0.3),
    ],
    ids=["dropout", "stochastic depth", "attention"],
)
@every_device
@law
def test_random_numbers_are_replayed_and_the_callers_generator_left_as_under_naive(scheduler, device, make):
    return trained_twice(net(scheduler, make), 16, 5, 4, device=device)


@given(
    strategies.seeds(),
    st.lists(st.sampled_from([0.0, 0.5]), min_size=1, max_size=6),
    st.sampled_from([Reversible(), Checkpoint(), Naive()]),
)
def test_any_pattern_of_random_and_deterministic_functions_is_replayed(seed, rates, scheduler):
    torch.manual_seed(seed)
    stack = ReversibleSequence([(mlp(dropout=p), mlp()) for p in rates]).double()
    assert_same_gradients(stack, *leaves(8, 4), schedulers=[scheduler], oracle=ByHand(), seed=seed)


# ---------------------------------------------------------------------------------------------- low precision
def no_further_from_the_truth(scheduler, scene, factor):
    """``scene(scheduler, exact)``: its error against the exact one is at most ``factor`` times that of naive autograd.

    Errors are those of all gradients together, in the norm, against float64 arithmetic from the same weights.
    """
    found = []
    with torch.random.fork_rng():
        for s, exact in ((ByHand(), True), (ByHand(), False), (scheduler, False)):
            torch.manual_seed(0)
            found.append(torch.cat([g.double().flatten() for g in scene(s, exact)]))
    truth, naive, got = found
    assert 1e-4 < error(naive, truth) < 0.05, "this scene is not one of low precision"
    assert error(got, truth) <= factor * error(naive, truth)


# In units of the error of naive autograd. Repeating from a kept state is the same arithmetic; inverting rounds again.
FACTOR = {Naive(): 1.0, Checkpoint(): 1.0, Reversible(): 1.5, Functional(): 1.5}
with_factor = pytest.mark.parametrize(("scheduler", "factor"), FACTOR.items(), ids=[type(s).__name__ for s in FACTOR])


@every_device
@with_factor
def test_autocast_around_the_forward_alone_is_replayed(scheduler, factor, device):
    seen = []

    def scene(scheduler, exact):
        stack, xs = net(scheduler, dtype=torch.float32), leaves(16, 4, dtype=torch.float32)
        if exact:
            stack, xs = stack.double(), [x.detach().double().requires_grad_() for x in xs]
        stack, xs = stack.to(device), [x.detach().to(device).requires_grad_() for x in xs]
        if not exact:
            stack[0].G[1].register_forward_hook(lambda m, args, y, note=seen.append: note(y.dtype))
        with torch.autocast(device, torch.bfloat16, enabled=not exact):
            outputs = stack(*xs)
        assert all(y.dtype == x.dtype for y, x in zip(outputs, xs, strict=True))
        loss(outputs).backward()
        return grads(*xs, stack)

    no_further_from_the_truth(scheduler, scene, factor)
    assert set(seen) == {torch.bfloat16} and len(seen) == 2 + (scheduler != Naive())


@every_scheduler
def test_autocast_around_backward_alone_is_not_replayed(scheduler):
    seen = []

    def scene(scheduler):
        stack, xs = net(scheduler, dtype=torch.float32), leaves(16, 4, dtype=torch.float32)
        stack[0].G[1].register_forward_hook(lambda m, args, y, note=seen.append: note(y.dtype))
        total = loss(stack(*xs))
        with torch.autocast("cpu", torch.bfloat16):
            total.backward()
        return grads(*xs, stack)

    torch.manual_seed(0)
    want = scene(ByHand())
    torch.manual_seed(0)
    assert error(scene(scheduler), want) < 1e-4 and set(seen) == {torch.float32}


@with_factor
def test_a_second_forward_in_the_same_autocast_region_still_trains_the_weights(scheduler, factor):
    """Autocast caches weights that it cast; one cast while backward repeats a function must not be found there."""

    def scene(scheduler, exact):
        stack, xs = net(scheduler, dtype=torch.float32), leaves(16, 4, dtype=torch.float32)
        if exact:
            stack, xs = stack.double(), [x.detach().double().requires_grad_() for x in xs]
        found = []
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            for _ in range(3):
                loss(stack(*xs)).backward()
                found += grads(*xs, stack)
                stack.zero_grad()
        return found

    no_further_from_the_truth(scheduler, scene, factor)


@every_recomputing_scheduler
def test_weights_that_were_cast_before_a_step_of_the_optimizer_are_not_used_after_it(scheduler):
    """In the region in which they were cast: autocast would find them in its cache."""
    stack, xs = net(scheduler, dtype=torch.float32), leaves(16, 4, dtype=torch.float32)
    optimizer = torch.optim.SGD(stack.parameters(), lr=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss(stack(*xs)).backward()
        optimizer.step()
        got = stack(*xs)
    with torch.autocast("cpu", torch.bfloat16):
        want = stack(*xs)
    assert all(map(torch.equal, got, want))


@with_factor
def test_weights_first_cast_in_backward_are_trained_by_a_later_forward_in_the_same_region(scheduler, factor):
    def scene(scheduler, exact):
        stack, xs = net(scheduler, dtype=torch.float32), leaves(16, 4, dtype=torch.float32)
        if exact:
            stack, xs = stack.double(), [x.detach().double().requires_grad_() for x in xs]
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            outputs = stack(*xs)
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            loss(outputs).backward()
            loss(stack(*xs)).backward()
        return grads(*xs, stack)

    no_further_from_the_truth(scheduler, scene, factor)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@with_factor
def test_a_whole_model_in_half_precision_is_about_as_accurate_as_naive(scheduler, factor, dtype, depth):
    def scene(scheduler, exact):
        stack, xs = net(scheduler, depth=depth, dtype=dtype), leaves(32, 4, dtype=dtype)
        if exact:
            stack, xs = stack.double(), [x.detach().double().requires_grad_() for x in xs]
        outputs = stack(*xs)
        assert all(y.dtype == x.dtype for y, x in zip(outputs, xs, strict=True))
        loss([y.double() for y in outputs]).backward()
        return grads(*xs, stack)

    no_further_from_the_truth(scheduler, scene, factor)


# ---------------------------------------------------------------------------------------------- buffers and modes
@pytest.mark.parametrize("spectral_norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
@law
def test_spectral_norm_iterates_once_a_forward(scheduler, spectral_norm):
    stack = net(scheduler, lambda: nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Tanh()))
    return [train(stack, *leaves(8, 4)), train(stack, *leaves(8, 4)), *stack.buffers()]


@law
def test_spectral_norm_under_every_pass_over_a_retained_graph(scheduler):
    stack = net(scheduler, lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh()))
    xs = leaves(8, 4)
    total = loss(stack(*xs))
    passes = [torch.autograd.grad(total, [*xs, *stack.parameters()], retain_graph=True) for _ in range(3)]
    assert error(passes[1:], [passes[0]] * 2) < 1e-10
    return [*passes, *stack.buffers()]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("weight_norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@law
def test_weight_norm(scheduler, weight_norm):
    return train(net(scheduler, lambda: nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Tanh())), *leaves())
