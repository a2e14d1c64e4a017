"""The networks, couplings and schedulers that flags of training name, and a line that tells of them.

Those with `plain` are timm's own of the same sizes: one stream, every activation stored.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import typer
from timm.models import SwinTransformer, VisionTransformer
from timm.models.mvitv2 import MultiScaleBlock, MultiScaleVit, MultiScaleVitCfg
from torch import Tensor, nn

from research.config import Config, CouplingName, FusionName, ModelName, SchedulerName, VariantName
from research.data import Dataset
from revlib import Additive, Coupling, ExactAdditive
from revlib.models import RevMViT, RevSwin, RevViT, minrev_vit
from revlib.models.fusion import ConcatLinear, ConcatMlp, Fusion, Mean
from revlib.schedulers import Checkpoint, Naive, PaReprop, Reversible, Scheduler


class Concat(nn.Module):
    """Both streams side by side. Shapes: (..., dim), twice -> (..., 2 dim)."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return torch.cat([x1, x2], dim=-1)


FUSIONS: dict[FusionName, Fusion] = {"mean": Mean, "concat-linear": ConcatLinear, "concat-mlp": ConcatMlp}


def vit(fusion: FusionName = "mean", variant: VariantName = "default", **sizes: Any) -> nn.Module:
    return minrev_vit(**sizes) if variant == "minrev" else RevViT(**sizes)


def plain_vit(fusion: FusionName, coupling: Coupling, scheduler: Scheduler, variant: VariantName = "default", **sizes: Any) -> nn.Module:
    return VisionTransformer(**sizes, class_token=False, global_pool="avg")


def two_stages(depth: int, num_heads: int) -> dict[str, Any]:
    """Half of the blocks in each of two stages, the second with twice the heads; a single block makes one stage."""
    depths = (depth // 2, depth - depth // 2) if depth > 1 else (depth,)
    return {"depths": depths, "num_heads": (num_heads, 2 * num_heads)[: len(depths)]}


def swin(depth: int, num_heads: int, fusion: FusionName = "mean", variant: VariantName = "default", **sizes: Any) -> nn.Module:
    return RevSwin(**sizes, **two_stages(depth, num_heads), fusion=FUSIONS[fusion])


def plain_swin(
    depth: int, num_heads: int, fusion: FusionName, coupling: Coupling, scheduler: Scheduler, variant: VariantName = "default", **sizes: Any
) -> nn.Module:
    return SwinTransformer(**sizes, **two_stages(depth, num_heads), window_size=4)


def three_stages(depth: int) -> tuple[int, ...]:
    """minREV's: 1 block, 2, and all others."""
    return tuple(blocks for blocks in (1, min(depth - 1, 2), depth - 3) if blocks > 0)


def mvit(depth: int, fusion: FusionName = "mean", variant: VariantName = "default", **sizes: Any) -> nn.Module:
    try:
        model = RevMViT(depths=three_stages(depth), **sizes, fusion=FUSIONS.get(fusion, Mean))
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint="--patch-size") from error
    if fusion == "concat":
        take_both_streams(model, sizes["mlp_ratio"])
    return model


def take_both_streams(model: RevMViT, mlp_ratio: float) -> None:
    """Put in transitions as minREV's: the streams side by side have the width of the next stage already, so that
    nothing widens them."""
    for before, stage in pairwise(model.stages):
        old = stage.transition
        stage.transition = MultiScaleBlock(
            old.dim_out,
            old.dim_out,
            old.attn.num_heads,
            stage.feat_size,
            mlp_ratio,
            drop_path=getattr(old.drop_path1, "drop_prob", 0.0),
            norm_layer=partial(nn.LayerNorm, eps=old.norm1.eps),
            kernel_q=old.attn.pool_q.kernel_size,
            kernel_kv=old.attn.pool_k.kernel_size,
            stride_q=old.attn.pool_q.stride,
            stride_kv=old.attn.pool_k.stride,
            has_cls_token=False,
            expand_attn=True,
        ).apply(model._init_weights)
        before.fuse = Concat()


def plain_mvit(
    img_size: int,
    patch_size: int,
    in_chans: int,
    num_classes: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    drop_path_rate: float,
    **reversible: Any,
) -> nn.Module:
    depths = three_stages(depth)
    config = MultiScaleVitCfg(
        *(depths, embed_dim, num_heads, mlp_ratio),
        use_cls_token=False,
        stride_q=((1, 1), *((2, 2) for _ in depths[1:])),
        stride_kv_adaptive=(2, 2),
        patch_kernel=(2 * patch_size - 1,) * 2,
        patch_stride=(patch_size,) * 2,
        patch_padding=(patch_size - 1,) * 2,
    )
    return MultiScaleVit(config, (img_size, img_size), in_chans, None, num_classes, drop_path_rate)


MODELS: dict[ModelName, Callable[..., nn.Module]] = {
    "vit": vit,
    "swin": swin,
    "mvit": mvit,
    "plain-vit": plain_vit,
    "plain-swin": plain_swin,
    "plain-mvit": plain_mvit,
}
COUPLINGS: dict[CouplingName, Coupling] = {"additive": Additive(), "exact": ExactAdditive()}
SCHEDULERS: dict[SchedulerName, Scheduler] = {
    "naive": Naive(),
    "reversible": Reversible(),
    "pareprop": PaReprop(),
    "checkpoint": Checkpoint(),
}


def describe(model: nn.Module, data: Dataset, config: Config, here: dict[str, object]) -> str:
    """One line on what is about to run."""
    parameters = sum(p.numel() for p in model.parameters())
    shape = "x".join(str(n) for n in data.train.images.shape[1:])
    return (
        f"{config.dataset}: {len(data.train):,} training and {len(data.test):,} test images of {shape}, "
        f"{len(data.classes)} classes; {config.model}, {config.scheduler}, {parameters:,} parameters; "
        f"{here['device']}"
    )
