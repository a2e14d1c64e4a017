"""RevMViTVideo: the reversible Multiscale Vision Transformer on clips, torchvision's MViTv2 with reversible stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

try:
    from torchvision.models.video.mvit import MSBlockConfig, MViT
except ImportError as error:
    raise ImportError(
        "RevMViTVideo is made of torchvision's blocks, and torchvision could not be imported; pip install torchvision"
    ) from error

from revlib.couplings import Coupling
from revlib.models.base import Scheduled, check_numbers
from revlib.models.blocks import Blocks
from revlib.models.fusion import Fusion, Mean
from revlib.models.stage import PooledAttention, RevStage, clip_grid
from revlib.schedulers import Scheduler

__all__ = ["RevMViTVideo"]


class RevMViTVideo(Scheduled, MViT):  # type: ignore[misc] # torchvision is untyped
    r"""Reversible Multiscale Vision Transformer of clips: pooling in space and time, otherwise :class:`RevMViT`.

    $$y_1 = x_1 + \mathrm{PooledAttention}(\mathrm{LN}(x_2)), \qquad y_2 = x_2 + \mathrm{MLP}(\mathrm{LN}(y_1))$$

    within a stage, and $x_1 = x_2 = \mathrm{Block}(\mathrm{fuse}(y_1, y_2))$ between stages: an ordinary MViTv2 block,
    which halves height and width and doubles the channels; frames keep their rate. A class token is classified.

    Args:
        clip_size: (frames, height, width), multiples of patch_size · (1, 2^(stages-1), 2^(stages-1)).
        patch_size: (frames, rows, columns) between patches; they overlap, 2 patch_size - 1 wide.
        num_classes: classes out. embed_dim, num_heads: of the first stage; both double at each stage.
        depths: blocks of each stage, at least two in all: the first of every stage but the first is its transition.
        kv_stride: of the pooled keys and values in the first stage, in space; it halves at each stage, down to 1.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the classifier, and in blocks; stochastic depth.
        fusion, coupling, scheduler: as those of :class:`RevMViT`.

    The defaults are MViTv2-S's on Kinetics-400.
    Shapes: clips (B, 3, frames, height, width) to logits (B, num_classes).
    Cost: as MViTv2; held of a stage are two streams and what enters its transition, at any depth.

    Raises: ValueError for sizes that do not divide, for a stage without blocks, and, in forward, for clips of another
    size; ImportError where torchvision is missing.

    Source: Li et al., *MViTv2*, CVPR 2022; Mangalam et al., *Reversible Vision Transformers*, CVPR 2022, section 3.3.

    Example:
        >>> import torch
        >>> model = RevMViTVideo((4, 32, 32), (2, 4, 4), num_classes=10, embed_dim=8, depths=(1, 2), kv_stride=2)
        >>> model(torch.randn(1, 3, 4, 32, 32)).shape
        torch.Size([1, 10])
    """

    blocks: Any

    def __init__(
        self,
        clip_size: tuple[int, int, int] = (16, 224, 224),
        patch_size: tuple[int, int, int] = (2, 4, 4),
        num_classes: int = 400,
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 2, 11, 2),
        num_heads: int = 1,
        kv_stride: int = 8,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        fusion: Fusion = Mean,
        coupling: Coupling | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        """Make the model; the docstring of the class explains the arguments."""
        check_numbers(locals(), per_stage=("depths",))
        inner = clip_grid(clip_size, patch_size, embed_dim, depths, num_heads)
        if sum(depths) < 2:
            raise ValueError(f"depths must be at least two in all, got {tuple(depths)}; add blocks")
        settings = []
        for i, depth in enumerate(depths):
            width, heads, kv = embed_dim * 2**i, num_heads * 2**i, max(kv_stride // 2**i, 1)
            for pools in [i > 0] + [False] * (depth - 1):
                entering, stride = (width // 2, [1, 2, 2]) if pools else (width, [1, 1, 1])
                settings.append(
                    MSBlockConfig(heads, entering, width, [3, 3, 3], [3, 3, 3], stride, [1, kv, kv])
                )
        super().__init__(
            spatial_size=clip_size[1:],
            temporal_size=clip_size[0],
            block_setting=settings,
            residual_pool=True,
            residual_with_cls_embed=False,
            rel_pos_embed=True,
            proj_after_attn=True,
            dropout=drop_rate,
            attention_dropout=proj_drop_rate,
            stochastic_depth_prob=drop_path_rate,
            num_classes=num_classes,
            patch_embed_kernel=tuple(2 * n - 1 for n in patch_size),
            patch_embed_stride=patch_size,
            patch_embed_padding=tuple(n - 1 for n in patch_size),
        )
        self.clip_size, blocks, stages = clip_size, iter(self.blocks), nn.ModuleList()
        frames, height, width = inner
        for i, depth in enumerate(depths):
            outer, inner = inner, (frames, height // 2**i, width // 2**i)
            transition, pairs = next(blocks) if i else None, Blocks((), coupling, scheduler)
            for b in itertools.islice(blocks, depth - (i > 0)):
                attention = PooledAttention(b.norm1, b.attn, b.stochastic_depth, inner)
                pairs.append((attention, nn.Sequential(b.norm2, b.mlp, b.stochastic_depth)))
            fuse = fusion(embed_dim * 2**i, partial(nn.LayerNorm, eps=1e-6))
            stages.append(RevStage(transition, pairs, fuse, outer))
        self.blocks = stages  # torchvision's forward walks them as it walks blocks

    def forward(self, clips: Tensor) -> Tensor:
        """Clips (B, 3, frames, height, width) to logits (B, num_classes); ValueError for clips of another size."""
        if clips.shape[2:] != self.clip_size:
            raise ValueError(
                f"clips must be (B, 3, *{self.clip_size}), got {tuple(clips.shape)}; resize them"
            )
        return super().forward(clips)

    if TYPE_CHECKING:

        def __call__(self, clips: Tensor) -> Tensor: ...
