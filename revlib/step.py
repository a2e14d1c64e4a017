"""The atom: one step, ``(s1, ..., sm) -> (s2, ..., sm, merge(s1, f(s2, ..., sm)))``, checked as it runs."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from revlib._numbers import whole
from revlib._torch import tree_leaves, version_of, versions_of
from revlib.couplings import Coupling, DefaultAdditive
from revlib.keywords import Keywords, keywords_of

if TYPE_CHECKING:
    from typing_extensions import Never

__all__ = [
    "BoundStep",
    "Layout",
    "Pair",
    "State",
    "Step",
    "advance",
    "apart",
    "checked",
    "layouts",
    "numbered",
    "route",
    "through_blocks",
    "together",
]

State = tuple[Tensor, ...]
T = TypeVar("T")


class Layout(NamedTuple):
    """Which streams of a state a step takes away, and at which places of the next state it puts those that it makes.

    The others stay, in their order. Of them the function reads the last ``read``.
    """

    taken: tuple[int, ...]
    made: tuple[int, ...]
    read: int


def apart(state: tuple[T, ...], places: tuple[int, ...]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """What stands at these places, and the others."""
    first, count = places[0], len(places)
    if places[-1] == first + count - 1:  # as nearly always
        return state[first : first + count], state[:first] + state[first + count :]
    others = tuple(s for i, s in enumerate(state) if i not in places)
    return tuple(state[i] for i in places), others


def together(some: tuple[T, ...], places: tuple[int, ...], others: tuple[T, ...]) -> tuple[T, ...]:
    """The inverse of :func:`apart`."""
    first, count = places[0], len(places)
    if places[-1] == first + count - 1:
        return others[:first] + some + others[first:]
    state = list(others)
    for i, s in zip(places, some, strict=True):
        state.insert(i, s)
    return tuple(state)


class BoundStep:
    """A step as the engine sees it: it takes streams of a state away, and makes others of them.

    In between it evaluates a function on some of the streams that stay, and ``merge`` and ``unmerge`` map what it takes
    to what it makes and back, given what the function returned. This is the step of a function and a coupling. Other
    kinds override how their streams are laid out, and these three.

    A sequence makes its bound steps once and uses them in every forward, so that what is found out about a function
    need not be found out again: ``memory`` belongs to the guards, which check that what they remember still holds.
    """

    merge_reads = False  # whether merge reads tensors besides what it is given, as the parameters of a bijection
    sums = 0  # so many of the first streams that it takes are only added to: nothing depends on their value

    def __init__(
        self, fn: Callable[..., Any], coupling: Coupling, name: str, streams: int | None = None
    ) -> None:
        self.fn, self.coupling, self.name, self.streams = fn, coupling, name, streams
        self.memory: dict[Any, Any] = {}
        self.begins: Pair | None = None  # the pair whose first function this is
        self.ends: Pair | None = None  # the pair whose second function this is
        self._keywords: tuple[Any, Keywords] | None = None
        self._layout: tuple[int, Layout] = (0, Layout((), (), 0))

    @property
    def owner(self) -> Callable[..., Any]:
        """The function whose state is read. A :class:`Step` only wraps it."""
        return self.fn.fn if isinstance(self.fn, Step) else self.fn

    def with_function(self, fn: Callable[..., Any]) -> BoundStep:
        """The same step of another function."""
        step = copy.copy(self)
        step.fn = fn
        return step

    def for_streams(self, dtype: torch.dtype) -> BoundStep:
        """The same step with the law that it has for such streams; always the same one for the same law."""
        coupling = self.coupling.for_streams(dtype)
        if coupling is self.coupling:
            return self
        if coupling not in self.memory:
            step = self.memory[coupling] = copy.copy(self)
            step.coupling, step.memory = coupling, {}
        return self.memory[coupling]

    # ------------------------------------------------------------------------------------------ streams
    def layout(self, m: int) -> Layout:
        """How the step treats a state of ``m`` streams."""
        if self._layout[0] != m:
            self._layout = m, self._laid_out(m)
        return self._layout[1]

    def _laid_out(self, m: int) -> Layout:
        n = self.streams or m
        if not 2 <= n <= m:
            raise TypeError(
                f"{self.name} runs on at least {self.streams or 2} streams, got {m}; duplicate the input, seq(x, x), "
                "or split it: seq(*x.chunk(2, dim=-1)), or a bijection such as Split() before the step"
            )
        return Layout((m - n,), (m - 1,), n - 1)

    def streams_before(self, m: int) -> int:
        """The number of streams of the state before, from that of the state after the step."""
        return m

    # ------------------------------------------------------------------------------------------ the map
    @property
    def needs_data(self) -> bool:
        """Whether it takes its parameters from the streams that it sees next."""
        return False

    def prepare(self, taken: State) -> None:
        """Before the step runs in forward, unwatched: have it take what it needs of its streams."""

    def evaluate(self, others: State, context: Mapping[str, Any]) -> Any:
        """``f``, refusing a function that edits its inputs or its context in place."""
        inputs = others if self.streams is None else others[len(others) - self.streams + 1 :]
        return self.called(tuple(map(self.coupling.show, inputs)), context)

    def called(self, inputs: State, context: Mapping[str, Any]) -> Any:
        """What the function returns for these streams."""
        if torch.compiler.is_compiling():  # version counters cannot be traced
            return self.fn(*inputs, **context)
        watched = inputs
        if context:
            watched = (*inputs, *(t for t in tree_leaves(dict(context)) if isinstance(t, Tensor)))
        before = versions_of(watched)
        try:
            f = self.fn(*inputs, **context)
        except TypeError as error:
            _refuse_signature(self, inputs, context, error)
            raise
        except RuntimeError as error:
            _note_where(self, inputs, error)
            raise
        if versions_of(watched) != before:
            raise RuntimeError(
                f"{self.name} edited a stream or a context tensor in place, so its step cannot be inverted; "
                "clone the tensor before editing it, or use an out-of-place operation."
            )
        return f

    def counted(self, inputs: int) -> str:
        """How messages call the streams that the function was given."""
        return f"{inputs} of {inputs + 1} streams, all but its own"

    def merge(self, taken: State, f: Any) -> State:
        """The new streams from those that are taken away, which they must equal in shape and kind."""
        return (_merged(self, taken[-1], f),)

    def unmerge(self, made: State, f: Any) -> State:
        """The streams that were taken away, from the new ones."""
        return (_unmerged(self, made[-1], f),)

    # ------------------------------------------------------------------------------------------ exactness
    def enter(self, s: Tensor) -> Tensor:
        """A stream as a sequence lets it in, if this step is the first that merges it away."""
        return self.coupling.enter(s)

    @property
    def leaves_as_entered(self) -> bool:
        """Whether the step has widened its streams unasked, so that they leave in the dtype in which they came."""
        return self.coupling.leaves_as_entered

    def limit_of(self, dtype: torch.dtype) -> float:
        """The magnitude that the new stream must stay below."""
        return self.coupling.limit_of(dtype)

    def inverts_exactly(self, dtype: torch.dtype) -> bool:
        """Whether inversion gives back every bit of a stream of this dtype."""
        return self.limit_of(dtype) < math.inf

    def inverse(self) -> BoundStep:
        """The step backwards."""
        return BoundInverse(self)

    def keywords(self, streams: int) -> Keywords:
        """The keywords that the function takes besides so many streams."""
        owner = self.owner
        target = owner.forward if isinstance(owner, nn.Module) else owner
        if self._keywords is None or self._keywords[0] != (target, streams):
            self._keywords = (target, streams), keywords_of(owner, streams)
        found = self._keywords[1]
        # A wrapper may have been given another function since.
        return keywords_of(owner, streams) if found.looked_through else found


NEEDS_DATA = (
    "{} takes its parameters from the first batch, which it cannot within a torch.func transform; let one batch "
    "through before"
)


class BoundInverse(BoundStep):
    """A step backwards: it takes away what the step makes, and makes what the step takes away."""

    def __init__(self, step: BoundStep) -> None:
        super().__init__(step.fn, step.coupling, f"the inverse of {step.name}")
        self.step, self.sums = step, step.sums

    def with_function(self, fn: Callable[..., Any]) -> BoundStep:
        return BoundInverse(self.step.with_function(fn))

    def _laid_out(self, m: int) -> Layout:
        taken, made, read = self.step.layout(self.step.streams_before(m))
        return Layout(made, taken, read)

    def streams_before(self, m: int) -> int:
        taken, made, _ = self.step.layout(m)
        return m - len(taken) + len(made)

    def evaluate(self, others: State, context: Mapping[str, Any]) -> Any:
        return self.step.evaluate(others, context)

    def merge(self, taken: State, f: Any) -> State:
        return self.step.unmerge(taken, f)

    def unmerge(self, made: State, f: Any) -> State:
        return self.step.merge(made, f)

    def limit_of(self, dtype: torch.dtype) -> float:
        # Nobody says that what is given to an inverse lies on the grid of an exact coupling.
        return math.inf

    def inverse(self) -> BoundStep:
        return self.step


class Step(nn.Module):
    r"""One reversible step on $m \ge 2$ streams.

    $$(s_1, \dots, s_m) \mapsto (s_2, \dots, s_m,\; s_1 \oplus f(s_2, \dots, s_m))$$

    Args:
        fn: $f$; called as ``fn(s2, ..., sm, **context)``. Its result must merge into ``s1`` without changing its shape.
        coupling: $\oplus$, the law that merges; additive unless given.
        streams: the step runs on so many of the last streams, and leaves those before them alone; on all unless given.

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

    def __init__(
        self, fn: Callable[..., Any], coupling: Coupling | None = None, streams: int | None = None
    ) -> None:
        """Make a step of a function and the law that merges its result, additive unless given."""
        super().__init__()
        if not callable(fn):
            raise TypeError(f"Step(fn=...) takes a module or a function, got {type(fn).__name__}")
        if isinstance(fn, type) and issubclass(fn, nn.Module):
            raise TypeError(f"Step(fn=...) takes a module or a function, got {given(fn)}")
        if streams is not None:
            whole("Step(streams=...)", streams, 2)
        self.fn = fn
        self.coupling = checked(coupling or DefaultAdditive())
        self.streams = streams

    def bind(self, name: str) -> BoundStep:
        """The step as the engine sees it."""
        return BoundStep(self, self.coupling, name, self.streams)

    def forward(self, *streams: Tensor, **context: Any) -> Any:
        """What the function returns for the other streams, before it is merged."""
        return self.fn(*streams, **context)

    if TYPE_CHECKING:  # so that F and G are modules in `for F, G in seq`, which raises at a Step

        def __iter__(self) -> Iterator[Never]: ...

    def extra_repr(self) -> str:
        """The coupling, as ``print(step)`` shows it above the function."""
        streams = "" if self.streams is None else f", streams={self.streams}"
        return f"coupling={self.coupling}{streams}"


