"""The atom: one step, ``(s1, ..., sm) -> (s2, ..., sm, merge(s1, f(s2, ..., sm)))``, checked as it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revlib._torch import tree_leaves, versions_of
from revlib.couplings import Additive, Coupling
from revlib.keywords import Keywords, keywords_of

__all__ = [
    "BoundStep",
    "Pair",
    "State",
    "Step",
    "advance",
    "checked",
    "evaluate",
    "merge",
    "retreat",
    "route",
]

State = tuple[Tensor, ...]


class BoundStep:
    """A step as the engine sees it: a function, the law that merges its result, and a name for messages.

    A sequence makes its bound steps once and uses them in every forward, so that what is found out about a function
    need not be found out again: ``memory`` belongs to the guards, which check that what they remember still holds.
    """

    def __init__(self, fn: Callable[..., Any], coupling: Coupling, name: str) -> None:
        self.fn, self.coupling, self.name = fn, coupling, name
        self.memory: dict[Any, Any] = {}
        self.begins: Pair | None = None  # the pair whose first function this is
        self.ends: Pair | None = None  # the pair whose second function this is
        self._keywords: tuple[Any, Keywords] | None = None

    @property
    def owner(self) -> Callable[..., Any]:
        """The function whose state is read. A :class:`Step` only wraps it."""
        return self.fn.fn if isinstance(self.fn, Step) else self.fn

    def with_coupling(self, coupling: Coupling) -> BoundStep:
        """The same step with another law; always the same one for the same law."""
        if coupling is self.coupling:
            return self
        if coupling not in self.memory:
            other = self.memory[coupling] = BoundStep(self.fn, coupling, self.name)
            other.begins, other.ends = self.begins, self.ends
        return self.memory[coupling]

    def keywords(self, streams: int) -> Keywords:
        """The keywords that the function takes besides so many streams."""
        owner = self.owner
        target = owner.forward if isinstance(owner, nn.Module) else owner
        if self._keywords is None or self._keywords[0] != (target, streams):
            self._keywords = (target, streams), keywords_of(owner, streams)
        found = self._keywords[1]
        # A wrapper may have been given another function since.
        return keywords_of(owner, streams) if found.looked_through else found


class Step(nn.Module):
    r"""One reversible step on $m \ge 2$ streams.

    $$(s_1, \dots, s_m) \mapsto (s_2, \dots, s_m,\; s_1 \oplus f(s_2, \dots, s_m))$$

    Args:
        fn: $f$; called as ``fn(s2, ..., sm, **context)``. Its result must merge into ``s1`` without changing its shape.
        coupling: $\oplus$, the law that merges; additive unless given.

    Calling the step evaluates $f$ alone, so that hooks and wrappers put on it run whenever $f$ does.
    Put steps into a :class:`~revlib.ReversibleSequence` to run them.

    Shapes: streams of any shapes; what $f$ returns must fit ``s1``. Cost: that of $f$, and of the coupling.

    Raises:
        TypeError: if ``fn`` cannot be called, or if ``coupling`` is no :class:`~revlib.Coupling`.

    Source: with $m = 2$, a step is half a block of Gomez et al. 2017 (RevNet).

    Example:
        >>> from revlib import ReversibleSequence
        >>> three = ReversibleSequence([Step(lambda b, c: torch.tanh(b) * c) for _ in range(6)])
        >>> a, b, c = three(*torch.randn(3, 2, 4))
        >>> a.shape
        torch.Size([2, 4])
    """

    def __init__(self, fn: Callable[..., Any], coupling: Coupling | None = None) -> None:
        """Make a step of a function and the law that merges its result, additive unless given."""
        super().__init__()
        if not callable(fn):
            raise TypeError(f"Step(fn=...) takes a module or a function, got {type(fn).__name__}")
        self.fn = fn
        self.coupling = checked(coupling or Additive())

    def forward(self, *streams: Tensor, **context: Any) -> Any:
        """What the function returns for the other streams, before it is merged."""
        return self.fn(*streams, **context)

    def extra_repr(self) -> str:
        """The coupling, as ``print(step)`` shows it above the function."""
        return f"coupling={self.coupling}"


class Pair(nn.Module):
    """Two functions of a block, ``y1 = x1 + F(x2); y2 = x2 + G(y1)``. Unpacks like the tuple it came from."""

    def __init__(self, F: nn.Module, G: nn.Module) -> None:
        super().__init__()
        self.F, self.G = F, G

    @property
    def is_hooked(self) -> bool:
        """Whether the pair itself has hooks, which a sequence must call, since nobody calls the pair."""
        return bool(
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
        )

    def entered(self, state: State) -> None:
        """Call the forward pre-hooks, which may look at the streams that enter the block."""
        if self._backward_hooks or self._backward_pre_hooks:
            raise RuntimeError(
                f"a block of a sequence ({self._functions()}) has a backward hook, which nothing would call, since the "
                "sequence runs F and G; register it on pair.F or pair.G, or a hook on the streams by y.register_hook"
            )
        for key, hook in list(self._forward_pre_hooks.items()):
            extra: tuple[Any, ...] = ({},) if key in self._forward_pre_hooks_with_kwargs else ()
            self._only_looks(hook(self, state, *extra))
        if self._forward_hooks:
            self.__dict__["_given"] = state

    def left(self, state: State) -> None:
        """Call the forward hooks, which may look at the streams that enter the block and at those that leave it."""
        given = self.__dict__.pop("_given", ())
        for key, hook in list(self._forward_hooks.items()):
            extra: tuple[Any, ...] = ({},) if key in self._forward_hooks_with_kwargs else ()
            self._only_looks(hook(self, given, *extra, state))

    def _only_looks(self, returned: Any) -> None:
        if returned is not None:
            raise RuntimeError(
                f"a forward hook of a block ({self._functions()}) returned something, but a hook of a block may only "
                "look at its streams: what it would change could not be inverted. Register it on pair.F or pair.G."
            )

    def _functions(self) -> str:
        return f"of {type(self.F).__name__} and {type(self.G).__name__}"

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


# ------------------------------------------------------------------------------------------ context
def route(
    steps: Sequence[BoundStep], streams: int, context: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The part of ``context`` that each step's function names. A name that no function takes is an error."""
    if not context:
        return [{} for _ in steps]
    taken = [step.keywords(streams - 1) for step in steps]
    unknown = [k for k in context if not any(k in names or every for names, every, _ in taken)]
    if unknown:
        known = sorted(set().union(*(names for names, _, _ in taken)))
        these = f"the names they take are {known}" if known else "they take streams alone"
        raise TypeError(
            f"context argument {unknown[0]!r} is taken by none of the {len(steps)} functions of this sequence; "
            f"{these}. Name it in the signature of a function that uses it."
        )
    return [{k: v for k, v in context.items() if every or k in names} for names, every, _ in taken]


