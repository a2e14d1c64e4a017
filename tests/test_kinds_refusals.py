"""Right programs that are refused, and wrong ones whose error misleads: wrappers, kinds of streams, nested stacks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from common import ByHand, Lambda, grads, leaves, loss, mlp
from scenes import Foreign, Refused, Stage, scene
from situations.base import everything, raised_by_revlib, train
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from revlib import Additive, Checkpoint, Coupling, ExactAdditive, Functional, Naive, Reversible, ReversibleSequence
from revlib.schedulers import Scheduler


# ---------------------------------------------------------------------------------------------- wrappers
class Masked(nn.Module):
    """An attention, of which a mask is the context."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, mask=None):
        h = self.linear(x)
        scores = h @ h.t() if mask is None else h @ h.t() + mask
        return scores.softmax(-1) @ h


class Plain(nn.Module):
    """Takes no context."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).tanh()


class Passing(nn.Module):
    """Somebody's wrapper, which hands on what it gets."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def routed(stage: Stage, wrap: Callable[[nn.Module], nn.Module]) -> list[Any]:
    """The oracle is the same without wrappers."""
    wraps = wrap if not isinstance(stage.scheduler, ByHand) else lambda m: m
    stack = stage.sequence(*((wraps(Masked()), wraps(Plain())) for _ in range(2)))
    xs, mask = leaves(), torch.ones(3, 3).tril().log()
    outputs = stack(*xs, mask=mask)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, *(p for p in stack.parameters() if p.requires_grad))]


@scene("11")
def test_compiled_functions_with_context(stage: Stage):
    try:
        return routed(stage, lambda m: torch.compile(m, backend="eager"))
    finally:
        torch._dynamo.reset()


@scene("11")
def test_averaged_models_with_context(stage: Stage):
    return routed(stage, AveragedModel)


@scene("11")
def test_torchs_checkpoint_wrapper_with_context(stage: Stage):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        checkpoint_wrapper,
    )

    return routed(stage, functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT))


@scene("11")
def test_torchs_offload_wrapper_with_context(stage: Stage):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import offload_wrapper

    return routed(stage, offload_wrapper)


@scene("11")
def test_data_parallel_with_context(stage: Stage):
    return routed(stage, nn.DataParallel)


@scene("11")
def test_a_wrapper_of_ones_own_with_context(stage: Stage):
    return routed(stage, Passing)


@scene("11")
def test_wrappers_in_wrappers_with_context(stage: Stage):
    return routed(stage, lambda m: Passing(AveragedModel(Passing(m))))


@scene("11")
def test_a_forward_decorated_without_wraps(stage: Stage):
    """As decorators of mixed precision and of profilers often are."""

    def wrap(m):
        inner = m.forward

        def timed(*args, **kwargs):
            return inner(*args, **kwargs)

        m.forward = timed
        return m

    return routed(stage, wrap)


@scene("11")
def test_a_partial_of_a_module_with_context(stage: Stage):
    """A module that calls a partial of another, which it has registered."""

    class Calling(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.call = inner, functools.partial(inner)

        def forward(self, *args, **kwargs):
            return self.call(*args, **kwargs)

    return routed(stage, Calling)


@scene("11")
def test_functions_that_really_take_any_context(stage: Stage):
    """They read what they want of it: looking through wrappers must not take that away."""

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, **context):
            return self.linear(x) * context["gain"] + context.get("shift", 0.0)

    stack, xs, gain = (
        stage.sequence((Reading(), Reading())),
        leaves(),
        torch.rand(4, requires_grad=True),
    )
    if isinstance(stage.scheduler, ByHand):  # which routes by name
        for f in (stack[0].F, stack[0].G):
            f.forward = functools.partial(lambda f, x, gain, shift: Reading.forward(f, x, gain=gain, shift=shift), f)
    outputs = stack(*xs, gain=gain, shift=torch.ones(4))
    loss(outputs).backward()
    return [*outputs, *grads(*xs, gain, stack)]


# ---------------------------------------------------------------------------------------------- harmless
class Keeping(nn.Module):
    """Keeps something that it computed, and nobody differentiates."""

    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.keep = nn.Linear(4, 4), keep

    def forward(self, x):
        h = self.linear(x)
        self.kept = self.keep(h)
        return h.tanh()


def keeping(stage: Stage, keep: Callable[[Tensor], Any]) -> list[Any]:
    stack = stage.stack(lambda: Keeping(keep))
    found = train(stack)
    return [*found, *(f.kept for pair in stack for f in pair)]


