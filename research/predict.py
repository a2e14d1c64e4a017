"""What a trained network sees in images: names of classes, and probabilities.

    python -m research.predict runs/folder-vit-reversible photo.jpg more-photos/
    python -m research.predict runs/folder-vit-reversible photo.jpg --json

Images may be of any size: they are brought to that of the training images, and normalised as those were.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from research.data.decoding import CorruptName, Decoder, Refuse, Skip, find_images, together
from research.data.streamed import Keys
from research.settings.flags import whole
from research.shared.machine import pick_device
from research.training.trained import Trained, load

app = typer.Typer(add_completion=False)


@app.command()
def main(
    run: Annotated[Path, typer.Argument(help="Folder of a run of research.train, or its last.pt.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them at any depth.")],
    top: Annotated[int, typer.Option(help="Classes to show of each image.", **whole(1))] = 3,
    json_: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each image, with the probabilities of all classes.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images at a time.", **whole(1))] = 64,
    workers: Annotated[int, typer.Option(help="Processes that decode; 0: this one.", **whole(0))] = 0,
    corrupt: Annotated[CorruptName, typer.Option(help="Files that cannot be read: stop, or omit them.")] = "refuse",
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Images that it was trained on: for a checkpoint that does not tell its classes."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Name the classes that a trained network gives to images."""
    trained = load(run, pick_device(device), data_dir)
    classes = trained.inputs.classes
    image = Column("image", overflow="fold")  # whole paths, also where the terminal is narrow
    table = Table(image, *(title for rank in range(1, min(top, len(classes)) + 1) for title in (f"{rank}.", "")))
    for path, row in predict(trained, find_images(images), batch_size, workers, corrupt):
        if json_:
            shares = dict(zip(classes, row.tolist(), strict=True))
            typer.echo(json.dumps({"image": str(path), "class": classes[int(row.argmax())], "probabilities": shares}))
            continue
        best = row.topk(min(top, len(classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        table.add_row(str(path), *(cell for i, share in pairs for cell in (classes[i], f"{share:.1%}")))
    if not json_:
        Console().print(table)


def predict(
    trained: Trained, paths: list[Path], batch_size: int = 64, workers: int = 0, corrupt: CorruptName = "refuse"
) -> Iterator[tuple[Path, Tensor]]:
    """Yields each image that can be read, with the probabilities of the classes, (classes,)."""
    numbers = torch.arange(len(paths))
    loader = DataLoader(
        # As label, each has its own number, so that one that is skipped leaves no doubt about the others.
        Decoder([(str(path), i) for i, path in enumerate(paths)], trained.inputs.image_size, trained.inputs.channels),
        batch_sampler=Keys(numbers, torch.zeros_like(numbers), batch_size),
        num_workers=workers,
        collate_fn=together,
        generator=torch.Generator(),
    )
    unreadable = Refuse("IMAGES", advice="") if corrupt == "refuse" else Skip()
    for pixels, which, broken in tqdm(loader, "predicting", leave=False, disable=None):
        for path, reason in broken:
            unreadable(path, reason)
        if len(which):
            rows = trained.probabilities(pixels).cpu()
            yield from zip([paths[i] for i in which.tolist()], rows, strict=True)


if __name__ == "__main__":
    app()
