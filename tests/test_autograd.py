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
from torch.utils.checkpoint import checkpoint

from revlib import Checkpoint, Coupling, Naive, Reversible, ReversibleSequence, Step, reversible
from revlib.schedulers import Plan, Scheduler
from revlib.testing import assert_inverts, assert_same_gradients, assert_unmerges, strategies

schedulers = st.sampled_from([Reversible(), Checkpoint(), Naive()])


# ---------------------------------------------------------------------------------------------- ways to differentiate
@law
def test_autograd_grad(scheduler):
    stack, xs = net(scheduler), leaves()
    found = grad(loss(stack(*xs)), [*xs, *stack.parameters()])
    assert all(t.grad is None for t in [*xs, *stack.parameters()])
    return found


@law
def test_autograd_grad_of_the_streams_alone(scheduler):
    stack, xs = net(scheduler), leaves()
    return grad(loss(stack(*xs)), xs)


@law
def test_autograd_grad_of_one_parameter_in_the_middle(scheduler):
    stack, xs = net(scheduler), leaves()
    return grad(loss(stack(*xs)), stack[1].G[1].weight)


@law
def test_autograd_grad_with_respect_to_an_unused_tensor(scheduler):
    stack, xs = net(scheduler), leaves()
    unused = torch.ones(2, requires_grad=True)
    return grad(loss(stack(*xs)), [unused, *xs], allow_unused=True)


@law
def test_a_gradient_per_sample_by_is_grads_batched(scheduler):
    stack, xs = net(scheduler), leaves(5, 4)
    y = stack(*xs)[1].sin().sum(1)
    return [grad(y, xs, v, retain_graph=True) for v in torch.eye(5, dtype=torch.float64)]


@law
def test_backward_into_chosen_inputs_only(scheduler):
    stack, xs = net(scheduler), leaves()
    loss(stack(*xs)).backward(inputs=[xs[1], stack[0].F[1].weight, stack[2].G[4].bias])
    return grads(*xs, stack)


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


@law
def test_a_loss_on_each_output_one_after_the_other(scheduler):
    stack, xs = net(scheduler), leaves()
    y1, y2 = stack(*xs)
    y1.square().sum().backward(retain_graph=True)
    first = grads(*xs, stack)
    y2.sin().sum().backward()
    return [*first, *grads(*xs, stack)]


@law
def test_gradients_accumulate_over_micro_batches(scheduler):
    stack = net(scheduler)
    return [train(stack, *leaves()) for _ in range(3)]


@law
def test_a_graph_retained_twice(scheduler):
    stack, xs = net(scheduler), leaves()
    total = loss(stack(*xs))
    total.backward(retain_graph=True)
    first = grads(*xs, stack)
    total.backward(retain_graph=True)
    total.backward()
    found = grads(*xs, stack)
    assert error(found, [3 * g for g in first]) < 1e-10
    return found


@law
def test_double_backward(scheduler):
    stack, xs = net(scheduler), leaves()
    first = grad(loss(stack(*xs)), xs, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    penalty.backward()
    return [*first, *grads(*xs, stack)]


@law
def test_the_loss_and_its_gradient_penalty_together(scheduler):
    stack, xs = net(scheduler), leaves()
    total = loss(stack(*xs))
    (total + sum(g.square().sum() for g in grad(total, xs, create_graph=True))).backward()
    return grads(*xs, stack)


@law
def test_third_derivatives(scheduler):
    stack, xs = net(scheduler, depth=2), leaves(2, 3)
    stack = ReversibleSequence([(mlp(3), mlp(3))], scheduler=scheduler).double()
    found = loss(stack(*xs))
    for _ in range(2):
        found = sum(g.square().sum() for g in grad(found, xs, create_graph=True))
    return grad(found, [*xs, *stack.parameters()])


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


@pytest.mark.parametrize("needing", [(), (0,), (1,)])
@law
def test_streams_that_need_no_gradient(scheduler, needing):
    stack, xs = net(scheduler), leaves()
    for i, x in enumerate(xs):
        x.requires_grad_(i in needing)
    return train(stack, *xs)


@law
def test_nothing_needs_a_gradient(scheduler):
    stack, xs = net(scheduler).requires_grad_(False), leaves()
    outputs = stack(*(x.detach() for x in xs))
    assert not any(y.requires_grad for y in outputs)
    return outputs


@law
def test_the_same_tensor_in_both_streams(scheduler):
    stack, (x, _) = net(scheduler), leaves()
    loss(stack(x, x)).backward()
    return grads(x, stack)


@law
def test_streams_that_are_views_of_one_tensor(scheduler):
    stack, (x, _) = net(scheduler), leaves(3, 8)
    loss(stack(*x.chunk(2, dim=-1))).backward()
    return grads(x, stack)


@law
def test_a_function_that_returns_its_stream_a_parameter_or_a_detached_tensor(scheduler):
    p, xs = nn.Parameter(torch.randn(3, 4, dtype=torch.float64)), leaves()
    functions = [lambda x: x, lambda x: p, lambda x: x.detach().sin(), lambda x: (p * x).sin()]
    outputs = reversible([Step(f) for f in functions * 2], *xs, scheduler=scheduler)
    loss(outputs).backward()
    assert not any(t._backward_hooks for t in (p, *xs)), "the user's own tensors were hooked"
    return [*outputs, *grads(*xs, p)]


# ---------------------------------------------------------------------------------------------- sharing
@law
def test_a_module_used_in_every_step(scheduler):
    shared = mlp().double()
    stack = ReversibleSequence([(shared, shared), (mlp(), shared), Step(shared)], scheduler=scheduler).double()
    return train(stack, *leaves())


@law
def test_a_parameter_tied_to_embedding_and_head(scheduler):
    embedding, head = nn.Embedding(7, 4).double(), nn.Linear(4, 7, bias=False).double()
    head.weight = embedding.weight
    stack = net(scheduler)
    stack[1].F[4].weight = stack[0].G[4].weight
    x = embedding(torch.tensor([[0, 3, 6], [1, 1, 2]]))
    logits = head(sum(stack(x, x)))
    nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor([1, 2, 3, 4, 5, 6])).backward()
    return [logits, *grads(embedding, stack)]


