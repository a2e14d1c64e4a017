"""Outputs and gradients that look right and are not: features by hooks, and whole models in 16 bits."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import timm
import torch
from common import ByHand, Lambda, error, grads, leaves, loss, mlp, vit_block
from scenes import Foreign, Stage, Unlike, scene
from situations.base import SCHEDULERS, raised_by_revlib
from torch import Tensor, nn

import revlib.models  # noqa: F401  # registers its models with timm
from revlib import Additive, Anchored, Checkpoint, Functional, KeepLast, Naive, Reversible, ReversibleSequence
from revlib.schedulers import Scheduler
from revlib.testing import LiveBytes


def failing(item: str, told: str, kind: type[BaseException] | tuple[type[BaseException], ...] = Unlike) -> Any:
    return pytest.mark.xfail(strict=True, raises=kind, reason=f"issue 15 item {item}: {told}")


# ---------------------------------------------------------------------------------------------- features by hooks
MODELS = {
    **{"rev_vit_tiny": 224, "rev_swin_tiny": 224},
    **{"rev_vit_cifar10": 32, "rev_swin_cifar10": 32, "rev_mvit_cifar10": 32},
}


@pytest.mark.parametrize("name", MODELS)
def test_features_by_timms_hooks(name):
    """As many as are promised, of the width that is promised; or refused."""
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, features_only=True, feature_cls="hook").eval()
        found = model(torch.randn(1, 3, MODELS[name], MODELS[name]))
    except Exception as raised:
        if not raised_by_revlib(raised):
            raise Foreign(f"{type(raised).__name__}: {raised}") from raised
        return
    promised = model.feature_info.channels()
    got = [t.shape[-1] if t.shape[-1] in promised else t.shape[1] for t in found if isinstance(t, Tensor)]
    if got != promised:
        raise Unlike(f"{promised} promised, {[tuple(t.shape) for t in found]} given")


@pytest.mark.parametrize("name", MODELS)
def test_features_by_timms_getter(name):
    model = timm.create_model(name, features_only=True, feature_cls="getter").eval()
    found = model(torch.randn(1, 3, MODELS[name], MODELS[name]))
    assert len(found) == len(model.feature_info.channels())


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hook_on_a_pair(kind):
    """A pair is never called itself: its hooks must run when the block does, or be refused, and not be forgotten."""
    stack, calls = ReversibleSequence([(mlp(), mlp()) for _ in range(2)]), []
    try:
        getattr(stack[0], kind)(lambda *_: calls.append(1) and None)
        loss(stack(*leaves(dtype=torch.float32))).backward()
    except (RuntimeError, TypeError) as raised:
        if not raised_by_revlib(raised):
            raise
        return
    if len(calls) != 1:
        raise Unlike(f"called {len(calls)} times")


@pytest.mark.parametrize("scheduler", [Naive(), Reversible(), Checkpoint(), Checkpoint(every=2)], ids=str)
def test_hooks_on_a_pair_see_its_streams_and_may_use_them(scheduler):
    def run(keep: bool) -> list[Any]:
        torch.manual_seed(0)
        stack, seen = ReversibleSequence([(mlp(), mlp()) for _ in range(3)], scheduler=scheduler).double(), {}
        handles = [
            stack[1].register_forward_pre_hook(lambda m, args: seen.update(args=args)),
            stack[1].register_forward_hook(lambda m, args, kwargs, out: seen.update(out=out), with_kwargs=True),
        ]
        xs = leaves()
        (loss(stack(*xs)) + (sum(y.cos().sum() for y in seen["out"]) if keep else 0)).backward()
        for handle in handles:
            handle.remove()
        if not keep:
            first, second = stack[:1](*xs), stack[:2](*xs)
            assert error([*seen["args"], *seen["out"]], [*first, *second]) == 0
            stack.zero_grad()
            xs = [x.detach().requires_grad_() for x in xs]
            middle = stack[:2](*xs)
            (loss(stack[2:](*middle)) + sum(y.cos().sum() for y in middle)).backward()
        return grads(*xs, stack)

    assert error(run(True), run(False)) < 1e-10


@pytest.mark.parametrize("scheduler", [Naive(), Reversible(), Functional()], ids=str)
def test_what_a_hook_on_a_pair_cannot_do_is_refused(scheduler):
    stack = ReversibleSequence([(mlp(), mlp())], scheduler=scheduler)
    handle = stack[0].register_forward_hook(lambda m, args, out: tuple(2 * y for y in out))
    with pytest.raises(RuntimeError, match=r"pair\.F|on its F or G"):
        stack(*leaves(dtype=torch.float32))
    handle.remove()
    stack[0].register_full_backward_pre_hook(lambda m, g: None)
    with pytest.raises(RuntimeError, match=r"pair\.F|on its F or G"):
        stack(*leaves(dtype=torch.float32))


def test_a_hook_on_a_block_of_a_model():
    """The usual way to look into a model: model.blocks[i].register_forward_hook(...)."""
    model, seen = timm.create_model("rev_vit_cifar10").eval(), {}
    blocks = next(m for m in model.modules() if isinstance(m, ReversibleSequence))
    try:
        blocks[0].register_forward_hook(lambda m, args, out: seen.update(out=out))
        model(torch.randn(1, 3, 32, 32))
    except (RuntimeError, TypeError) as raised:
        if not raised_by_revlib(raised):
            raise
        return
    if "out" not in seen:
        raise Unlike("the hook was never called")


def test_a_hooked_block_keeps_no_streams_after_an_error():
    """A block can be copied and pickled after a pass that failed within it, and holds nothing of that pass."""
    fails = Lambda(lambda m, x: m(x) if x.shape[0] < 5 else 1 / 0, nn.Linear(4, 4))
    for scheduler in (Reversible(), Naive()):
        stack = ReversibleSequence([(nn.Linear(4, 4), fails)], scheduler=scheduler)
        stack[0].register_forward_hook(lambda m, args, out: None)
        before = set(vars(stack[0]))
        x = torch.randn(6, 4, requires_grad=True)
        held = weakref.ref(y := x * 1)
        with pytest.raises(ZeroDivisionError):
            stack(y, y)
        del y
        gc.collect()
        assert held() is None and set(vars(stack[0])) == before


def hooked(stage: Stage, keep: Any) -> list[Any]:
    """Training, with what forward hooks of the functions have kept after backward."""
    stack, kept = stage.stack(), []
    for pair in stack:
        for f in pair:
            f.register_forward_hook(functools.partial(keep, kept))
    xs = leaves()
    loss(stack(*xs)).backward()
    return [*grads(*xs, stack), len(kept), *kept]


@scene("3", refusal="hook")
def test_activations_kept_by_hooks(stage: Stage):
    """One a function: a repetition is no second forward."""
    return hooked(stage, lambda kept, m, args, out: kept.append(out.detach().clone()))


@scene("3", refusal="hook")
def test_norms_of_activations_by_hooks(stage: Stage):
    return hooked(stage, lambda kept, m, args, out: kept.append(float(out.detach().norm())))


@scene("3", refusal="hook")
def test_inputs_kept_by_pre_hooks(stage: Stage):
    stack, kept = stage.stack(), []
    for pair in stack:
        for f in pair:
            f.register_forward_pre_hook(lambda m, args: kept.append(args[0].detach().clone()))
    xs = leaves()
    loss(stack(*xs)).backward()
    return [*grads(*xs, stack), len(kept)]


@scene("3", refusal="hook")
def test_calls_counted_by_a_hook_of_all_modules(stage: Stage):
    stack, xs, calls = stage.stack(), leaves(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: calls.append(type(m).__name__))
    try:
        loss(stack(*xs)).backward()
    finally:
        handle.remove()
    return [*grads(*xs, stack), *(calls.count(kind) for kind in ("Linear", "LayerNorm", "GELU"))]


@scene("6", refusal="Functional", refusing="Functional")
def test_features_kept_by_hooks_and_differentiated(stage: Stage):
    """A perceptual loss on what hooks have kept in a dict by name."""
    stack, kept = stage.stack(), {}
    for i, pair in enumerate(stack):
        for j, f in enumerate(pair):
            f.register_forward_hook(lambda m, args, out, name=(i, j): kept.__setitem__(name, out))
    xs = leaves()
    outputs = stack(*xs)
    (loss(outputs) + sum(f.square().mean() for f in kept.values())).backward()
    return [*grads(*xs, stack), len(kept)]


@scene("6")
def test_gradients_kept_by_backward_hooks(stage: Stage):
    stack, kept = stage.stack(), []
    for pair in stack:
        pair.F.register_full_backward_hook(lambda m, into, outof: kept.append(outof[0].norm()) and None)
    xs = leaves()
    loss(stack(*xs)).backward()
    return [*grads(*xs, stack), len(kept)]


# ---------------------------------------------------------------------------------------------- 16 bits throughout
def blocks(depth: int, width: int = 32) -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(0)
    return [vit_block(width, 2) for _ in range(depth)]


def in_16_bits(scheduler: Scheduler, dtype: torch.dtype, run: torch.dtype, depth: int, **kwargs: Any) -> list[Tensor]:
    """Gradients of a model whose weights are those of 16 bits, computed in ``run``."""
    stack = ReversibleSequence(blocks(depth), scheduler=scheduler, **kwargs).to(dtype).to(run)
    x = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(1)).to(dtype).to(run)
    outputs = stack(x, x)
    assert all(y.dtype == run for y in outputs), "streams leave in the dtype in which they came"
    sum(y.to(torch.promote_types(run, torch.float32)).square().mean() for y in outputs).backward()
    return [p.grad.double() for p in stack.parameters()]


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    return (
        (sum((g - w).square().sum() for g, w in zip(got, want, strict=True)) / sum(w.square().sum() for w in want))
        .sqrt()
        .item()
    )


@functools.cache
def oracle(dtype: torch.dtype, depth: int) -> tuple[list[Tensor], float]:
    """In float64, and how far plain autograd in 16 bits is from it."""
    want = in_16_bits(ByHand(), dtype, torch.float64, depth)
    return want, distance(in_16_bits(ByHand(), dtype, dtype, depth, coupling=Additive()), want)


def _sixteen() -> list[Any]:
    cells = []
    for dtype in (torch.bfloat16, torch.float16):
        for depth in (48, 192):
            for name, scheduler in SCHEDULERS.items():
                marks = [pytest.mark.slow] if depth == 192 else []
                cells.append(pytest.param(dtype, depth, scheduler, marks=marks, id=f"{str(dtype)[6:]}-{depth}-{name}"))
    return cells


@pytest.mark.some(6)
@pytest.mark.parametrize(("dtype", "depth", "scheduler"), _sixteen())
def test_a_model_in_16_bits_is_as_right_as_under_plain_autograd(dtype, depth, scheduler):
    """Whoever calls .bfloat16() has not chosen to let streams drift."""
    want, own = oracle(dtype, depth)
    far = distance(in_16_bits(scheduler, dtype, dtype, depth), want)
    if not far <= 1.2 * own:
        raise Unlike(f"{far:.2g} from float64, where plain autograd in 16 bits is {own:.2g}")


@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(), Anchored(4), KeepLast(1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_explicit_additive_coupling_adds_in_16_bits(dtype, scheduler):
    """It means what it says: outputs have the bits of a sum in the streams' own dtype."""
    found = []
    for s in (ByHand(), scheduler):
        stack = ReversibleSequence(blocks(4), Additive(), s).to(dtype)
        x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        found.append(stack(x, x))
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_model_in_16_bits_holds_does_not_grow_with_depth(dtype):
    """Two float32 streams, at any depth."""
    held = []
    for depth in (4, 24):
        stack = ReversibleSequence(blocks(depth)).to(dtype)
        x = torch.randn(8, 64, 32, dtype=dtype, requires_grad=True)
        with LiveBytes([x, *stack.parameters()]) as live:
            outputs = stack(x, x)
            held.append(live.now)
            del outputs
        stream = 4 * x.numel()
        assert held[-1] <= 4 * stream + 2**15 * depth / 4, "the outputs, and two float32 streams, and what is compared"
    assert held[1] - held[0] < 2**15 * 5, held


def test_outputs_in_16_bits_are_those_of_every_scheduler():
    """Swapping the scheduler changes no output, also where streams are kept wider inside."""
    found = []
    for scheduler in SCHEDULERS.values():
        stack = ReversibleSequence(blocks(4), scheduler=scheduler).bfloat16()
        x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
        found.append(stack(x, x))
    for outputs in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, found[0], strict=True))


def test_a_model_in_16_bits_inverts():
    stack = ReversibleSequence(blocks(4)).bfloat16()
    xs = [torch.randn(2, 16, 32).bfloat16() for _ in range(2)]
    with torch.no_grad():
        back = stack.inverse(*stack(*xs))
    assert all((b - x).float().norm() < 0.05 * x.float().norm() for b, x in zip(back, xs, strict=True))
