"""The networks, couplings and schedulers that flags of training name, and a line that tells of them."""

from collections.abc import Callable
from typing import Any

import typer
from timm.models import VisionTransformer
from torch import nn

from research.config import Config, CouplingName, ModelName, SchedulerName
from research.data import Dataset
from revlib import Additive, Coupling, ExactAdditive
from revlib.models import RevMViT, RevSwin, RevViT
from revlib.schedulers import Checkpoint, Naive, PaReprop, Reversible, Scheduler


def plain_vit(coupling: Coupling, scheduler: Scheduler, **sizes: Any) -> nn.Module:
    """timm's: one stream, every activation stored."""
    return VisionTransformer(**sizes, class_token=False, global_pool="avg")


def swin(depth: int, num_heads: int, **sizes: Any) -> nn.Module:
    """Half of the blocks in each of two stages, the second with twice the heads; a single block makes one stage."""
    depths = (depth // 2, depth - depth // 2) if depth > 1 else (depth,)
    return RevSwin(**sizes, depths=depths, num_heads=(num_heads, 2 * num_heads)[: len(depths)])


def mvit(depth: int, **sizes: Any) -> nn.Module:
    """minREV's: stages of 1, 2, and all other blocks."""
    stages = (1, min(depth - 1, 2), depth - 3)
    try:
        return RevMViT(depths=[blocks for blocks in stages if blocks > 0], **sizes)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint="--patch-size") from error


MODELS: dict[ModelName, Callable[..., nn.Module]] = {
    "vit": RevViT,
    "swin": swin,
    "mvit": mvit,
    "plain-vit": plain_vit,
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
