"""From a pretrained vision transformer to a reversible one, and on: what conversion changes, costs and saves.

    python -m research.finetune                                                   # digits: a few minutes on one core
    python -m research.finetune --dataset cifar10 --data-dir DIR --limit 4000

Trains a timm ViT on the first classes of a data set, converts it, and fine-tunes both networks on all classes, with a
fresh head, the same seed, and the same order. "Restored" is the original architecture with the fine-tuned weights.
"""

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from timm.models import VisionTransformer
from torch import Tensor, nn

from research.data.batches import Batches
from research.data.readers import DATASETS, DatasetName
from research.data.split import Dataset, Split
from research.shared.files import replacing
from research.shared.machine import environment, make_reproducible
from research.training.loop import evaluate
from revlib import convert
from revlib.testing import footprint

app = typer.Typer(add_completion=False)


@dataclasses.dataclass
class Line:
    """A network before and after fine-tuning. Bytes are of activations, ``error`` is of the logits against the original
    network's (relative, in the norm), ``agree`` the share of test images given the same class."""

    name: str
    momentum: float | None
    error: float
    agree: float
    accuracy_before: float
    accuracy: float
    accuracy_restored: float
    held: int
    peak: int
    seconds: float


@app.command()
def main(
    dataset: Annotated[DatasetName, typer.Option(help="Real images.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="Where they lie, unless downloaded.")] = None,
    cache_dir: Annotated[Path, typer.Option(help="Keeps decoded images.")] = Path("~/.cache/revlib"),
    limit: Annotated[int, typer.Option(help="Training images; as many for tests at most.")] = 2000,
    classes: Annotated[int, typer.Option(help="Classes of pretraining; fine-tuning adds the others.")] = 5,
    embed_dim: Annotated[int, typer.Option(help="Width.")] = 64,
    depth: Annotated[int, typer.Option(help="Blocks.")] = 12,
    patch_size: Annotated[int, typer.Option(help="Pixels.")] = 2,
    groups: Annotated[str, typer.Option(help="Values of convert.vit(group=...), by commas.")] = "2,4,8",
    pretrain: Annotated[int, typer.Option(help="Epochs.")] = 20,
    finetune: Annotated[int, typer.Option(help="Epochs.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    lr: Annotated[float, typer.Option(help="AdamW's, at its highest.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for table.md and finetune.json.")] = Path("runs/finetune"),
) -> None:
    """Train, convert, compare, fine-tune; write a table."""
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    torch.set_num_threads(1)
    make_reproducible(seed, deterministic=True)
    cpu = torch.device("cpu")
    whole = DATASETS[dataset](data_dir, cache_dir).prepare(limit, limit, cpu)
    model = VisionTransformer(
        img_size=whole.train.images.shape[-1],
        patch_size=patch_size,
        in_chans=whole.train.images.shape[1],
        num_classes=classes,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // 16,
    )
    some = dataclasses.replace(whole, train=first(whole.train, classes), test=first(whole.test, classes))
    train(model, some, pretrain, batch_size, lr, seed)
    accuracy = test(model, some, batch_size)
    typer.echo(f"pretrained on {len(some.train):,} images of {classes} classes: test accuracy {accuracy:.2%}")

    # Closeness is of the pretrained network with its own head, on the images it was made for.
    images = torch.cat([images for images, _ in Batches(some, batch_size).test("")])
    lines = []
    contenders: dict[str, int | None] = {"ordinary": None, "ordinary, checkpointed": None}
    contenders |= {f"reversible, group={group}": int(group) for group in groups.split(",")}
    for name, group in contenders.items():
        net = copy.deepcopy(model) if group is None else convert.vit(model, group=group)
        if name.endswith("checkpointed"):
            net.set_grad_checkpointing()
        error, agree = closeness(net, model, images)
        before = test(net, some, batch_size)
        make_reproducible(seed, deterministic=True)
        net.reset_classifier(len(whole.classes))
        found = footprint(lambda x, net=net: (net.train()(x),), [images[:batch_size]], net.parameters())
        net.zero_grad()
        began = time.perf_counter()
        train(net, whole, finetune, batch_size, lr, seed)
        seconds = time.perf_counter() - began
        after = test(net, whole, batch_size)
        momentum = None if group is None else net.blocks.momentum
        restored = after if group is None else test(convert.restore(net), whole, batch_size)
        lines.append(Line(name, momentum, error, agree, before, after, restored, *found, seconds))
        typer.echo(f"{name}: {after:.2%} after {seconds:.0f} s")
    write(out, lines, {**setting, **environment(cpu)})


def first(split: Split, classes: int) -> Split:
    """The images of the first classes."""
    chosen = split.labels < classes
    return Split(split.images[chosen], split.labels[chosen])


def train(model: nn.Module, data: Dataset, epochs: int, batch_size: int, lr: float, seed: int) -> None:
    """AdamW on a cosine; the order of images and their augmentation follow from the seed alone."""
    draws, batches = torch.Generator().manual_seed(seed), Batches(data, batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * -(-len(data.train) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(1, steps), pct_start=0.1)
    model.train()
    for epoch in range(epochs):
        for images, labels in batches.train(draws, f"epoch {epoch + 1}"):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def test(model: nn.Module, data: Dataset, batch_size: int) -> float:
    """The share of test images that are classified rightly."""
    return evaluate(model, Batches(data, batch_size).test("test"), torch.autocast("cpu", enabled=False))[1]


@torch.no_grad()
def closeness(net: nn.Module, original: nn.Module, images: Tensor) -> tuple[float, float]:
    """Relative error of the logits, and the share of images with the same largest one."""
    got, want = net.eval()(images), original.eval()(images)
    return float((got - want).norm() / want.norm()), float((got.argmax(1) == want.argmax(1)).float().mean())


def write(out: Path, lines: list[Line], setting: dict[str, Any]) -> None:
    """finetune.json with everything, table.md and the terminal with what matters."""
    head = ["network", "γ", "logits' error", "same class", "accuracy before", "after fine-tuning", "then restored"]
    head += ["held, MiB", "peak, MiB", "seconds"]
    rows = [
        [
            line.name,
            "" if line.momentum is None else f"{line.momentum:.3g}",
            f"{line.error:.2e}",
            *(f"{v:.2%}" for v in (line.agree, line.accuracy_before, line.accuracy, line.accuracy_restored)),
            *(f"{v / 2**20:.2f}" for v in (line.held, line.peak)),
            f"{line.seconds:.1f}",
        ]
        for line in lines
    ]
    with replacing(out / "finetune.json") as path:
        content = {"setting": setting, "networks": [dataclasses.asdict(line) for line in lines]}
        path.write_text(json.dumps(content, indent=1) + "\n")
    with replacing(out / "table.md") as path:
        cells = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
        text = "".join("| " + " | ".join(row) + " |\n" for row in cells)
        path.write_text(text)
    typer.echo(text, nl=False)
    typer.echo(f"see {out / 'table.md'} and {out / 'finetune.json'}")


if __name__ == "__main__":
    app()
