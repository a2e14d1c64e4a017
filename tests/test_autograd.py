"""Whatever autograd can do with a plain stack, it does with a reversible one: the graph is the ordinary one."""

import copy
from dataclasses import dataclass

import pytest
import torch
from common import (
    ByHand,
    Lambda,
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
from torch import nn
from torch.autograd import grad

from revlib import Checkpoint, Coupling, Naive, Reversible, ReversibleSequence, Step, reversible
from revlib.schedulers import Plan, Scheduler
from revlib.testing import assert_inverts, assert_same_gradients, assert_unmerges, strategies

schedulers = st.sampled_from([Reversible(), Checkpoint(), Naive()])


# ---------------------------------------------------------------------------------------------- ways to differentiate
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4])
@law
def test_a_loss_on_one_output(scheduler, used, depth):
    stack, xs = net(scheduler, depth=depth), leaves()
    stack(*xs)[used].square().sum().backward()
    return grads(*xs, stack)


@pytest.mark.parametrize("used", [0, 1])
@law
def test_a_loss_on_one_output_when_the_other_is_deleted(scheduler, used):
    stack, xs = net(scheduler), leaves()
    outputs = list(stack(*xs))
    del outputs[1 - used]
    outputs[0].square().sum().backward()
    return grads(*xs, stack)


@every_scheduler
def test_gradcheck_and_gradgradcheck(scheduler):
    torch.manual_seed(0)
    stack = ReversibleSequence([(mlp(2), mlp(2)) for _ in range(2)], scheduler=scheduler).double()
    xs = leaves(2, 2)
    weights = [stack[0].F[1].weight, stack[1].G[4].weight]
    assert torch.autograd.gradcheck(lambda *t: stack(*t[:2]), [*xs, *weights])
    assert torch.autograd.gradgradcheck(lambda *t: stack(*t[:2]), [*xs, *weights])


# ---------------------------------------------------------------------------------------------- what needs a gradient
@given(strategies.seeds(), st.data(), schedulers)
def test_parameters_frozen_in_any_pattern(seed, data, scheduler):
    torch.manual_seed(seed)
    stack, xs = net(scheduler, depth=2), leaves()
    for t in [*xs, *stack.parameters()]:
        t.requires_grad_(data.draw(st.booleans()))
    assert_same_gradients(stack, *xs, schedulers=[scheduler], oracle=ByHand())


@given(strategies.seeds(), st.data(), schedulers)
def test_requires_grad_toggled_between_forward_and_backward(seed, data, scheduler):
    def flip_some(loss_, parameters, flipped):
        for p, flip in zip(parameters, flipped, strict=True):
            p.requires_grad_(p.requires_grad != flip)
        loss_.backward()

    torch.manual_seed(seed)
    first, xs = net(scheduler, depth=2), leaves()
    frozen = [data.draw(st.booleans()) for _ in first.parameters()]
    flipped = [data.draw(st.booleans()) for _ in first.parameters()]
    found = []
    for s in (ByHand(), scheduler):
        stack = copy.deepcopy(first)
        stack.scheduler = s
        streams = [x.detach().clone().requires_grad_() for x in xs]
        for p, no in zip(stack.parameters(), frozen, strict=True):
            p.requires_grad_(not no)
        flip_some(loss(stack(*streams)), list(stack.parameters()), flipped)
        found.append(grads(*streams, stack))
    assert error(found[1], found[0]) < 1e-10


# ---------------------------------------------------------------------------------------------- unusual functions
def with_auxiliary_loss(scheduler):
    auxiliary = []

    def f(first, second, x):
        h = first(x).tanh()
        auxiliary.append(h.square().mean())
        return second(h)

    stack = net(scheduler, lambda: Lambda(f, nn.Linear(4, 6), nn.Linear(6, 4)))
    xs = leaves()
    outputs = stack(*xs)
    return stack, xs, loss(outputs), sum(auxiliary)


@pytest.mark.parametrize("main_first", [True, False])
@law
def test_an_auxiliary_loss_from_inside_a_function_differentiated_by_itself(scheduler, main_first):
    stack, xs, main, auxiliary = with_auxiliary_loss(scheduler)
    first, second = (main, auxiliary) if main_first else (auxiliary, main)
    first.backward(retain_graph=True)
    halfway = grads(*xs, stack)
    second.backward()
    return [*halfway, *grads(*xs, stack)]


