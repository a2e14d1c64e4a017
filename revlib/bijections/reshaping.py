"""Bijections that only move elements: exact, and nothing of them is saved for backward."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, overload

import torch
from einops import rearrange
from torch import Tensor

from revlib._numbers import whole
from revlib.bijections.base import Bijection
from revlib.step import State

__all__ = ["Concat", "Permute", "Rearrange", "Split"]


class Rearrange(Bijection):
    r"""Each stream rearranged by an einops pattern; its inverse is the reversed pattern.

    ``Rearrange("b c (h p) (w q) -> b (c p q) h w", p=2, q=2)`` trades resolution for channels (space to depth),
    ``Rearrange("b c (h p) (w q) -> b (h w) (c p q)", h=14, p=16, q=16)`` makes patches.

    Args:
        pattern: both sides name the same axes, so that nothing is repeated or lost.
        sizes: of axes; of each axis but one in every parenthesis, on the right side too.

    Shapes: those of the pattern, of every stream. Cost: at most a copy of each, and nothing saved. Exact.

    Raises:
        TypeError: the pattern is no string.
        ValueError: the two sides do not name the same axes, or a size is missing.
        EinopsError: a stream does not fit the pattern.

    Source: Rogozhnikov, *Einops: Clear and Reliable Tensor Manipulations with Einstein-like Notation*, ICLR 2022. Space
    to depth is the squeeze of Dinh et al., *Density estimation using Real NVP*, ICLR 2017, in another order.

    Example:
        >>> halve = Rearrange("b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
        >>> x = torch.randn(1, 3, 8, 8)
        >>> y = halve(x)
        >>> y.shape, torch.equal(halve.inverse(y), x)
        (torch.Size([1, 12, 4, 4]), True)
    """

    exact = True

    def __init__(self, pattern: str, **sizes: int) -> None:
        """Take a pattern of einops, and the sizes of axes that it cannot tell from a stream."""
        super().__init__()
        if not isinstance(pattern, str):
            raise TypeError(
                'Rearrange takes a pattern of einops such as "b c (h p) -> b (c p) h", got '
                f"{pattern!r}; write both sides into one string"
            )
        self.pattern, self.sizes = pattern, sizes
        sides = [s.strip() for s in pattern.split("->")]
        axes = [sorted(s.replace("(", " ").replace(")", " ").split()) for s in sides]
        if len(sides) != 2 or axes[0] != axes[1] or any(a.isdigit() and a != "1" for a in axes[0]):
            raise ValueError(
                f"Rearrange({pattern!r}) has no inverse: both sides of the pattern must name the same axes"
            )
        for group in re.findall(r"\(([^)]*)\)", sides[1]):
            unknown = [axis for axis in group.split() if axis not in sizes and axis != "1"]
            if len(unknown) > 1:
                raise ValueError(
                    f"Rearrange({pattern!r}) could not go back: nothing says how large each of {unknown} in "
                    f"({group}) is; give the sizes of all but one, as in Rearrange(..., {unknown[-1]}=8)"
                )
        self.reversed = f"{sides[1]} -> {sides[0]}"

    def _all(self, streams: State, pattern: str) -> Tensor | State:
        moved = tuple(rearrange(s, pattern, **self.sizes) for s in streams)
        return moved if len(moved) > 1 else moved[0]

    @overload
    def forward(self, stream: Tensor, /) -> Tensor: ...
    @overload
    def forward(self, stream: Tensor, second: Tensor, /, *others: Tensor) -> State: ...
    def forward(self, *streams: Tensor) -> Tensor | State:
        return self._all(streams, self.pattern)

    @overload
    def inverse(self, stream: Tensor, /) -> Tensor: ...
    @overload
    def inverse(self, stream: Tensor, second: Tensor, /, *others: Tensor) -> State: ...
    def inverse(self, *streams: Tensor) -> Tensor | State:
        return self._all(streams, self.reversed)

    if TYPE_CHECKING:

        @overload
        def __call__(self, stream: Tensor, /) -> Tensor: ...
        @overload
        def __call__(self, stream: Tensor, second: Tensor, /, *others: Tensor) -> State: ...
        def __call__(self, *streams: Tensor) -> Tensor | State: ...

    def log_det(self, *streams: Tensor) -> Tensor:
        return _nothing(streams)

    def extra_repr(self) -> str:
        """The pattern and the sizes."""
        return ", ".join([repr(self.pattern), *(f"{k}={v}" for k, v in self.sizes.items())])


class Split(Bijection):
    r"""One stream into equal parts along ``dim``: $[x_1, \dots, x_m] \mapsto (x_1, \dots, x_m)$.

    Each stream gets memory of its own, so that a stream that stays does not keep the others alive.

    Shapes: a stream of $m \cdot c$ along ``dim`` into m of c. Cost: a copy; nothing saved. Exact.

    Raises:
        ValueError: ``streams`` is below 2, or does not divide the size of ``dim``.

    Example:
        >>> [s.shape for s in Split(2)(torch.zeros(5, 6, 7))]
        [torch.Size([5, 3, 7]), torch.Size([5, 3, 7])]
    """

    takes, exact = 1, True
    makes: int

    def __init__(self, streams: int = 2, dim: int = 1) -> None:
        """Take the number of streams to make, and the dimension along which."""
        super().__init__()
        whole("Split(streams=...)", streams, 2)
        self.makes, self.dim = streams, dim

    def forward(self, x: Tensor) -> State:
        if x.shape[self.dim] % self.makes:
            raise ValueError(
                f"Split(streams={self.makes}, dim={self.dim}) cannot divide a stream of shape {tuple(x.shape)} into "
                "equal parts; rearrange it first, or split along another dimension"
            )
        return tuple(part.clone() for part in x.chunk(self.makes, self.dim))

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> State: ...

    def inverse(self, *streams: Tensor) -> Tensor:
        return torch.cat(streams, self.dim)

    def log_det(self, *streams: Tensor) -> Tensor:
        return _nothing(streams)

    def extra_repr(self) -> str:
        """How many streams it makes, along which dimension."""
        return f"streams={self.makes}, dim={self.dim}"


class Concat(Bijection):
    r"""The inverse of :class:`Split`: streams alike into one, $(x_1, \dots, x_m) \mapsto [x_1, \dots, x_m]$.

    Shapes: m streams of c along ``dim`` into one of $m \cdot c$. Cost: a copy; nothing saved. Exact.

    Raises:
        ValueError: ``streams`` is below 2, or the streams have different shapes.

    Example:
        >>> Concat(2)(torch.zeros(5, 3), torch.ones(5, 3)).shape
        torch.Size([5, 6])
    """

    makes, exact = 1, True

    def __init__(self, streams: int = 2, dim: int = 1) -> None:
        """Take the number of streams to join, and the dimension along which."""
        super().__init__()
        whole("Concat(streams=...)", streams, 2)
        self.split = Split(streams, dim)
        self.takes = streams

    def forward(self, *streams: Tensor) -> Tensor:
        if len({s.shape for s in streams}) > 1:
            raise ValueError(
                f"Concat takes streams of one shape, got {[tuple(s.shape) for s in streams]}"
            )
        return self.split.inverse(*streams)

    if TYPE_CHECKING:

        def __call__(self, *streams: Tensor) -> Tensor: ...

    def inverse(self, x: Tensor) -> State:
        return self.split.forward(x)

    def log_det(self, *streams: Tensor) -> Tensor:
        return _nothing(streams)

    def extra_repr(self) -> str:
        """How many streams it takes, along which dimension."""
        return self.split.extra_repr()


class Permute(Bijection):
    r"""The streams in another order: $(s_0, \dots, s_{m-1}) \mapsto (s_{o_0}, \dots, s_{o_{m-1}})$.

    Shapes: any, and each stream keeps its own. Cost: none. Exact.

    Raises:
        ValueError: the order does not name each of its numbers once.

    Example:
        >>> a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
        >>> [s.shape for s in Permute(2, 0, 1)(a, b, c)]
        [torch.Size([2]), torch.Size([1]), torch.Size([1])]
    """

    exact = True

    def __init__(self, *order: int) -> None:
        """Take the order: the old place of each stream, by its new place."""
        super().__init__()
        if sorted(order) != list(range(len(order))) or not order:
            raise ValueError(f"Permute takes each of 0, ..., m - 1 once, got {order}")
        self.order, self.takes, self.makes = order, len(order), len(order)

    def forward(self, *streams: Tensor) -> State:
        return tuple(streams[i] for i in self.order)

    if TYPE_CHECKING:

        def __call__(self, *streams: Tensor) -> State: ...

    def inverse(self, *streams: Tensor) -> State:
        return tuple(streams[self.order.index(i)] for i in range(len(self.order)))

    def log_det(self, *streams: Tensor) -> Tensor:
        return _nothing(streams)

    def extra_repr(self) -> str:
        """The order."""
        return ", ".join(map(str, self.order))


def _nothing(streams: State) -> Tensor:
    """The log-determinant of a map that only moves elements."""
    return streams[0].new_zeros(streams[0].shape[0])
