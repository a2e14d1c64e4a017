r"""What a bijection is: any invertible map of streams, as a step of a sequence.

A step of two functions keeps the shapes of its streams. A bijection may give them others, or another number of them:
a rearrangement of axes, a split, a permutation, an invertible convolution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revlib._numbers import whole
from revlib._torch import in_transform
from revlib.couplings import Additive
from revlib.step import NEEDS_DATA, BoundStep, Layout, State, given

if TYPE_CHECKING:
    from typing_extensions import Never, Self

__all__ = ["Bijection", "Inverse"]


class Bijection(nn.Module, ABC):
    r"""An invertible map of streams, $(s_1, \dots, s_m) \mapsto (t_1, \dots, t_n)$, with parameters of its own.

    Subclasses define ``forward(*streams)`` and ``inverse(*streams)``. Both return a tuple of streams, or a tensor where
    there is but one, and each undoes the other: ``inverse(*forward(*s)) == s``, in train mode, too. So a normalisation
    by the statistics of the batch is no bijection. Streams may have any shapes, and must be floating-point.
    Both may take context by keyword, as functions do.

    In backward the inputs come back by ``inverse``, and ``forward`` runs again on them, where it saves tensors. Every
    scheduler and every guard treats a bijection like any other step. Both run in the dtype of the streams: autocast is
    off, since an inverse needs every digit. In a model in 16 bits streams are float32 (see ``DefaultAdditive``).

    Shapes: whatever the subclass takes and makes. Cost: of what backward repeats, ``inverse``, and ``forward`` if it
    saves anything.

    Raises:
        TypeError: in forward of a sequence, if there are fewer streams than it takes.
        NotImplementedError: in :meth:`log_det`, unless the subclass defines it.

    Attributes:
        takes, makes: how many streams forward takes and returns. It takes the last of the state; those before them stay
            as they are. Unless both are given, it takes all, and makes as many.
        exact: whether the inverse gives back every bit, as moving elements does and arithmetic does not. A sequence of
            exact steps alone is held to that, and one with a single other step to the tolerance of its precision.
        initialised: set it to False in ``__init__`` to have :meth:`initialise` called once.

    Example:
        >>> class Negate(Bijection):
        ...     exact = True
        ...
        ...     def forward(self, *streams):
        ...         return tuple(-s for s in streams)
        ...
        ...     inverse = forward
        >>> Negate()(torch.ones(1))
        (tensor([-1.]),)
    """

    takes: int | None = None
    makes: int | None = None
    exact: bool = False
    initialised: bool = True

    @abstractmethod
    def forward(self, *streams: Any, **context: Any) -> Tensor | State:
        """The streams that this map makes of the given ones."""

    @abstractmethod
    def inverse(self, *streams: Any, **context: Any) -> Tensor | State:
        """The streams that forward maps to these."""

    # nn.Module declares that a call returns Any, and `for F, G in seq` raises where it meets a bijection.
    if TYPE_CHECKING:

        def __call__(self, *streams: Any, **context: Any) -> Tensor | State: ...

        def __iter__(self) -> Iterator[Never]: ...

    def initialise(self, *streams: Any) -> None:
        """Set parameters from data, and nothing else.

        It is called once, if ``initialised`` is false, without gradients, on the streams that the first forward in
        train mode is about to map. Forward itself cannot do this, since backward repeats it."""

    def log_det(self, *streams: Any) -> Tensor:
        r"""$\log |\det \partial t / \partial s|$ at these streams, of each sample: of shape ``(batch,)``."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its log-determinant is")

    def extra_repr(self) -> str:
        """The settings, as ``print`` shows them in parentheses; none, unless a subclass says so."""
        return ""

    def on_last(self, streams: int) -> Self:
        """Make the bijection take the last ``streams`` streams only, and return it. Earlier streams stay as they are.

        Example:
            >>> from revlib.bijections import Permute, Rearrange
            >>> from revlib import ReversibleSequence
            >>> seq = ReversibleSequence([Rearrange("b c (h p) -> b (c p) h", p=2).on_last(1)])
            >>> [s.shape for s in seq(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))]
            [torch.Size([1, 3, 4]), torch.Size([1, 6, 2])]
        """
        if self.takes is not None:
            raise ValueError(
                f"{type(self).__name__} takes {self.takes} streams, the last of the state; leave out on_last(...)"
            )
        whole("on_last(...)", streams, 1)
        self.takes = self.makes = streams
        return self

    def bind(self, name: str) -> BoundStep:
        """The bijection as the engine sees it."""
        if (self.takes is None) != (self.makes is None):
            raise TypeError(
                f"{name} must say both how many streams it `takes` and `makes`, or neither"
            )
        return BoundBijection(self, name)


