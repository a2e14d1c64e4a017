r"""A running sum as the first stream: log-determinants of a flow, or losses from inside functions.

The state is $(a, s_1, \dots, s_m)$, and every step adds a term of its own to $a$. It is a stream like any other, so
that the sum of a network of any depth is differentiated in the memory of one step. Start it with zeros in float64: it
has one element a sample, and terms that cancel would otherwise leave nothing of it that comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from revlib.bijections.base import Bijection, BoundBijection
from revlib.couplings import Additive, Coupling
from revlib.step import BoundStep, Layout, Pair, State, Step

__all__ = ["with_log_det", "with_losses"]


def with_log_det(
    items: Iterable[Step | Pair | Bijection | tuple[Callable[..., Any], Callable[..., Any]]],
    coupling: Coupling | None = None,
) -> list[Step | Bijection]:
    r"""The same steps, each of which adds its $\log |\det \partial y / \partial x|$ to a first stream $\ell$.

    The likelihood of a flow $z = f(x)$ with a prior $p$ is $\log p(x) = \log p(z) + \ell$::

        flow = ReversibleSequence(with_log_det([Convolution1x1(2), Split(2), Step(net, Affine()), Concat(2)]))
        log_det, z = flow(torch.zeros(len(x), dtype=torch.float64), x)
        log_likelihood = prior.log_prob(z).flatten(1).sum(1) + log_det

    and ``flow.inverse(log_det, z)`` samples. Steps and bijections keep their parameters, and what they do.

    Args:
        items: Steps whose coupling has a ``log_det`` (``Affine``, ``Scaled``, and the additive ones, which keep
            volumes), bijections that have one, and pairs.
        coupling: of the pairs; additive unless given.

    Shapes: a first stream of shape (batch,). Cost: a sum over a stream a step; nothing kept beyond the step.

    Raises:
        NotImplementedError: when it runs, a coupling or a bijection that does not say what its log-determinant is.

    Source: Dinh et al. 2017 (RealNVP); Kingma and Dhariwal 2018 (Glow).

    Example:
        >>> import torch
        >>> from revlib import ReversibleSequence
        >>> from revlib.bijections import Concat, Split
        >>> from revlib.couplings import Scaled
        >>> flow = ReversibleSequence(with_log_det([Split(2), Step(torch.nn.Tanh(), Scaled(keep=2.0)), Concat(2)]))
        >>> log_det, z = flow(torch.zeros(5, dtype=torch.float64), torch.randn(5, 6))
        >>> log_det[0] / 3  # three of six elements were doubled
        tensor(0.6931, dtype=torch.float64)
    """
    found: list[Step | Bijection] = []
    for item in items:
        if isinstance(item, Step):
            found.append(_LogDetStep(item.fn, item.coupling, item.streams))
        elif isinstance(item, Bijection):
            found.append(_LogDetBijection(item))
        else:
            found += [_LogDetStep(fn, coupling or Additive()) for fn in item]
    return found


def with_losses(steps: Iterable[Step]) -> list[Step]:
    r"""The same steps, of functions that return ``(f, loss)``; the losses add up in a first stream.

    For losses that arise inside a function, such as the balance of a mixture of experts: the graph of each is rebuilt
    with its step, and nothing of it is stored. Example::

        stack = ReversibleSequence(with_losses(Step(Experts(64)) for _ in range(12)))
        auxiliary, y1, y2 = stack(torch.zeros((), dtype=torch.float64), x, x)
        (loss(y1, y2) + 0.01 * auxiliary).backward()

    Shapes: a first stream of the shape of the losses. Cost: an addition a step.

    Example:
        >>> import torch
        >>> from revlib import ReversibleSequence
        >>> stack = ReversibleSequence(with_losses([Step(lambda x: (x.tanh(), x.square().mean()))]))
        >>> loss, y1, y2 = stack(torch.zeros((), dtype=torch.float64), torch.ones(3), torch.ones(3))
        >>> loss
        tensor(1., dtype=torch.float64)
    """
    return [_LossStep(step.fn, step.coupling, step.streams) for step in steps]


class _BoundSum(BoundStep):
    """A step that takes the first stream besides its own, and adds a term to it."""

    sums = 1

    def _laid_out(self, m: int) -> Layout:
        n = self.streams or m - 1
        if not 2 <= n < m:
            raise TypeError(
                f"{self.name} adds to a first stream, and so runs on at least {1 + (self.streams or 2)}, got {m}"
            )
        return Layout((0, m - n), (0, m - 1), n - 1)

    def merge(self, taken: State, f: Any) -> State:
        total, s = taken
        return (total + self._term(s, f), *super().merge((s,), self._merged(f)))

    def unmerge(self, made: State, f: Any) -> State:
        total, merged = made
        (s,) = super().unmerge((merged,), self._merged(f))
        return (total - self._term(s, f), s)

    def inverts_exactly(self, dtype: torch.dtype) -> bool:
        return False

    def _merged(self, f: Any) -> Any:
        return f

    def _term(self, s: Tensor, f: Any) -> Tensor:
        return self.coupling.log_det(s, f)


class _BoundLoss(_BoundSum):
    def _merged(self, f: Any) -> Any:
        if not isinstance(f, (tuple, list)) or len(f) != 2:
            raise TypeError(f"{self.name} must return a pair (f, loss), got {type(f).__name__}")
        return f[0]

    def _term(self, s: Tensor, f: Any) -> Tensor:
        term: Tensor = f[1]
        return term


class _LogDetStep(Step):
    def bind(self, name: str) -> BoundStep:
        return _BoundSum(self, self.coupling, name, self.streams)


class _LossStep(Step):
    def bind(self, name: str) -> BoundStep:
        return _BoundLoss(self, self.coupling, name, self.streams)


class _LogDetBijection(Bijection):
    """A bijection that takes the first stream besides its own, and adds its log-determinant to it."""

    def __init__(self, of: Bijection) -> None:
        super().__init__()
        self.of, self.exact = of, of.exact
        self.takes = None if of.takes is None else of.takes + 1
        self.makes = None if of.makes is None else of.makes + 1

    @property
    def initialised(self) -> bool:  # type: ignore[override]
        return self.of.initialised

    @initialised.setter
    def initialised(self, value: bool) -> None:
        self.of.initialised = value

    def initialise(self, total: Tensor, *streams: Tensor) -> None:
        self.of.initialise(*streams)

    def forward(self, total: Tensor, *streams: Tensor, **context: Any) -> State:
        return (total + self.of.log_det(*streams), *_tuple(self.of(*streams, **context)))

    def inverse(self, total: Tensor, *streams: Tensor, **context: Any) -> State:
        before = _tuple(self.of.inverse(*streams, **context))
        return (total - self.of.log_det(*before), *before)

    def bind(self, name: str) -> BoundStep:
        return _BoundLogDetBijection(self, name)


class _BoundLogDetBijection(BoundBijection):
    sums = 1

    def _laid_out(self, m: int) -> Layout:
        taken, made, _ = super()._laid_out(m)
        return Layout((0, *taken[1:]), (0, *made[1:]), 0)


def _tuple(result: Tensor | State) -> State:
    return (result,) if isinstance(result, Tensor) else tuple(result)
