"""Outside of ordinary training: evaluation, function transforms, threads, fake tensors."""

import threading

import pytest
import torch
from common import (
    ByHand,
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
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, jacfwd, jacrev, jvp, vjp, vmap

from revlib import Naive, Reversible, ReversibleSequence, engine
from revlib.testing import LiveBytes


# ---------------------------------------------------------------------------------------------- without gradients
@law
def test_eval_mode(scheduler):
    return train(net(scheduler, lambda: mlp(dropout=0.5)).eval(), *leaves())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@law
def test_no_gradients(scheduler, mode):
    stack, xs = net(scheduler, lambda: mlp(dropout=0.5)), leaves()
    with mode():
        outputs = stack(*xs)
    assert not any(y.requires_grad for y in outputs)
    return [*outputs, torch.rand(())]


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


@law
def test_training_on_streams_made_in_inference_mode(scheduler):
    with torch.inference_mode():
        frozen = torch.randn(3, 4, dtype=torch.float64)
    (x,) = leaves(count=1)
    stack = net(scheduler)
    loss(stack(x, frozen.clone())).backward()
    return grads(x, stack)


@every_recomputing_scheduler
def test_a_context_tensor_made_in_inference_mode(scheduler):
    class Conditioned(nn.Module):
        def forward(self, x, scale):
            return (x + scale).sin()

    with torch.inference_mode():
        scale = torch.randn(4, dtype=torch.float64)
    found = []
    for s in (ByHand(), scheduler):
        torch.manual_seed(0)
        found.append(train(ReversibleSequence([(Conditioned(), Conditioned())], scheduler=s), *leaves(), scale=scale))
    assert error(found[1], found[0]) < 1e-10


@law
def test_a_scheduler_swapped_between_steps_and_after_forward(scheduler):
    stack, xs = net(Naive()), leaves()
    stack.scheduler = scheduler
    total = loss(stack(*xs))
    stack.scheduler = Naive()
    total.backward()
    return [*grads(*xs, stack), *train(stack, *leaves())]


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


@law
def test_functional_call_with_backward_inside(scheduler):
    stack, xs = net(scheduler), leaves()
    mine = parameters_of(stack)
    return torch.autograd.grad(loss(functional_call(stack, mine, tuple(xs))), [*xs, *mine.values()])


@law
def test_func_grad(scheduler):
    stack, xs = net(scheduler), [x.detach() for x in leaves()]
    mine = dict(stack.named_parameters())
    return torch.func.grad(lambda p, *x: loss(functional_call(stack, p, x)), argnums=(0, 1, 2))(mine, *xs)


@law
def test_func_grad_of_grad(scheduler):
    stack, xs = net(scheduler, depth=1), [x.detach() for x in leaves()]

    def penalty(x1, x2):
        return torch.func.grad(lambda a, b: loss(stack(a, b)))(x1, x2).square().sum()

    return torch.func.grad(penalty, argnums=(0, 1))(*xs)


@law
def test_vmap_over_samples(scheduler):
    stack, xs = net(scheduler), leaves(6, 3, 4)
    outputs = vmap(stack)(*xs)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


@law
def test_gradients_per_sample(scheduler):
    stack, xs = net(scheduler, depth=2), [x.detach() for x in leaves(6, 4)]
    mine = {k: p.detach() for k, p in stack.named_parameters()}
    per_sample = torch.func.grad(lambda p, a, b: loss(functional_call(stack, p, (a[None], b[None]))))
    return vmap(per_sample, in_dims=(None, 0, 0))(mine, *xs)


@law
def test_jvp(scheduler):
    stack, xs, vs = net(scheduler), leaves(), leaves()
    return jvp(lambda *x: stack(*x), tuple(x.detach() for x in xs), tuple(v.detach() for v in vs))


@law
def test_forward_mode_by_dual_tensors(scheduler):
    stack, xs, vs = net(scheduler), leaves(), leaves()
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, v.detach()) for x, v in zip(xs, vs, strict=True)]
        tangents = [torch.autograd.forward_ad.unpack_dual(y).tangent for y in stack(*duals)]
        loss(tangents).backward()
    return [*tangents, *grads(*xs, stack)]


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
@law
def test_jacobians(scheduler, jacobian):
    return jacobian(net(scheduler, depth=2), argnums=(0, 1))(*(x.detach() for x in leaves(2, 4)))