class Pair(nn.Module):
    """Two functions of a block, ``y1 = x1 + F(x2); y2 = x2 + G(y1)``. Unpacks like the tuple it came from."""

    def __init__(self, F: nn.Module, G: nn.Module) -> None:
        super().__init__()
        self.F, self.G = F, G

    def forward(self, *streams: Tensor, **context: Any) -> Never:
        """A pair is run by its sequence, whose coupling and scheduler it needs."""
        raise TypeError(
            "a pair of functions is not called by itself; stack[0:1](x1, x2) runs the first pair of a sequence, and "
            "stack[0].F(x2) one of its functions"
        )

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

    def left(self, given: State, state: State) -> None:
        """Call the forward hooks, which may look at the streams that enter the block and at those that leave it."""
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


def given(value: object) -> str:
    """How messages call what came in place of a value of another kind."""
    if isinstance(value, type):
        return f"the class {value.__name__}; call it to make one"
    return type(value).__name__


def checked(coupling: Coupling) -> Coupling:
    if not isinstance(coupling, Coupling):
        raise TypeError(
            f"coupling must be a Coupling value such as Additive(), got {coupling!r}"
            + ("; call it to make one" if isinstance(coupling, type) else "")
        )
    return coupling


# ------------------------------------------------------------------------------------------ context
def layouts(steps: Sequence[BoundStep], m: int) -> list[Layout]:
    """How each step treats its state, where the first has ``m`` streams."""
    found = []
    for step in steps:
        found.append(step.layout(m))
        m += len(found[-1].made) - len(found[-1].taken)
    return found


