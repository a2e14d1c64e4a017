"""Additive couplings: in floating point, and on a grid where sums are exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from revlib._numbers import is_power_of_two, real
from revlib.couplings import kernel
from revlib.couplings.base import Coupling

__all__ = ["Additive", "DefaultAdditive", "ExactAdditive"]


@dataclass(frozen=True)
class Additive(Coupling):
    r"""$\mathrm{merge}(s, f) = s + f$, $\mathrm{unmerge}(t, f) = t - f$.

    Shapes: ``s`` and ``f`` alike, or ``f`` broadcastable to ``s``. Cost: one addition, nothing saved for backward.
    Inversion is exact up to rounding: about one unit in the last place of ``s + f`` a step, so it loses accuracy
    where ``f`` is much larger than ``s``, and it drifts with depth where ``f`` is computed in bfloat16 or float16.

    Source: Gomez et al., *The Reversible Residual Network*, NeurIPS 2017, its reversible block; Mangalam et al.,
    *Reversible Vision Transformers*, CVPR 2022.

    Example:
        >>> coupling = Additive()
        >>> merged = coupling.merge(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]))
        >>> merged
        tensor([1.5000, 2.2500])
        >>> coupling.unmerge(merged, torch.tensor([0.5, 0.25]))
        tensor([1., 2.])
    """

    def merge(self, s: Tensor, f: Tensor) -> Tensor:
        return s + f

    def unmerge(self, merged: Tensor, f: Tensor) -> Tensor:
        return merged - f

    def log_det(self, s: Tensor, f: Tensor) -> Tensor:
        return s.new_zeros(s.shape[:1])


_DIGITS = {torch.float32: 24, torch.float64: 53}  # of the significand


class _AddOnGrid(torch.autograd.Function):
    """s + sign [t], with t rounded to multiples of a power of two; the gradient is that of s + sign t."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, t: Tensor, grid: float, sign: int) -> Tensor:
        if kernel.serves(s, t):
            return kernel.add_on_grid(s, t, grid, sign)
        # Powers of two scale exactly.
        return torch.add(s, (t.to(s.dtype) * (1 / grid)).round_(), alpha=sign * grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        if not torch.compiler.is_compiling():
            # What nobody differentiates gets no gradient, and not zeros.
            ctx.set_materialize_grads(False)
        s, t, _, sign = inputs
        ctx.stream, ctx.dtype, ctx.sign = s.dtype, t.dtype, sign

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None:
            return None, None, None, None
        return gradient, (gradient if ctx.sign > 0 else -gradient).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, ds: Tensor | None, dt: Tensor | None, *_: Any) -> Tensor | None:
        if dt is None:
            return None if ds is None else ds.clone()
        dt = dt.to(ctx.stream) if ctx.sign > 0 else -dt.to(ctx.stream)
        return dt if ds is None else ds + dt


