r"""Published reversible networks, as lists of steps for a :class:`~revlib.ReversibleSequence`.

======================================  ===========================================================  ================
recipe                                  streams in and out                                           exact variant
======================================  ===========================================================  ================
``midpoint(fns, h)``                    $(x_{t-1}, x_t)$, of two step sizes                          ``exact=limit``
``leapfrog(fns, h)``                    $(v, x)$, with $v = (x_t - x_{t-1}) / h$                     ``exact=limit``
pairs and ``Scaled(add=h)``             $(y, z)$: Hamiltonian networks                               ``ExactAdditive``
``momentum(fns, gamma)``                $(v, x)$                                                     none
``columns(fns, gamma)``                 $(x_{t-m+1}, \dots, x_t)$, one a level, oldest first         ``gamma`` 1 or -1
``grouped(*blocks)``                    $(x_1, \dots, x_C)$, the groups of channels                  ``exact=limit``
pairs                                   $(x_1, x_2)$: NICE and RevNet                                ``ExactAdditive``
======================================  ===========================================================  ================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from revlib._numbers import real
from revlib.couplings import Additive, Coupling, ExactAdditive, Scaled
from revlib.step import Step

__all__ = ["columns", "grouped", "leapfrog", "midpoint", "momentum"]

Function = Callable[..., Any]


def _plus(exact: float | None) -> Coupling:
    return Additive() if exact is None else ExactAdditive(exact)


def _size(name: str, h: float) -> None:
    real(
        f"{name}(h=...)",
        h,
        lambda h: math.isfinite(h) and h != 0,
        "a step size, a finite number other than 0 such as 0.1",
    )


def midpoint(fns: Iterable[Function], h: float = 1.0, exact: float | None = None) -> list[Step]:
    r"""$x_{t+1} = x_{t-1} + 2h f_t(x_t)$, a step a function, on the streams $(x_{t-1}, x_t)$.

    The paper begins with a step of Euler's: ``seq(x, x + h * f0(x))``. ``exact=1024`` adds on the grid of
    ``ExactAdditive(1024)``.

    Shapes: two streams alike. Cost: one function a step, and one product more than ``Additive``. Inversion has no
    factor of its own: errors grow as the recurrence run backwards does. Measured in float32, h = 0.1, with the paper's
    antisymmetric weights, $f(x) = \tanh(x K)$: 1, 4, 46 and 2e5 roundings after 16, 64, 256 and 1024 steps. For a
    Jacobian with a real eigenvalue $\lambda$ of either sign they grow like $e^{|\lambda| h n}$, and so does the forward
    pass: not for functions that decay, such as $f(x) = -x$.

    Source: Chang et al., *Reversible Architectures for Arbitrarily Deep Residual Neural Networks*, AAAI 2018, midpoint
    network.

    Example:
        >>> from revlib import ReversibleSequence
        >>> fns = [nn.Linear(4, 4) for _ in range(6)]
        >>> seq, x = ReversibleSequence(midpoint(fns, h=0.1)), torch.randn(2, 4)
        >>> before, last = seq(x, x + 0.1 * fns[0](x))
        >>> len(seq), last.shape
        (6, torch.Size([2, 4]))
    """
    _size("midpoint", h)
    return [Step(fn, Scaled(add=2 * h, plus=_plus(exact))) for fn in fns]


def leapfrog(fns: Iterable[Function], h: float = 1.0, exact: float | None = None) -> list[Step]:
    r"""$x_{t+1} = 2 x_t - x_{t-1} + h^2 f_t(x_t)$ as $v \gets v + h f_t(x)$, $x \gets x + h v$ on the streams $(v, x)$.

    With $v = (x_t - x_{t-1}) / h$ both are the same recurrence; the one with $v$ does not cancel $2 x_t$ against
    $x_{t-1}$, and starts at rest from ``seq(zeros, x)``. ``exact=1024`` adds on the grid of ``ExactAdditive(1024)``.

    Shapes: two streams alike. Cost: two steps a function, the second without any. Inversion has no factor of its own.
    Measured in float32, h = 0.1, with the paper's $f(x) = -K^\top \tanh(K x)$: 2, 8, 59 and 3500 roundings after 16,
    64, 256 and 1024 functions (10, 120, 3100 and 2e5 for $2 x_t - x_{t-1}$). Not for $h^2 |\lambda| > 4$: unstable.

    The Hamiltonian network of the paper, $y \gets y + h F(z)$, $z \gets z + h G(y)$, is
    ``ReversibleSequence(pairs, coupling=Scaled(add=h))``; its G carries the sign.

    Source: Chang et al. 2018, leapfrog network.

    Example:
        >>> from revlib import ReversibleSequence
        >>> seq, x = ReversibleSequence(leapfrog([nn.Linear(4, 4) for _ in range(6)], h=0.1)), torch.randn(2, 4)
        >>> velocity, last = seq(torch.zeros_like(x), x)
        >>> last.shape
        torch.Size([2, 4])
    """
    _size("leapfrog", h)
    coupling = Scaled(add=h, plus=_plus(exact))
    return [step for fn in fns for step in (Step(fn, coupling), Step(nn.Identity(), coupling))]


def momentum(fns: Iterable[Function], gamma: float = 0.9) -> list[Step]:
    r"""$v \gets \gamma v + (1 - \gamma) f_t(x)$, $x \gets x + v$ on the streams $(v, x)$: a residual network's drop-in.

    The paper starts at $v = 0$, ``seq(zeros, x)``, or at a learned $v$; $x$ is the second stream out.

    Shapes: two streams alike. Cost: two steps a function, the second without any. Inversion divides $v$ by $\gamma$, so
    over n functions its error grows to $\gamma^{-n}$ roundings (measured: up to 0.3 times that, in float32 with small
    perceptrons), times what they amplify themselves. There backward refuses beyond about 14 functions at a $\gamma$ of
    0.5, 25 at 0.7, 37 at 0.8, 72 at 0.9, 130 at 0.95. Deeper: ``Anchored(k)`` with fewer steps between, or float64.

    Not exact, and cannot be on a grid: $\gamma v$ has more digits than $v$. For rational $\gamma$ the digits could be
    kept beside the stream, at $\log_2(1 / \gamma)$ bits an element and step (Maclaurin et al. 2015), as the paper does.
    Not for a small $\gamma$ in deep stacks: 0 is the residual network itself, which does not invert.

    Raises:
        ValueError: ``gamma`` is no number between 0 and 1.

    Source: Sander et al., *Momentum Residual Neural Networks*, ICML 2021, the momentum ResNet.

    Example:
        >>> from revlib import ReversibleSequence
        >>> seq, x = ReversibleSequence(momentum([nn.Linear(4, 4) for _ in range(6)], gamma=0.9)), torch.randn(2, 4)
        >>> velocity, last = seq(torch.zeros_like(x), x)
        >>> last.shape
        torch.Size([2, 4])
    """
    real(
        "momentum(gamma=...)",
        gamma,
        lambda gamma: 0 < gamma < 1,
        "a number between 0 and 1, such as 0.9",
        advice=": at 0 the network is a residual one and does not invert, and at 1 its functions have no effect",
    )
    return [
        step
        for fn in fns
        for step in (Step(fn, Scaled(gamma, 1 - gamma)), Step(nn.Identity(), Additive()))
    ]


def columns(fns: Iterable[Function], gamma: float = 1.0) -> list[Step]:
    r"""$x_t = f_t(x_{t-1}, \dots, x_{t-m+1}) + \gamma x_{t-m}$ on m streams, as many as a column has levels.

    Functions are called as the streams lie, oldest first: ``f(x[t - m + 1], ..., x[t - 1])``. In the paper a level uses
    the first and the last of them: the level above it in the column before, and the one below in its own. With four
    levels, zeros before the first column, and the stem as context of every first level::

        seq = ReversibleSequence(columns([level for column in net for level in column], gamma=0.9))
        x1, x2, x3, x4 = seq(*zeros, stem=stem)  # the last column

    Shapes: m streams, each with its own shape; level i of every column returns what merges into stream i. Cost: one
    function a step. Inversion divides by $\gamma$: at least $|\gamma|^{-c}$ roundings after c columns of m steps, as
    :class:`~revlib.couplings.Scaled` says. With $\gamma = \pm 1$ ``Step(f, Scaled(keep, plus=ExactAdditive()))`` is
    exact. Not for the paper's $\gamma$, which is learned for each channel: that is a coupling of your own.

    Source: Cai et al., *Reversible Column Networks*, ICLR 2023, the multi-level reversible unit.

    Example:
        >>> from revlib import ReversibleSequence
        >>> class Level(nn.Linear):
        ...     def forward(self, below, above):  # of three streams, the two others, oldest first
        ...         return super().forward(below + above)
        >>> seq = ReversibleSequence(columns([Level(4, 4) for _ in range(6)], gamma=0.9))  # two columns of three levels
        >>> [x.shape for x in seq(*torch.randn(3, 2, 4))]
        [torch.Size([2, 4]), torch.Size([2, 4]), torch.Size([2, 4])]
    """
    return [Step(fn, Scaled(keep=gamma)) for fn in fns]


class _Others(nn.Module):
    """A function of the sum of all other groups, or of the latest alone."""

    def __init__(self, fn: Function, latest: bool) -> None:
        super().__init__()
        self.fn, self.latest = fn, latest

    def forward(self, *groups: Tensor, **context: Any) -> Any:
        return self.fn(groups[-1] if self.latest else reduce(torch.add, groups), **context)


def grouped(*blocks: Sequence[Function], exact: float | None = None) -> list[Step]:
    r"""$x'_0 = \sum_{i=2}^{C} x_i$, $x'_i = x_i + f_i(x'_{i-1})$: blocks of C functions on C groups of channels.

    It is the recurrence on C streams with an additive law: the first function of a block sees the sum of the other
    groups, each next one the group before it. With C = 2 it is a pair. Example::

        seq = ReversibleSequence(grouped(*[[conv(16) for _ in range(4)] for _ in range(depth)]))
        x = torch.cat(seq(*x.chunk(4, dim=-1), edges=edges), dim=-1)

    Context reaches all functions, so all must name it.

    Shapes: C streams alike; a stream has 1/C of the channels, and so has what a function saves. Cost: a sum of C - 1
    streams a block. Inversion as with ``Additive``, or ``ExactAdditive(exact)``. Not for few channels: functions of 1/C
    of them have 1/C of a dense layer's weights to mix with.

    Raises:
        ValueError: the blocks have different numbers of functions, or only one.

    Source: Li et al., *Training Graph Neural Networks with 1000 Layers*, ICML 2021, the grouped reversible GNN.

    Example:
        >>> from revlib import ReversibleSequence
        >>> seq = ReversibleSequence(grouped(*[[nn.Linear(2, 2) for _ in range(4)] for _ in range(3)]))
        >>> torch.cat(seq(*torch.randn(5, 8).chunk(4, dim=-1)), dim=-1).shape
        torch.Size([5, 8])
    """
    sizes = sorted({len(block) for block in blocks})
    if len(sizes) > 1 or (sizes and sizes[0] < 2):
        raise ValueError(
            f"grouped(...) takes blocks with a function for each group, all with as many, two at least; got {sizes}"
        )
    return [
        Step(_Others(fn, latest=i > 0), _plus(exact))
        for block in blocks
        for i, fn in enumerate(block)
    ]
