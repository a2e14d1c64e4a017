"""PublishedRevMViT: the Reversible MViT of the paper, as PySlowFast builds Rev-MViT-B, so that its checkpoints fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models.mvitv2 import MultiScaleAttention, PatchEmbed
from torch import Tensor, nn

from revlib.couplings import Coupling
from revlib.models.base import Scheduled, check_numbers
from revlib.models.blocks import Blocks
from revlib.models.stage import PooledAttention, RevStage, patch_grid
from revlib.models.tracing import traced
from revlib.schedulers import Scheduler

__all__ = ["Concat", "Published", "PublishedRevMViT", "StageTransition", "init_weights"]

_norm = partial(nn.LayerNorm, eps=1e-6)


class Concat(nn.Module):
    """Both streams side by side. Shapes: (..., dim), twice -> (..., 2 dim). No parameters."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return torch.cat([x1, x2], dim=-1)


class StageTransition(nn.Module):
    r"""Between stages: x, both streams side by side, to a map of half the height and width, with as many channels.

    $$u = x + \mathrm{MLP}(x), \quad v = \mathrm{LN}_q(\mathrm{pool}_q(u)) + F(u), \quad y = \mathrm{drop}(v + G(v))$$

    where the convolution and norm that pool the residual, head by head, are those of the queries of F, and drop is
    stochastic depth of all of it. Shapes: (B, N, C), (height, width) to (B, N / 4, C), (height / 2, width / 2).
    """

    def __init__(self, F: PooledAttention, G: nn.Module, dim: int, drop_path: float) -> None:
        super().__init__()
        self.fusion, self.F, self.G, self.drop_path = Mlp(dim, 2 * dim), F, G, DropPath(drop_path)

    def forward(self, x: Tensor, feat_size: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        attn: Any = self.F.attn
        height, width = feat_size
        x = x + self.fusion(x)
        heads = rearrange(
            x, "b (h w) (heads c) -> (b heads) c h w", h=height, w=width, heads=attn.num_heads
        )
        pooled = attn.pool_q(heads)
        residual = attn.norm_q(
            rearrange(pooled, "(b heads) c h w -> b (h w) heads c", heads=attn.num_heads)
        )
        x = residual.flatten(2) + self.F(x)
        return self.drop_path(x + self.G(x)), pooled.shape[-2:]


class Published(Scheduled):
    """What the published models share: stages on patches with absolute positions, and a head on both streams.

    A model sets ``patch_embed``, ``feat_size`` and ``stages``, defines ``positions``, and calls ``finish`` last.
    """

    patch_embed: Any
    feat_size: tuple[int, ...]
    stages: Any

    def positions(self) -> Tensor:
        """The positions of all patches, (1, N, embed_dim)."""
        raise NotImplementedError

    def finish(self, num_features: int, num_classes: int, drop_rate: float, fc_norm: bool) -> None:
        """Make the head: a norm of features or of their mean, dropout, and a last layer."""
        self.num_features = self.head_hidden_size = num_features
        self.norm = nn.Identity() if fc_norm else _norm(num_features)
        self.fc_norm = _norm(num_features) if fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images, or clips, to (B, N, num_features), normalised."""
        x, feat_size = self.patch_embed(images)
        if not traced(x) and tuple(feat_size) != self.feat_size:
            want, got = ("x".join(map(str, size)) for size in (self.feat_size, feat_size))
            raise ValueError(
                f"images must give {want} patches, got {got}; resize them, or build the model with theirs"
            )
        x = x + self.positions()
        for stage in self.stages:
            x, feat_size = stage(x, feat_size)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, num_features) to (B, num_classes), or to the pooled features before the classifier."""
        x = self.head_drop(self.fc_norm(x.mean(1)))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """Images, or clips, to logits (B, num_classes), or to pooled features where there is no classifier."""
        return self.forward_head(self.forward_features(images))

    if TYPE_CHECKING:

        def __call__(self, images: Tensor) -> Tensor: ...

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes, on the device and in the dtype of the model."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(init_weights).to(self.patch_embed.proj.weight).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone, beside biases and norms."""
        return {name for name, _ in self.named_parameters() if name.startswith("pos_embed")}


class PublishedRevMViT(Published):
    r"""Reversible Multiscale Vision Transformer as published, on the first MViT: :class:`RevMViT` is on the second.

    $$y_1 = x_1 + \mathrm{PooledAttention}(\mathrm{LN}(x_2)), \qquad y_2 = x_2 + \mathrm{MLP}(\mathrm{LN}(y_1))$$

    within a stage, and :class:`~revlib.models.mvit_published.StageTransition` of both streams between stages. Against
    RevMViT: positions are absolute and not relative, queries are pooled in transitions only and not added again after
    attention, transitions fuse two streams by an MLP with a residual, and the head sees the normalised concatenation
    of both, averaged over patches.

    Args:
        img_size: pixels, a number or (height, width), multiples of patch_size · 2^(stages - 1).
        patch_size: pixels between patches; they overlap, 2 patch_size - 1 wide.
        in_chans, num_classes: channels in; classes out (0: no classifier, ``forward`` returns pooled features).
        embed_dim, num_heads: of the first stage; both double at each stage. mlp_ratio: hidden width of MLPs / width.
        depths: blocks of each stage; the first of every stage but the first is its transition.
        kv_stride: of the pooled keys and values in the first stage; it halves at each stage, down to 1.
        drop_rate, drop_path_rate: dropout before the classifier; stochastic depth, rising linearly over all blocks.
        fc_norm: average over the patches first, and normalise after; ``USE_MEAN_POOLING`` of PySlowFast.
        coupling, scheduler: of all stages, see :class:`~revlib.ReversibleSequence`; also ``model.scheduler = ...``.

    The defaults are Rev-MViT-B's: 39.7 million parameters.

    Shapes: images (B, in_chans, H, W) to logits (B, num_classes); features (B, N, 2^stages embed_dim).
    Cost: held of a stage are two streams and what enters its transition, at any depth. A ValueError meets sizes that
    do not divide, a stage without blocks, and, in forward, images of another size.

    Source: Mangalam et al., *Reversible Vision Transformers*, CVPR 2022, section 3.3; Fan et al., *Multiscale Vision
    Transformers*, ICCV 2021; PySlowFast's ``REV_MVIT_B_16_CONV``. There F and G of a block drop the same samples; here
    each draws its own.

    Example:
        >>> model = PublishedRevMViT(32, 4, num_classes=10, embed_dim=8, depths=(1, 2))
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 2, 11, 2),
        num_heads: int = 1,
        mlp_ratio: float = 4.0,
        kv_stride: int = 4,
        drop_path_rate: float = 0.0,
        coupling: Coupling | None = None,
        scheduler: Scheduler | None = None,
        *,
        drop_rate: float = 0.0,
        fc_norm: bool = False,
    ) -> None:
        """Make the model; the docstring of the class explains the arguments."""
        super().__init__()
        check_numbers(locals(), per_stage=("depths",))
        self.feat_size = size = patch_grid(img_size, patch_size, embed_dim, depths, num_heads)
        kernel, padding = (2 * patch_size - 1,) * 2, (patch_size - 1,) * 2
        self.patch_embed = PatchEmbed(in_chans, embed_dim, kernel, (patch_size,) * 2, padding)
        self.pos_embed = nn.Parameter(torch.zeros(1, size[0] * size[1], embed_dim))
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            dim, heads, kv = embed_dim * 2**i, num_heads * 2**i, max(kv_stride // 2**i, 1)
            entered, transition = size, None
            if i:
                attn = _attention(dim, heads, size, kv, pool_queries=True)
                F = PooledAttention(_norm(dim), attn, nn.Identity(), size)
                transition = StageTransition(F, _mlp(dim, mlp_ratio), dim, next(rates))
                size = (size[0] // 2, size[1] // 2)
            pairs = Blocks((), coupling, scheduler)
            for _ in range(depth - (i > 0)):
                rate = next(rates)
                F = PooledAttention(
                    _norm(dim), _attention(dim, heads, size, kv), DropPath(rate), size
                )
                pairs.append((F, _mlp(dim, mlp_ratio).append(DropPath(rate))))
            self.stages.append(RevStage(transition, pairs, Concat(), entered))
        self.finish(embed_dim * 2 ** len(depths), num_classes, drop_rate, fc_norm)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def positions(self) -> Tensor:
        return self.pos_embed


def _attention(
    dim: int, heads: int, size: tuple[int, int], kv_stride: int, pool_queries: bool = False
) -> nn.Module:
    queries = {"kernel_q": (3, 3), "stride_q": (2, 2)} if pool_queries else {}
    pooling = {"kernel_kv": (3, 3), "stride_kv": (kv_stride,) * 2, **queries}
    plain = {"has_cls_token": False, "rel_pos_type": "none", "residual_pooling": False}
    return MultiScaleAttention(dim, dim, size, heads, **pooling, **plain, norm_layer=_norm)


def _mlp(dim: int, ratio: float) -> nn.Sequential:
    return nn.Sequential(_norm(dim), Mlp(dim, int(dim * ratio)))


def init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
        trunc_normal_(module.weight, std=0.02)
    if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
        nn.init.constant_(module.bias, 0.02)
