"""Train a reversible model on an image data set.

    python -m research.train                                               # digits: a minute on two CPU cores
    python -m research.train --dataset cifar10 --scheduler reversible --amp    # minREV's sizes
    python -m research.train --help

Settings are in config.py, readers in data.py, shuffling and augmentation in batches.py.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
import typer
from timm.models import VisionTransformer
from torch import Tensor, nn

from research import checkpoint
from research.batches import Batch, Batches
from research.captured import Captured, Step
from research.checkpoint import Run
from research.config import AmpDtypeName, Config, CouplingName, ModelName, SchedulerName, flags
from research.data import DATASETS, Dataset
from research.log import Log, Row
from research.machine import environment, make_reproducible, pick_device
from research.plots import draw_curves
from revlib import Additive, Coupling, ExactAdditive, raise_pending
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
AMP_DTYPES: dict[AmpDtypeName, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}

app = typer.Typer(add_completion=False)


@app.command()
@flags
def main(config: Config) -> None:
    """Train a reversible model. Each epoch writes log.jsonl, curve.png and last.pt, the checkpoint."""
    logfile, curve, last = (config.folder / name for name in ("log.jsonl", "curve.png", "last.pt"))
    if last.exists() and not (config.resume or config.overwrite):
        raise typer.BadParameter(
            f"{config.folder} holds a run; add --resume to continue it, --overwrite to start it anew, "
            "or name another folder.",
            param_hint="--out",
        )
    device = pick_device(config.device)
    if config.graph and device.type != "cuda":
        raise typer.BadParameter(f"needs CUDA, this run is on {device.type}; drop it.", param_hint="--graph")
    make_reproducible(config.seed, config.deterministic)
    data = DATASETS[config.dataset](config.data_dir, config.cache_dir)
    data = data.prepare(config.limit_train, config.limit_test, device)
    run = build(config, data, device)
    here = environment(device)
    if config.resume:
        log = checkpoint.resume(last, run, config, here)
    else:
        log = Log({"config": config.as_json(), "environment": here}, [])
        last.unlink(missing_ok=True)
    log.write(logfile)  # on resuming, an epoch that was logged but not saved goes
    typer.echo(describe(run.model, data, config, here))

    batches = Batches(data, config.batch_size)
    amp = torch.autocast(device.type, AMP_DTYPES[config.amp_dtype], enabled=config.amp)
    step = train_step(run, amp)
    step = Captured(step, run.model, run.optimizer) if config.graph else step
    for epoch in range(len(log.rows) + 1, min(config.epochs, config.stop_after or config.epochs) + 1):
        name = f"epoch {epoch}/{config.epochs}"
        began, lr = time.perf_counter(), float(run.schedule.get_last_lr()[0])
        train_loss, train_accuracy = train_epoch(run, batches.train(run.draws, f"{name} train"), step)
        test_loss, test_accuracy = evaluate(run.model, batches.test(f"{name} test"), amp)
        row = Row(
            epoch=epoch,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            lr=lr,
            seconds=time.perf_counter() - began,
        )
        typer.echo(
            f"{name}  train {train_loss:.4f} {train_accuracy:7.2%}  test {test_loss:.4f} {test_accuracy:7.2%}"
            f"  lr {lr:.2e}  {row['seconds']:.1f} s"
        )
        if not math.isfinite(train_loss + test_loss):
            raise SystemExit("the loss is no longer a finite number; try a lower --lr, or drop --amp")
        log.append(row, logfile)
        checkpoint.save(last, run, log)
        draw_curves({config.folder.name: log.rows}, curve)
    typer.echo(f"{len(log.rows)} of {config.epochs} epochs done: see {logfile}, {curve}, {last}")


def train_step(run: Run, amp: torch.autocast) -> Step:
    """A function that takes one optimizer step on a batch. -> its score, measured on the way."""

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with amp:
            logits = run.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        return score(logits.detach(), loss.detach(), labels)

    return step


def train_epoch(run: Run, batches: Iterable[Batch], step: Step) -> tuple[float, float]:
    """One step per batch. -> mean loss and accuracy over the images."""
    run.model.train()
    sums = [step(images, labels) for images, labels in batches]
    raise_pending()  # a GPU tells late of streams that came back wrong: before the epoch counts
    run.schedule.step()
    return mean(sums)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], amp: torch.autocast) -> tuple[float, float]:
    """-> mean loss and accuracy over the images."""
    model.eval()
    sums = []
    for images, labels in batches:
        with amp:
            logits = model(images)
        sums.append(score(logits, F.cross_entropy(logits.float(), labels), labels))
    return mean(sums)


def score(logits: Tensor, loss: Tensor, labels: Tensor) -> Tensor:
    """(loss, correct answers, images), summed over a batch. -> (3,), on the device: nothing waits for it."""
    hits = logits.argmax(1) == labels
    return torch.stack([loss * len(labels), hits.sum(), torch.ones_like(loss) * len(labels)])


def mean(scores: list[Tensor]) -> tuple[float, float]:
    """Mean loss and accuracy from the scores of all batches."""
    loss, hits, images = torch.stack(scores).cpu().double().sum(0).tolist()
    return loss / images, hits / images


def build(config: Config, data: Dataset, device: torch.device) -> Run:
    """A fresh model and optimizer; made on the CPU, so that a seed gives the same weights on every device."""
    _, channels, height, width = data.train.images.shape
    if height != width or height % config.patch_size:
        raise typer.BadParameter(
            f"expected a divisor of the images' side, got {config.patch_size} for {height}x{width} images "
            "(which must be square); choose another.",
            param_hint="--patch-size",
        )
    model = MODELS[config.model](
        img_size=height,
        patch_size=config.patch_size,
        in_chans=channels,
        num_classes=len(data.classes),
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
        coupling=COUPLINGS[config.coupling],
        scheduler=SCHEDULERS[config.scheduler],
    ).to(device)
    # A captured step reads the learning rate from the device, where the schedule writes it.
    lr = torch.tensor(config.lr, device=device) if config.graph else config.lr
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, capturable=config.graph)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp and config.amp_dtype == "float16")
    return Run(model, optimizer, schedule, scaler, torch.Generator().manual_seed(config.seed))


def describe(model: nn.Module, data: Dataset, config: Config, here: dict[str, object]) -> str:
    """One line on what is about to run."""
    parameters = sum(p.numel() for p in model.parameters())
    shape = "x".join(str(n) for n in data.train.images.shape[1:])
    return (
        f"{config.dataset}: {len(data.train):,} training and {len(data.test):,} test images of {shape}, "
        f"{len(data.classes)} classes; {config.model}, {config.scheduler}, {parameters:,} parameters; "
        f"{here['device']}"
    )


if __name__ == "__main__":
    app()
