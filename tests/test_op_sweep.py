"""Every operation and every module that torch tests, as a function of a stack, against plain autograd.

torch describes each of its differentiable operations (``op_db``) and modules (``module_db``) with sample inputs, for its
own tests. Each becomes the function of a step here, and outputs, gradients, buffers and the next random number must be
those of the same recurrence without revlib. A hundred thousand lines of kernels save their tensors for backward in some
way; this finds the ways that a repetition does not follow.

Two of four steps run the operation. The first one gets its input as backward recovers it, with rounding errors where the
scheduler inverts; the last one gets it exactly, and runs the operation last, so that a repetition that stops early stops
within it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from common import ByHand, Lambda
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from revlib import Anchored, Checkpoint, Reversible, reversible
from revlib.schedulers import Scheduler

pytest.importorskip("expecttest", reason="torch's own tests, which describe its operations, need it")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
SCHEDULERS: dict[str, Scheduler] = {
    "Reversible()": Reversible(),
    "Checkpoint()": Checkpoint(),
    "Anchored(3)": Anchored(3),
}
MOST = 6  # samples of one operation, evenly spaced among those that torch has

# ---------------------------------------------------------------------------------------------- what is left out
SKIPPED_OPERATIONS: dict[str, str] = {}
SKIPPED_MODULES: dict[str, str] = {}

# ---------------------------------------------------------------------------------------------- what disagrees
# The case, the schedulers that disagree, and the cause. A test fails where the list says too much or too little.
DISAGREEING: dict[str, tuple[set[str], str]] = {}


# ---------------------------------------------------------------------------------------------- cases
class Case(NamedTuple):
    """A function of one tensor, what that tensor is, and what else a gradient is wanted of."""

    fn: Callable[[Tensor], Any]
    stream: Tensor
    leaves: list[Tensor]
    module: nn.Module | None = None


def _differentiable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _streamable(t: Any) -> bool:
    return (
        isinstance(t, Tensor)
        and type(t) in (Tensor, nn.Parameter)
        and _differentiable(t.dtype)
        and t.layout is torch.strided
        and not t.is_nested
    )


def _fresh(value: Any) -> Any:
    """A copy of a sample's arguments, whose tensors are leaves."""

    def copied(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.detach().clone().requires_grad_(t.requires_grad)

    return tree_map(copied, value)


def of_operation(op: Any, variant: Callable[..., Any], sample: Any, *, inplace: bool) -> Case | None:
    """The sample's first tensor is the stream; all others are captured."""
    arguments = _fresh((sample.input, *sample.args)), _fresh(dict(sample.kwargs))
    flat = tree_leaves(arguments)
    place = next((i for i, t in enumerate(flat) if _streamable(t)), None)
    if place is None:
        return None
    stream, others = flat[place], [t for i, t in enumerate(flat) if i != place]

    def fn(x: Tensor) -> Any:
        count = iter(range(len(flat)))
        args, kwargs = tree_map(lambda t: x if next(count) == place else t, arguments)
        if inplace:
            args = (args[0].clone(), *args[1:])
        return sample.output_process_fn_grad(variant(*args, **kwargs))

    return Case(fn, stream, [t for t in others if isinstance(t, Tensor) and t.requires_grad])


def of_module(info: Any, sample: Any, dtype: torch.dtype, *, training: bool) -> Case | None:
    built = sample.constructor_input
    module = info.module_cls(*built.args, **built.kwargs).to(dtype).train(training)
    arguments = _fresh((sample.forward_input.args, sample.forward_input.kwargs))
    flat = tree_leaves(arguments)
    place = next((i for i, t in enumerate(flat) if _streamable(t)), None)
    if place is None:
        return None

    def fn(module: nn.Module, x: Tensor) -> Any:
        count = iter(range(len(flat)))
        args, kwargs = tree_map(lambda t: x if next(count) == place else t, arguments)
        return module(*args, **kwargs)

    others = [t for i, t in enumerate(flat) if i != place and isinstance(t, Tensor) and t.requires_grad]
    return Case(Lambda(fn, module), flat[place], others, module)


def fitted(result: Any, x: Tensor) -> Tensor:
    """What an operation returned, as what merges into the stream: itself where it can be.

    Else a sum with growing weights, none of which autograd saves: the operation stays the last to save anything.
    """
    if isinstance(result, Tensor) and result.shape == x.shape and result.dtype == x.dtype and not result.is_sparse:
        return result
    total = torch.zeros((), dtype=x.dtype)
    for t in tree_leaves(result):
        if not isinstance(t, Tensor) or not _differentiable(t.dtype) or not t.requires_grad:
            continue
        t = t.to_dense() if t.layout is not torch.strided else t
        if t.is_complex() and not x.is_complex():
            t = torch.view_as_real(t.resolve_conj())
        total = total + t.flatten().cumsum(0).sum().to(x.dtype) / max(1, t.numel())
    return total


def played(case: Case, scheduler: Scheduler) -> list[Tensor | None]:
    """Outputs and gradients of two pairs, and buffers."""
    streams = [case.stream.detach().clone().requires_grad_() for _ in range(2)]
    fn, stream = case.fn, case.stream.detach()
    wave = lambda x: 0.1 * x.sin()  # noqa: E731

    def first(x: Tensor) -> Tensor:
        return fitted(fn(x), x)

    def last(x: Tensor) -> Tensor:  # in the operation's domain, exactly
        return fitted(fn(stream + (x - x.detach())), x)

    outputs = reversible([(first, wave), (wave, last)], *streams, scheduler=scheduler)
    total = sum(((i + 1) * torch.view_as_real(y) if y.is_complex() else (i + 1) * y).sin().sum() for i, y in enumerate(outputs))
    total.backward()
    parameters, buffers = [], []
    if case.module is not None:
        parameters, buffers = list(case.module.parameters()), list(case.module.buffers())
    return [
        *(y.detach() for y in outputs),
        *(t.grad for t in (*streams, *case.leaves, *parameters)),
        *(b.detach() for b in buffers),
        torch.rand(1),
    ]


def distance(got: Tensor | None, want: Tensor | None, scale: float) -> float:
    """Relative to the tensor's own size, or a thousandth of the largest; NaN and infinity must meet the same."""
    if got is None or want is None:
        return 0.0 if got is want else float("inf")
    if got.layout is not torch.strided or want.layout is not torch.strided:
        got, want = got.to_dense(), want.to_dense()
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    got, want = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (got, want))
    special = ~want.isfinite()
    if not torch.equal(special, ~got.isfinite()):
        return float("inf")
    got, want = got.masked_fill(special, 0.0), want.masked_fill(special, 0.0)
    return (got - want).norm().item() / max(want.norm().item(), 1e-3 * scale, 1e-300)


