"""Every operation and every module that torch tests, as a function of a stack, against plain autograd.

torch describes its differentiable operations (``op_db``) and its modules (``module_db``) with sample
inputs, for its own tests. Each becomes the function of a step here. Outputs, gradients, buffers and
the next random number must be those of the same recurrence without revlib. Every kernel saves
tensors for backward in some way of its own; the sweep finds those that a repetition does not follow.

Two of four steps run the operation. The first one gets its input as backward recovers it, with
rounding errors where the scheduler inverts. The last one gets it exactly, and runs the operation
last, so that a repetition that stops early stops within it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from common import ByHand, Lambda
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from revlib import Anchored, Checkpoint, Functional, Reversible, ReversibleSequence
from revlib.schedulers import Scheduler

pytest.importorskip("expecttest", reason="torch's own tests, which describe its operations, need it")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
SCHEDULERS: dict[str, Scheduler] = {
    "Reversible()": Reversible(),
    "Checkpoint()": Checkpoint(),
    "Anchored(3)": Anchored(3),
    "Functional()": Functional(),
}
MOST = 6  # samples of one operation, evenly spaced among those that torch has
TOLERANCE = {  # relative
    **{torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: 1e-3},
    **{torch.bfloat16: 0.1, torch.float16: 0.05},
}

# ---------------------------------------------------------------------------------------------- what disagrees
# A case is named with the schedulers under which it does not agree, and why. It fails where that is no longer so.
FAR = "its result is a hundred million times its stream, from which the stream does not come back: refused, and rightly"
INVERTING = "Reversible()", "Functional()"
DISAGREEING: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(["pow", "float_power", "special_erfcx"], (("Reversible()",), FAR)),
    **{f"polygamma_polygamma_n_{n}{edit}": (INVERTING, FAR) for n in range(5) for edit in ("", "_")},
    "special_polygamma_special_polygamma_n_0": (INVERTING, FAR),
}

# ---------------------------------------------------------------------------------------------- what is left out
SKIPPED = {  # besides operations that have no gradient, of which torch's list says so
    "torch_ops_aten__flash_attention_forward": "runs on a GPU only",
    "torch_ops_aten__efficient_attention_forward": "runs on a GPU only",
    "nn_functional_batch_norm_without_cudnn": "runs on a GPU only; the same on a CPU is nn_functional_batch_norm",
    "nn_functional_one_hot": "takes integers",
    "nn_Embedding_train": "takes integers, which are no stream",
    "nn_Embedding_eval": "takes integers, which are no stream",
}


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


JUNK = itertools.cycle([3.0, -7.0, 11.0, -1.0])


def litter(x: Tensor) -> None:
    """Leave other numbers in free memory each time, so that nothing depends on what a kernel does not write."""
    left = [torch.full_like(x, next(JUNK)) for _ in range(5)]
    del left


class Function(nn.Module):
    """A function of a stream. What it captures is context, too: Functional() takes from there what needs a gradient."""

    def __init__(self, fn: Callable[[Tensor], Tensor], module: nn.Module | None = None) -> None:
        super().__init__()
        self.fn, self.module = fn, module

    def forward(self, x: Tensor, captured: Any = ()) -> Tensor:
        return self.fn(x)


def played(case: Case, scheduler: Scheduler) -> list[Tensor | None]:
    """Outputs and gradients of two pairs, and buffers."""
    streams = [case.stream.detach().clone().requires_grad_() for _ in range(2)]
    fn, stream = case.fn, case.stream.detach()

    def wave(x: Tensor) -> Tensor:  # sines of complex numbers grow without bounds
        return 0.1 * x if x.is_complex() else 0.1 * x.sin()

    def first(x: Tensor) -> Tensor:
        litter(x)
        return fitted(fn(x), x)

    def last(x: Tensor) -> Tensor:  # in the operation's domain, exactly
        litter(x)
        return fitted(fn(stream + (x - x.detach())), x)

    functions = Function(first, case.module), Function(wave), Function(wave), Function(last, case.module)
    outputs = ReversibleSequence([functions[:2], functions[2:]], scheduler=scheduler)(*streams, captured=case.leaves)
    total = sum(
        ((i + 1) * torch.view_as_real(y) if y.is_complex() else (i + 1) * y).sin().sum() for i, y in enumerate(outputs)
    )
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


def _plain(t: Tensor) -> Tensor:
    t = t.detach() if t.layout is torch.strided else t.detach().to_dense()
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def size(t: Tensor) -> float:
    t = _plain(t)
    return t.masked_fill(~t.isfinite(), 0.0).norm().item()


def distance(got: Tensor | None, want: Tensor | None, scale: float) -> float:
    """Relative to the tensor's own size, or a thousandth of the largest; NaN and infinity must meet the same."""
    if got is None or want is None:
        return 0.0 if got is want else math.inf
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    got, want = _plain(got), _plain(want)
    special = ~want.isfinite()
    if not torch.equal(special, ~got.isfinite()):
        return math.inf
    gap = (got - want).masked_fill(special, 0.0)
    return gap.norm().item() / max(size(want), 1e-3 * scale, 1e-300)


