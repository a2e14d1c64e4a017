"""PublishedRevMViTVideo: the Reversible MViT of clips, as PySlowFast builds Rev-MViT-B 16x4, so its checkpoints fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from revlib.couplings import Coupling
from revlib.models.base import check_numbers
from revlib.models.blocks import Blocks
from revlib.models.fusion import Mean
from revlib.models.mvit_published import Concat, Published, init_weights
from revlib.models.stage import PooledAttention, RevStage, clip_grid
from revlib.schedulers import Scheduler

__all__ = ["ProjectedTransition", "PublishedRevMViTVideo"]

Volume = tuple[int, int, int]
_norm = partial(nn.LayerNorm, eps=1e-6)


class ClipPatches(nn.Module):
    """(B, channels, frames, height, width) to (B, N, dim) and the map of patches: overlapping, in space and time."""

    def __init__(self, in_chans: int, dim: int, patch_size: Volume) -> None:
        super().__init__()
        kernel: Any = tuple(2 * n - 1 for n in patch_size)
        padding: Any = tuple(n - 1 for n in patch_size)
        self.proj = nn.Conv3d(in_chans, dim, kernel, patch_size, padding)

    def forward(self, clips: Tensor) -> tuple[Tensor, torch.Size]:
        x = self.proj(clips)
        return x.flatten(2).transpose(1, 2), x.shape[2:]


class VolumeAttention(nn.Module):
    r"""Attention of patches in space and time, with queries, keys and values pooled head by head in space.

    $$q, k, v = \mathrm{pool}(W_{q,k,v}\,x), \qquad y = W\,\mathrm{softmax}(q k^\top / \sqrt{c})\,v + b$$

    A pool is a 3x3x3 convolution of each channel, and a norm over the c channels of a head. Queries that keep their
    resolution are not pooled. Shapes: (B, N, dim), volume to (B, N / stride_q², dim_out), volume.
    """

    def __init__(
        self, dim: int, dim_out: int, num_heads: int, stride_q: int, stride_kv: int
    ) -> None:
        super().__init__()
        self.num_heads, channels = num_heads, dim_out // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim_out, bias=False), nn.Linear(dim_out, dim_out)
        for name, stride in (("q", stride_q), ("k", stride_kv), ("v", stride_kv)):
            pooled = name != "q" or stride > 1
            pool = nn.Conv3d(
                channels, channels, 3, (1, stride, stride), 1, groups=channels, bias=False
            )
            self.add_module(f"pool_{name}", pool if pooled else None)
            self.add_module(f"norm_{name}", _norm(channels) if pooled else None)

    def pooled(self, name: str, heads: Tensor, size: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        """(B, heads, N, c) of a volume to what queries, keys or values make of it, and its volume."""
        pool, norm = getattr(self, f"pool_{name}"), getattr(self, f"norm_{name}")
        if pool is None:
            return heads, size
        t, h, w = size
        x = pool(rearrange(heads, "b heads (t h w) c -> (b heads) c t h w", t=t, h=h, w=w))
        return norm(
            rearrange(x, "(b heads) c t h w -> b heads (t h w) c", heads=self.num_heads)
        ), x.shape[2:]

    def forward(self, x: Tensor, size: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        q, k, v = rearrange(
            self.qkv(x), "b n (part heads c) -> part b heads n c", part=3, heads=self.num_heads
        )
        (q, after), (k, _), (v, _) = (
            self.pooled(name, part, size) for name, part in zip("qkv", (q, k, v), strict=True)
        )
        x = scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b heads n c -> b n (heads c)")), after


class ProjectedTransition(nn.Module):
    r"""Between stages: x, the mean of both streams, to a map of half the height and width, with twice the channels.

    $$v = \mathrm{LN}_q(\mathrm{pool}_q(W x + b)) + F(x), \quad y = \mathrm{drop}(v + G(v))$$

    where the convolution and norm that pool the residual, head by head, are those of the queries of F, and drop is
    stochastic depth of all of it. Shapes: (B, N, C), volume to (B, N / 4, 2 C), volume.
    """

    def __init__(
        self, F: PooledAttention, G: nn.Module, dim: int, dim_out: int, drop_path: float
    ) -> None:
        super().__init__()
        self.project, self.F, self.G, self.drop_path = (
            nn.Linear(dim, dim_out),
            F,
            G,
            DropPath(drop_path),
        )

    def forward(self, x: Tensor, size: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        attn: Any = self.F.attn
        heads = rearrange(self.project(x), "b n (heads c) -> b heads n c", heads=attn.num_heads)
        residual, after = attn.pooled("q", heads, size)
        x = rearrange(residual, "b heads n c -> b n (heads c)") + self.F(x)
        return self.drop_path(x + self.G(x)), after


class PublishedRevMViTVideo(Published):
    r"""Reversible Multiscale Vision Transformer of clips as published, on the first MViT.

    $$y_1 = x_1 + \mathrm{PooledAttention}(\mathrm{LN}(x_2)), \qquad y_2 = x_2 + \mathrm{MLP}(\mathrm{LN}(y_1))$$

    within a stage, and ``ProjectedTransition`` of the mean of both streams between stages. Patches and pools reach
    into time, where frames keep their rate; positions are the sum of one of space and one of time; projections to
    queries, keys and values have no bias. The head sees the normalised concatenation of both streams, averaged.

    Args:
        clip_size: (frames, height, width), multiples of patch_size · (1, 2^(stages - 1), 2^(stages - 1)).
        patch_size: (frames, rows, columns) between patches; they overlap, 2 patch_size - 1 wide.
        in_chans, num_classes: channels in; classes out (0: no classifier, ``forward`` returns pooled features).
        embed_dim, num_heads: of the first stage; both double at each stage. mlp_ratio: hidden width of MLPs / width.
        depths: blocks of each stage; the first of every stage but the first is its transition.
        kv_stride: of the pooled keys and values in the first stage, in space; it halves at each stage, down to 1.
        drop_rate, drop_path_rate: dropout before the classifier; stochastic depth, rising linearly over all blocks.
        fc_norm: average over the patches first, and normalise after; ``USE_MEAN_POOLING`` of PySlowFast.
        coupling, scheduler: of all stages, see :class:`~revlib.ReversibleSequence`; also ``model.scheduler = ...``.

    The defaults are Rev-MViT-B's 16x4 on Kinetics-400 without a class token, which PySlowFast's reversible forward
    refuses: 34,963,120 parameters, for dropout 0.5 and stochastic depth 0.05 in training.

    Shapes: clips (B, in_chans, frames, height, width) to logits (B, num_classes); features (B, N, 2^stages embed_dim).
    Cost: held of a stage are two streams and what enters its transition, at any depth.

    Raises: ValueError for sizes that do not divide, for a stage without blocks, and, in forward, for clips of another
    size.

    Source: Mangalam et al., *Reversible Vision Transformers*, CVPR 2022, section 3.3; PySlowFast's
    ``REV_MVIT_B_16x4_CONV``. There F and G of a block drop the same samples; here each draws its own.

    Example:
        >>> model = PublishedRevMViTVideo((4, 32, 32), (2, 4, 4), num_classes=10, embed_dim=8, depths=(1, 2))
        >>> model(torch.randn(1, 3, 4, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        clip_size: Volume = (16, 224, 224),
        patch_size: Volume = (2, 4, 4),
        in_chans: int = 3,
        num_classes: int = 400,
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 2, 11, 2),
        num_heads: int = 1,
        mlp_ratio: float = 4.0,
        kv_stride: int = 8,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        fc_norm: bool = False,
        coupling: Coupling | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        """Make the model; the docstring of the class explains the arguments."""
        super().__init__()
        check_numbers(locals(), per_stage=("depths",))
        size = clip_grid(clip_size, patch_size, embed_dim, depths, num_heads)
        self.feat_size, (frames, *space) = size, size
        self.patch_embed = ClipPatches(in_chans, embed_dim, patch_size)
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, math.prod(space), embed_dim))
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, frames, embed_dim))
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            dim, heads, kv = embed_dim * 2**i, num_heads * 2**i, max(kv_stride // 2**i, 1)
            entered, transition = size, None
            if i:
                F = PooledAttention(
                    _norm(dim // 2),
                    VolumeAttention(dim // 2, dim, heads, 2, kv),
                    nn.Identity(),
                    size,
                )
                transition = ProjectedTransition(
                    F, _mlp(dim, mlp_ratio), dim // 2, dim, next(rates)
                )
                size = (frames, size[1] // 2, size[2] // 2)
            pairs = Blocks((), coupling, scheduler)
            for _ in range(depth - (i > 0)):
                rate = next(rates)
                F = PooledAttention(
                    _norm(dim), VolumeAttention(dim, dim, heads, 1, kv), DropPath(rate), size
                )
                pairs.append((F, _mlp(dim, mlp_ratio).append(DropPath(rate))))
            self.stages.append(
                RevStage(transition, pairs, Mean(dim) if i + 1 < len(depths) else Concat(), entered)
            )
        self.finish(embed_dim * 2 ** len(depths), num_classes, drop_rate, fc_norm)
        for positions in (self.pos_embed_spatial, self.pos_embed_temporal):
            trunc_normal_(positions, std=0.02)
        self.apply(init_weights)

    def positions(self) -> Tensor:
        """The positions of all patches, (1, N, embed_dim): each is that of its place plus that of its time."""
        return (self.pos_embed_temporal[:, :, None] + self.pos_embed_spatial[:, None]).flatten(1, 2)


def _mlp(dim: int, ratio: float) -> nn.Sequential:
    return nn.Sequential(_norm(dim), Mlp(dim, int(dim * ratio)))
