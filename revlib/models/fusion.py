"""How two streams of a stage become one, before the next stage duplicates it again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import Mlp
from torch import Tensor, nn

__all__ = ["Concat", "ConcatLinear", "ConcatMlp", "Fusion", "Mean"]

Fusion = Callable[
    [int, Callable[[int], nn.Module]], nn.Module
]  # of channels and a norm -> module(x1, x2)


class Mean(nn.Module):
    r"""$(x_1 + x_2) / 2$. Shapes: (..., dim), twice -> (..., dim). No parameters."""

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return (x1 + x2) / 2


class ConcatLinear(nn.Module):
    r"""$W\,\mathrm{norm}([x_1; x_2])$. Shapes: (..., dim), twice -> (..., dim). Parameters: 2 dim², and the norm's."""

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.linear = norm_layer(2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.linear(self.norm(torch.cat([x1, x2], dim=-1)))


class ConcatMlp(nn.Module):
    r"""$\mathrm{MLP}(\mathrm{norm}([x_1; x_2]))$ with 2 dim hidden channels.

    Shapes: (..., dim), twice -> (..., dim). Parameters: 6 dim², and the norm's.
    """

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.mlp = norm_layer(2 * dim), Mlp(2 * dim, 2 * dim, dim)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.mlp(self.norm(torch.cat([x1, x2], dim=-1)))


class Concat(nn.Module):
    """Both streams side by side, for a next stage that takes twice the channels. Shapes: (..., dim), twice ->
    (..., 2 dim)."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Both streams side by side."""
        return torch.cat([x1, x2], dim=-1)