def disagreement(make: Callable[[], Case], scheduler: Scheduler, limit: float) -> str:
    """What differs from plain autograd, in words, if anything."""
    torch.manual_seed(0)
    case = make()
    torch.manual_seed(1)
    want = played(case, ByHand())
    torch.manual_seed(0)
    case = make()
    torch.manual_seed(1)
    try:
        got = played(case, scheduler)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    scale = max((size(t) for t in want if t is not None), default=1.0)
    far = max(distance(g, w, scale) for g, w in zip(got, want, strict=True))
    return "" if far <= limit else f"{far:.2g} from plain autograd"


def chosen(samples: Iterator[Any]) -> list[Any]:
    some = list(samples)
    step = max(1, -(-len(some) // MOST))
    return some[::step]


# ---------------------------------------------------------------------------------------------- the sweep
Makers = Callable[[], list[Callable[[], Case]]]


def precision(dtypes: Any) -> torch.dtype | None:
    """The best of those that an operation differentiates."""
    order = (torch.float64, torch.float32, torch.complex128, torch.bfloat16, torch.float16)
    return next((d for d in order if d in dtypes), None)


def operations() -> Iterator[tuple[str, Makers, torch.dtype]]:
    """Of each its name, its cases and their dtype; also the variants that edit their first argument."""
    for op in op_db:
        dtype = precision(op.supported_backward_dtypes("cpu")) if op.supports_autograd else None
        if dtype is None:
            continue
        for suffix, variant in (("", op.op), ("_", op.inplace_variant)):
            if variant is not None and (not suffix or op.supports_inplace_autograd):
                makers = functools.partial(of_samples, op, variant, dtype, inplace=bool(suffix))
                yield f"{op.formatted_name}{suffix}", makers, dtype


def of_samples(op: Any, variant: Any, dtype: torch.dtype, *, inplace: bool) -> list[Callable[[], Case]]:
    torch.manual_seed(0)
    makers = [
        functools.partial(of_operation, op, variant, sample, inplace=inplace)
        for sample in chosen(op.sample_inputs("cpu", dtype, requires_grad=True))
        if not (inplace and sample.broadcasts_input)
    ]
    return [make for make in makers if make() is not None and _runs(make)]  # type: ignore[misc]


def _runs(make: Callable[[], Any]) -> bool:
    """One sample of as_strided looks beyond the memory of a copy."""
    if "as_strided_partial_views" not in make.args[0].formatted_name:  # type: ignore[attr-defined]
        return True
    with contextlib.suppress(RuntimeError):
        played(make(), ByHand())
        return True
    return False


def modules() -> Iterator[tuple[str, Makers, torch.dtype]]:
    for info in module_db:
        dtype = precision(info.dtypes)
        assert dtype is not None
        for training in (True, False):
            name = f"{info.formatted_name}_{'train' if training else 'eval'}"
            yield name, functools.partial(of_inputs, info, dtype, training=training), dtype


def of_inputs(info: Any, dtype: torch.dtype, *, training: bool) -> list[Callable[[], Case]]:
    torch.manual_seed(0)
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    return [functools.partial(of_module, info, sample, dtype, training=training) for sample in chosen(inputs)]  # type: ignore[misc]


OPERATIONS = {name: rest for name, *rest in operations() if name not in SKIPPED}
MODULES = {name: rest for name, *rest in modules() if name not in SKIPPED}


def sweep(makers: Makers, dtype: torch.dtype) -> dict[str, str]:
    """By scheduler, what the first sample that disagrees says."""
    made, found = makers(), {}
    assert made, "torch describes no sample of it that has a stream"
    for name, scheduler in SCHEDULERS.items():
        told = next(filter(None, (disagreement(make, scheduler, TOLERANCE[dtype]) for make in made)), "")
        if told:
            found[name] = told
    return found


def check(name: str, found: dict[str, str]) -> None:
    schedulers, cause = DISAGREEING.get(name, ((), ""))
    surprising = {s: told for s, told in found.items() if s not in schedulers}
    assert not surprising, f"{name} differs from plain autograd: {surprising}"
    agreeing = set(schedulers) - set(found)
    assert not agreeing, f"{name} agrees under {agreeing} by now: take it off the list ({cause})"


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    makers, dtype = OPERATIONS[name]
    check(name, sweep(makers, dtype))


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    makers, dtype = MODULES[name]
    check(name, sweep(makers, dtype))


def test_the_sweep_is_complete():
    """Every case that is left out, or that disagrees, exists; the numbers are those that we tell."""
    names = {*OPERATIONS, *MODULES}
    assert DISAGREEING.keys() <= names
    every = {op.formatted_name for op in op_db} | {name for name, *_ in modules()}
    assert SKIPPED.keys() <= every and not SKIPPED.keys() & names
    left = {op.formatted_name for op in op_db if op.supports_autograd} - names - SKIPPED.keys()
    assert not left, f"differentiable, and neither played nor left out for a reason: {left}"
    assert len(OPERATIONS) * len(SCHEDULERS) > 1_900 and len(MODULES) * len(SCHEDULERS) > 600
