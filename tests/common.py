"""What the tests share: an oracle that does not use the engine, small functions, and scenes compared with it."""

import functools
import inspect
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from revlib import Checkpoint, Functional, Naive, Reversible, ReversibleSequence
from revlib.schedulers import Scheduler
from revlib.step import BoundInverse, BoundStep, apart, together


@dataclass(frozen=True)
class ByHand(Scheduler):
    """The recurrence, written down without the engine: what a user would write in a plain PyTorch model."""

    def plan(self, length):
        raise NotImplementedError

    def run(self, branches, state, context):
        for branch in branches:
            routed = {k: v for k, v in context.items() if k in _names(branch.owner)}
            if isinstance(branch, BoundInverse):
                *rest, s = state
                seen = map(branch.coupling.show, rest)
                state = (branch.coupling.unmerge(s, branch.fn(*seen, **routed)), *rest)
            elif type(branch) is BoundStep and branch.streams is None:
                s, *rest = state
                seen = map(branch.coupling.show, rest)
                state = (*rest, branch.coupling.merge(s, branch.fn(*seen, **routed)))
            else:  # of some of the streams, or a bijection
                layout = branch.layout(len(state))
                taken, rest = apart(state, layout.taken)
                branch.prepare(taken)
                state = together(branch.merge(taken, branch.evaluate(rest, routed)), layout.made, rest)
        return state


def _names(fn: Callable[..., Any]) -> Collection[str]:
    return inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).parameters


def _id(value: Any) -> str:
    return type(value).__name__


every_scheduler = pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(), Naive()], ids=_id)
every_recomputing_scheduler = pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint()], ids=_id)


def error(got: Any, want: Any) -> float:
    """The largest error in the norm of any tensor of a nest, relative to it; None must meet None.

    A tensor far smaller than the largest is measured against a thousandth of that: gradients that vanish exactly are
    nothing but rounding.
    """
    got, want = tree_leaves(got), tree_leaves(want)
    assert [type(v) for v in got] == [type(v) for v in want], f"{got} is not like {want}"
    pairs = [(g.detach(), w.detach()) for g, w in zip(got, want, strict=True) if isinstance(w, Tensor)]
    assert [g for g in got if not isinstance(g, Tensor)] == [w for w in want if not isinstance(w, Tensor)]
    assert [g.shape for g, _ in pairs] == [w.shape for _, w in pairs]
    wide = torch.complex128 if any(w.is_complex() for _, w in pairs) else torch.float64
    sizes = [w.to(wide).norm().item() for _, w in pairs]
    assert max(sizes, default=1.0) > 0, "the scene compares nothing but zeros"
    floor = 1e-3 * max(sizes, default=0.0)
    return max(
        ((g.to(wide) - w.to(wide)).norm().item() / max(size, floor) for (g, w), size in zip(pairs, sizes, strict=True)),
        default=0.0,
    )


# In forward the graphs of its functions are dropped: nothing that needs a gradient may be captured or left behind.
_CAPTURES, _LEAVES = "Pass it as context", "it computed"
REFUSED_BY_FUNCTIONAL: dict[str, str] = {
    "test_a_coupling_fed_with_a_parameter_and_a_tensor": _CAPTURES,
    "test_an_auxiliary_loss_from_inside_a_function_differentiated_by_itself": _LEAVES,
    "test_only_an_auxiliary_loss_from_inside_a_function": _LEAVES,
}


def examples(number: int) -> settings:
    """So many examples of a property in a thorough run, and as large a part of them by default as of any property."""
    return settings(max_examples=max(4, number * settings.default.max_examples // 60))


@functools.cache
def _by_hand(scene: Callable[..., Any], **rest: Any) -> Any:
    """What the scene returns without the engine: the same for every scheduler."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return scene(ByHand(), **rest)


def law(scene: Callable[..., Any]) -> Callable[..., None]:
    """``scene(scheduler)`` plays a piece of training in float64, from a seed, and returns a nest of tensors.

    As a test: under every scheduler it returns what it returns by hand, or Functional refuses it as stated above.
    """

    @pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(), Naive(), Functional()], ids=_id)
    @functools.wraps(scene)
    def test(scheduler, **rest):
        refused = REFUSED_BY_FUNCTIONAL.get(scene.__name__)
        if refused and scheduler == Functional():
            with pytest.raises((RuntimeError, TypeError), match=refused):
                scene(scheduler, **rest)
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            got = scene(scheduler, **rest)
        assert error(got, _by_hand(scene, **rest)) < 1e-10

    return test


class Lambda(nn.Module):
    """A function as a module, with the modules that it uses."""

    def __init__(self, fn: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.parts = nn.ModuleList(modules)

    def forward(self, *streams, **context):
        return self.fn(*self.parts, *streams, **context)


class Counter:
    """Calls itself ``fn`` and raises at the calls it is told to."""

    def __init__(self, fn: Callable[..., Any], raise_at: int) -> None:
        # Not a number among its attributes, which a repetition would find as forward found it.
        self.fn, self.raise_at, self.count = fn, raise_at, itertools.count(1).__next__

    def __call__(self, *args):
        if self.count() == self.raise_at:
            raise ArithmeticError("the user's own error")
        return self.fn(*args)


def mlp(width: int = 4, out: int | None = None, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, out or width)
    )


def net(
    scheduler: Scheduler, make: Callable[[], nn.Module] = mlp, depth: int = 3, dtype: torch.dtype = torch.float64
) -> ReversibleSequence:
    return ReversibleSequence([(make(), make()) for _ in range(depth)], scheduler=scheduler).to(dtype)


def leaves(*shape: int, count: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape or (3, 4), dtype=dtype, requires_grad=True) for _ in range(count)]


def loss(outputs: Any) -> Tensor:
    """Curved, and different for each output, so that no mistake cancels."""
    terms = [(y.abs().square() if y.is_complex() else y.sin() * y).sum() / (i + 1) for i, y in enumerate(outputs)]
    return torch.stack(terms).sum()


def grads(*tensors_or_modules: Tensor | nn.Module) -> list[Tensor | None]:
    found = []
    for t in tensors_or_modules:
        found += [p.grad for p in t.parameters()] if isinstance(t, nn.Module) else [t.grad]
    return [None if g is None else g.clone() for g in found]


def train(stack: ReversibleSequence, *streams: Tensor, **context: Any) -> list[Any]:
    """One forward and backward: the outputs and all gradients."""
    outputs = stack(*streams, **context)
    loss(outputs).backward()
    return [*outputs, *grads(*streams, stack)]


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        return self.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2))


def vit_block(width: int = 192, heads: int = 3) -> tuple[nn.Module, nn.Module]:
    """The pre-norm block of a vision transformer."""
    mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    return (
        nn.Sequential(nn.LayerNorm(width), SelfAttention(width, heads)),
        nn.Sequential(nn.LayerNorm(width), mlp),
    )


def model_gradients(model: nn.Module, images: Tensor, times: int = 1) -> dict[str, Any]:
    """By name, of a model from one seed; of the last of so many passes."""
    for _ in range(times):
        torch.manual_seed(0)
        model.zero_grad()
        model(images).sin().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def gap(got: dict[str, Tensor], want: dict[str, Tensor]) -> Tensor:
    """The largest difference of any tensor, relative to the largest of them."""
    largest = max(g.norm() for g in want.values())
    return max((got[name] - want[name]).norm() / largest for name in want)
