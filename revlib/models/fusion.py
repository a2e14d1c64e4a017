"""How two streams of a stage become one, before the next stage duplicates it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from timm.layers import Mlp
from torch import Tensor, nn

__all__ = ["Concat", "ConcatLinear", "ConcatMlp", "Fusion", "Mean"]

# Makes a module of two streams, from their channels and what makes a norm of so many channels.
Fusion = Callable[[int, Callable[[int], nn.Module]], nn.Module]


class _Fused(nn.Module):
    def extra_repr(self) -> str:
        """The settings, as ``print`` shows them besides the layers: there are none."""
        return ""


class Mean(_Fused):
    r"""The mean of both streams, $(x_1 + x_2) / 2$.

    Shapes: (..., dim), twice, to (..., dim). Cost: no parameters. Both arguments are ignored; they are there so that
    every fusion is made alike.

    Source: the mode "avg" of PySlowFast's ``TwoStreamFusion``, code of Mangalam et al. 2022.

    Example:
        >>> Mean(4)(torch.zeros(2, 4), torch.ones(2, 4))[0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        """Make the fusion; it needs neither the channels ``dim`` nor a norm."""
        super().__init__()

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """The mean of both streams, of the shape of either."""
        return (x1 + x2) / 2

    if TYPE_CHECKING:

        def __call__(self, x1: Tensor, x2: Tensor) -> Tensor: ...


class ConcatLinear(_Fused):
    r"""A linear layer on both streams side by side, $W\,\mathrm{norm}([x_1; x_2])$.

    Args:
        dim: channels of each stream. norm_layer: makes a norm of so many channels as it is given, 2 dim.

    Shapes: (..., dim), twice, to (..., dim). Cost: 2 dim² parameters, the bias, and those of the norm.

    Source: as the mode "ln+concat_linear" of PySlowFast's ``TwoStreamFusion``, with one layer in place of its MLP.

    Example:
        >>> ConcatLinear(4)(torch.zeros(2, 4), torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        """Make the norm and the linear layer."""
        super().__init__()
        self.norm, self.linear = norm_layer(2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Both streams as one of the same width."""
        return self.linear(self.norm(torch.cat([x1, x2], dim=-1)))

    if TYPE_CHECKING:

        def __call__(self, x1: Tensor, x2: Tensor) -> Tensor: ...


class ConcatMlp(_Fused):
    r"""An MLP on both streams side by side, $\mathrm{MLP}(\mathrm{norm}([x_1; x_2]))$, with 2 dim hidden channels.

    Args:
        dim: channels of each stream. norm_layer: makes a norm of so many channels as it is given, 2 dim.

    Shapes: (..., dim), twice, to (..., dim). Cost: 6 dim² parameters, the biases, and those of the norm.

    Source: the mode "ln+concat_linear" of PySlowFast's ``TwoStreamFusion``, code of Mangalam et al. 2022.

    Example:
        >>> ConcatMlp(4)(torch.zeros(2, 4), torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        """Make the norm and the MLP."""
        super().__init__()
        self.norm, self.mlp = norm_layer(2 * dim), Mlp(2 * dim, 2 * dim, dim)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Both streams as one of the same width."""
        return self.mlp(self.norm(torch.cat([x1, x2], dim=-1)))

    if TYPE_CHECKING:

        def __call__(self, x1: Tensor, x2: Tensor) -> Tensor: ...


class Concat(_Fused):
    """Both streams side by side, for a next stage that takes twice the channels.

    Shapes: (..., dim), twice, to (..., 2 dim). Cost: no parameters.

    Source: the mode "concat" of PySlowFast's ``TwoStreamFusion``, code of Mangalam et al. 2022.

    Example:
        >>> Concat()(torch.zeros(2, 4), torch.ones(2, 4)).shape
        torch.Size([2, 8])
    """

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Both streams side by side."""
        return torch.cat([x1, x2], dim=-1)

    if TYPE_CHECKING:

        def __call__(self, x1: Tensor, x2: Tensor) -> Tensor: ...