@law
def test_a_stack_applied_twice_in_one_loss(scheduler):
    stack, xs = net(scheduler), leaves()
    loss(stack(*stack(*xs))).backward()
    return grads(*xs, stack)


@law
def test_nested_reversible_stacks(scheduler):
    def split(inner, x):
        return torch.cat(inner(*x.chunk(2, -1)), -1)

    def make():
        return nn.Sequential(nn.LayerNorm(8), Lambda(split, net(scheduler, lambda: mlp(dropout=0.2), depth=2)))

    return train(net(scheduler, make, depth=2), *leaves(3, 8))


@law
def test_a_stack_inside_a_larger_model(scheduler):
    stem, stack, head = nn.Linear(3, 8).double(), net(scheduler), nn.Linear(4, 2).double()
    for _ in range(2):
        head(sum(stack(*stem(torch.randn(5, 3, dtype=torch.float64)).chunk(2, -1)))).square().mean().backward()
    return grads(stem, stack, head)


# ---------------------------------------------------------------------------------------------- conditioning
@law
def test_context_by_keyword(scheduler):
    def scaled(linear, x, *, scale, options, power):
        return linear(x).tanh() * scale * options["deep"]["gain"] + options["list"][0] ** power

    scale, gain, shift, constant = leaves(4, count=4)
    constant.requires_grad_(False)
    options = {"deep": {"gain": gain}, "list": [shift, constant, None, "text"]}
    stack = net(scheduler, lambda: Lambda(scaled, nn.Linear(4, 4)))
    for branch in (f for pair in stack for f in pair):
        branch.forward = lambda x, scale, options, power, m=branch: scaled(
            m.parts[0], x, scale=scale, options=options, power=power
        )
    xs = leaves()
    return [train(stack, *xs, scale=scale, options=options, power=2), *grads(scale, gain, shift)]


@law
def test_context_that_only_some_functions_name(scheduler):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, scale, times=1):
            return (self.linear(x) * scale * times).tanh()

    (scale,) = leaves(4, count=1)
    stack = ReversibleSequence([(Conditioned(), mlp()), (mlp(), Conditioned())], scheduler=scheduler).double()
    return [train(stack, *leaves(), scale=scale, times=3), *grads(scale)]


@law
def test_context_that_is_itself_computed(scheduler):
    class Conditioned(nn.Module):
        def forward(self, x, scale):
            return (x * scale).sin()

    (raw,) = leaves(4, count=1)
    stack = ReversibleSequence([(Conditioned(), Conditioned())] * 2, scheduler=scheduler)
    return [train(stack, *leaves(), scale=raw.exp()), *grads(raw)]


@law
def test_conditioning_by_closure(scheduler):
    w, bias = leaves(4, 4, count=1)[0], leaves(4, count=1)[0]
    functions = [(lambda x: (x @ w).tanh(), lambda x: (x @ w.t() + bias).sin())] * 3
    xs = leaves()
    loss(reversible(functions, *xs, scheduler=scheduler)).backward()
    return grads(*xs, w, bias)


