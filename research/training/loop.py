"""The training loop: epochs of steps, tests, lines of the log, and checkpoints."""

import math
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from research.data.augment import mixer
from research.data.batches import Batch, Batches
from research.data.split import Dataset
from research.data.streamed import Streamed
from research.settings.config import Config
from research.shared.captured import Captured, Step
from research.shared.machine import environment, make_reproducible, slowdown
from research.training import checkpoint
from research.training.build import AMP_DTYPES, build
from research.training.checkpoint import Run
from research.training.distributed import ALONE, Processes
from research.training.inputs import Inputs, read
from research.training.log import Log, Row, duration, told
from research.training.plots import draw_curves
from research.training.tracking import trackers
from revlib import raise_pending


def train(config: Config, processes: Processes, device: torch.device) -> None:
    """The whole run. Every process has the same weights and order of images; the first writes files and messages."""
    logfile, curve, last = (config.folder / name for name in ("log.jsonl", "curve.png", "last.pt"))
    if config.graph and device.type != "cuda":
        raise typer.BadParameter(f"needs CUDA, this run is on {device.type}; drop it.", param_hint="--graph")
    make_reproducible(config.seed, config.deterministic)
    with processes.first_first():
        data = read(config)
    data = data.prepare(config.limit_train, config.limit_test, device)
    mix = mixer(config.mixup, config.cutmix, len(data.classes))
    batches = Batches(data, config.batch_size, processes.rank > 0, config.rand_augment, mix, config.statistics)
    inputs = Inputs.of(data, batches.normalize)
    run = build(config, data, device)
    if processes.rank == 0:
        checkpoint.make_room(config, run)
    here = environment(device) | {"processes": processes.count}
    say: Callable[[str], None] = typer.echo if processes.rank == 0 else lambda message: None
    if config.resume:
        log = checkpoint.resume(last, run, config, inputs, here, say)
        if log.resumed[-1:] != [len(log.rows)] and len(log.rows) < config.epochs:
            log.header["resumed"] = [*log.resumed, len(log.rows)]
    else:
        log = Log({"config": config.as_json(), "environment": here, "data": inputs.as_json()}, [])
    if processes.rank == 0:
        if not config.resume:
            last.unlink(missing_ok=True)
        log.write(logfile)  # on resuming, an epoch that was logged but not saved goes
    tell = trackers(config, log) if processes.rank == 0 else []
    say(describe(run.model, data, config, here))
    if config.amp and (times := slowdown(AMP_DTYPES[config.amp_dtype], device)) > 2:
        say(
            f"--amp will be slow here: matrix products in {config.amp_dtype} take {times:.0f} times as long as in "
            "float32, since this processor has no instructions for them. Without --amp the run is faster."
        )

    amp = torch.autocast(device.type, AMP_DTYPES[config.amp_dtype], enabled=config.amp)
    step = train_step(run, amp, processes, config.label_smoothing, config.clip_grad)
    tested = run.model if run.ema is None else run.ema.module
    step = Captured(step, {run.model, tested}, run.optimizer) if config.graph else step
    end = min(config.epochs, config.stop_after or config.epochs)
    for epoch in range(len(log.rows) + 1, end + 1):
        name = f"epoch {epoch}/{config.epochs}"
        began, lr = time.perf_counter(), float(run.schedule.get_last_lr()[0])
        processes.seed(config.seed, epoch)
        train_loss, train_accuracy = train_epoch(run, batches.train(run.draws, f"{name} train"), step, processes)
        trained = time.perf_counter() - began
        test_loss, test_accuracy = evaluate(tested, batches.test(f"{name} test"), amp, processes)
        row = Row(
            epoch=epoch,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            lr=lr,
            seconds=time.perf_counter() - began,
        )
        speed, left = len(data.train) / trained, (end - epoch) * row["seconds"]
        say(f"{name}  {told(row)}  {speed:,.0f} images/s" + f"  {duration(left)} left" * (end > epoch))
        if not math.isfinite(train_loss + test_loss):
            raise SystemExit("the loss is no longer a finite number; try a lower --lr, or drop --amp")
        if processes.rank == 0:
            try:
                log.append(row, logfile)
                checkpoint.save(last, run, log)
                draw_curves({config.folder.name: log.rows}, curve, log.resumed)
            except (OSError, RuntimeError) as error:  # torch.save raises the second for a full disk
                raise checkpoint.unwritten(config, epoch, error) from error
            for tracker in tell:
                tracker(row)
    say(f"{len(log.rows)} of {config.epochs} epochs done: see {logfile}, {curve}, {last}")


def train_step(
    run: Run, amp: torch.autocast, processes: Processes = ALONE, smoothing: float = 0.0, longest: float = 0.0
) -> Step:
    """Returns a function that takes one optimizer step on a batch and returns the score of this process's part."""
    model = run.model if processes.count == 1 else DistributedDataParallel(run.model)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        count, images, labels = len(images), processes.part(images), processes.part(labels)
        with amp:
            logits = model(images)
        loss = processes.loss(logits.float(), labels, count, smoothing)
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        if longest:
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), longest)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        if run.ema is not None:
            run.ema.update(run.model)
        return score(logits.detach(), loss.detach() * (count / processes.count), labels)

    return step


def train_epoch(run: Run, batches: Iterable[Batch], step: Step, processes: Processes = ALONE) -> tuple[float, float]:
    """Take one step for each batch. Returns mean loss and accuracy over the images."""
    run.model.train()
    sums = [step(images, labels) for images, labels in batches]
    raise_pending()  # a GPU reports streams that were recovered wrongly only later; the epoch must not count then
    run.schedule.step()
    return mean(sums, processes)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], amp: torch.autocast, processes: Processes = ALONE
) -> tuple[float, float]:
    """Returns mean loss and accuracy over the images."""
    model.eval()
    sums = []
    for images, labels in batches:
        theirs = processes.part(labels)
        with amp:
            logits = model(processes.part(images))
        sums.append(score(logits, F.cross_entropy(logits.float(), theirs, reduction="sum"), theirs))
    return mean(sums, processes)


def score(logits: Tensor, loss: Tensor, labels: Tensor) -> Tensor:
    """The score of a batch, (summed loss, correct answers, images): a tensor on the device, which nobody waits for."""
    # A mixture of two images counts as right by the label of its larger part.
    hits = logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))
    return torch.stack([loss, hits.sum(), torch.ones_like(loss) * len(labels)])


def mean(scores: list[Tensor], processes: Processes) -> tuple[float, float]:
    """Mean loss and accuracy from the scores of all batches."""
    sums = torch.stack(scores).cpu().double().sum(0)
    loss, hits, images = processes.sum(sums, scores[0].device).tolist()
    return loss / images, hits / images


def describe(model: nn.Module, data: Dataset, config: Config, here: dict[str, object]) -> str:
    """One line on what is about to run."""
    parameters = sum(p.numel() for p in model.parameters())
    shape = "x".join(str(n) for n in data.train.shape)
    where = ", read from disk" if isinstance(data.train, Streamed) else ""
    return (
        f"{config.dataset}: {len(data.train):,} training and {len(data.test):,} test images of {shape}{where}, "
        f"{len(data.classes)} classes; {config.model}, {config.scheduler}, {parameters:,} parameters; "
        f"{here['device']}"
    )