def disagreement(make: Callable[[], Case | None], scheduler: Scheduler, limit: float) -> str | None:
    """What differs from plain autograd, in words; nothing where the case does not run there either."""
    torch.manual_seed(0)
    case = make()
    if case is None:
        return None
    try:
        torch.manual_seed(1)
        want = played(case, ByHand())
    except Exception:  # not differentiable with these arguments, or out of its domain
        return None
    RAN.append(1)
    torch.manual_seed(0)
    case = make()
    torch.manual_seed(1)
    try:
        got = played(case, scheduler)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    scale = max((t.detach().abs().nan_to_num(0, 0, 0).double().norm().item() for t in want if t is not None and not t.is_complex() and t.layout is torch.strided), default=1.0)
    far = max(distance(g, w, scale) for g, w in zip(got, want, strict=True))
    return None if far <= limit else f"{far:.2g} from plain autograd"


RAN: list[int] = []


def chosen(samples: Iterator[Any]) -> list[Any]:
    some = list(samples)
    step = max(1, -(-len(some) // MOST))
    return some[::step]


# ---------------------------------------------------------------------------------------------- the sweep
def operations() -> Iterator[tuple[str, Callable[[], Iterator[Callable[[], Case | None]]], torch.dtype]]:
    """Name, a function that makes the cases, and the dtype; with variants that edit their first argument."""
    for op in op_db:
        dtype = precision(op.supported_backward_dtypes("cpu")) if op.supports_autograd else None
        if dtype is None:
            continue
        for suffix, variant in (("", op.op), ("_", op.inplace_variant)):
            if variant is not None and (not suffix or op.supports_inplace_autograd):
                name = f"{op.formatted_name}{suffix}"
                yield name, (lambda op=op, v=variant, s=suffix, d=dtype: of_samples(op, v, d, inplace=bool(s))), dtype


def of_samples(op: Any, variant: Any, dtype: torch.dtype, *, inplace: bool) -> Iterator[Callable[[], Case | None]]:
    for sample in chosen(op.sample_inputs("cpu", dtype, requires_grad=True)):
        if not (inplace and sample.broadcasts_input):
            yield lambda sample=sample: of_operation(op, variant, sample, inplace=inplace)


def precision(dtypes: Any) -> torch.dtype | None:
    """The best of those that an operation differentiates."""
    order = (torch.float64, torch.float32, torch.complex128, torch.bfloat16, torch.float16)
    return next((d for d in order if d in dtypes), None)


def modules() -> Iterator[tuple[str, Callable[[], Iterator[Callable[[], Case | None]]], torch.dtype]]:
    for info in module_db:
        dtype = precision(info.dtypes)
        if dtype is None:
            continue
        for training in (True, False):
            name = f"{info.formatted_name}_{'train' if training else 'eval'}"
            yield name, (lambda info=info, d=dtype, t=training: of_inputs(info, d, training=t)), dtype


def of_inputs(info: Any, dtype: torch.dtype, *, training: bool) -> Iterator[Callable[[], Case | None]]:
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    for sample in chosen(inputs):
        yield lambda sample=sample: of_module(info, sample, dtype, training=training)
