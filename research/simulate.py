"""Bytes of a training step of the published sizes under every scheduler, on fake tensors: no GPU, and hardly memory.

    python -m research.simulate                                     # of RevViT, RevSwin and RevMViT: minutes on a CPU
    python -m research.simulate --model l --img-size 1024 --batch-size 4 --amp bfloat16
    python -m research.simulate --model s --depths '' --validate    # against real steps, too

Peak bytes are affine in the number of images, and bytes in the number of blocks: two simulated sizes give the largest
that fits, and further ones tell the error of the line. What is counted: see research/footprints.py.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tqdm import tqdm

from research.settings.flags import whole_numbers
from research.shared.files import replacing
from research.shared.machine import environment, pick_device
from research.studies.footprints import CONTENDERS, MODELS, Point, Setting, count

app = typer.Typer(add_completion=False)

PUBLISHED = [name for name, model in MODELS.items() if not model.sizes]
PAPER = {"s": 8.8, "b": 17.0, "l": 22.6}  # MB an image at 224 pixels: Mangalam et al. 2022, table 1
GOALS = {"s": 5.5, "b": 11.0, "l": 14.5}  # and ours, in float32
VALIDATED = [  # models, pixels and dropout that a CPU runs in seconds
    *((name, 64, dropout) for name in ("tiny", "tiny-swin", "tiny-mvit") for dropout in (0.0, 0.2)),
    ("s", 224, 0.0),
]


class Line(NamedTuple):
    """A straight line through two points of a curve of bytes."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def slope(self) -> float:
        return (self.y1 - self.y0) / (self.x1 - self.x0)

    def largest(self, limit: int) -> int:
        """The largest whole x whose y is within the limit; 0 if none is."""
        return max(0, self.x0 + (limit - self.y0) * (self.x1 - self.x0) // (self.y1 - self.y0))

    def error(self, x: int, y: int) -> float:
        """Relative distance of another point of the curve from the line."""
        return abs(self.y0 + self.slope * (x - self.x0) - y) / y


@dataclass(frozen=True)
class Row:
    """One contender: activation bytes an image, what fits, and how far further points are from the lines."""

    model: str
    contender: str
    depth: int
    fixed: int  # bytes of weights, gradients and optimizer
    held_per_image: float
    peak_per_image: float
    fits: dict[int, tuple[int, int]]  # GB -> (largest batch at this depth, largest depth at the given batch)
    batch_error: float
    depth_error: float


def solve(points: Sequence[Point], depth: int, batch: int, memory: Sequence[int]) -> Row:
    """The row of a contender, from its points at (depth, batch) and at other batch sizes and depths."""
    at = {(p.depth, p.batch): p for p in points}
    here, twice, deeper = at[depth, batch], at[depth, 2 * batch], at[2 * depth, batch]
    by_batch = Line(batch, here.total, 2 * batch, twice.total)
    by_depth = Line(depth, here.total, 2 * depth, deeper.total)
    fits = {gb: (by_batch.largest(gb * 10**9), by_depth.largest(gb * 10**9)) for gb in memory}
    return Row(
        here.model,
        here.contender,
        depth,
        here.weights + here.gradients + here.optimizer,
        Line(batch, here.held, 2 * batch, twice.held).slope,
        Line(batch, here.peak, 2 * batch, twice.peak).slope,
        fits,
        max(by_batch.error(p.batch, p.total) for p in points if p.depth == depth),
        max(by_depth.error(p.depth, p.total) for p in points if p.batch == batch),
    )


def markdown(head: str, rows: Sequence[Sequence[str]]) -> str:
    titles = head.split(" | ")
    lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(rows: Sequence[Row], batch: int, comparable: bool) -> str:
    """Activations an image, if comparable beside the paper's; and the largest batch and depth that fit."""
    per_image = "model | how | blocks | weights, gradients, Adam [MB] | held [MB / image] | peak [MB / image]"
    cells = [[r.model, r.contender, str(r.depth), f"{r.fixed / 1e6:.0f}"] for r in rows]
    for row, cell in zip(rows, cells, strict=True):
        cell += [f"{row.held_per_image / 1e6:.2f}", f"{row.peak_per_image / 1e6:.2f}"]
        cell += [str(known.get(row.model, "")) for known in (PAPER, GOALS)] if comparable else []
    fits = "model | how | " + " | ".join(f"fits in {gb} GB" for gb in rows[0].fits)
    largest = [[r.model, r.contender, *(f"{b:,} / {d:,}" for b, d in r.fits.values())] for r in rows]
    return (
        f"{markdown(per_image + ' | paper | goal' * comparable, cells)}\n\n"
        f"Largest batch / largest depth with {batch} images, 1 GB = 10^9 bytes:\n\n{markdown(fits, largest)}\n\n"
        f"Further simulated sizes are off these lines by at most {max(r.batch_error for r in rows):.2%} of all bytes "
        f"in batch size, {max(r.depth_error for r in rows):.2%} in depth."
    )


def validate(
    contenders: Sequence[str], setting: Setting, tick: Callable[[], object]
) -> tuple[str, list[dict[str, Any]]]:
    """Real steps beside simulated ones."""
    found, rows = [], []
    for model, pixels, dropout in VALIDATED:
        case = replace(setting, img_size=pixels, dropout=dropout)
        sizes = (model, contenders, MODELS[model].depth, [2], case)
        for real, fake in zip(count(*sizes, fake=False, tick=tick), count(*sizes, tick=tick), strict=True):
            row = [model, real.contender, str(dropout)]
            for a, b in ((real.held, fake.held), (real.peak, fake.peak)):
                row += [f"{a:,}", f"{b:,}", f"{b / a - 1:.1e}"]
            rows.append(row)
            found.append({"dropout": dropout, "real": asdict(real), "fake": asdict(fake)})
    head = "model | how | dropout | real held [B] | fake held [B] | error | real peak [B] | fake peak [B] | error"
    return markdown(head, rows), found


def draw(points: Sequence[Point], path: Path) -> None:
    """Peak activation memory of an image against depth, logarithmic in both."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(p.contender for p in points):
        line = sorted((p.depth, p.peak / p.batch / 1e6) for p in points if p.contender == name)
        width, style = 3 if name == "reversible" else 1.3, "--" if name.startswith("timm") else "-"
        axes.plot(*zip(*line, strict=True), style, marker="o", markersize=4, label=name, linewidth=width)
    depths = sorted({p.depth for p in points})
    label = f"peak activation memory [MB / image, of {points[0].batch}]"
    axes.set(xscale="log", yscale="log", xlabel=f"blocks of the width of {points[0].model.upper()}", ylabel=label)
    axes.set_xticks(depths, [str(d) for d in depths], minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def listed(text: str, flag: str, allowed: Sequence[str]) -> list[str]:
    """The names in a comma-separated flag, each of which must be among those allowed."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in allowed:
            wanted = f"names among {', '.join(allowed)}"
            raise typer.BadParameter(f"expected {wanted}, separated by commas, got {part!r}", param_hint=flag)
    return list(dict.fromkeys(parts))


@app.command()
def main(
    model: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}; by commas.")] = ",".join(PUBLISHED),
    schedulers: Annotated[str, typer.Option(help="Rows of the tables, comma-separated.")] = ",".join(CONTENDERS),
    img_size: Annotated[int, typer.Option(min=16, help="Pixels; a multiple of 16, or 32 in stages.")] = 224,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks, instead of the model's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images, where the largest depth is asked for.")] = 64,
    memory: Annotated[str, typer.Option(help="Budgets in GB, comma-separated.")] = "16,24,40,80",
    depths: Annotated[str, typer.Option(help="Blocks of the first model in the plot; empty: none.")] = "12,48,192,1000",
    dtype: Annotated[Literal["float32", "bfloat16", "float64"], typer.Option(help="Of the model.")] = "float32",
    amp: Annotated[Literal["bfloat16", "float16"] | None, typer.Option(help="Under autocast to it.")] = None,
    device: Annotated[str, typer.Option(help="Where fake tensors seem to be; cuda where there is one.")] = "cpu",
    validate_: Annotated[bool, typer.Option("--validate", help="Also compare with real steps.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/simulate"),
) -> None:
    """Size training steps without running them; write simulation.json, table.md and memory.png."""
    models, names = listed(model, "--model", list(MODELS)), listed(schedulers, "--schedulers", list(CONTENDERS))
    budgets, plotted = whole_numbers(memory, "--memory"), whole_numbers(depths, "--depths") if depths else []
    if not (models and names):
        raise typer.BadParameter("expected at least one --model and one of --schedulers")
    for name, asked in [(m, depth or MODELS[m].depth) for m in models] + [(models[0], d) for d in plotted]:
        if img_size % MODELS[name].pixels:
            unit = f"a multiple of {MODELS[name].pixels} for {name}"
            raise typer.BadParameter(f"expected {unit}, got {img_size}", param_hint="--img-size")
        if asked < MODELS[name].least:
            least = f"at least {MODELS[name].least} blocks for {name}"
            raise typer.BadParameter(f"expected {least}, got {asked}", param_hint="--depth, --depths")
    setting = Setting(img_size, dtype, amp, pick_device(device).type)
    batches = sorted({1, batch_size, 2 * batch_size, 4 * batch_size})
    many = 16 * batch_size
    points: list[Point] = []
    rows, curve, text, checked = [], [], "", []
    steps = len(models) * (len(batches) + 2) + len(plotted) + 2 * len(VALIDATED) * validate_
    with tqdm(total=steps * len(names), unit="step") as bar:
        for m in models:
            own = depth or MODELS[m].depth
            for d, sizes in ((own, batches), (2 * own, [batch_size]), (4 * own, [batch_size])):
                bar.set_description(f"{m}, {d} blocks")
                points += count(m, names, d, sizes, setting, tick=bar.update)
            for name in names:
                mine = [p for p in points if (p.model, p.contender) == (m, name)]
                rows.append(solve(mine, own, batch_size, budgets))
        for d in plotted:
            bar.set_description(f"{models[0]}, {d} blocks")
            curve += count(models[0], names, d, [many], setting, tick=bar.update)
        if validate_:
            bar.set_description("validation")
            text, checked = validate(names, setting, bar.update)
    published = depth is None and setting == Setting(device=setting.device)
    text = "\n\n".join([tables(rows, batch_size, published), *([text] if text else [])])
    record = {
        "setting": asdict(setting) | {"batch_size": batch_size},
        "environment": environment(torch.device(setting.device)),
        "rows": [asdict(r) for r in rows],
        "points": [asdict(p) | {"total": p.total} for p in [*points, *curve]],
        "validation": checked,
    }
    with replacing(out / "simulation.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    with replacing(out / "table.md") as temporary:
        temporary.write_text(text + "\n")
    if curve:
        draw(curve, out / "memory.png")
    typer.echo(f"{text}\n\nWritten to {out}.")


if __name__ == "__main__":
    app()
