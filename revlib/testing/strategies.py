"""Hypothesis strategies: functions, streams, contexts, stacks, schedulers, and whole cases.

They draw shapes and a seed, never single elements, so that cases shrink to the smallest shapes and shallowest stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    raise ModuleNotFoundError(
        'revlib.testing.strategies needs hypothesis: pip install "revlib-torch[testing]"',
        name="hypothesis",
    ) from error

from revlib.bijections import (
    ActNorm,
    Bijection,
    Concat,
    Convolution1x1,
    Inverse,
    Permute,
    Rearrange,
    Split,
)
from revlib.schedulers import (
    Anchored,
    Budget,
    Checkpoint,
    KeepLast,
    Naive,
    PaReprop,
    Plan,
    Reversible,
    Scheduler,
)
from revlib.sequence import ReversibleSequence
from revlib.step import Step, advance

__all__ = [
    "Case",
    "bijections",
    "branches",
    "cases",
    "contexts",
    "dtypes",
    "mixed_cases",
    "schedulers",
    "seeds",
    "stacks",
    "streams",
]


class Branch(nn.Module):
    """A small function of one or more streams: normalise, mix, activate, project; with what real blocks do besides.

    It names the context arguments ``gain`` and ``shift``, adds dropout, batch norm and in-place activation if asked.
    """

    def __init__(
        self, widths: Sequence[int], out: int, *, dropout: float, batch_norm: bool, inplace: bool
    ) -> None:
        super().__init__()
        hidden = 2 * max(out, 2)
        self.inputs = nn.ModuleList(nn.Linear(w, hidden) for w in widths)
        self.norm = nn.BatchNorm1d(hidden) if batch_norm else nn.LayerNorm(hidden)
        self.act = nn.ReLU(inplace=True) if inplace else nn.Tanh()
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, out)

    def forward(self, *streams: Tensor, gain: Tensor | None = None, shift: float = 0.0) -> Tensor:
        h = torch.stack([f(s) for f, s in zip(self.inputs, streams, strict=True)]).sum(0)
        h = self.drop(self.act(self.norm(h.flatten(0, -2)).view(h.shape)))
        return self.out(h if gain is None else h * gain) + shift


def seeds() -> st.SearchStrategy[int]:
    """Seeds of random generators.

    Example:
        >>> from hypothesis import given
        >>> @given(seeds())
        ... def check(seed):
        ...     assert torch.equal(*(torch.manual_seed(seed).get_state() for _ in range(2)))
        >>> check()
    """
    return st.integers(0, 2**16)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """Precisions in which gradients can be compared closely: float64 and float32.

    Example:
        >>> from hypothesis import given
        >>> @given(dtypes())
        ... def check(dtype):
        ...     assert dtype in (torch.float64, torch.float32)
        >>> check()
    """
    return st.sampled_from([torch.float64, torch.float32])


@st.composite
def branches(draw: st.DrawFn, widths: Sequence[int] = (4,), out: int = 4) -> nn.Module:
    """Functions from streams of ``widths`` channels to ``out`` channels, deterministic or not, in train mode.

    They may have dropout, batch norm and an activation in place, and name the context of :func:`contexts`.

    Shapes: (batch, tokens, width) for each of ``widths`` to (batch, tokens, out), in float32.

    Example:
        >>> from hypothesis import given
        >>> @given(branches((4, 2), out=3))
        ... def check(function):
        ...     assert function(torch.ones(2, 5, 4), torch.ones(2, 5, 2)).shape == (2, 5, 3)
        >>> check()
    """
    torch.manual_seed(draw(seeds()))
    return Branch(
        widths,
        out,
        dropout=draw(st.sampled_from([0.0, 0.3])),
        batch_norm=draw(st.booleans()),
        inplace=draw(st.booleans()),
    )


@st.composite
def streams(
    draw: st.DrawFn, widths: Sequence[int] = (4, 4), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Streams with elements of order one; any subset of them requires a gradient.

    Shapes: (batch, tokens, width) for each of ``widths``, with 2 to 4 samples of 2 to 5 tokens.

    Example:
        >>> from hypothesis import given
        >>> from revlib import Additive
        >>> from revlib.testing import assert_unmerges
        >>> @given(streams((4, 4)))
        ... def check(pair):
        ...     assert_unmerges(Additive(), *pair)
        >>> check()
    """
    batch, tokens = draw(st.integers(2, 4)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(seeds()))
    return tuple(
        torch.randn(batch, tokens, w, generator=generator, dtype=dtype).requires_grad_(
            draw(st.booleans())
        )
        for w in widths
    )