@law
def test_only_an_auxiliary_loss_from_inside_a_function(scheduler):
    stack, xs, _, auxiliary = with_auxiliary_loss(scheduler)
    auxiliary.backward()
    return grads(*xs, stack)


@law
def test_a_function_that_differentiates_a_part_of_itself_without_a_graph(scheduler):
    def f(linear, x):
        h = linear(x)
        (slope,) = grad(h.tanh().sum(), h, retain_graph=True)
        return h.sin() * slope

    return train(net(scheduler, lambda: Lambda(f, nn.Linear(4, 4))), *leaves())


class Squared(torch.autograd.Function):
    """Reads its saved tensors twice."""

    @staticmethod
    def forward(ctx, x):
        y = x.square()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        (x, y), (again, _) = ctx.saved_tensors, ctx.saved_tensors
        assert torch.equal(y, x.square()) and torch.equal(x, again)
        return g * (x + again)


@pytest.mark.parametrize("retain_graph", [False, True])
@law
def test_a_custom_function_that_reads_its_saved_tensors_twice(scheduler, retain_graph):
    stack, xs = net(scheduler, lambda: Lambda(lambda m, x: Squared.apply(m(x)).sin(), nn.Linear(4, 4))), leaves()
    loss(stack(*xs)).backward(retain_graph=retain_graph)
    return grads(*xs, stack)


@every_scheduler
def test_saved_tensors_can_be_looked_at_outside_of_backward(scheduler):
    torch.manual_seed(0)
    (x,) = leaves(count=1)
    a, b = reversible([(lambda x: x.sin(), lambda x: x.exp())], x, x.detach().cos(), scheduler=scheduler)
    saved = b.grad_fn.next_functions[1][0]
    while not hasattr(saved, "_saved_result"):
        saved = saved.next_functions[0][0]
    assert error(saved._saved_result, a.detach().exp()) < 1e-10
    assert error(saved._saved_result, a.detach().exp()) < 1e-10


