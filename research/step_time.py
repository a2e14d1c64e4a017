"""How long a recipe's training step takes on a CPU, in float32 and under --amp, before and after it was made faster.

    python -m research.step_time --recipe minrev-vit --out research/results/step-time

Processor time of whole steps on random images, one thread unless OMP_NUM_THREADS says otherwise, all ways in turn in
one run: other programs slow all of them alike. Before: torch's fused attention, and an optimizer that goes through the
parameters operation by operation. After: what research.train runs.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from timm.layers import Attention

from research.data.split import Dataset, Split
from research.settings.config import RECIPES, Config, RecipeName
from research.shared.files import replacing
from research.shared.machine import environment
from research.training.build import build
from research.training.checkpoint import Run
from research.training.loop import train_step
from revlib.models.attention import SelfAttention

CPU = torch.device("cpu")

app = typer.Typer(add_completion=False)


def before(run: Run) -> Run:
    """The same run, without everything that makes it faster."""
    for module in run.model.modules():
        if isinstance(module, SelfAttention):
            module.__class__ = Attention
    slow = type(run.optimizer)(run.model.parameters(), lr=1e-3, fused=False)
    return dataclasses.replace(run, optimizer=slow)


def ways(config: Config) -> dict[str, Callable[[], object]]:
    """A training step for each way of running it."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (config.batch_size, 3, 32, 32), generator=draws, dtype=torch.uint8)
    split = Split(images, torch.randint(10, (config.batch_size,), generator=draws))
    data = Dataset(split, split, [str(i) for i in range(10)], 4, True)
    found: dict[str, Callable[[], object]] = {}
    for amp in (False, True):
        for name, change in (("before", before), ("after", lambda run: run)):
            torch.manual_seed(0)
            run = change(build(config, data, CPU))
            step = train_step(run, torch.autocast("cpu", torch.bfloat16, enabled=amp))
            found[f"{'bfloat16' if amp else 'float32'}, {name}"] = partial(step, images.float() / 255, split.labels)
    return found


@app.command()
def main(
    recipe: Annotated[RecipeName, typer.Option(help="Whose network and batch size.")] = "minrev-vit",
    scheduler: Annotated[str, typer.Option(help="As --scheduler of research.train.")] = "reversible",
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each way, after two that warm up.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Folder for table.md.")] = None,
) -> None:
    """Time the steps of a recipe."""
    config = dataclasses.replace(RECIPES[recipe], scheduler=scheduler, device="cpu")
    steps, seconds = ways(config), dict[str, list[float]]()
    for number in range(rounds + 2):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if number > 1:
                seconds.setdefault(name, []).append(time.process_time() - began)
    base = statistics.median(seconds["float32, before"])
    here = environment(CPU)
    lines = [
        f"A step of {recipe} under {scheduler}, {config.batch_size} images, processor time, median (fastest) of "
        f"{rounds}; {here['device']}, {here['threads']} thread(s), torch {here['torch']}.",
        "",
        "| | ms | images/s | times as fast |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, values in seconds.items():
        median = statistics.median(values)
        speed = f"{config.batch_size / median:.0f} | {base / median:.2f}"
        lines.append(f"| {name} | {median * 1e3:.0f} ({min(values) * 1e3:.0f}) | {speed} |")
    typer.echo("\n".join(lines))
    if out is not None:
        with replacing(out / "table.md") as temporary:
            temporary.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    app()
