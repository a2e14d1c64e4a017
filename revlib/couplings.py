r"""Couplings: how a step folds what its function returned into the oldest stream, and how that is undone.

A reversible step is the recurrence

$$(s_1, \dots, s_m) \mapsto (s_2, \dots, s_m,\; \mathrm{merge}(s_1, f(s_2, \dots, s_m)))$$

and a coupling is its law: ``unmerge(merge(s, f), f) == s``. Couplings are immutable values without parameters of
their own; whatever is learned lives in the function $f$.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Additive", "Coupling"]


class Coupling(ABC):
    """The law of a step. Subclass it with two pure functions of tensors to define another recurrence.

    ``merge`` is recorded by autograd: write it out of differentiable operations. ``unmerge`` is only ever evaluated.
    Both must return a tensor with the shape of ``s``. ``f`` is what the step's function returned: a tensor, or any
    nest of tuples, lists and dicts of tensors where the law needs several (an affine law takes a scale and a shift).
    """

    @abstractmethod
    def merge(self, s: Tensor, f: Any) -> Tensor:
        """The new stream, from the oldest stream and what the function returned."""

    @abstractmethod
    def unmerge(self, merged: Tensor, f: Any) -> Tensor:
        """The oldest stream, from the new one and what the function returned."""


@dataclass(frozen=True)
class Additive(Coupling):
    r"""$\mathrm{merge}(s, f) = s + f$, $\mathrm{unmerge}(t, f) = t - f$.

    Shapes: ``s`` and ``f`` alike, or ``f`` broadcastable to ``s``. Cost: one addition, nothing saved for backward.
    Inversion is exact up to rounding: about one unit in the last place of ``s + f`` a step, so it loses accuracy
    where ``f`` is much larger than ``s``, and it drifts with depth where ``f`` is computed in bfloat16 or float16.

    Source: Gomez et al., *The Reversible Residual Network*, NeurIPS 2017, equation 6; Mangalam et al., *Reversible
    Vision Transformers*, CVPR 2022, equations 1 and 2.
    """

    def merge(self, s: Tensor, f: Tensor) -> Tensor:
        return s + f

    def unmerge(self, merged: Tensor, f: Tensor) -> Tensor:
        return merged - f