@law
def test_a_vjp_called_twice(scheduler):
    outputs, pull = vjp(net(scheduler), *(x.detach() for x in leaves()))
    return [outputs, pull(outputs), pull(tuple(y.sin() for y in outputs))]


@law
def test_jacobian_and_hessian_of_torch_autograd(scheduler):
    stack, xs = net(scheduler, depth=1), tuple(leaves(2, 2))
    stack = ReversibleSequence([(mlp(2), mlp(2))], scheduler=scheduler).double()
    return [
        torch.autograd.functional.jacobian(lambda *x: stack(*x), xs),
        torch.autograd.functional.jacobian(lambda *x: stack(*x)[0], xs, vectorize=True),
        torch.autograd.functional.hessian(lambda *x: loss(stack(*x)), xs),
    ]


@law
def test_batched_gradients(scheduler):
    stack, xs = net(scheduler), leaves()
    outputs = stack(*xs)
    basis = torch.eye(12, dtype=torch.float64).view(12, 3, 4)
    return torch.autograd.grad(outputs[1].sin(), xs, basis, is_grads_batched=True)


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


@every_scheduler
def test_threads_share_one_stack(scheduler):
    """As data-parallel threads do: each its own forward and backward, gradients taken by autograd.grad."""
    torch.manual_seed(0)
    stack, batches = net(scheduler), [leaves(16, 4) for _ in range(4)]

    def work(i):
        return [torch.autograd.grad(loss(stack(*batches[i])), [*batches[i], *stack.parameters()]) for _ in range(10)]

    together = in_threads(4, work)
    assert error(together, [work(i) for i in range(4)]) < 1e-10


@every_recomputing_scheduler
def test_backward_in_another_thread_than_forward(scheduler):
    found = []
    for s in (ByHand(), scheduler):
        torch.manual_seed(0)
        stack, xs = net(s, lambda: mlp(dropout=0.4)), leaves(16, 4)
        total = loss(stack(*xs))
        in_threads(1, lambda _, total=total: total.backward())
        found.append(grads(*xs, stack))
    assert error(found[1], found[0]) < 1e-10


@every_recomputing_scheduler
def test_two_threads_differentiate_one_graph(scheduler):
    torch.manual_seed(0)
    stack, xs = net(scheduler, lambda: mlp(dropout=0.4), depth=6), leaves(16, 4)
    total = loss(stack(*xs))

    def work(i):
        return [torch.autograd.grad(total, xs, retain_graph=True) for _ in range(10)]

    alone = work(0)
    assert error(in_threads(3, work), [alone] * 3) < 1e-10


# ---------------------------------------------------------------------------------------------- programs and shapes
@every_scheduler
def test_a_step_of_training_on_the_meta_device(scheduler):
    stack = net(scheduler, lambda: mlp(dropout=0.1)).to("meta")
    xs = [torch.empty(3, 4, dtype=torch.float64, device="meta", requires_grad=True) for _ in range(2)]
    outputs = stack(*xs)
    assert [y.shape for y in outputs] == [(3, 4)] * 2 and all(y.is_meta for y in outputs)
    loss(outputs).backward()
    assert all(g.is_meta for g in grads(*xs, stack))


@every_scheduler
def test_a_step_of_training_on_fake_tensors(scheduler):
    with FakeTensorMode():
        stack = ReversibleSequence([(mlp(dropout=0.1), mlp())] * 3, scheduler=scheduler)
        outputs = stack(*leaves(1000, 4, dtype=torch.float32))
        loss(outputs).backward()
    assert [tuple(y.shape) for y in outputs] == [(1000, 4)] * 2
    assert all(g.shape == p.shape for g, p in zip(grads(stack), stack.parameters(), strict=True))


@law
def test_a_pickled_state_dict_is_the_same_under_every_scheduler(scheduler):
    stack = net(scheduler)
    other = net(Naive())
    other.load_state_dict(stack.state_dict())
    other.scheduler = scheduler
    return train(other, *leaves())