@scene("14")
def test_integers_that_are_kept(stage: Stage):
    return keeping(stage, lambda h: h.argmax(-1))


@scene("14")
def test_a_mask_that_is_kept(stage: Stage):
    return keeping(stage, lambda h: h > 0)


@scene("14")
def test_a_value_computed_without_gradients_that_is_kept(stage: Stage):
    def keep(h):
        with torch.no_grad():
            return h.mean()

    return keeping(stage, keep)


@scene("14")
def test_an_order_that_is_kept(stage: Stage):
    return keeping(stage, lambda h: h.argsort(-1))


@scene("14")
def test_a_histogram_that_is_kept(stage: Stage):
    return keeping(stage, lambda h: torch.bincount(h.argmax(-1), minlength=4))


@scene("14")
def test_a_quantised_code_that_is_kept(stage: Stage):
    return keeping(stage, lambda h: h.detach().mul(8).round().to(torch.int8))


@scene("14")
def test_attention_that_is_kept_detached_by_data(stage: Stage):
    return keeping(stage, lambda h: h.softmax(-1).data)


@scene("14")
def test_buckets_of_hashed_attention(stage: Stage):
    """Reformer: buckets are kept from forward, for whoever wants to reverse with the same."""

    class Hashing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.rotations = nn.Linear(4, 4), None

        def forward(self, x):
            h = self.linear(x)
            with torch.no_grad():
                self.rotations = torch.randn(4, 2)
                rotated = h @ self.rotations
                self.buckets = torch.cat([rotated, -rotated], -1).argmax(-1)
                self.order = self.buckets.argsort()
            y = h[self.order].softmax(-1)
            return torch.zeros_like(y).index_copy(0, self.order, y)

    return train(stage.stack(Hashing))


@scene("14")
def test_a_log_determinant_that_is_kept(stage: Stage):
    """A flow keeps it for the likelihood, which is differentiated by itself, detached here."""

    class Flowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            scale = self.linear(x).tanh()
            with torch.no_grad():
                self.log_determinant = scale.sum(-1)
            return x * scale

    return train(stage.stack(Flowing))


@scene("14", refusal="log.?det|keeps", refusing="Functional")
def test_a_log_determinant_that_is_differentiated(stage: Stage):
    class Flowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            scale = self.linear(x).tanh()
            self.log_determinant = scale.sum(-1)
            return x * scale

    stack, xs = stage.stack(Flowing), leaves()
    outputs = stack(*xs)
    (loss(outputs) + sum(f.log_determinant.sum() for pair in stack for f in pair)).backward()
    return grads(*xs, stack)


@scene("14", marks=[pytest.mark.slow])
def test_a_graph_break_without_fullgraph(stage: Stage):
    """torch.compile of a model, without fullgraph: a function with a break runs, in parts."""

    class Breaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = self.linear(x)
            torch._dynamo.graph_break()
            return h.tanh()

    torch._dynamo.reset()
    stack, xs = stage.stack(Breaking, depth=1), leaves()
    run = stack if isinstance(stage.scheduler, ByHand) else torch.compile(stack, backend="aot_eager")
    try:
        outputs = run(*xs)
        loss(outputs).backward()
        return [*outputs, *grads(*xs, stack)]
    finally:
        torch._dynamo.reset()


@scene("14", marks=[pytest.mark.slow])
def test_a_print_in_a_compiled_function(stage: Stage):
    class Printing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = self.linear(x)
            if h.sum().item() > 1e9:
                print("large")
            return h.tanh()

    torch._dynamo.reset()
    stack, xs = stage.stack(Printing, depth=1), leaves()
    run = stack if isinstance(stage.scheduler, ByHand) else torch.compile(stack, backend="aot_eager")
    try:
        outputs = run(*xs)
        loss(outputs).backward()
        return [*outputs, *grads(*xs, stack)]
    finally:
        torch._dynamo.reset()