# ---------------------------------------------------------------------------------------------- hooks
class Shift(nn.Module):
    """Its gradient needs no saved tensor, so it is complete before anything was recovered for its function."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x + self.shift


@dataclass(frozen=True)
class KeepUpper(Scheduler):
    """Activations above, inversion below."""

    def plan(self, length):
        return Plan(activations=range(length // 2, length), states=(length,))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("last", [nn.Identity, Shift, lambda: nn.Linear(4, 4, bias=False), lambda: nn.LayerNorm(4)])
@law
def test_an_optimizer_that_steps_inside_backward(scheduler, last, mixed):
    """Each parameter is updated as soon as its gradient is complete, before the functions below are repeated."""
    stack = net(scheduler, lambda: nn.Sequential(mlp(), last()))
    if mixed and scheduler == Reversible():
        stack.scheduler = KeepUpper()
    for p in stack.parameters():
        optimizer = torch.optim.Adam([p], lr=0.05)

        def step(p, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    for _ in range(4):
        loss(stack(*leaves())).backward()
    return list(stack.parameters())


# ---------------------------------------------------------------------------------------------- autograd's own modes
@every_recomputing_scheduler
def test_anomaly_mode_names_the_operation_in_the_function_that_made_a_nan(scheduler):
    def root(x):
        return x.mul(0).sqrt()  # the slope is 0 times infinity

    (x, z), functions = leaves(), [(torch.sin, root)]
    with (
        pytest.warns(UserWarning, match="in root"),
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        loss(reversible(functions, x, z, scheduler=scheduler)).backward()


# ---------------------------------------------------------------------------------------------- kinds of streams
class Swapped(Coupling):
    """A sum that takes the layout of what the function returned."""

    def merge(self, s, f):
        return f + s

    def unmerge(self, merged, f):
        return merged - f


@every_recomputing_scheduler
def test_functions_see_streams_in_the_same_layout_again(scheduler):
    seen = []
    note = seen.append  # out of sight of the guards, which put lists back

    def f(m, x):
        note(x.stride())
        return m(x).transpose(0, 1).contiguous().transpose(0, 1)

    stack = ReversibleSequence([Step(Lambda(f, nn.Linear(4, 4)), Swapped()) for _ in range(4)], scheduler=scheduler)
    outputs = stack(*leaves(3, 5, 4, dtype=torch.float32))
    forward = list(seen)
    loss(outputs).backward()
    assert len(set(forward)) == 2 and seen == [*forward, *reversed(forward)]


@every_scheduler
def test_functions_see_streams_in_the_same_dtype_again(scheduler):
    """The second step promotes its stream to float64; the first, whose module takes float32, is repeated below it."""
    linear, xs = nn.Linear(4, 4), leaves(dtype=torch.float32)
    outputs = reversible([(linear, lambda x: x.double().sin())], *xs, scheduler=scheduler)
    assert [y.dtype for y in outputs] == [torch.float32, torch.float64]
    outputs[1].sum().backward()
    want = torch.autograd.grad((xs[1] + (xs[0] + linear(xs[1])).double().sin()).sum(), [*xs, linear.weight])
    assert error([*grads(*xs), linear.weight.grad], want) < 1e-5


@given(st.permutations([0, 1, 2]), st.permutations([0, 1, 2]), schedulers)
def test_streams_of_any_layout(first, second, scheduler):
    torch.manual_seed(0)
    stack = net(scheduler, depth=2)
    xs = [
        torch.empty_permuted((3, 5, 4), order, dtype=torch.float64).normal_().requires_grad_()
        for order in (first, second)
    ]
    assert_same_gradients(stack, *xs, schedulers=[scheduler], oracle=ByHand())


@given(strategies.seeds(), st.integers(3, 5), st.integers(1, 8), schedulers)
def test_steps_on_more_than_two_streams(seed, m, depth, scheduler):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4 * (m - 1), 4)

        def forward(self, *streams):
            return self.linear(torch.cat(streams, -1)).tanh()

    torch.manual_seed(seed)
    stack = ReversibleSequence([Step(Mixed()) for _ in range(depth)]).double()
    xs = leaves(count=m)
    assert_same_gradients(stack, *xs, schedulers=[scheduler], oracle=ByHand())
    assert_inverts(stack, *xs)


class Affine(Coupling):
    """Real-valued non-volume-preserving: the merge itself saves tensors, and takes a pair."""

    def merge(self, s, f):
        return s * f["scale"].tanh().exp() + f["shift"]

    def unmerge(self, merged, f):
        return (merged - f["shift"]) * (-f["scale"].tanh()).exp()


class ScaleAndShift(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(mlp(4, 8), nn.Dropout(0.2))

    def forward(self, x):
        scale, shift = self.body(x).chunk(2, -1)
        return {"scale": scale, "shift": shift}


@pytest.mark.parametrize("frozen", [False, True])
@law
def test_a_coupling_that_saves_tensors_itself(scheduler, frozen):
    stack = ReversibleSequence([(ScaleAndShift(), ScaleAndShift()) for _ in range(3)], Affine(), scheduler).double()
    stack[1].requires_grad_(not frozen)
    return train(stack, *leaves())


@law
def test_double_backward_through_a_coupling_that_saves_tensors_itself(scheduler):
    stack = ReversibleSequence([(ScaleAndShift(), ScaleAndShift())] * 2, Affine(), scheduler).double()
    xs = leaves()
    sum(g.square().sum() for g in grad(loss(stack(*xs)), xs, create_graph=True)).backward()
    return grads(*xs, stack)


@given(strategies.seeds(), st.lists(st.integers(1, 4), max_size=3))
def test_the_affine_coupling_of_these_tests_unmerges(seed, shape):
    torch.manual_seed(seed)
    s, a, b = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    assert_unmerges(Affine(), s, {"scale": a, "shift": b})


class Scaled(Coupling):
    """Its merge saves the stream that is merged away and a learned scale: f is a tensor, the law has a parameter."""

    def merge(self, s, f):
        return s * f[0] + f[1]

    def unmerge(self, merged, f):
        return (merged - f[1]) / f[0]


@law
def test_a_coupling_fed_with_a_parameter_and_a_tensor(scheduler):
    gamma = nn.Parameter(torch.full((4,), 1.3, dtype=torch.float64))
    m, xs = mlp().double(), leaves()
    steps = [Step(lambda x: (gamma, m(x)), Scaled()) for _ in range(5)]
    loss(reversible(steps, *xs, scheduler=scheduler)).backward()
    return grads(gamma, m, *xs)