@law
def test_conditioning_on_a_computed_tensor_by_closure(scheduler):
    (raw,), xs = leaves(4, count=1), leaves()
    scale = raw.exp()
    loss(reversible([(lambda x: (x * scale).sin(),) * 2] * 3, *xs, scheduler=scheduler)).backward()
    return grads(*xs, raw)


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


@law
def test_an_auxiliary_loss_from_inside_a_function_added_to_the_main_loss(scheduler):
    stack, xs, main, auxiliary = with_auxiliary_loss(scheduler)
    (main + 0.3 * auxiliary).backward()
    return grads(*xs, stack)


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
def test_a_function_that_is_the_gradient_of_an_energy(scheduler):
    def force(potential, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            (f,) = grad(potential(x).sin().sum(), x, create_graph=True)
        return -f

    stack = net(scheduler, lambda: Lambda(force, nn.Linear(4, 3)))
    return train(stack, *leaves())


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
@law
def test_tensor_hooks_see_and_change_gradients_once(scheduler):
    seen = []

    def hooked(g):
        seen.append(g.clone())
        return 2 * g

    def f(linear, x):
        h = linear(x)
        h.register_hook(hooked)
        return h.tanh()

    stack, xs = net(scheduler, lambda: Lambda(f, nn.Linear(4, 4))), leaves()
    for t in (*xs, stack[1].F.parts[0].weight):
        t.register_hook(hooked)
    outputs = stack(*xs)
    for y in outputs:
        y.register_hook(hooked)
    loss(outputs).backward()
    assert len(seen) == 6 + 3 + 2
    return [*seen, *grads(*xs, stack)]


@law
def test_retained_gradients_of_outputs_and_inside_functions(scheduler):
    inside = []

    def f(linear, x):
        h = linear(x)
        if h.requires_grad:
            h.retain_grad()
        inside.append(h)
        return h.tanh()

    stack, xs = net(scheduler, lambda: Lambda(f, nn.Linear(4, 4))), leaves()
    outputs = stack(*xs)
    for y in outputs:
        y.retain_grad()
    first = list(inside)
    loss(outputs).backward()
    return grads(*outputs, *first, *xs, stack)


@law
def test_forward_hooks_of_modules_change_what_they_return(scheduler):
    stack = net(scheduler)
    stack[0].F.register_forward_hook(lambda m, args, y: 2 * y)
    stack[1].G[1].register_forward_hook(lambda m, args, y: y.sin())
    stack[1].G[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    stack.register_forward_hook(lambda m, args, ys: tuple(y.exp() for y in ys))
    return train(stack, *leaves())


@law
def test_full_backward_hooks_see_and_change_gradients_once(scheduler):
    seen = []

    def hook(module, grad_input, grad_output):
        seen.append([g.clone() for g in (*grad_input, *grad_output)])
        return tuple(2 * g for g in grad_input)

    stack = net(scheduler)
    for module in (stack[0].F, stack[1].G[1], stack[2].G, stack):
        module.register_full_backward_hook(hook)
    stack[1].F.register_full_backward_pre_hook(lambda m, g: (3 * g[0],))
    found = train(stack, *leaves())
    assert len(seen) == 4
    return [*seen, *found]


@law
def test_post_accumulate_grad_hooks_fire_once_a_parameter(scheduler):
    stack, fired = net(scheduler), []
    for name, p in stack.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append((name, p.grad.clone())))
    train(stack, *leaves())
    assert sorted(name for name, _ in fired) == sorted(name for name, _ in stack.named_parameters())
    return [g for _, g in sorted(fired, key=lambda pair: pair[0])]


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


@law
def test_an_optimizer_after_each_backward(scheduler):
    stack = net(scheduler)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        loss(stack(*leaves())).backward()
        optimizer.step()
    return list(stack.parameters())


# ---------------------------------------------------------------------------------------------- autograd's own modes
@pytest.mark.parametrize("use_reentrant", [True, False])
@law
def test_checkpoint_inside_a_function(scheduler, use_reentrant):
    def f(m, x):
        return checkpoint(m, x, use_reentrant=use_reentrant)

    return train(net(scheduler, lambda: Lambda(f, mlp(dropout=0.3))), *leaves())


@pytest.mark.parametrize("use_reentrant", [True, False])
@law
def test_checkpoint_around_a_stack(scheduler, use_reentrant):
    stack, xs = net(scheduler, lambda: mlp(dropout=0.3)), leaves()
    outputs = checkpoint(stack, *xs, use_reentrant=use_reentrant)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


@law
def test_saved_tensors_on_the_cpu(scheduler):
    stack, xs = net(scheduler), leaves()
    with torch.autograd.graph.save_on_cpu():
        total = loss(stack(*xs))
    total.backward()
    return grads(*xs, stack)


@law
def test_saved_tensors_packed_by_the_users_own_hooks(scheduler):
    stack, xs = net(scheduler), leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
        total = loss(stack(*xs))
    total.backward()
    return grads(*xs, stack)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@law
def test_anomaly_mode(scheduler):
    with torch.autograd.detect_anomaly():
        return train(net(scheduler), *leaves())


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


@law
def test_a_copy_made_between_forward_and_backward(scheduler):
    stack, xs = net(scheduler), leaves()
    total = loss(stack(*xs))
    twin = copy.deepcopy(stack)
    total.backward()
    assert all(p.grad is None for p in twin.parameters())
    return [*grads(*xs, stack), *train(twin, *leaves())]


@law
def test_backward_in_inference_of_nothing_under_no_grad(scheduler):
    """Backward called under no_grad, as some training loops do."""
    stack, xs = net(scheduler), leaves()
    total = loss(stack(*xs))
    with torch.no_grad():
        total.backward()
    return grads(*xs, stack)


@law
def test_a_function_that_turns_gradients_off_for_a_part(scheduler):
    def f(first, second, x):
        with torch.no_grad():
            gate = first(x).sigmoid()
        return second(x).tanh() * gate

    return train(net(scheduler, lambda: Lambda(f, nn.Linear(4, 4), nn.Linear(4, 4))), *leaves())


# ---------------------------------------------------------------------------------------------- kinds of streams
def conv():
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 4, 1))