class Kept(nn.Module):
    """Everything that a function may read and update, and a break of the compiler's graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.tied = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.linear.weight
        self.register_buffer("calls", torch.zeros(()))
        self.count = 0

    def forward(self, x, c=None):
        self.calls += 1
        self.count += 1
        h = self.tied(self.linear(self.norm(x)).sin()) + (0 if c is None else c)
        torch._dynamo.graph_break()
        return h.tanh() * self.linear.bias


@pytest.mark.parametrize("training", [False, True])
@scene("14", marks=[pytest.mark.slow])
def test_graph_breaks_over_several_steps(stage: Stage, training: bool):
    """With buffers, shared weights, counts and a context, called twice, in one compiled function with the loss."""
    torch._dynamo.reset()
    stack, xs, c = stage.stack(Kept, depth=2).train(training), leaves(), leaves()[0]

    def total(*streams):
        return loss(stack(*streams, c=c))

    run = total if isinstance(stage.scheduler, ByHand) else torch.compile(total, backend="aot_eager")
    found: list[Any] = []
    try:
        for _ in range(2):
            for t in (*xs, c, *stack.parameters()):
                t.grad = None
            run(*xs).backward()
            found += [*grads(*xs, stack), c.grad]
        return [*found, *everything(stack)]
    finally:
        torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- grad mode set bare
def switching(stage: Stage, off: Callable[[], Any], on: Callable[[], Any]) -> list[Any]:
    def run(first, second, x):
        off()
        gate = first(x).sigmoid()
        on()
        return second(x).tanh() * gate

    return train(stage.stack(lambda: Lambda(run, nn.Linear(4, 4), nn.Linear(4, 4))))


@scene("16")
def test_set_grad_enabled_bare(stage: Stage):
    return switching(stage, lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True))


@scene("16")
def test_no_grad_entered_and_left_by_hand(stage: Stage):
    context = torch.no_grad()
    return switching(stage, context.__enter__, lambda: context.__exit__(None, None, None))


@scene("16")
def test_the_private_switch_of_grad_mode(stage: Stage):
    return switching(stage, lambda: torch._C._set_grad_enabled(False), lambda: torch._C._set_grad_enabled(True))


@scene("16")
def test_a_decorated_part(stage: Stage):
    @torch.no_grad()
    def gate(m, x):
        return m(x).sigmoid()

    def run(first, second, x):
        return second(x).tanh() * gate(first, x)

    return train(stage.stack(lambda: Lambda(run, nn.Linear(4, 4), nn.Linear(4, 4))))


@scene("16")
def test_inference_mode_inside(stage: Stage):
    def run(first, second, x):
        with torch.inference_mode():
            gate = first(x).sigmoid()
        return second(x).tanh() * gate.clone()

    return train(stage.stack(lambda: Lambda(run, nn.Linear(4, 4), nn.Linear(4, 4))))


# ---------------------------------------------------------------------------------------------- hooks forbidden
def forbidden(stage: Stage, forward: bool, backward: bool) -> list[Any]:
    """The message is the user's own; where revlib needs hooks in backward, its error must say that it does."""
    stack, xs = stage.stack(mlp), leaves()

    def forbid(which):
        no_hooks = disable_saved_tensors_hooks("no hooks, said the user")
        return no_hooks if which else contextlib.nullcontext()

    with forbid(forward):
        outputs = stack(*xs)
    total = loss(outputs)
    with forbid(backward):
        total.backward()
    return grads(*xs, stack)


FORBIDDEN = "reversible|revlib"


@scene("16", refusal=FORBIDDEN)
def test_backward_where_hooks_are_forbidden(stage: Stage):
    return forbidden(stage, False, True)


@scene("16", refusal=FORBIDDEN)
def test_forward_where_hooks_are_forbidden(stage: Stage):
    return forbidden(stage, True, False)


@scene("16", refusal=FORBIDDEN)
def test_gradients_asked_for_where_hooks_are_forbidden(stage: Stage):
    stack, xs = stage.stack(mlp), leaves()
    outputs = stack(*xs)
    with disable_saved_tensors_hooks("no hooks, said the user"):
        return list(torch.autograd.grad(loss(outputs), [*xs, *stack.parameters()]))


@scene("16", refusal=FORBIDDEN)
def test_a_retained_graph_where_hooks_are_forbidden(stage: Stage):
    stack, xs = stage.stack(mlp), leaves()
    total = loss(stack(*xs))
    with disable_saved_tensors_hooks("no hooks, said the user"):
        total.backward(retain_graph=True)
    total.backward()
    return grads(*xs, stack)


