"""What it costs RevSwin and RevMViT to take a batch in parts where their maps are largest.

    python -m research.parts --out research/results/parts

Of each model: the batch as a whole; RevMViT's transitions alone in parts; and what the model does unless it is told
otherwise. Bytes of activations at the peak of backward are counted. Time is processor time of a step at 224 pixels on
one thread, all ways in turn in one run.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import Tensor, nn

import revlib.models  # noqa: F401  # registers its models with timm
from research.shared.files import replacing
from research.shared.machine import environment
from revlib.testing import footprint

MODELS = ("rev_swin_tiny", "rev_mvit_base")
WHOLE, TRANSITIONS, GIVEN = "whole", "transitions in parts", "as given"


def built(name: str, way: str, **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **({"parts": 1} if way == WHOLE else {}), **sizes).train()
    if way == TRANSITIONS:
        model.stages[0].pairs.parts = 1  # the functions of the first stage take the batch at once
    return model


def seconds(model: nn.Module, images: Tensor) -> float:
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    model(images).square().mean().backward()
    return time.process_time() - began


def peak_of(model: nn.Module, images: Tensor) -> float:
    return footprint(lambda x: (model(x),), [images], model.parameters()).peak


def measure(name: str, images: int, size: int, rounds: int, **sizes: int) -> list[tuple[str, float, float]]:
    """Of each way: seconds of a step relative to those of the batch as a whole, and bytes an image at the peak."""
    batch = torch.randn(images, 3, size, size)
    ways = (WHOLE, TRANSITIONS, GIVEN) if "mvit" in name else (WHOLE, GIVEN)  # RevSwin has no such transitions
    models = {way: built(name, way, **sizes) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in models}
    for k in range(rounds + 1):
        for way in list(models) if k % 2 else reversed(list(models)):
            found = seconds(models[way], batch)
            if k:  # the first step of each warms up
                times[way].append(found)
    ratios = {way: [a / b for a, b in zip(ts, times[WHOLE], strict=True)] for way, ts in times.items()}
    peaks = {way: peak_of(model, batch) / images for way, model in models.items()}
    return [(way, statistics.median(ratios[way]), peaks[way]) for way in models]


def main(
    models: Annotated[str, typer.Option(help="Names of timm's, comma-separated.")] = ",".join(MODELS),
    batches: Annotated[str, typer.Option(help="Numbers of images, comma-separated.")] = "4,16",
    size: Annotated[int, typer.Option(min=32, help="Pixels of a side.")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each way.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Write the table into this folder.")] = None,
) -> None:
    """Measure, print the table, and write it if asked."""
    torch.set_num_threads(1)
    here = environment(torch.device("cpu"))
    lines = [f"Medians of {rounds} steps; {here['device']}, one thread, torch {here['torch']}.", ""]
    lines += ["| model | images | way | time, of the whole | peak [MB / image] |", "| --- | ---: | --- | ---: | ---: |"]
    for name in models.split(","):
        for images in map(int, batches.split(",")):
            for way, ratio, peak in measure(name, images, size, rounds):
                lines.append(f"| {name} | {images} | {way} | {ratio:.2f} | {peak / 1e6:.1f} |")
                typer.echo(lines[-1])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        command = f"python -m research.parts --models {models} --batches {batches} --size {size} --rounds {rounds}"
        for file, text in (("table.md", "\n".join(lines)), ("command.txt", f"{command} --out {out}")):
            with replacing(out / file) as temporary:
                temporary.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
