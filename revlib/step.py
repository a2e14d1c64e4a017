"""The atom: one step, ``(s1, ..., sm) -> (s2, ..., sm, merge(s1, f(s2, ..., sm)))``, checked as it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revlib.couplings import Additive, Coupling
from revlib.tensors import version_of

__all__ = [
    "Branch",
    "Pair",
    "State",
    "Step",
    "advance",
    "checked",
    "evaluate",
    "exporting",
    "merge",
    "retreat",
    "route",
]

State = tuple[Tensor, ...]


class Branch(NamedTuple):
    """What the engine sees of a step: a function, the law that merges its result, and a name for messages."""

    fn: Callable[..., Any]
    coupling: Coupling
    name: str

    @property
    def owner(self) -> Callable[..., Any]:
        """Whose state the function reads: a Step only wraps."""
        return self.fn.fn if isinstance(self.fn, Step) else self.fn


class Step(nn.Module):
    r"""One reversible step on $m \ge 2$ streams.

    $$(s_1, \dots, s_m) \mapsto (s_2, \dots, s_m,\; s_1 \oplus f(s_2, \dots, s_m))$$

    Args:
        fn: $f$; called as ``fn(s2, ..., sm, **context)``. Its result must merge into ``s1`` without changing its shape.
        coupling: $\oplus$, the law that merges; additive unless given.

    Calling the step evaluates $f$ alone, so that hooks and wrappers put on it run whenever $f$ does.
    Put steps into a :class:`~revlib.ReversibleSequence` to run them.
    """

    def __init__(self, fn: Callable[..., Any], coupling: Coupling | None = None) -> None:
        super().__init__()
        if not callable(fn):
            raise TypeError(f"Step(fn=...) takes a module or a function, got {type(fn).__name__}")
        self.fn = fn
        self.coupling = checked(coupling or Additive())

    def forward(self, *streams: Tensor, **context: Any) -> Any:
        return self.fn(*streams, **context)

    def extra_repr(self) -> str:
        return f"coupling={self.coupling}"


class Pair(nn.Module):
    """Two functions of a block, ``y1 = x1 + F(x2); y2 = x2 + G(y1)``. Unpacks like the tuple it came from."""

    def __init__(self, F: nn.Module, G: nn.Module) -> None:
        super().__init__()
        self.F, self.G = F, G

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self.F, self.G))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> nn.Module:
        return (self.F, self.G)[index]


def checked(coupling: Coupling) -> Coupling:
    if not isinstance(coupling, Coupling):
        raise TypeError(
            f"coupling must be a Coupling value such as Additive(), got {coupling!r}"
            + ("; call it to make one" if isinstance(coupling, type) else "")
        )
    return coupling


# ---------------------------------------------------------------------------------------------- context
def _named_parameters(fn: Callable[..., Any], streams: int) -> tuple[frozenset[str], bool]:
    """The keyword names that ``fn`` takes besides its streams, and whether it takes any name at all."""
    if isinstance(fn, Step):
        fn = fn.fn
    try:
        parameters = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).parameters.values()
    except (TypeError, ValueError):
        return frozenset(), False
    kinds = inspect.Parameter
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    rest = positional[streams:] + [p for p in parameters if p.kind is kinds.KEYWORD_ONLY]
    names = frozenset(p.name for p in rest if p.kind is not kinds.POSITIONAL_ONLY)
    return names, any(p.kind is kinds.VAR_KEYWORD for p in parameters)


def route(branches: Sequence[Branch], streams: int, context: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The part of ``context`` that each branch names. A name that no branch takes is an error."""
    if not context:
        return [{} for _ in branches]
    taken = [_named_parameters(b.fn, streams - 1) for b in branches]
    unknown = [k for k in context if not any(k in names or every for names, every in taken)]
    if unknown:
        known = sorted(set().union(*(names for names, _ in taken)))
        these = f"the names they take are {known}" if known else "they take streams alone"
        raise TypeError(
            f"context argument {unknown[0]!r} is taken by none of the {len(branches)} functions of this sequence; "
            f"{these}. Name it in the signature of a function that uses it."
        )
    return [{k: v for k, v in context.items() if every or k in names} for names, every in taken]