# ------------------------------------------------------------------------------------------ running a step
def evaluate(step: BoundStep, inputs: State, context: Mapping[str, Any]) -> Any:
    """``f(inputs)``, refusing a function that edits its inputs or its context in place."""
    inputs = tuple(map(step.coupling.show, inputs))
    if torch.compiler.is_compiling():  # version counters cannot be traced
        return step.fn(*inputs, **context)
    watched = inputs
    if context:
        watched = (*inputs, *(t for t in tree_leaves(dict(context)) if isinstance(t, Tensor)))
    before = versions_of(watched)
    try:
        f = step.fn(*inputs, **context)
    except TypeError as error:
        _refuse_signature(step, inputs, context, error)
        raise
    if versions_of(watched) != before:
        raise RuntimeError(
            f"{step.name} edited a stream or a context tensor in place, so its step cannot be inverted; "
            "clone the tensor before editing it, or use an out-of-place operation."
        )
    return f


def _refuse_signature(
    step: BoundStep, inputs: State, context: Mapping[str, Any], error: TypeError
) -> None:
    """Says so where ``error`` is of a call that the function's own signature does not allow."""
    fn = step.owner
    try:
        signature = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*inputs, **context)
    except TypeError as mismatch:
        names = f" and {', '.join(sorted(context))}" if context else ""
        raise TypeError(
            f"{step.name} was called with {len(inputs)} of {len(inputs) + 1} streams, all but its own,{names} but "
            f"takes {signature} ({mismatch}); change its signature, or the streams and keywords given to the sequence"
        ) from error


def merge(step: BoundStep, s: Tensor, f: Any) -> Tensor:
    """The new stream; its shape and kind must be those of the stream it replaces."""
    if not (isinstance(f, Tensor) and f.is_floating_point()):
        leaves = tree_leaves(f)
        if not leaves or not all(isinstance(t, Tensor) for t in leaves):
            raise TypeError(
                f"{step.name} must return a tensor to merge into its stream, got {type(f).__name__}"
            )
        if not all(t.is_floating_point() or t.is_complex() for t in leaves):
            raise TypeError(
                f"{step.name} must return floating-point tensors, got {[t.dtype for t in leaves]}; cast its result."
            )
    try:
        merged = step.coupling.merge(s, f)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{step.name} returned shape {_shapes(f)} in a {type(f).__name__}, which {step.coupling} does not merge "
            f"into its stream of shape {tuple(s.shape)}"
        ) from error
    if not isinstance(merged, Tensor):
        raise TypeError(
            f"{step.coupling}.merge must return the new stream as a tensor, got {type(merged).__name__}; merge only "
            "adds the function's result to the stream, and returns nothing else"
        )
    if merged.shape != s.shape:
        raise ValueError(
            f"{step.name} must return what merges into its stream of shape {tuple(s.shape)}; "
            f"merged with {_shapes(f)} the stream would become {tuple(merged.shape)}"
        )
    if torch.compiler.is_compiling():
        return merged
    same = merged.dtype is s.dtype
    if not same and (
        merged.is_complex() != s.is_complex() or not torch.can_cast(s.dtype, merged.dtype)
    ):
        raise TypeError(
            f"{step.name} would turn its {s.dtype} stream into {merged.dtype} by {step.coupling}.merge; cast its "
            "result."
        )
    return merged


def _shapes(f: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tree_leaves(f)]


def advance(steps: Sequence[BoundStep], state: State, contexts: Sequence[dict[str, Any]]) -> State:
    """All steps in order, as an ordinary differentiable function."""
    for step, context in zip(steps, contexts, strict=True):
        s, *inputs = state
        if step.begins is not None and step.begins.is_hooked:
            step.begins.entered(state)
        state = (*inputs, merge(step, s, evaluate(step, tuple(inputs), context)))
        if step.ends is not None and step.ends.is_hooked:
            step.ends.left(state)
    return state


def retreat(step: BoundStep, state: State, context: Mapping[str, Any]) -> State:
    """The state before a step, from the state after it: the step's inverse, as an ordinary differentiable function."""
    *inputs, merged = state
    return (step.coupling.unmerge(merged, evaluate(step, tuple(inputs), context)), *inputs)