@scene("16")
def test_a_learned_stream_that_steps_inside_backward(stage: Stage):
    """Its own gradient is there before the step that reads it is repeated, and plain autograd saved nothing of it."""
    xs = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    stack = stage.sequence((nn.Linear(4, 4).requires_grad_(False), mlp()))

    def step(t):
        with torch.no_grad():
            t.sub_(0.1 * t.grad)

    xs[0].register_post_accumulate_grad_hook(step)
    loss(stack(*xs)).backward()
    return [*xs, *grads(*xs, stack)]


# ---------------------------------------------------------------------------------------------- kinds of streams
class Wrapped(Tensor):
    """A wrapper subclass without ``__tensor_flatten__``, as of logging tutorials."""

    @staticmethod
    def __new__(cls, inner, requires_grad=None):
        wants = inner.requires_grad if requires_grad is None else requires_grad
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=wants)

    def __init__(self, inner, requires_grad=None):
        self.inner = inner.detach()

    def __repr__(self):
        return f"Wrapped({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        from torch.utils._pytree import tree_map

        unwrap = lambda t: t.inner if isinstance(t, Wrapped) else t  # noqa: E731
        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda t: Wrapped(t) if isinstance(t, Tensor) else t, result)


@scene(
    "15",
    refusal=r"stream \d.*Wrapped.*(__tensor_flatten__|Naive)",
)
def test_streams_of_a_wrapper_that_does_not_flatten(stage: Stage):
    xs = [Wrapped(torch.randn(3, 4), requires_grad=True) for _ in range(2)]
    outputs = stage.run([(torch.sin, torch.cos)] * 2, *xs)
    sum(y.square().sum() for y in outputs).backward()
    return [x.grad.inner for x in xs]


def told(run: Callable[[], Any], *words: str) -> None:
    """The error is revlib's, and names everything."""
    try:
        run()
    except Exception as raised:
        if not raised_by_revlib(raised):
            raise Foreign(f"{type(raised).__name__}: {raised}") from raised
        missing = [w for w in words if w.lower() not in str(raised).lower()]
        if missing:
            raise Refused(f"{missing} not in {type(raised).__name__}: {raised}") from raised
    else:
        raise AssertionError("nothing was said")


def streams(*xs: Any) -> Callable[[Scheduler], None]:
    def run(scheduler):
        stack = ReversibleSequence([(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)], scheduler=scheduler)
        loss(stack(*xs)).backward()

    return run


def merging(merge: Callable[[Tensor, Tensor], Any]) -> Callable[[Scheduler], None]:
    class Odd(Coupling):
        def merge(self, s, f):
            return merge(s, f)

        def unmerge(self, merged, f):
            return merged

        def __repr__(self):
            return "Odd()"

    def run(scheduler):
        stack = ReversibleSequence([(nn.Linear(4, 4), nn.Linear(4, 4))], Odd(), scheduler)
        loss(stack(*leaves(dtype=torch.float32))).backward()

    return run


def proxied(scheduler: Scheduler) -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = ReversibleSequence([(nn.Linear(4, 4), nn.Linear(4, 4))], scheduler=scheduler)

        def forward(self, x):
            return self.stack(x, x)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, nn.Linear)

    Tracer().trace(Net())