class Inverse(Bijection):
    r"""A bijection backwards: its forward is $b^{-1}$, and its inverse $b$.

    Args:
        of: the bijection $b$.

    Shapes, cost and errors are those of the bijection, with forward and inverse exchanged. Exact, if it is.

    Raises:
        TypeError: if ``of`` is no bijection.

    Example:
        >>> from revlib.bijections import Rearrange
        >>> Inverse(Rearrange("b (h w) -> b h w", h=2))(torch.ones(1, 2, 3)).shape
        torch.Size([1, 6])
    """

    def __init__(self, of: Bijection) -> None:
        """Hold the bijection as ``of``, with its parameters."""
        super().__init__()
        if not isinstance(of, Bijection):
            raise TypeError(
                f"Inverse(of=...) takes a Bijection, which has an inverse of its own, got {given(of)}"
            )
        self.of, self.takes, self.makes, self.exact = of, of.makes, of.takes, of.exact

    def forward(self, *streams: Tensor, **context: Any) -> Tensor | State:
        return self.of.inverse(*streams, **context)

    def inverse(self, *streams: Tensor, **context: Any) -> Tensor | State:
        return self.of(*streams, **context)

    def log_det(self, *streams: Tensor) -> Tensor:
        before = self.of.inverse(*streams)
        return -self.of.log_det(*((before,) if isinstance(before, Tensor) else before))


class BoundBijection(BoundStep):
    """A step that takes all streams away, evaluates nothing on others, and merges by a map with parameters."""

    merge_reads = True
    leaves_as_entered = False

    def __init__(self, fn: Bijection, name: str) -> None:
        super().__init__(fn, Additive(), name)
        # The engine may put a wrapper that watches it in the place of fn, and not in this one.
        self.bijection = fn

    def for_streams(self, dtype: torch.dtype) -> BoundStep:
        return self

    def _laid_out(self, m: int) -> Layout:
        takes, makes = self.bijection.takes or m, self.bijection.makes or m
        if m < takes:
            raise TypeError(f"{self.name} takes {takes} streams, got {m}")
        return Layout(tuple(range(m - takes, m)), tuple(range(m - takes, m - takes + makes)), 0)

    def streams_before(self, m: int) -> int:
        takes, makes = self.bijection.takes or m, self.bijection.makes or m
        if m < makes:
            raise TypeError(f"the inverse of {self.name} takes {makes} streams, got {m}")
        return m - makes + takes

    @property
    def needs_data(self) -> bool:
        return not self.bijection.initialised and self.bijection.training

    def prepare(self, taken: State) -> None:
        if self.needs_data:
            if in_transform():
                raise RuntimeError(NEEDS_DATA.format(self.name))
            with torch.no_grad():
                self.bijection.initialise(*taken)
            self.bijection.initialised = True

    def evaluate(self, others: State, context: Mapping[str, Any]) -> Any:
        return context

    def counted(self, inputs: int) -> str:
        return f"{inputs} streams"

    def merge(self, taken: State, f: Any) -> State:
        made = _in_own_precision(self, taken, f)
        expected = self.bijection.makes or len(taken)
        for t in made:
            if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
                kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(f"{self.name} must return floating-point streams, got {kind}")
        if len(made) != expected:
            raise TypeError(
                f"{self.name} must return {expected} streams, got {len(made)}; set its attribute `makes` to the number "
                "that it makes of those that it `takes`"
            )
        return made

    def unmerge(self, made: State, f: Any) -> State:
        taken = _in_own_precision(self.with_function(self.bijection.inverse), made, f)
        if len(taken) != (self.bijection.takes or len(made)):
            raise TypeError(
                f"the inverse of {self.name} must return the {self.bijection.takes or len(made)} streams that forward "
                f"takes, got {len(taken)}"
            )
        return taken

    def enter(self, s: Tensor) -> Tensor:
        return s

    def limit_of(self, dtype: torch.dtype) -> float:
        return math.inf

    def inverts_exactly(self, dtype: torch.dtype) -> bool:
        return self.bijection.exact

    def inverse(self) -> BoundStep:
        return type(self)(Inverse(self.bijection), f"the inverse of {self.name}")


def _in_own_precision(step: BoundStep, streams: State, context: Mapping[str, Any]) -> State:
    kind = streams[0].device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            result = step.called(streams, context)
    else:
        result = step.called(streams, context)
    return (result,) if isinstance(result, Tensor) else tuple(result)
