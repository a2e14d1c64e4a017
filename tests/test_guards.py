"""Each guard is needed: without it, one scene has a wrong gradient that nobody notices. With it, the gradient is right,
or an error says what is wrong."""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from common import Lambda, error, examples, grads, leaves, loss, mlp, net, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

from revlib import (
    Checkpoint,
    ExactAdditive,
    Functional,
    KeepLast,
    Naive,
    Reversible,
    ReversibleSequence,
    engine,
    reversible,
)
from revlib.guards import Guards, recovery_check
from revlib.guards.recovery_check import Comparison
from revlib.tensors import last_activation, saved_at


class Body(nn.Module):
    """A linear layer, and something of a scene's own in front of it."""

    def __init__(self, before, last):
        super().__init__()
        self.linear, self.last, self.before, self.calls = nn.Linear(4, 4), last, before, 0

    def forward(self, x):
        return self.last(self.linear(self.before(self, x)))


class SinesAreCosines(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (torch.cos if func is torch.sin else func)(*args, **(kwargs or {}))


def draws(module, x):
    return nn.functional.dropout(x, 0.5)


def counts(module, x):
    module.calls += 1
    return x * module.calls


def hidden_numbers():
    """Another number at each call, from behind a method in C, where nobody finds the iterator."""
    return itertools.count().__next__


def chooses():
    numbers = hidden_numbers()
    return lambda module, x: x * (1.0 + numbers() % 4)


def gradients(scheduler, before, *, forward=None, between=None, last=nn.Tanh()):  # noqa: B008
    torch.manual_seed(0)
    stack = ReversibleSequence(
        [(Body(before, last), Body(before, last)) for _ in range(3)], scheduler=scheduler
    ).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    if forward is None:
        y = stack(x, x.sin())
    else:
        with forward:
            y = stack(x, x * 2)
    if between is not None:
        between()
    y[0].square().sum().backward()
    return [p.grad for p in [x, *stack.parameters()]]


def leave_out(monkeypatch, *names):
    """Passes without these guards."""
    make = engine._guards

    def some(*args):
        guards, recovery = make(*args)
        left = [g for g in guards.guards if type(g).__name__ not in names]
        assert len(left) == len(guards.guards) - len(names)
        return Guards(left), recovery

    monkeypatch.setattr(engine, "_guards", some)


SCENES = {
    "Randomness": {"before": draws},
    "Settings": {"before": lambda module, x: torch.sin(x), "forward": SinesAreCosines()},
    "ModuleStates": {"before": counts},
}


@pytest.mark.parametrize("name", SCENES)
def test_what_is_put_back_is_wrong_without_its_guard(name, monkeypatch):
    want = gradients(Naive(), **SCENES[name])
    assert error(gradients(Reversible(), **SCENES[name]), want) < 1e-9
    leave_out(monkeypatch, name)
    assert error(gradients(Checkpoint(tolerance=math.inf), **SCENES[name]), want) > 1e-2


def test_what_a_kernel_writes_after_it_was_saved_is_wrong_without_its_guard(monkeypatch):
    """RReLU saves its noise and fills it afterwards, so a repetition must not stop at the last saved tensor."""

    def run(scheduler):
        return gradients(scheduler, lambda module, x: x, last=nn.RReLU(0.1, 0.9))

    want = run(Naive())
    assert error(run(Checkpoint()), want) < 1e-9
    leave_out(monkeypatch, "EarlyStop")
    # Unwritten memory may hold anything, so that the error may be NaN.
    assert not error(run(Checkpoint(tolerance=math.inf)), want) <= 1e-2


def test_an_edited_tensor_is_refused_and_wrong_without_its_guard(monkeypatch):
    def run(scheduler, edits):
        table = torch.linspace(1, 2, 4, dtype=torch.float64)
        between = (lambda: table.mul_(2)) if edits else None
        return gradients(scheduler, lambda module, x: (x * table).sin(), between=between)

    want = run(Naive(), edits=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(Naive(), edits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(Checkpoint(), edits=True)
    leave_out(monkeypatch, "Edits")
    assert error(run(Checkpoint(tolerance=math.inf), edits=True), want) > 1e-2


def test_a_function_that_does_not_repeat_is_refused_and_wrong_without_the_check(monkeypatch):
    want = gradients(Naive(), chooses())
    with pytest.raises(RuntimeError, match="recovered what enters"):
        gradients(Reversible(), chooses())
    leave_out(monkeypatch, "RecoveryCheck")
    assert error(gradients(Reversible(), chooses()), want) > 1e-2


@pytest.mark.parametrize("last", [0.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(), Functional()], ids=lambda s: type(s).__name__)
def test_noise_is_found_before_a_last_layer_that_starts_at_zero(scheduler, dtype, last):
    """No stream tells, since functions return next to nothing. The gradients of their last layers depend on it."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.numbers = nn.Linear(16, 64), nn.Linear(64, 16), hidden_numbers()
            for p in self.last.parameters():
                nn.init.constant_(p, last)

        def forward(self, x):
            h = 3 * self.first(x).relu()
            return self.last(h * (torch.rand(h.shape, generator=torch.Generator().manual_seed(self.numbers())) < 0.5))

    torch.manual_seed(0)
    stack = ReversibleSequence([(Branch(), Branch()) for _ in range(3)], scheduler=scheduler).to(dtype)
    total = sum(y.square().mean() for y in stack(*torch.randn(2, 32, 16, dtype=dtype)))
    with pytest.raises(RuntimeError, match=r"recovered (an activation of|what enters) [FG] of block \d \(Branch\)"):
        total.backward()


WITH_ACTIVATIONS = {
    "layers": nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)),
    "attention": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0),
    "scaled": lambda x: (x.sin() * x.exp()) * nn.Parameter(torch.zeros(4)),
    "several results": lambda x: (x.detach(), (x.sin() + 1) * x),
}


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("function", WITH_ACTIVATIONS.values(), ids=WITH_ACTIVATIONS)
def test_the_last_activation_is_found_again_in_another_graph(function, needs_gradient):
    """Streams of a repetition always need a gradient; the first that enter a stack seldom do."""
    x = torch.randn(2, 3, 4)
    first, again = (
        results if isinstance(results, tuple) else (results,)
        for results in (function(x.clone().requires_grad_(needs)) for needs in (needs_gradient, True))
    )
    found = last_activation(first)
    if found is None:
        assert not needs_gradient, "only a stream leads to an activation here"
        return
    place, t = found
    other = saved_at(again, place)
    assert t.requires_grad and other is not t and torch.equal(other, t)
    assert not isinstance(t, nn.Parameter)
    assert saved_at([torch.ones(2)], place) is None, "no graph"


INVERTING = pytest.mark.parametrize(
    "scheduler", [Reversible(), Checkpoint(), KeepLast(1), Functional()], ids=lambda s: type(s).__name__
)


class Float8(torch.autograd.Function):
    """Keeps what it needs in eight bits, as low-memory activations do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.sigmoid().to(torch.float8_e4m3fn))
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].to(g.dtype)


@INVERTING
def test_functions_that_save_eight_bits(scheduler):
    def run(scheduler):
        torch.manual_seed(0)
        stack = ReversibleSequence([(Lambda(lambda m, x: Float8.apply(m(x)), mlp()), mlp())] * 2, scheduler=scheduler)
        return train(stack.double(), *leaves())

    assert error(run(scheduler), run(Naive())) < 1e-10


@INVERTING
def test_functions_that_return_more_digits_than_they_compute_with_are_no_false_alarm(scheduler):
    """Under autocast, where the last operation is a product with a parameter in float32."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.scale = mlp(32), nn.Parameter(torch.ones(32))

        def forward(self, x):
            return self.mlp(x) * self.scale

    def run(scheduler):
        torch.manual_seed(0)
        stack, xs = net(scheduler, Scaled, 48, torch.float32), leaves(32, 32, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = stack(*xs)
        loss(outputs).backward()
        return grads(*xs, stack)

    assert error(run(scheduler), run(Naive())) < 0.05


@INVERTING
@pytest.mark.parametrize("zero", [(), (0,), (1,), (0, 1)], ids=str)
def test_activations_that_are_nothing_but_rounding_are_no_false_alarm(scheduler, zero):
    """A norm makes such of constant images, which a first try of a model is often given."""

    def block():
        norm = nn.InstanceNorm2d(16)
        return nn.Sequential(nn.Conv2d(4, 16, 1), norm, nn.ReLU(), nn.Conv2d(16, 4, 1))

    def run(scheduler):
        torch.manual_seed(0)
        stack = ReversibleSequence([(block(), block()) for _ in range(6)], scheduler=scheduler)
        flat = torch.randn(2, 2, 4, 1, 1).expand(2, 2, 4, 8, 8)
        xs = [(0 * x if i in zero else 1 * x).requires_grad_() for i, x in enumerate(flat)]
        return train(stack, *xs)

    got, want = (torch.cat([t.flatten() for t in run(s)]) for s in (scheduler, Naive()))
    assert error([got], [want]) < 1e-3


@INVERTING
def test_exact_streams_allow_activations_the_rounding_of_kernels(scheduler):
    """Kernels add in another order where the number of threads is another. Here half an ulp stands for that."""
    count = hidden_numbers()

    class Nudged(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 16)
            nn.init.zeros_(self.last.weight)

        def forward(self, x):
            return self.last(self.first(x).relu() * (1 + 2e-7 * (count() % 2)))

    stack = ReversibleSequence([(Nudged(), nn.Linear(16, 16))], ExactAdditive(), scheduler)
    loss(stack(*leaves(32, 16, dtype=torch.float32))).backward()
    assert count() == 2, "it did not run twice"


def test_one_wrong_element_is_found_in_one_of_several_forwards():
    """Of 1024 elements 128 are compared, and others in each forward."""
    numbers, refused = hidden_numbers(), []

    def function(x):
        noise = torch.rand((), generator=torch.Generator().manual_seed(numbers())).item()
        return x.sin() + torch.zeros(1024).index_fill(0, torch.tensor(3), noise)

    for _ in range(16):
        xs = [torch.randn(1024, requires_grad=True) for _ in range(2)]
        total = sum(y.sum() for y in reversible([(function, torch.cos)], *xs))
        try:
            total.backward()
        except RuntimeError as error:
            refused.append("recovered what enters" in str(error))
        else:
            refused.append(False)
    assert 0 < sum(refused) < 16


NUMBERS = st.sampled_from([0.0, 1e-3, 1.0, -2.0, 1e30, math.inf, -math.inf, math.nan])


@st.composite
def comparisons(draw):
    """Samples of what forward had, and of what came back: the same, nearly the same, or something else."""
    dtype, found = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])), []
    sizes = draw(st.sampled_from([(3, 3, 3), (3, 2, 3), (4,)]))
    for size in sizes:
        original = [draw(NUMBERS), *[1.0] * (size - 1)]
        other = draw(st.sampled_from([lambda v: v, lambda v: v * (1 + 1e-5), lambda v: v * 1.05, lambda v: 7.0]))
        recovered = [other(original[0]), *original[1:]]
        found.append(Comparison("f", torch.tensor(original, dtype=dtype), torch.tensor(recovered, dtype=dtype)))
    return found


def passes(found, tolerance):
    return bool((recovery_check.relative_errors(found, tolerance) <= tolerance).all())


@examples(600)
@given(comparisons(), st.sampled_from([0.0, 1e-3, 0.5]))
def test_the_first_look_at_what_came_back_passes_what_a_closer_look_passes(found, tolerance):
    refused = pytest.raises(RuntimeError, match="recovered what enters f")
    with nullcontext() if passes(found, tolerance) else refused:
        recovery_check.compare_recovered(found, [], False, tolerance, {torch.float32}, None)
