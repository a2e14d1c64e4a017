"""The networks and couplings that flags of training name.

Those with `plain` are timm's own of the same sizes: one stream, every activation stored.
"""

from collections.abc import Callable
from typing import Any

import typer
from timm.models import SwinTransformer, VisionTransformer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn

from research.settings.config import CouplingName, FusionName, ModelName, VariantName
from revlib import Additive, Coupling, ExactAdditive
from revlib.models import RevMViT, RevSwin, RevViT, minrev_mvit, minrev_swin, minrev_vit
from revlib.models.fusion import ConcatLinear, ConcatMlp, Fusion, Mean
from revlib.models.minrev import init_like_torch, take_both_streams
from revlib.schedulers import Scheduler

FUSIONS: dict[FusionName, Fusion] = {"mean": Mean, "concat-linear": ConcatLinear, "concat-mlp": ConcatMlp}


def vit(fusion: FusionName = "mean", variant: VariantName = "default", **sizes: Any) -> nn.Module:
    return minrev_vit(**sizes) if variant == "minrev" else RevViT(**sizes)


def plain_vit(
    fusion: FusionName, coupling: Coupling, scheduler: Scheduler, variant: VariantName = "default", **sizes: Any
) -> nn.Module:
    model = VisionTransformer(**sizes, class_token=False, global_pool="avg")
    if variant == "minrev":
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
        for block in model.blocks:
            block.norm1.eps = 1e-6
        nn.init.zeros_(model.pos_embed)
        init_like_torch(model)
    return model


def two_stages(depth: int, num_heads: int) -> dict[str, Any]:
    """Half of the blocks in each of two stages, the second with twice the heads; a single block makes one stage."""
    depths = (depth // 2, depth - depth // 2) if depth > 1 else (depth,)
    return {"depths": depths, "num_heads": (num_heads, 2 * num_heads)[: len(depths)]}


def swin(
    depth: int,
    num_heads: int,
    fusion: FusionName = "mean",
    variant: VariantName = "default",
    unrolled_windows: bool = False,
    **sizes: Any,
) -> nn.Module:
    stages = two_stages(depth, num_heads)
    if variant == "minrev":
        return minrev_swin(**sizes, **stages, unrolled_windows=unrolled_windows)
    return RevSwin(**sizes, **stages, fusion=FUSIONS[fusion])


def plain_swin(
    depth: int,
    num_heads: int,
    fusion: FusionName,
    coupling: Coupling,
    scheduler: Scheduler,
    variant: VariantName = "default",
    unrolled_windows: bool = False,
    **sizes: Any,
) -> nn.Module:
    model = SwinTransformer(**sizes, **two_stages(depth, num_heads), window_size=4)
    if variant == "minrev":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
                nn.init.constant_(module.bias, 0.02)
    return model


def three_stages(depth: int) -> tuple[int, ...]:
    """The depths of minREV's stages: 1 block, 2 blocks, and all others."""
    return tuple(blocks for blocks in (1, min(depth - 1, 2), depth - 3) if blocks > 0)


def mvit(depth: int, fusion: FusionName = "mean", variant: VariantName = "default", **sizes: Any) -> nn.Module:
    try:
        if variant == "minrev":
            return minrev_mvit(depths=three_stages(depth), **sizes)
        model = RevMViT(depths=three_stages(depth), **sizes, fusion=FUSIONS.get(fusion, Mean))
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint="--patch-size") from error
    if fusion == "concat":
        take_both_streams(model, sizes["mlp_ratio"])
    return model


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
    variant: VariantName = "default",
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
        norm_eps=1e-5 if variant == "minrev" else 1e-6,
    )
    model = MultiScaleVit(config, (img_size, img_size), in_chans, None, num_classes, drop_path_rate)
    if variant == "minrev":
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                nn.init.zeros_(parameter)
    return model


MODELS: dict[ModelName, Callable[..., nn.Module]] = {
    "vit": vit,
    "swin": swin,
    "mvit": mvit,
    "plain-vit": plain_vit,
    "plain-swin": plain_swin,
    "plain-mvit": plain_mvit,
}
COUPLINGS: dict[CouplingName, Coupling] = {"additive": Additive(), "exact": ExactAdditive()}
