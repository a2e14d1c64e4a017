"""On a grid, inversion gives back every bit, and gradients are bit for bit those of stored activations."""

import copy
import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from common import Lambda, error, examples, grads, leaves, loss, mlp, vit_block
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revlib import (
    Additive,
    ExactAdditive,
    Naive,
    PaReprop,
    Reversible,
    ReversibleSequence,
    Step,
    invert,
    positionwise,
    reversible,
)
from revlib.schedulers import Anchored, Checkpoint, KeepLast
from revlib.testing import assert_unmerges, strategies


def same(got, want):
    """Bit for bit; None only where None is."""
    return len(got) == len(want) and all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(got, want, strict=True)
    )


def made_exact(stack, **kw):
    """The same stack with ExactAdditive throughout."""
    stack.coupling = ExactAdditive(**kw)
    for item in stack:
        if isinstance(item, Step):
            item.coupling = ExactAdditive(**kw)
    return stack


def observed(stack, scheduler, streams, context, seed=0, amp=None):
    stack, xs = copy.deepcopy(stack), [t.detach().clone().requires_grad_(t.requires_grad) for t in streams]
    stack.scheduler = scheduler
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Cached casts of a weight that steps share would collect its gradients in low precision under Naive.
        with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None, cache_enabled=False):
            outputs = stack(*xs, **context)
        if any(y.requires_grad for y in outputs):
            loss(outputs).backward()
    return [*(y.detach() for y in outputs), *grads(*xs, stack)]


precisions = st.sampled_from([None, torch.bfloat16, torch.float16])  # of autocast


# ---------------------------------------------------------------------------------------------- the law
@given(strategies.seeds(), st.integers(-12, 30), st.floats(1e-6, 1e3), strategies.dtypes())
def test_any_result_unmerges_from_any_stream_on_the_grid(seed, power, scale, dtype):
    torch.manual_seed(seed)
    coupling = ExactAdditive(limit=2.0**power)
    s = coupling.enter(torch.randn(64, dtype=dtype).clamp(-3, 3) * coupling.limit / 8)
    f = (torch.randn(64, dtype=dtype) * scale).clamp(-coupling.limit / 2, coupling.limit / 2)
    assert_unmerges(coupling, s, f, rtol=0.0)
    assert torch.equal(coupling.enter(s), s)
    digits = {torch.float32: 24, torch.float64: 53}[dtype]
    assert (coupling.merge(torch.zeros_like(s), f) - f).abs().max() <= coupling.limit * 2.0**-digits / 2


@examples(60)
@given(strategies.cases(dtype=torch.float32), precisions)
def test_inversion_gives_back_every_bit(case, amp):
    stack = made_exact(case.stack).eval()
    entered = [ExactAdditive().enter(x) if i < len(stack.bound_steps) else x for i, x in enumerate(case.streams)]
    with torch.no_grad(), torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
        recovered = stack.inverse(*stack(*case.streams, **case.context), **case.context)
    assert same(recovered, entered)


@examples(120)
@given(strategies.cases(dtype=torch.float32, max_depth=7), strategies.schedulers(), precisions, strategies.seeds())
def test_gradients_are_those_of_naive_bit_for_bit(case, scheduler, amp, seed):
    """Dropout, batch norm, context, shared and frozen modules included."""
    stack = made_exact(case.stack)
    arguments = case.streams, case.context, seed, amp
    assert same(observed(stack, scheduler, *arguments), observed(stack, Naive(), *arguments))


@pytest.mark.some(1)
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 192])
def test_a_deep_vit(amp, depth):
    torch.manual_seed(0)
    blocks = [vit_block(32, 2) for _ in range(depth)]
    stack = ReversibleSequence([(nn.Sequential(F, nn.Dropout(0.1)), G) for F, G in blocks], ExactAdditive())
    xs = leaves(2, 9, 32, dtype=torch.float32)
    want = observed(stack, Naive(), xs, {}, amp=amp)
    for scheduler in (Reversible(), Checkpoint(2), KeepLast(3, Anchored(4)), PaReprop()):
        assert same(observed(stack, scheduler, xs, {}, amp=amp), want)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_thousand_blocks(amp):
    torch.manual_seed(0)
    stack = ReversibleSequence([vit_block(16, 2) for _ in range(1000)], ExactAdditive())
    xs = leaves(2, 5, 16, dtype=torch.float32)
    assert same(observed(stack, Reversible(), xs, {}, amp=amp), observed(stack, Naive(), xs, {}, amp=amp))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp is not None):
        assert same(stack.inverse(*stack(*xs)), [ExactAdditive().enter(x) for x in xs])


def test_without_the_grid_none_of_this_holds():
    torch.manual_seed(0)
    stack, xs = ReversibleSequence([vit_block(32, 2) for _ in range(12)]), leaves(2, 9, 32, dtype=torch.float32)
    assert not same(observed(stack, Reversible(), xs, {}), observed(stack, Naive(), xs, {}))


