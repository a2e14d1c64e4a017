r"""What a coupling is: how a step folds what its function returned into the oldest stream, and how that is undone.

A reversible step is the recurrence

$$(s_1, \dots, s_m) \mapsto (s_2, \dots, s_m,\; \mathrm{merge}(s_1, f(s_2, \dots, s_m)))$$

and a coupling is its law: ``unmerge(merge(s, f), f) == s``. Couplings are immutable values without parameters of
their own; whatever is learned lives in the function $f$.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Coupling"]


class Coupling(ABC):
    """The law of a step. Subclass it with two pure functions of tensors to define another recurrence.

    ``merge`` is recorded by autograd: write it out of differentiable operations. ``unmerge`` is only ever evaluated.
    Both must return a tensor with the shape of ``s``. ``f`` is what the step's function returned: a tensor, or any
    nest of tuples, lists and dicts of tensors where the law needs several (an affine law takes a scale and a shift).

    Cost: ``merge`` in forward, and ``unmerge`` in backward where the stream must come back. What ``merge`` saves for
    its gradient is kept as activations are.

    Example:
        >>> class Difference(Coupling):
        ...     def merge(self, s, f):
        ...         return s - f
        ...
        ...     def unmerge(self, merged, f):
        ...         return merged + f
        >>> Difference().unmerge(Difference().merge(torch.tensor(3.0), torch.tensor(1.0)), torch.tensor(1.0))
        tensor(3.)
    """

    @abstractmethod
    def merge(self, s: Tensor, f: Any) -> Tensor:
        """The new stream, from the oldest stream and what the function returned."""

    @abstractmethod
    def unmerge(self, merged: Tensor, f: Any) -> Tensor:
        """The oldest stream, from the new one and what the function returned."""

    def enter(self, s: Tensor) -> Tensor:
        """An input stream as it enters a sequence, before the first step; by default as it is. Differentiable."""
        return s

    def show(self, s: Tensor) -> Tensor:
        """A stream as the functions of steps with this coupling see it; by default as it is. Differentiable."""
        return s

    # Whether the streams leave a sequence in the dtype in which they entered it.
    leaves_as_entered: ClassVar[bool] = False

    def log_det(self, s: Tensor, f: Any) -> Tensor:
        r"""$\log |\det \partial \mathrm{merge}(s, f) / \partial s|$ of each sample, of shape ``(batch,)``.

        Only flows need it, see :func:`revlib.bijections.with_log_det`."""
        raise NotImplementedError(f"{self} does not say what its log-determinant is")

    def for_streams(self, dtype: torch.dtype) -> Coupling:
        """The law that a sequence uses where all its streams have this dtype. It is this one unless defined."""
        return self

    def limit_of(self, dtype: torch.dtype) -> float:
        """The magnitude that merged streams of this dtype must stay below. Backward raises an error if one did not."""
        return math.inf