@st.composite
def contexts(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Context that :func:`branches` understand: a tensor that may require a gradient, a number, either, or nothing.

    Example:
        >>> from hypothesis import given
        >>> @given(contexts())
        ... def check(context):
        ...     assert context.keys() <= {"gain", "shift"}
        >>> check()
    """
    context: dict[str, Any] = {}
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(seeds()))
        gain = torch.rand((), generator=generator, dtype=dtype) + 0.5
        context["gain"] = gain.requires_grad_(draw(st.booleans()))
    if draw(st.booleans()):
        context["shift"] = draw(st.sampled_from([-1.0, 0.5]))
    return context


@st.composite
def stacks(
    draw: st.DrawFn,
    widths: Sequence[int] = (4, 4),
    dtype: torch.dtype = torch.float64,
    max_depth: int = 5,
) -> ReversibleSequence:
    """Stacks on ``len(widths)`` streams: pairs and single steps (more than two streams: steps), some modules shared,
    some parameters frozen. Whatever order pairs and steps come in, every function fits the streams it meets.

    Shapes: of a stream (batch, tokens, width), with one of ``widths``.

    Example:
        >>> from hypothesis import given
        >>> from revlib.testing import assert_inverts
        >>> @given(stacks((4, 4)), streams((4, 4)))
        ... def check(stack, pair):
        ...     assert_inverts(stack, *pair)
        >>> check()
    """
    rotation = list(widths)
    items: list[Any] = []
    for _ in range(draw(st.integers(1, max_depth))):
        pair = len(widths) == 2 and draw(st.booleans())
        functions = []
        for _ in range(2 if pair else 1):
            functions.append(draw(branches(rotation[1:], rotation[0])))
            rotation = [*rotation[1:], rotation[0]]
        items.append(tuple(functions) if pair else Step(functions[0]))
        same = [i for i in items[:-1] if type(i) is type(items[-1]) and len(set(widths)) == 1]
        if same and draw(st.integers(0, 4)) == 4:
            items[-1] = draw(st.sampled_from(same))
    stack = ReversibleSequence(items).to(dtype)
    for parameter in stack.parameters():
        parameter.requires_grad_(draw(st.integers(0, 5)) != 5)
    return stack


Shape = tuple[int, int]  # of a sample of a stream: width and positions


class Across(nn.Module):
    """A function of streams (batch, width, positions) of any shapes to one of another shape."""

    def __init__(self, read: Sequence[Shape], out: Shape, dropout: float) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(width, 5) for width, _ in read)
        self.drop, self.out, self.shape = nn.Dropout(dropout), nn.Linear(5, out[0] * out[1]), out

    def forward(self, *streams: Tensor) -> Tensor:
        means = [f(s.mean(2)) for f, s in zip(self.inputs, streams, strict=True)]
        return self.out(self.drop(torch.stack(means).sum(0).tanh())).unflatten(1, self.shape)


@st.composite
def bijections(draw: st.DrawFn, shapes: Sequence[Shape]) -> Bijection:
    """Bijections of the last of several streams, or of all of them.

    Args:
        shapes: (width, positions) of each stream.

    Shapes: of a stream (batch, width, positions).

    Example:
        >>> from hypothesis import given
        >>> from revlib.testing import assert_bijects
        >>> @given(bijections([(2, 4), (2, 4)]))
        ... def check(bijection):
        ...     assert_bijects(bijection, *torch.randn(2, 3, 2, 4, dtype=torch.float64))
        >>> check()
    """
    width, positions = shapes[-1]
    alike = len(shapes) > 1 and shapes[-2] == shapes[-1]
    deeper, flatter = "b c (n p) -> b (c p) n", "b (c p) n -> b c (n p)"
    some: list[Bijection] = [Permute(*draw(st.permutations(range(len(shapes)))))]
    if positions % 2 == 0:
        some.append(Rearrange(deeper, p=2).on_last(1 + alike))
    if width % 2 == 0:
        some += [Rearrange(flatter, p=2).on_last(1), Split(2)]
    if alike:
        some.append(Concat(2))
    torch.manual_seed(draw(seeds()))
    for kind in (ActNorm, Convolution1x1):
        some += [kind(width), Inverse(kind(width))]
    return draw(st.sampled_from(some))


@st.composite
def mixed_cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64, max_items: int = 6) -> Case:
    """Stacks of steps and bijections, which change the shapes of streams and their number; with streams that fit.

    Shapes: of a stream (batch, width, positions), at first (3, 2, 4).

    Example:
        >>> from hypothesis import given
        >>> from revlib.testing import assert_same_gradients
        >>> @given(mixed_cases(max_items=3))
        ... def check(case):
        ...     assert_same_gradients(case.stack, *case.streams)
        >>> check()
    """
    shapes: list[Shape] = [(2, 4)] * draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(seeds()))
    given = tuple(
        torch.randn(3, *shape, generator=generator, dtype=dtype).requires_grad_(draw(st.booleans()))
        for shape in shapes
    )
    items: list[Any] = [] if len(shapes) > 1 else [Permute(0)]
    for _ in range(draw(st.integers(1, max_items))):
        if len(shapes) > 1 and draw(st.booleans()):
            front, (taken, *read) = shapes[:-2], shapes[-2:]
            if draw(st.booleans()):  # of all streams
                front, (taken, *read) = [], shapes
            torch.manual_seed(draw(seeds()))
            function = Across(read, taken, draw(st.sampled_from([0.0, 0.3])))
            items.append(Step(function, streams=1 + len(read)))
            shapes = [*front, *read, taken]
        else:
            items.append(draw(bijections(shapes)))
            zeros = tuple(torch.zeros(1, *shape) for shape in shapes)
            made = advance([items[-1].eval().bind("")], zeros, [{}])
            shapes = [(s.shape[1], s.shape[2]) for s in made]
    stack = ReversibleSequence(items).to(dtype).train()
    for parameter in stack.parameters():
        parameter.requires_grad_(draw(st.integers(0, 5)) != 5)
    return Case(stack, given, {})


@dataclass(frozen=True)
class Planned(Scheduler):
    """A scheduler that keeps the steps, states and streams it is told to, as far as the stack reaches, and the last
    state."""

    activations: tuple[int, ...]
    states: tuple[int, ...]
    streams: tuple[int, ...] = ()

    def plan(self, length: int) -> Plan:
        return Plan(
            self.activations, {length} | {j for j in self.states if j < length}, self.streams
        )


def schedulers() -> st.SearchStrategy[Scheduler]:
    """The library's schedulers but for ``Functional``, and arbitrary plans.

    Example:
        >>> from hypothesis import given
        >>> @given(schedulers())
        ... def check(scheduler):
        ...     scheduler.plan(6).check(6)
        >>> check()
    """
    some = st.sets(st.integers(0, 9), max_size=4).map(lambda s: tuple(sorted(s)))
    below = st.one_of(
        st.sampled_from([Reversible(), PaReprop()]),
        st.builds(Checkpoint, every=st.integers(1, 4)),
        st.builds(Anchored, every=st.integers(1, 5)),
    )
    return st.one_of(
        st.just(Naive()),
        below,
        st.builds(KeepLast, steps=st.integers(0, 6), below=below),
        st.builds(Budget, fraction=st.floats(0, 1), below=below),
        st.builds(Planned, activations=some, states=some, streams=some),
    )


@dataclass(frozen=True)
class Case:
    """A stack with streams and context that fit it: what :func:`cases` and :func:`mixed_cases` draw.

    Example:
        >>> stack = ReversibleSequence([(nn.Tanh(), nn.Tanh())])
        >>> case = Case(stack, (torch.ones(3), torch.ones(3)), {})
        >>> [y.shape for y in case.stack(*case.streams, **case.context)]
        [torch.Size([3]), torch.Size([3])]
    """

    stack: ReversibleSequence
    streams: tuple[Tensor, ...]
    context: dict[str, Any]


@st.composite
def cases(
    draw: st.DrawFn, dtype: torch.dtype = torch.float64, max_streams: int = 3, max_depth: int = 5
) -> Case:
    """A stack on two or more streams of equal or different widths, with streams and context.

    Args:
        max_streams: how many streams at most, from 2 up. max_depth: how many pairs and steps at most.

    Shapes: of a stream (batch, tokens, width), with widths from 1 to 5.

    Example:
        >>> from hypothesis import given
        >>> from revlib.testing import assert_same_gradients
        >>> @given(cases(max_depth=3))
        ... def check(case):
        ...     assert_same_gradients(case.stack, *case.streams, context=case.context)
        >>> check()
    """
    count = draw(st.integers(2, max_streams))
    widths = draw(
        st.one_of(st.just([4] * count), st.lists(st.integers(1, 5), min_size=count, max_size=count))
    )
    stack = draw(stacks(widths, dtype, max_depth))
    return Case(stack, draw(streams(widths, dtype)), draw(contexts(dtype)))
