"""Parts of multiscale transformers: branches; stages of a transition, pairs on two copies of its result, a fusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revlib._numbers import divisible
from revlib._torch import exporting, transforming
from revlib.models.blocks import each_alone, parts_of
from revlib.models.tracing import NotScripted, noted, traced
from revlib.schedulers import Naive
from revlib.sequence import ReversibleSequence

__all__ = ["PooledAttention", "RevStage", "WindowBranch", "clip_grid", "patch_grid"]


class PooledAttention(nn.Module):
    """F of a pair: norm, attention with pooled keys and values on a map of one size, drop path; no residual."""

    def __init__(
        self, norm: nn.Module, attn: nn.Module, drop_path: nn.Module, feat_size: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.norm, self.attn, self.drop_path, self.feat_size = norm, attn, drop_path, feat_size

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.attn(self.norm(x), self.feat_size)[0])


class WindowBranch(SwinTransformerBlock):  # type: ignore[misc]  # timm comes without types
    """F: a block of timm's without residuals and MLP, from (B, H, W, C) to the same."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path1(self._attn(self.norm1(x)))

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """The pair (F, G). It can be asked for once, since G takes the MLP with it."""
        mlp = nn.Sequential(self.norm2, self.mlp, self.drop_path2)
        del self.norm2, self.mlp, self.drop_path2
        return self, mlp


class RevStage(NotScripted):
    """A transition: an ordinary block that pools queries, or None; pairs on two copies of its result; their fusion.

    Transition and fusion do not invert. They are checkpointed, unless the scheduler of the pairs is ``Naive()``, and
    but for transforms of ``torch.func``, which refuse that. With ``parts`` above 1 they run, and run again in backward,
    on so many parts of the batch, so that only one part's activations are alive.
    Shapes: (B, N, C), (height, width) to (B, N', C'), (height', width'), as timm's stage.
    """

    parts: int = 1

    def __init__(
        self,
        transition: nn.Module | None,
        pairs: ReversibleSequence,
        fusion: nn.Module,
        feat_size: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.transition, self.pairs = transition, pairs
        self.fusion, self.feat_size = fusion, feat_size

    def forward(self, x: Tensor, feat_size: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        if traced(x):
            both = noted(self, (x, feat_size))
            # A trace calls by the name of the stage what is taken from it last, which should be the features.
            after = both[1]
            return both[0], after
        if tuple(feat_size) != self.feat_size:
            raise ValueError(
                f"images must give {'x'.join(map(str, self.feat_size))} patches, got {'x'.join(map(str, feat_size))}: "
                "tables of relative positions fit one size; resize images to img_size, or build the model with theirs"
            )
        if self.transition is not None:
            x, feat_size = self._ordinary(self.transition, x, feat_size)
        # In the dtype of autocast, sums over many blocks would be too coarse to be inverted.
        x = x.to(next(self.parameters()).dtype)
        return self._ordinary(self.fusion, *self.pairs(x, x)), feat_size

    def _ordinary(self, layer: Callable[..., Any], *args: Any) -> Any:
        """The result of a layer. A batch may be taken in parts; arguments that are no tensors belong to all of them."""
        parts = parts_of(self.parts, args[0])
        if parts == 1:
            return self._again(layer, *args)
        tensors = [
            arg.tensor_split(parts) if isinstance(arg, Tensor) else [arg] * parts for arg in args
        ]
        with each_alone(args[0]):
            results = [self._again(layer, *part) for part in zip(*tensors, strict=True)]
        if isinstance(results[0], Tensor):
            return torch.cat(results)
        return torch.cat([x for x, _ in results]), results[0][1]

    def _again(self, layer: Callable[..., Any], *args: Any) -> Any:
        kept = isinstance(self.pairs.scheduler, Naive) or transforming()
        return (
            layer(*args) if kept or exporting() else checkpoint(layer, *args, use_reentrant=False)
        )


def patch_grid(
    img_size: int | tuple[int, int],
    patch_size: int,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: int,
) -> tuple[int, int]:
    """Rows and columns of patches, for stages that each halve them. Raises: ValueError for sizes that do not fit."""
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    divisible("embed_dim", embed_dim, "num_heads", num_heads)
    unit = patch_size * 2 ** (len(depths) - 1)
    if any(side % unit for side in sides):
        resized = "x".join(str(-(-side // unit) * unit) for side in sides)
        raise ValueError(
            f"img_size must be divisible by {unit} (patch_size={patch_size}, doubled by each stage but the first), "
            f"got {sides[0]}x{sides[1]}; resize to {resized}"
        )
    return sides[0] // patch_size, sides[1] // patch_size


def clip_grid(
    clip_size: tuple[int, int, int],
    patch_size: tuple[int, int, int],
    embed_dim: int,
    depths: Sequence[int],
    num_heads: int,
) -> tuple[int, int, int]:
    """As :func:`patch_grid` for clips: times, rows and columns of patches. Stages keep the frames' rate."""
    divisible("embed_dim", embed_dim, "num_heads", num_heads)
    shrink = 2 ** (len(depths) - 1)
    units = (patch_size[0], patch_size[1] * shrink, patch_size[2] * shrink)
    if any(pixels % unit for pixels, unit in zip(clip_size, units, strict=True)):
        nearest = tuple(-(-n // unit) * unit for n, unit in zip(clip_size, units, strict=True))
        raise ValueError(
            f"clip_size must be divisible by {units}, got {clip_size}; resize to {nearest}"
        )
    frames, height, width = clip_size
    return frames // patch_size[0], height // patch_size[1], width // patch_size[2]