def numbered(found: Sequence[Layout], m: int) -> list[tuple[int, ...]]:
    """The streams of each state by number, where each stream that a step makes gets the next one."""
    states, after = [tuple(range(m))], m
    for taken, made, _ in found:
        new = tuple(range(after, after + len(made)))
        states.append(together(new, made, apart(states[-1], taken)[1]))
        after += len(new)
    return states


def route(
    steps: Sequence[BoundStep], streams: int, context: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The part of ``context`` that each step's function names. A name that no function takes is an error."""
    if not context:
        return [{} for _ in steps]
    given = [a.read or len(a.taken) for a in layouts(steps, streams)]
    taken = [step.keywords(count) for step, count in zip(steps, given, strict=True)]
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
            f"{step.name} was called with {step.counted(len(inputs))},{names} but "
            f"takes {signature} ({mismatch}); change its signature, or the streams and keywords given to the sequence: "
            "each positional argument is a stream, and context such as a mask goes by keyword, seq(x, x, mask=mask)"
        ) from error


def _note_where(step: BoundStep, inputs: State, error: RuntimeError) -> None:
    """Notes the step beneath a message of torch, as of shapes that do not fit. Errors of other classes get no note."""
    noted = hasattr(error, "add_note")  # from Python 3.11 on
    if type(error) is not RuntimeError or not noted:
        return
    note = f"This was raised by {step.name}, called with streams of shapes {[tuple(s.shape) for s in inputs]}."
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def _merged(step: BoundStep, s: Tensor, f: Any) -> Tensor:
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
    version = -1 if torch.compiler.is_compiling() else version_of(s)
    try:
        merged = step.coupling.merge(s, f)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{step.name} returned shape {_shapes(f)} in a {type(f).__name__}, which {step.coupling} does not merge "
            f"into its stream of shape {tuple(s.shape)}{_what_to_return(s, f)}"
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
    if version_of(s) != version:
        raise RuntimeError(
            f"{step.coupling}.merge edited its stream in place, so the step cannot be inverted; return a new tensor"
        )
    same = merged.dtype is s.dtype
    if not same and (
        merged.is_complex() != s.is_complex() or not torch.can_cast(s.dtype, merged.dtype)
    ):
        raise TypeError(
            f"{step.name} would turn its {s.dtype} stream into {merged.dtype} by {step.coupling}.merge; cast its "
            "result."
        )
    return merged


