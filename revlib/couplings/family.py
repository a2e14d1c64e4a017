r"""Couplings that scale: by a number (midpoint, leapfrog, momentum, columns), or by what the function returned.

:mod:`revlib.recurrences` builds the published networks from them. NICE (Dinh et al. 2014) needs none of
them: its coupling is :class:`~revlib.couplings.Additive` on the two halves of the channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from revlib._numbers import real
from revlib.couplings.additive import Additive, ExactAdditive
from revlib.couplings.base import Coupling

__all__ = ["Affine", "Scaled"]


_LEARNED = "; what is learned belongs into the function, not the coupling"


@dataclass(frozen=True)
class Scaled(Coupling):
    r"""$\mathrm{merge}(s, f) = k s \oplus c f$, $\mathrm{unmerge}(t, f) = (t \ominus c f) / k$.

    With $k = 1$, any $c$: midpoint, leapfrog and Hamiltonian networks. With $k = \gamma$, $c = 1 - \gamma$: momentum.
    With $k = \gamma$, $c = 1$: columns.

    Args:
        keep: $k$, not 0: what the stream is multiplied by. add: $c$, what the function's result is multiplied by.
        plus: $\oplus$, ``Additive()`` or ``ExactAdditive(limit)``.

    Shapes: ``s`` and ``f`` alike, or ``f`` broadcastable to ``s``. Cost: up to two passes more than ``plus``, and one
    temporary tensor of the size of ``f``; nothing saved for backward, so that a step stays as cheap to repeat.

    Inversion divides by $k$, so it multiplies the error of that stream by $1 / |k|$. Each of m streams is merged away
    once in m steps: n steps make $|k|^{-n/m}$ roundings of one, times what the functions themselves amplify. In float32
    about $10^4$ roundings pass the default tolerance: $n / m \approx 9 / \ln(1 / |k|)$ is 87 at 0.9, and 13 at 0.5.
    With $|k| > 1$ the forward pass grows like that instead. With $k = \pm 1$ there is no such factor.

    Exact, with ``plus=ExactAdditive()``, for $k = \pm 1$ and any $c$: the product $c f$ is rounded to the grid before
    it is added. Any other $k$ leads off the grid or beyond its limit and loses digits that only side information could
    bring back (Maclaurin et al., *Gradient-based Hyperparameter Optimization through Reversible Learning*, ICML 2015,
    for rational $k$), so it is refused.

    Not for a learned or per-channel $k$: return it from the function, with :class:`Affine` or a coupling of your own.
    Not for a $|k|$ far from 1 in deep stacks, unless ``Anchored`` or ``Checkpoint`` keeps states on the way.

    Raises:
        ValueError: ``keep`` is 0, ``plus`` is neither of the two, or a ``keep`` other than 1 and -1 is to be exact.

    Source: see :mod:`revlib.recurrences`, for each network.

    Example:
        >>> coupling = Scaled(keep=0.5, add=2.0)
        >>> merged = coupling.merge(torch.tensor([4.0]), torch.tensor([1.0]))
        >>> merged, coupling.unmerge(merged, torch.tensor([1.0]))
        (tensor([4.]), tensor([4.]))
    """

    keep: float = 1.0
    add: float = 1.0
    plus: Coupling = field(default_factory=Additive)

    def __post_init__(self) -> None:
        real("Scaled(keep=...)", self.keep, math.isfinite, "a finite number", advice=_LEARNED)
        real("Scaled(add=...)", self.add, math.isfinite, "a finite number", advice=_LEARNED)
        if self.keep == 0:
            raise ValueError(
                "Scaled(keep=0) would forget the stream, so no step could be inverted; keep some of it"
            )
        if not isinstance(self.plus, (Additive, ExactAdditive)):
            raise ValueError(
                f"Scaled(plus=...) takes Additive() or ExactAdditive(limit), got {self.plus!r}"
            )
        if isinstance(self.plus, ExactAdditive) and abs(self.keep) != 1:
            raise ValueError(
                f"Scaled(keep={self.keep!r}, plus={self.plus!r}) is not exact: only keep=1 and keep=-1 stay on the "
                "grid, any other factor loses digits. Use plus=Additive(), or keep=1 with the decay in the function"
            )

    def merge(self, s: Tensor, f: Tensor) -> Tensor:
        return self.plus.merge(s if self.keep == 1 else s * self.keep, self._added(f))

    def unmerge(self, merged: Tensor, f: Tensor) -> Tensor:
        s = self.plus.unmerge(merged, self._added(f))
        return s if self.keep == 1 else s / self.keep

    def log_det(self, s: Tensor, f: Tensor) -> Tensor:
        return s.new_full(s.shape[:1], s[0].numel() * math.log(abs(self.keep)))

    def enter(self, s: Tensor) -> Tensor:
        return self.plus.enter(s)

    def show(self, s: Tensor) -> Tensor:
        return self.plus.show(s)

    def limit_of(self, dtype: torch.dtype) -> float:
        return self.plus.limit_of(dtype)

    def _added(self, f: Tensor) -> Tensor:
        return f if self.add == 1 else f * self.add


@dataclass(frozen=True)
class Affine(Coupling):
    r"""$\mathrm{merge}(s, (a, b)) = s \sigma + b$, $\mathrm{unmerge}(t, (a, b)) = (t - b) / \sigma$.

    The scale is $\sigma = e^{\beta \tanh a}$.

    Args:
        bound: $\beta > 0$; scales lie between $e^{-\beta}$ and $e^{\beta}$. A function that returns zeros is the
            identity, so initialise its last layer with zeros.

    Shapes: the function returns a pair, the log-scale $a$ before its bound and the shift $b$, each of the shape of
    ``s`` or broadcastable to it. It is a pair, and not one tensor to be cut, because which dimension holds channels is
    for the function to say: ``return self.out(x).chunk(2, dim=-1)``.

    Cost: five passes over the stream; three tensors of its size saved for backward (the stream, the scale and the
    tanh), of one step at a time under ``Reversible``. As the coupling saves tensors, its function is repeated to its
    end under ``Checkpoint(every=2)``, too. The log-determinant is the sum of $\beta \tanh a$; see
    :func:`revlib.bijections.with_log_det`.

    Inversion divides by the scale, so a step multiplies the error of its stream by $e^{-\beta \tanh a}$: at most
    $e^{\beta}$, 2.7 unless given, and less than 1 where the stream grew. Over n steps on two streams that makes up to
    $e^{\beta n / 2}$ roundings of one, times what the functions themselves amplify. Measured in float32 with random
    linear functions of normalised streams, in roundings: 10 after 8 steps, 180 after 32, and 3e5 after 128, which
    backward refuses (36 and 900 after 32 and 128 with ``bound=0.5``).

    Not where a plain sum serves: it costs more, and streams that shrink step after step do not come back. Not with a
    large ``bound`` in float32, where the gradient of the scales also explodes.

    Raises:
        ValueError: ``bound`` is not above 0; in forward, a function returned no pair.

    Source: Dinh et al., *Density estimation using Real NVP*, ICLR 2017, the affine coupling layer. The
    bound on the scale is that of common implementations; MemCNN (van de Leemput et al., *MemCNN: A Python/PyTorch
    package for creating memory-efficient invertible neural networks*, JOSS 2019) bounds with a sigmoid.

    Example:
        >>> coupling, s = Affine(bound=1.0), torch.tensor([2.0])
        >>> nothing = torch.zeros(1), torch.zeros(1)
        >>> coupling.merge(s, nothing)  # a function that returns zeros is the identity
        tensor([2.])
        >>> f = torch.tensor([0.3]), torch.tensor([0.1])
        >>> torch.allclose(coupling.unmerge(coupling.merge(s, f), f), s)
        True
    """

    bound: float = 1.0

    def __post_init__(self) -> None:
        real(
            "Affine(bound=...)",
            self.bound,
            lambda bound: 0 < bound < math.inf,
            "a finite number above 0",
            advice=": scales lie between exp(-bound) and exp(bound); where no scale is wanted, use Additive(), "
            "and return what is learned from the function",
        )

    def merge(self, s: Tensor, f: tuple[Tensor, Tensor]) -> Tensor:
        log_scale, shift = _two(f)
        return s * self._scale(log_scale) + shift

    def unmerge(self, merged: Tensor, f: tuple[Tensor, Tensor]) -> Tensor:
        log_scale, shift = _two(f)
        return (merged - shift) / self._scale(log_scale)

    def log_det(self, s: Tensor, f: tuple[Tensor, Tensor]) -> Tensor:
        return (self.bound * torch.tanh(_two(f)[0])).expand_as(s).flatten(1).sum(1)

    def _scale(self, log_scale: Tensor) -> Tensor:
        return torch.exp(self.bound * torch.tanh(log_scale))


def _two(f: Any) -> tuple[Tensor, Tensor]:
    # A tensor would unpack too, along its batch.
    if isinstance(f, Tensor) or not isinstance(f, (tuple, list)) or len(f) != 2:
        what = f"a {type(f).__name__}"
        if isinstance(f, Tensor):
            what = f"one tensor of shape {tuple(f.shape)}"
        raise ValueError(
            f"Affine takes a pair (log-scale, shift), and the function returned {what}; "
            "return the halves of it, as in out.chunk(2, dim=-1)"
        )
    return f[0], f[1]
