"""RevMViT: the reversible Multiscale Vision Transformer, timm's MViTv2 with its stages made reversible."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import get_act_layer, get_norm_layer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import Tensor, nn

from revlib.couplings import Coupling
from revlib.models.base import Layer, Scheduled, TimmModel, check_numbers
from revlib.models.blocks import Blocks, separable
from revlib.models.fusion import Fusion, Mean
from revlib.models.sizes import resize_mvit
from revlib.models.stage import PooledAttention, RevStage, patch_grid
from revlib.schedulers import Scheduler

__all__ = ["RevMViT"]


class RevMViT(Scheduled, MultiScaleVit):  # type: ignore[misc] # timm is untyped
    r"""Reversible Multiscale Vision Transformer, version 2: each stage halves the resolution and doubles the channels.

    $$y_1 = x_1 + \mathrm{PooledAttention}(\mathrm{LN}(x_2)), \qquad y_2 = x_2 + \mathrm{MLP}(\mathrm{LN}(y_1))$$

    within a stage, and $x_1 = x_2 = \mathrm{Block}(\mathrm{fuse}(y_1, y_2))$ between stages: an ordinary MViTv2 block,
    whose queries, and residual, are pooled with stride 2 and get twice the channels. The last stage is fused too. Head
    and methods are those of timm's ``MultiScaleVit``: norm, mean over patches, dropout, linear.

    Args:
        img_size: pixels, a number or (height, width), multiples of s = patch_size · 2^(stages - 1).
        patch_size: pixels between patches; they overlap, 2 patch_size - 1 wide.
        in_chans, num_classes: channels in; classes out (0: no classifier, ``forward`` returns pooled features).
        embed_dim, num_heads: of the first stage; both double at each stage. mlp_ratio: hidden width of MLPs / width.
        depths: blocks of each stage, counted as timm does: the first of every stage but the first is its transition.
        kv_stride: of the pooled keys and values in the first stage; it halves at each stage, down to 1.
        drop_rate, drop_path_rate: dropout before the classifier; stochastic depth, rising linearly over all blocks.
        fc_norm: average over the patches first, and normalise after; by timm's name.
        class_token: put one in front of the patches, and classify by it.
        fusion: how two streams become one: ``Mean``, ``ConcatLinear`` or ``ConcatMlp``.
        coupling: how blocks merge into the streams; ``ExactAdditive()`` for inversion without rounding errors.
        scheduler: of all stages; also ``model.scheduler = ...`` at any time. A ``Budget`` bounds them together.
        global_pool: "avg", "token" (the class token) or "" for none; None for "token" where there is one, else "avg".
        norm_layer, act_layer: classes, or timm's names of them. device, dtype: of parameters.
        parts: of a batch, that the first stage, transitions and fusions take one after another in training.

    The defaults are minREV's on CIFAR-10; ``(224, 4, 3, 1000, 96, (2, 3, 16, 3), kv_stride=4)`` has MViTv2-B's sizes.

    Shapes: images (B, in_chans, H, W) to logits (B, num_classes); features (B, H W / s², embed_dim · s / patch_size).
    Cost: as MViTv2; held of a stage are two streams and what enters its transition, at any depth. A ValueError meets
    sizes that do not divide, a stage without blocks, and, in forward, images of another size.

    Source: Li et al., *MViTv2*, CVPR 2022; Fan et al., *Multiscale Vision Transformers*, ICCV 2021; Mangalam et al.,
    *Reversible Vision Transformers*, CVPR 2022, section 3.3 (stage-transition and stage-preserving blocks).

    Example:
        >>> model = RevMViT(img_size=16, patch_size=4, embed_dim=8, depths=(1, 2))
        >>> model(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    stages: Any  # timm's
    feature_info: Any
    _init_weights: Any
    head: Any

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 2, 1),
        num_heads: int = 1,
        mlp_ratio: float = 4.0,
        kv_stride: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        class_token: bool = False,
        fc_norm: bool = False,
        fusion: Fusion = Mean,
        coupling: Coupling | None = None,
        scheduler: Scheduler | None = None,
        *,
        global_pool: str | None = None,
        norm_layer: Layer = "layernorm",
        act_layer: Layer = nn.GELU,
        parts: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the model; the docstring of the class explains the arguments."""
        check_numbers(locals(), per_stage=("depths",))
        feat_size = patch_grid(img_size, patch_size, embed_dim, depths, num_heads)
        cfg = MultiScaleVitCfg(
            *(tuple(depths), embed_dim, num_heads, mlp_ratio),
            use_cls_token=class_token,
            stride_q=((1, 1), *((2, 2) for _ in depths[1:])),
            stride_kv_adaptive=(kv_stride, kv_stride),
            patch_kernel=(2 * patch_size - 1,) * 2,
            patch_stride=(patch_size,) * 2,
            patch_padding=(patch_size - 1,) * 2,
            norm_layer=norm_layer,
            norm_eps=getattr(norm_layer, "keywords", {}).get("eps", 1e-6),
        )
        # timm makes tables for square images only. Of an oblong one, the shorter side leaves rows unused.
        side = max(feat_size) * patch_size
        super().__init__(
            cfg,
            (side, side),
            in_chans,
            global_pool,
            num_classes,
            drop_path_rate,
            drop_rate,
            device=device,
            dtype=dtype,
        )
        for i, stage in enumerate(self.stages):
            transition, blocks = (stage.blocks[0], stage.blocks[1:]) if i else (None, stage.blocks)
            inner = (feat_size[0] // 2, feat_size[1] // 2) if i else feat_size
            pairs = Blocks((), coupling, scheduler)
            for b in blocks:
                attention = PooledAttention(b.norm1, b.attn, b.drop_path1, inner)
                pairs.append((attention, nn.Sequential(b.norm2, b.mlp, b.drop_path2)))
            for b in stage.blocks:
                b.mlp.act = get_act_layer(act_layer)()
            norm = partial(get_norm_layer(norm_layer), eps=cfg.norm_eps)
            fuse = (
                fusion(cfg.embed_dim[i], norm)
                .to(device=device, dtype=dtype)
                .apply(self._init_weights)
            )
            self.stages[i] = RevStage(transition, pairs, fuse, feat_size)
            self.feature_info[i]["module"] = f"stages.{i}"
            feat_size = inner
        self.fc_norm: nn.Module = nn.Identity()
        if fc_norm:
            self.norm, self.fc_norm = self.fc_norm, self.norm
        for stage in self.stages:
            stage.parts = separable(parts, self)
        self.stages[0].pairs.parts = stage.parts

    get_intermediate_layers = TimmModel.get_intermediate_layers

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Take images of another size: tables of relative positions are resampled to it."""
        resize_mvit(self, img_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes), or to pooled features where there is no classifier."""
        features: Any = self.forward_features  # timm's, which has no types
        return self.forward_head(features(x))

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What ``forward_features`` returns to (B, num_classes), or to the pooled features before the classifier."""
        pooled = self.fc_norm(super().forward_head(x, pre_logits=True))
        return pooled if pre_logits else self.head(pooled)