def _what_to_return(s: Tensor, f: Any) -> str:
    """Advice on a result that the coupling does not take, such as the pair that an attention or a recurrent layer
    returns."""
    if isinstance(f, Tensor) or not any(t.shape == s.shape for t in tree_leaves(f)):
        return "; change what the function returns, or use the coupling that it was written for"
    return (
        "; return the tensor of that shape alone, and hand on the others as 'Losses from inside functions' in the "
        "guide shows, or use the coupling that the function was written for"
    )


def _unmerged(step: BoundStep, made: Tensor, f: Any) -> Tensor:
    s = step.coupling.unmerge(made, f)
    if not isinstance(s, Tensor) or s.shape != made.shape:
        came = f"shape {tuple(s.shape)}" if isinstance(s, Tensor) else type(s).__name__
        raise TypeError(
            f"{step.coupling}.unmerge must return the stream that merge was given, a tensor of shape "
            f"{tuple(made.shape)}, got {came}"
        )
    return s


def _shapes(f: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tree_leaves(f)]


def advance(steps: Sequence[BoundStep], state: State, contexts: Sequence[dict[str, Any]]) -> State:
    """All steps in order, as an ordinary differentiable function."""
    return through_blocks(steps, state, contexts, _advanced)


def _advanced(step: BoundStep, state: State, context: dict[str, Any]) -> State:
    layout = step.layout(len(state))
    taken, others = apart(state, layout.taken)
    step.prepare(taken)
    made = step.merge(taken, step.evaluate(others, context))
    return together(made, layout.made, others)


def through_blocks(
    steps: Sequence[BoundStep],
    state: State,
    contexts: Sequence[T],
    run: Callable[[BoundStep, State, T], State],
) -> State:
    """``run`` on one step after the other, with the hooks of the blocks to which the steps belong called in between."""
    entered: dict[Pair, State] = {}  # what the blocks were given that somebody wants to see
    for step, context in zip(steps, contexts, strict=True):
        if step.begins is not None and step.begins.is_hooked:
            step.begins.entered(state)
            entered[step.begins] = state
        state = run(step, state, context)
        if step.ends is not None and step.ends.is_hooked:
            step.ends.left(entered.pop(step.ends, ()), state)
    return state