# ---------------------------------------------------------------------------------------------- the range
def far(limit, size, scheduler=None):
    """Three blocks, of which the second's G returns ``size``."""
    torch.manual_seed(0)
    jump = Lambda(lambda f, x: f(x) * 0 + size, nn.Linear(4, 4))
    return ReversibleSequence([(mlp(), mlp()), (mlp(), jump), (mlp(), mlp())], ExactAdditive(limit), scheduler)


@pytest.mark.parametrize(
    "scheduler", [Reversible(), Checkpoint(), KeepLast(1), Reversible(tolerance=math.inf)], ids=str
)
@pytest.mark.parametrize("size", [100.0, -100.0])
def test_leaving_the_range_is_an_error_that_names_the_step_and_the_size(scheduler, size):
    total = loss(far(64.0, size, scheduler)(*leaves(dtype=torch.float32)))
    with pytest.raises(
        RuntimeError, match=r"G of block 1 \(Lambda\) took its stream to a magnitude of 10\d\.\d+, beyond"
    ):
        total.backward()
    loss(far(256.0, size, scheduler)(*leaves(dtype=torch.float32))).backward()


def test_an_overflow_in_forward_is_left_to_the_grad_scaler():
    xs = leaves(dtype=torch.float32)
    loss(far(64.0, math.inf)(*xs)).backward()
    assert not xs[0].grad.isfinite().all()


@pytest.mark.parametrize("limit", [0.0, -2.0, 1000.0, math.inf, math.nan])
def test_the_limit_is_a_power_of_two(limit):
    with pytest.raises(ValueError, match=r"ExactAdditive\(limit=...\) takes a power of two such as 1024"):
        ExactAdditive(limit)


@pytest.mark.parametrize("dtype", ["bf16", torch.int8, torch.complex64, 16], ids=repr)
def test_functions_see_streams_in_a_floating_point_dtype(dtype):
    with pytest.raises(
        TypeError, match=r"ExactAdditive\(functions=...\) takes a floating-point dtype .* got " + re.escape(repr(dtype))
    ):
        ExactAdditive(functions=dtype)


def test_a_step_that_does_not_repeat_its_bits_is_an_error():
    """Where all is exact, equality is asked for: here one part in a million would pass otherwise."""
    calls = itertools.count().__next__  # where no guard sees it
    bad = Lambda(lambda f, x: f(x) * (1 + 1e-4 * (calls() > 0)), nn.Linear(4, 4))
    xs = leaves(16, 4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="where 0 is tolerated"):
        loss(ReversibleSequence([(mlp(), bad)], ExactAdditive())(*xs)).backward()


def test_a_private_mask_that_would_hide_in_the_tolerance_of_bfloat16_is_an_error():
    """Without the grid, which asks for equality, it is known to be silent."""
    numbers = itertools.count().__next__  # where no guard sees it

    def f(m, x):
        mask = torch.bernoulli(torch.full_like(x, 0.5), generator=torch.Generator().manual_seed(numbers()))
        return torch.where(mask > 0, m(x), m(x).sin())

    torch.manual_seed(0)
    stack = ReversibleSequence([(mlp(), Lambda(f, nn.Linear(4, 4))) for _ in range(3)], ExactAdditive())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = stack(*leaves(16, 4, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="where 0 is tolerated"):
        loss(outputs).backward()


# ---------------------------------------------------------------------------------------------- low precision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_models_in_low_precision_keep_their_streams_in_float32(dtype):
    torch.manual_seed(0)
    stack = ReversibleSequence([vit_block(32, 2) for _ in range(24)], ExactAdditive(functions=dtype)).to(dtype)
    xs = leaves(2, 9, 32, dtype=dtype)
    got, want = (observed(stack, s, xs, {}) for s in (Reversible(), Naive()))
    assert same(got, want)
    assert got[0].dtype == torch.float32 and got[2].dtype == dtype  # outputs, and gradients of the inputs
    with torch.no_grad():
        entered = [ExactAdditive(functions=dtype).enter(x) for x in xs]
        assert same(stack.inverse(*stack(*xs)), entered)
        assert all((e - x.float()).abs().max() < 1e-4 for e, x in zip(entered, xs, strict=True))


def test_streams_in_low_precision_are_refused():
    stack = ReversibleSequence([(mlp(), mlp())], ExactAdditive()).bfloat16()
    with pytest.raises(TypeError, match=r"say ExactAdditive\(functions=torch.bfloat16\)"):
        stack(*leaves(dtype=torch.bfloat16))


# ---------------------------------------------------------------------------------------------- autograd
def test_the_gradient_is_that_of_the_identity():
    f = torch.randn(5, requires_grad=True)
    s = ExactAdditive().enter(torch.randn(5))
    (ExactAdditive().merge(s, f) * torch.arange(5.0)).sum().backward()
    assert torch.equal(f.grad, torch.arange(5.0))


def test_double_backward_bit_for_bit():
    found = []
    for scheduler in (Naive(), Reversible()):
        torch.manual_seed(0)
        stack = ReversibleSequence([(mlp(), mlp()) for _ in range(3)], ExactAdditive(), scheduler)
        xs = leaves(dtype=torch.float32)
        first = torch.autograd.grad(loss(stack(*xs)), xs, create_graph=True)
        loss(first).backward()
        found.append([*first, *grads(*xs, stack)])
    assert same(found[0], found[1])


def test_function_transforms():
    torch.manual_seed(0)
    stack = ReversibleSequence([(mlp(), mlp()) for _ in range(2)], ExactAdditive()).double()
    x = torch.randn(3, 4, dtype=torch.float64)

    def total(x):
        return loss(stack(x, x))

    want = torch.func.grad(total)(x)
    leaf = x.clone().requires_grad_()
    total(leaf).backward()
    assert torch.allclose(leaf.grad, want, rtol=1e-12)
    per_row = torch.func.vmap(torch.func.grad(total))(x)
    assert torch.allclose(per_row, want, rtol=1e-10)
    tangent = torch.randn_like(x)
    assert torch.allclose(torch.func.jvp(total, (x,), (tangent,))[1], (want * tangent).sum(), rtol=1e-10)


@pytest.mark.slow
def test_compiled():
    torch.manual_seed(0)
    stack = ReversibleSequence([(mlp(), mlp()) for _ in range(2)], ExactAdditive())
    xs = leaves(dtype=torch.float32)
    loss(torch.compile(stack)(*xs)).backward()
    got = grads(*xs, stack)
    for t in (*xs, *stack.parameters()):
        t.grad = None
    loss(stack(*xs)).backward()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(got, grads(*xs, stack), strict=True))