@dataclass(frozen=True)
class ExactAdditive(Coupling):
    r"""$\mathrm{merge}(s, f) = s + [f]$, $\mathrm{unmerge}(t, f) = t - [f]$, where $[f]$ is $f$ rounded to a grid.

    The grid is the multiples of $g = \mathrm{limit} \cdot 2^{-24}$ (float32 streams; $2^{-53}$ for float64), and the
    gradient of $[f]$ is that of $f$. Sums of multiples of $g$ below ``limit`` are exact in floating point. So inversion
    gives back every bit, at any depth, and the gradients of every scheduler are bit for bit those of ``Naive`` wherever
    kernels repeat their bits. Functions may run in any precision: under bfloat16 autocast inversion is exact too. (The
    engine runs functions with autocast's weight cache off; for a weight that several steps share, Naive's gradients are
    the same to the bit only with ``cache_enabled=False``. ``Functional`` adds up what steps share in another order.)

    A sequence rounds its input streams to the grid once, as they enter; inversion gives back the rounded ones.

    ======  ==========  ==========================
    limit   resolution  relative to 1, in float32
    ======  ==========  ==========================
    64      3.8e-6      18 bits
    1024    6.1e-5      14 bits
    16384   9.8e-4      10 bits
    ======  ==========  ==========================

    Args:
        limit: the magnitude that streams must stay below, a power of two. Backward raises an error where one has not.
        functions: the dtype in which functions see streams, for functions whose parameters are in bfloat16 or float16.
            Streams are then cast to float32 as they enter, and leave the sequence so.

    Shapes: ``s`` and ``f`` alike, or ``f`` broadcastable to ``s``. Cost: two passes over ``f`` more than
    :class:`Additive` (none on CUDA, where Triton fuses them), and one over the stream to watch its range; nothing saved
    for backward.
    Not for streams in bfloat16 or float16, whose grids would be too coarse: keep the streams in float32.

    Raises:
        ValueError: ``limit`` is no power of two.
        TypeError: ``functions`` is no floating-point dtype; in forward, for streams in other than float32 and float64,
            unless they are cast by ``functions``.
        RuntimeError: in backward, where a stream has reached the limit.

    Source: the exactness of sums on a common grid is that of fixed-point numbers; Maclaurin et al. 2015 and MacKay et
    al. 2018 keep the lost bits instead.

    Example:
        >>> coupling, f = ExactAdditive(limit=64), torch.tensor([1e-3, 1 / 3])
        >>> s = coupling.enter(torch.tensor([0.1, 0.2]))  # on the grid
        >>> torch.equal(coupling.unmerge(coupling.merge(s, f), f), s)
        True
        >>> torch.equal(Additive().unmerge(Additive().merge(s, f), f), s)  # which differ in the last bits
        False
    """

    limit: float = 1024.0
    functions: torch.dtype | None = None

    def __post_init__(self) -> None:
        real("ExactAdditive(limit=...)", self.limit, is_power_of_two, "a power of two such as 1024")
        dtype = self.functions
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(
                "ExactAdditive(functions=...) takes a floating-point dtype such as torch.bfloat16, or None for that of "
                f"the streams, got {dtype!r}"
            )

    def merge(self, s: Tensor, f: Tensor) -> Tensor:
        return self._add(s, f, 1)

    def unmerge(self, merged: Tensor, f: Tensor) -> Tensor:
        return self._add(merged, f, -1)

    def log_det(self, s: Tensor, f: Tensor) -> Tensor:
        return s.new_zeros(s.shape[:1])

    def enter(self, s: Tensor) -> Tensor:
        wide = s.float() if self.functions is not None and s.dtype not in _DIGITS else s
        return self._add(torch.zeros_like(wide), wide, 1)

    def show(self, s: Tensor) -> Tensor:
        return s if self.functions is None else s.to(self.functions)

    def limit_of(self, dtype: torch.dtype) -> float:
        return self.limit

    def _add(self, s: Tensor, f: Tensor, sign: int) -> Tensor:
        if s.dtype not in _DIGITS:
            raise TypeError(
                f"ExactAdditive needs streams in float32 or float64, got {s.dtype}: say "
                f"ExactAdditive(functions={s.dtype}) if that is what the functions compute in, or cast the streams and "
                "run the functions under autocast"
            )
        grid = self.limit * 2.0 ** -_DIGITS[s.dtype]
        f = f.expand_as(s)
        if torch.compiler.is_compiling():
            # The compiler does not trace an autograd.Function that defines a jvp, and fuses these operations itself.
            f = f.to(s.dtype)
            rounded = (f.detach() * (1 / grid)).round() * grid
            return s + sign * (rounded + (f - f.detach()))
        if not torch.is_grad_enabled() and kernel.serves(s, f):
            # Backward unmerges without gradients, and then need not take the way through autograd.
            return kernel.add_on_grid(s, f, grid, sign)
        return _AddOnGrid.apply(s, f, grid, sign)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _InFloat32(ExactAdditive):
    """The law of :class:`DefaultAdditive` for streams in 16 bits. Beyond the limit it adds as float32 does."""

    leaves_as_entered: ClassVar[bool] = True

    def limit_of(self, dtype: torch.dtype) -> float:
        return math.inf


@dataclass(frozen=True)
class DefaultAdditive(Additive):
    r"""The coupling of a sequence that names none: :class:`Additive`, with streams in 16 bits kept in float32.

    Streams in float32 and float64 are added as by :class:`Additive`. Where all streams are in bfloat16 or float16, as
    in a model after ``.bfloat16()``, adding them in 16 bits would let inversion drift with depth. Inside the sequence
    they are then float32, on the grid of :class:`ExactAdditive`: functions see them in their own 16 bits, their results
    are added in float32, and the streams leave in their own dtype. Up to magnitudes of 1024 inversion is exact.

    Cost in 16 bits: two streams of four bytes an element instead of two, at any depth, and a cast of each stream that a
    function reads. Under every scheduler alike, ``Naive`` too, so that outputs do not depend on it.

    Example:
        >>> coupling = DefaultAdditive()  # of ReversibleSequence([...]) with no coupling named
        >>> coupling.for_streams(torch.float32) is coupling
        True
        >>> coupling.for_streams(torch.bfloat16).enter(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    def for_streams(self, dtype: torch.dtype) -> Coupling:
        return _InFloat32(functions=dtype) if dtype in (torch.bfloat16, torch.float16) else self