def exporting() -> bool:
    """Whether a program is being exported. Under ``torch.compile``, torch 2.11 takes its own function for this as true
    throughout, and would then run every stack with its activations stored."""
    return torch.compiler._is_exporting_flag


# ---------------------------------------------------------------------------------------------- the steps
def _versions(tensors: Sequence[Any]) -> list[int]:
    return [version_of(t) if isinstance(t, Tensor) else -1 for t in tensors]


def evaluate(branch: Branch, inputs: State, context: Mapping[str, Any]) -> Any:
    """``f(inputs)``, refusing a function that edits its inputs or its context in place."""
    inputs = tuple(branch.coupling.show(s) for s in inputs)
    if torch.compiler.is_compiling():  # versions cannot be traced
        return branch.fn(*inputs, **context)
    watched = [*inputs, *(tree_leaves(dict(context)) if context else ())]
    before = _versions(watched)
    try:
        f = branch.fn(*inputs, **context)
    except TypeError as error:
        _refuse_signature(branch, inputs, context, error)
        raise
    if _versions(watched) != before:
        raise RuntimeError(
            f"{branch.name} edited a stream or a context tensor in place, so its step cannot be inverted; "
            "clone the tensor before editing it, or use an out-of-place operation."
        )
    return f


def _refuse_signature(branch: Branch, inputs: State, context: Mapping[str, Any], error: TypeError) -> None:
    """Says so where ``error`` is of a call that the function's own signature does not allow."""
    fn = branch.owner
    try:
        signature = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*inputs, **context)
    except TypeError as mismatch:
        names = f" and {', '.join(sorted(context))}" if context else ""
        raise TypeError(
            f"{branch.name} was called with {len(inputs)} of {len(inputs) + 1} streams, all but its own,{names} but "
            f"takes {signature} ({mismatch}); change its signature, or the streams and keywords given to the sequence"
        ) from error


def merge(branch: Branch, s: Tensor, f: Any) -> Tensor:
    """The new stream; its shape and kind must be those of the stream it replaces."""
    leaves = [f] if isinstance(f, Tensor) else tree_leaves(f)
    if not leaves or not all(isinstance(t, Tensor) for t in leaves):
        raise TypeError(f"{branch.name} must return a tensor to merge into its stream, got {type(f).__name__}")
    if not all(t.is_floating_point() or t.is_complex() for t in leaves):
        raise TypeError(
            f"{branch.name} must return floating-point tensors, got {[t.dtype for t in leaves]}; cast its result."
        )
    try:
        merged = branch.coupling.merge(s, f)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        shapes = [tuple(t.shape) for t in leaves]
        raise ValueError(
            f"{branch.name} returned shape {shapes} in a {type(f).__name__}, which {branch.coupling} does not merge "
            f"into its stream of shape {tuple(s.shape)}"
        ) from error
    if merged.shape != s.shape:
        raise ValueError(
            f"{branch.name} must return what merges into its stream of shape {tuple(s.shape)}; "
            f"merged with {[tuple(t.shape) for t in leaves]} the stream would become {tuple(merged.shape)}"
        )
    if torch.compiler.is_compiling():
        return merged
    if merged.is_complex() != s.is_complex() or not torch.can_cast(s.dtype, merged.dtype):
        raise TypeError(f"{branch.name} would turn its {s.dtype} stream into {merged.dtype}; cast its result.")
    return merged


def advance(branches: Sequence[Branch], state: State, contexts: Sequence[dict[str, Any]]) -> State:
    """All steps in order, as an ordinary differentiable function."""
    for branch, context in zip(branches, contexts, strict=True):
        s, *inputs = state
        state = (*inputs, merge(branch, s, evaluate(branch, tuple(inputs), context)))
    return state


def retreat(branch: Branch, state: State, context: Mapping[str, Any]) -> State:
    """The state before a step, from the state after it: the step's inverse, as an ordinary differentiable function."""
    *inputs, merged = state
    return (branch.coupling.unmerge(merged, evaluate(branch, tuple(inputs), context)), *inputs)