def test_the_functional_form_enters_the_grid_too():
    torch.manual_seed(0)
    pairs, coupling = [(mlp(), mlp()) for _ in range(3)], ExactAdditive()
    xs = leaves(dtype=torch.float32)
    with torch.no_grad():
        back = invert(pairs, *reversible(pairs, *xs, coupling=coupling), coupling=coupling)
    assert same(back, [coupling.enter(x).detach() for x in xs])


def test_in_parts():
    torch.manual_seed(0)
    blocks, coupling = [(mlp(), mlp()) for _ in range(3)], ExactAdditive()
    parts = [item for F, G in blocks for item in (Step(F, coupling), *positionwise(G, 2, coupling=coupling))]
    stack, xs = ReversibleSequence(parts), leaves(2, 5, 4, dtype=torch.float32)
    assert same(observed(stack, Reversible(), xs, {}), observed(stack, Naive(), xs, {}))


KERNEL = """
import contextlib, os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from revlib.couplings import kernel
no_device = type("", (), {"device_of": staticmethod(lambda t: contextlib.nullcontext())})
torch.get_device_module = lambda device: no_device
torch.manual_seed(0)
for streams in (torch.float32, torch.float64):
    for results in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for sign in (1, -1):
            grid = 1024 * 2.0 ** (-24 if streams == torch.float32 else -53)
            edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e30, grid / 2, 1.5 * grid])
            halves = torch.randint(-9, 9, (500,)) * grid / 2
            t = torch.cat([torch.randn(700), torch.randn(400) * 300, torch.randn(91) * grid, halves, edges]).to(results)
            s = (torch.randn(len(t), dtype=streams) / grid).round() * grid
            want = torch.add(s, (t.to(streams) * (1 / grid)).round_(), alpha=sign * grid)
            assert torch.equal(kernel.add_on_grid(s, t, grid, sign).nan_to_num(7.0), want.nan_to_num(7.0))
"""


def test_the_kernel_for_cuda_in_its_interpreter():
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", KERNEL], check=True)


def test_derivatives_of_the_inverse_are_those_of_the_plain_one():
    torch.manual_seed(0)
    stack = ReversibleSequence([(mlp(), mlp()) for _ in range(2)]).double()
    xs, tangents = leaves(), tuple(x.detach() for x in leaves())
    found = []
    for coupling in (Additive(), ExactAdditive()):
        stack.coupling = coupling
        stack.zero_grad()
        streams = [x.detach().clone().requires_grad_() for x in xs]
        loss(stack.inverse(*streams)).backward()
        _, forward = torch.func.jvp(stack.inverse, tuple(x.detach() for x in xs), tangents)
        found.append([*grads(streams[0], stack), streams[1].grad, *forward])
    assert error(found[1], found[0]) < 1e-9