@law
def test_channels_last_streams(scheduler):
    stack, seen = net(scheduler, conv).to(memory_format=torch.channels_last), []
    stack[0].G[0].register_forward_hook(lambda m, args, y: seen.append(args[0].stride()))
    xs = [x.detach().to(memory_format=torch.channels_last).requires_grad_() for x in leaves(2, 4, 5, 6)]
    found = train(stack, *xs)
    assert len(set(seen)) == 1
    return found


class Swapped(Coupling):
    """A sum that takes the layout of what the function returned."""

    def merge(self, s, f):
        return f + s

    def unmerge(self, merged, f):
        return merged - f


@every_recomputing_scheduler
def test_functions_see_streams_in_the_same_layout_again(scheduler):
    seen = []

    def f(m, x):
        seen.append(x.stride())
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


@law
def test_streams_that_are_strided_or_expanded_views(scheduler):
    (base,), (row,) = leaves(3, 8, count=1), leaves(4, count=1)
    stack = net(scheduler)
    loss(stack(base[:, ::2], row.expand(3, 4))).backward()
    return grads(base, row, stack)


@law
def test_complex_streams(scheduler):
    stack = net(scheduler, lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), dtype=torch.complex128)
    return train(stack, *leaves(dtype=torch.complex128))


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4)])
@every_scheduler
def test_an_empty_batch(scheduler, shape):
    stack = net(scheduler)
    xs = leaves(*shape)
    outputs = stack(*xs)
    loss(outputs).backward()
    assert all(t.shape == shape for t in (*outputs, *grads(*xs)))
    assert all(g is not None and not g.any() for g in grads(stack))


@law
def test_streams_without_dimensions(scheduler):
    a, xs = nn.Parameter(torch.tensor(0.7, dtype=torch.float64)), leaves(1)
    xs = [x.detach()[0].requires_grad_() for x in xs]
    loss(reversible([(lambda x: (a * x).sin(), torch.cos)] * 2, *xs, scheduler=scheduler)).backward()
    return grads(*xs, a)


@law
def test_streams_of_different_widths(scheduler):
    stack = ReversibleSequence([(mlp(3, 5), mlp(5, 3)) for _ in range(3)], scheduler=scheduler).double()
    return train(stack, *leaves(2, 5, count=1), *leaves(2, 3, count=1))


@law
def test_streams_of_different_precision(scheduler):
    def f(m, x):
        return m(x.double()).tanh()

    def g(m, x):
        return m(x).tanh().float()

    xs = [*leaves(count=1), *leaves(count=1, dtype=torch.float32)]
    stack = ReversibleSequence(
        [(Lambda(f, nn.Linear(4, 4)), Lambda(g, nn.Linear(4, 4))) for _ in range(2)],
        scheduler=Reversible(tolerance=1e-3) if isinstance(scheduler, Reversible) else scheduler,
    ).double()
    outputs = stack(*xs)
    assert [y.dtype for y in outputs] == [torch.float64, torch.float32]
    loss([y.double() for y in outputs]).backward()
    # A float32 stream inverts to float32 accuracy only: compare its consequences that far.
    return [(t.double() * 2**10).round() if t is not None else t for t in (*outputs, *grads(*xs, stack))]


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
