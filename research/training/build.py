"""From settings to what trains: network, optimizer, schedule, average of the weights, loss scaling."""

import math

import torch
import typer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from research.data.split import Dataset
from research.settings.config import AmpDtypeName, Config
from research.settings.schedulers import scheduler
from research.training.checkpoint import Run
from research.training.networks import COUPLINGS, MODELS
from revlib import ReversibleSequence

AMP_DTYPES: dict[AmpDtypeName, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def network(config: Config, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A fresh network for images of this shape, (C, H, W)."""
    channels, height, width = shape
    if height != width or height % config.patch_size:
        raise typer.BadParameter(
            f"expected a divisor of the images' side, got {config.patch_size} for {height}x{width} images "
            "(which must be square); choose another.",
            param_hint="--patch-size",
        )
    return MODELS[config.model](
        img_size=height,
        patch_size=config.patch_size,
        in_chans=channels,
        num_classes=classes,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
        fusion=config.fusion,
        variant=config.variant,
        coupling=COUPLINGS[config.coupling],
        scheduler=scheduler(config.scheduler),
        **({"unrolled_windows": True} if config.unrolled_windows else {}),
    )


def build(config: Config, data: Dataset, device: torch.device) -> Run:
    """A fresh model and optimizer; made on the CPU, so that a seed gives the same weights on every device."""
    model = network(config, data.train.shape, len(data.classes)).to(device)
    ema = ModelEmaV3(model, config.ema) if config.ema else None
    if config.compile:
        compile_functions(model)
    # A captured step reads the learning rate from the device, where the schedule writes it.
    lr = torch.tensor(config.lr, device=device) if config.graph else config.lr
    # Given the model, timm groups its parameters by whether they decay.
    decaying = model if config.weight_decay else model.parameters()
    optimizer = create_optimizer_v2(
        decaying,
        config.optimizer,
        lr=lr,
        weight_decay=config.weight_decay,
        capturable=config.graph,
        fused=True if device.type == "cpu" else None,  # one pass over the parameters, not one for each operation
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp and config.amp_dtype == "float16")
    draws = torch.Generator().manual_seed(config.seed)
    return Run(
        model,
        optimizer,
        schedule(optimizer, config.epochs, config.warmup_epochs, config.cosine_lag),
        scaler,
        draws,
        ema,
    )


def schedule(optimizer: torch.optim.Optimizer, epochs: int, warmup: int, lag: int = 0) -> LRScheduler:
    """It rises linearly in the first epochs, then falls to 0 on a cosine; or falls at once on a late cosine."""
    if lag:
        # In the first epoch the highest rate, then the cosine from -lag + 1 on, where it is the same as at lag - 1.
        return LambdaLR(optimizer, lambda epoch: 0.5 + math.cos(math.pi * (epoch and epoch - lag) / epochs) / 2)
    cosine = CosineAnnealingLR(optimizer, T_max=epochs - warmup)
    if not warmup:
        return cosine
    line = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [line, cosine], milestones=[warmup])


def compile_functions(model: nn.Module) -> None:
    """Compile F and G of every step in place, since a stack itself breaks torch's graphs. A model without stacks is
    compiled as a whole."""
    stacks = [module for module in model.modules() if isinstance(module, ReversibleSequence)]
    for module in [f for stack in stacks for step in stack for f in step] or [model]:
        module.compile()