X = torch.randn(3, 4)
MISLEADING: dict[str, tuple[Callable[[Scheduler], None], tuple[str, ...]]] = {
    # what is given: how, and what the message must say: the argument, what was expected, what came, what to do
    "a tuple as a stream": (streams((X, X)), ("stream 0", "tensor", "tuple", "seq(*")),
    "a list as a stream": (streams([X, X], X), ("stream 0", "tensor", "list", "seq(*")),
    "a dict as a stream": (streams({"x": X}, X), ("stream 0", "tensor", "dict")),
    "the outputs of another stack as one": (
        streams((X, X), X),
        ("stream 0", "tensor", "tuple", "seq(*"),
    ),
    "an array as a stream": (
        streams(np.zeros((3, 4)), X),
        ("stream 0", "tensor", "ndarray", "torch.from_numpy"),
    ),
    "None as a stream": (streams(X, None), ("stream 1", "tensor", "NoneType")),
    "a proxy as a stream": (proxied, ("stream 0", "Proxy", "fx", "leaf")),
    "8-bit floats as streams, e4m3": (
        streams(X.to(torch.float8_e4m3fn), X),
        ("stream 0", "float8_e4m3fn", "bfloat16"),
    ),
    "8-bit floats as streams, e5m2": (
        streams(X, X.to(torch.float8_e5m2)),
        ("stream 1", "float8_e5m2", "bfloat16"),
    ),
    "quantised streams": (
        streams(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), X),
        ("stream 0", "qint8", "dequantize"),
    ),
    "a coupling that returns a tuple": (
        merging(lambda s, f: (s + f, f)),
        ("Odd()", "merge", "tensor", "tuple"),
    ),
    "a coupling that returns a list": (
        merging(lambda s, f: [s + f]),
        ("Odd()", "merge", "tensor", "list"),
    ),
    "a coupling that returns nothing": (
        merging(lambda s, f: None),
        ("Odd()", "merge", "tensor", "NoneType"),
    ),
    "a coupling that returns a number": (
        merging(lambda s, f: 1.0),
        ("Odd()", "merge", "tensor", "float"),
    ),
    "a coupling that returns integers": (
        merging(lambda s, f: (s + f).long()),
        ("Odd()", "merge", "int64"),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(), Functional()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("what", MISLEADING)
def test_errors_say_what_was_given_and_what_to_do(what, scheduler):
    run, words = MISLEADING[what]
    told(lambda: run(scheduler), *words)


@scene("15")
def test_functions_that_return_sparse_tensors(stage: Stage):
    """A dense stream plus a sparse result is dense: what intercepts the result must not ask for a view."""

    def rows(m, x):
        return m(x).tanh().to_sparse_csr()

    return train(stage.stack(lambda: Lambda(rows, nn.Linear(4, 4))))


@scene("15")
def test_functions_that_return_sparse_coordinates(stage: Stage):
    def rows(m, x):
        return m(x).tanh().to_sparse()

    return train(stage.stack(lambda: Lambda(rows, nn.Linear(4, 4))))


# ---------------------------------------------------------------------------------------------- exact within inexact
def within(stage: Stage, blocks: int, around: Callable[..., Any]) -> list[Any]:
    """An exact stack within torch's checkpoint, within a function of an inexact stack, in float32 as models are."""

    def make():
        inner = ReversibleSequence([(mlp(), mlp())], ExactAdditive(), stage.scheduler)

        def run(inner, x):
            return torch.cat(around(lambda *parts: inner(*parts), *x.chunk(2, -1)), -1)

        return Lambda(run, inner)

    # So that what comes back lies beside its point of the grid now and then.
    loud = lambda m, x: 200 / blocks * m(x)  # noqa: E731
    stack = stage.sequence(*((make(), Lambda(loud, mlp(8))) for _ in range(blocks))).float()
    found = []
    for _ in range(8):
        xs = leaves(ROWS, 8, dtype=torch.float32)
        outputs = stack(*xs)
        loss(outputs).backward()
        found += [*outputs, *grads(*xs, stack)]
        stack.zero_grad()
    return found


def plain_checkpoint(f: Callable[..., Any], *args: Tensor) -> Any:
    return checkpoint(f, *args, use_reentrant=False)


def reentrant_checkpoint(f: Callable[..., Any], *args: Tensor) -> Any:
    return checkpoint(f, *args, use_reentrant=True)


def unchecked_checkpoint(f: Callable[..., Any], *args: Tensor) -> Any:
    return checkpoint(f, *args, use_reentrant=False, determinism_check="none")


def selective_checkpoint(f: Callable[..., Any], *args: Tensor) -> Any:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    return checkpoint(f, *args, use_reentrant=False, context_fn=keep)


def sequential_checkpoint(f: Callable[..., Any], *args: Tensor) -> Any:
    return checkpoint_sequential([lambda args: f(*args), lambda args: args], 2, args, use_reentrant=False)


def nested_checkpoint(f: Callable[..., Any], *args: Tensor) -> Any:
    return plain_checkpoint(lambda *args: plain_checkpoint(f, *args), *args)


def no_checkpoint(f: Callable[..., Any], *args: Tensor) -> Any:
    return f(*args)


FLOAT, ROWS = 1e-2, 11  # so few that every element is compared, in whatever order the tests run


@scene("17", tolerance=FLOAT)
def test_an_exact_stack_within_a_checkpoint_1(stage: Stage):
    return within(stage, 1, plain_checkpoint)


@pytest.mark.some(3)
@scene("17", tolerance=FLOAT)
def test_an_exact_stack_within_a_checkpoint_4(stage: Stage):
    return within(stage, 4, plain_checkpoint)


@pytest.mark.some(3)
@scene("17", tolerance=FLOAT)
def test_an_exact_stack_within_a_checkpoint_12(stage: Stage):
    return within(stage, 12, plain_checkpoint)


@pytest.mark.some(3)
@scene("17", tolerance=FLOAT, refusal="reentrant", refusing="Functional")
def test_an_exact_stack_within_a_reentrant_checkpoint(stage: Stage):
    return within(stage, 4, reentrant_checkpoint)


@pytest.mark.some(3)
@scene("17", tolerance=FLOAT)
def test_an_exact_stack_within_an_unchecked_checkpoint(stage: Stage):
    return within(stage, 4, unchecked_checkpoint)


@pytest.mark.some(3)
@scene("17", tolerance=FLOAT)
def test_an_exact_stack_within_a_selective_checkpoint(stage: Stage):
    return within(stage, 4, selective_checkpoint)


@pytest.mark.some(3)
@scene("17", tolerance=FLOAT)
def test_an_exact_stack_within_a_sequential_checkpoint(stage: Stage):
    return within(stage, 4, sequential_checkpoint)


@pytest.mark.some(3)
@scene("17", tolerance=FLOAT)
def test_an_exact_stack_within_two_checkpoints(stage: Stage):
    return within(stage, 4, nested_checkpoint)


@pytest.mark.some(3)
@scene("17", tolerance=FLOAT)
def test_an_exact_stack_within_an_inexact_one(stage: Stage):
    return within(stage, 4, no_checkpoint)


# ---------------------------------------------------------------------------------------------- couplings
@dataclasses.dataclass(frozen=True)
class Pairing(Additive):
    def unmerge(self, merged, f):
        return merged - f, f


@dataclasses.dataclass(frozen=True)
class Flattening(Additive):
    def unmerge(self, merged, f):
        return (merged - f).flatten()


@dataclasses.dataclass(frozen=True)
class InPlace(Additive):
    def merge(self, s, f):
        return s.detach().add_(f)


@pytest.mark.parametrize("scheduler", [Reversible(), Functional()])
@pytest.mark.parametrize(
    ("coupling", "told"),
    [
        (Pairing(), r"Pairing.*unmerge must return the stream .* shape \(3, 4\), got tuple"),
        (Flattening(), r"Flattening.*unmerge must return the stream .* shape \(3, 4\), got shape \(12,\)"),
        (InPlace(), r"InPlace.*merge edited its stream in place"),
    ],
)
def test_couplings_that_are_no_couplings(coupling: Coupling, told: str, scheduler: Scheduler):
    stack = ReversibleSequence([(mlp(), mlp()) for _ in range(2)], coupling, scheduler)
    with pytest.raises((TypeError, RuntimeError), match=told):
        loss(stack(*(x * 1 for x in leaves(3, 4, dtype=torch.float32)))).backward()


# ---------------------------------------------------------------------------------------------- a stack within another
class Inner(nn.Module):
    """A Functional stack within a function, whose results are saved by whoever is around."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        parts = (nn.Linear(2, 2), activation()), (activation(), nn.Sequential(nn.Linear(2, 2), activation()))
        self.stack = ReversibleSequence(parts, scheduler=Functional())

    def forward(self, x):
        return torch.cat(self.stack(*x.chunk(2, -1)), -1)


@pytest.mark.some(9)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, functools.partial(nn.Softmax, -1)])
@scene("14")
def test_a_functional_stack_within_a_function(stage: Stage, activation: Any):
    return train(stage.stack(lambda: Inner(activation)), 3, 4)


@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(), Naive()], ids=str)
def test_a_functional_stack_within_a_function_searches_no_memory(scheduler, monkeypatch):
    """What the stack around saves kept graphs alive, and it took 0.4 s each time to find out that nothing else did."""

    def search() -> None:
        raise AssertionError("all objects of the process were searched")

    stack = ReversibleSequence([(Inner(nn.Tanh), Inner(nn.Tanh)) for _ in range(2)], scheduler=scheduler).double()
    monkeypatch.setattr("revlib.functional.purity.gc.collect", search)
    outputs = stack(*leaves(3, 4))
    loss(outputs).backward()
    monkeypatch.undo()


@pytest.mark.parametrize("around", [lambda: saved_tensors_hooks(lambda t: [t], lambda held: held[0]), save_on_cpu])
@scene("14")
def test_saved_tensor_hooks_around(stage: Stage, around: Any):
    with around():
        return train(stage.stack(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())), 3, 4)
