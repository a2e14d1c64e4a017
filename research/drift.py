"""How far inversion drifts, and what that does to gradients: by depth, precision, coupling, scheduler and weights.

    python -m research.drift                                      # a few minutes on one CPU core
    python -m research.drift --depths 1,3 --deep 0 --out runs/small

Blocks are those of research/benchmark.py. Errors are relative, in the norm: of the second input stream as backward
recovers it for the first function (0 where it is kept), and of all gradients together, against Naive in the same
precision and against Naive in float64. Nothing is raised for drift here: tolerance is infinite.
"""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.figure import Figure  # without pyplot: always Agg, no global state, no window
from torch import Tensor, nn
from tqdm import tqdm

from research.benchmarking.contenders import vit
from research.settings.flags import whole_numbers
from research.shared.files import replacing
from research.shared.machine import environment
from revlib import ReversibleSequence
from revlib.couplings import Additive, Coupling, ExactAdditive
from revlib.schedulers import Anchored, Checkpoint, Naive, Reversible, Scheduler

FLOOR = 1e-18  # where plots draw an error of zero
app = typer.Typer(add_completion=False)


class Precision(NamedTuple):
    dtype: torch.dtype  # of weights and streams
    autocast: bool = False


PRECISIONS = {
    "float64": Precision(torch.float64),
    "float32": Precision(torch.float32),
    "float32, bf16 autocast": Precision(torch.float32, autocast=True),
    "bfloat16": Precision(torch.bfloat16),
}
COUPLINGS: dict[str, Coupling] = {"Additive": Additive(), "ExactAdditive": ExactAdditive()}
SCHEDULERS: dict[str, Scheduler] = {
    "Naive": Naive(),
    "Reversible": Reversible(tolerance=math.inf),
    "Anchored(8)": Anchored(8, tolerance=math.inf),
    "Checkpoint": Checkpoint(tolerance=math.inf),
}


@dataclass(frozen=True)
class Setting:
    """A stack of blocks with weights: ``scale`` times those of initialisation, then trained for so many steps."""

    depth: int
    width: int
    scale: float = 1.0
    trained: int = 0

    @property
    def weights(self) -> str:
        return f"scale {self.scale:g}, " + (f"{self.trained} steps" if self.trained else "untrained")


@dataclass(frozen=True)
class Point:
    sweep: str  # depth or weights
    setting: Setting
    precision: str
    coupling: str
    scheduler: str
    inversion: float
    to_naive: float
    to_truth: float
    largest: float  # element of the streams that come out


def relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The relative error of all tensors together; infinite if anything is not a number."""
    gap = sum((f.double() - e.double()).square().sum().item() for f, e in zip(found, expected, strict=True))
    size = sum(e.double().square().sum().item() for e in expected)
    error = math.sqrt(gap / size) if gap else 0.0
    return error if math.isfinite(error) else math.inf


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """The sum of the outputs' mean squares, in float64: its own rounding is not what is measured."""
    return torch.stack([y.double().square().mean() for y in outputs]).sum()


class Stage:
    """The weights and inputs of a setting, in float32."""

    def __init__(self, setting: Setting, heads: int, tokens: int, batch: int) -> None:
        torch.manual_seed(0)
        self.setting = setting
        self.stack = ReversibleSequence([vit(setting.width, heads) for _ in range(setting.depth)])
        self.streams = [torch.randn(batch, tokens, setting.width) for _ in range(2)]
        with torch.no_grad():
            for module in self.stack.modules():
                if isinstance(module, nn.Linear):
                    module.weight.mul_(setting.scale)
        self.stack.scheduler = Naive()
        targets = [torch.randn_like(x) for x in self.streams]
        optimizer = torch.optim.AdamW(self.stack.parameters(), lr=1e-3)
        for _ in range(setting.trained):
            optimizer.zero_grad()
            loss_of([y - t for y, t in zip(self.stack(*self.streams), targets, strict=True)]).backward()
            optimizer.step()
        self.copies = {name: copy.deepcopy(self.stack).to(p.dtype) for name, p in PRECISIONS.items()}
        self.truth = self.step("float64", "Additive", "Naive")[1]

    def step(self, precision: str, coupling: str, scheduler: str) -> tuple[float, list[Tensor], float]:
        """Returns the error of the recovered stream, all gradients, and the largest element of the outputs."""
        dtype, autocast = PRECISIONS[precision]
        stack = self.copies[precision]
        stack.zero_grad()
        stack.coupling, stack.scheduler = COUPLINGS[coupling], SCHEDULERS[scheduler]
        streams = [x.to(dtype, copy=True).requires_grad_() for x in self.streams]
        # What the first function gets: in forward and, unless its activations are stored, once more in backward.
        seen: list[Tensor] = []
        hook = stack[0].F.register_forward_pre_hook(lambda _, args, note=seen.append: note(args[0].detach().clone()))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = stack(*streams)
        loss_of(outputs).backward()
        hook.remove()
        gradients = [t.grad for t in (*streams, *stack.parameters()) if t.grad is not None]
        largest = max(y.abs().max().item() for y in outputs)
        return relative([seen[-1]], [seen[0]]), gradients, largest

    def measure(self, sweep: str, tick: Callable[[], object]) -> list[Point]:
        points = []
        for precision, coupling in cells():
            expected: list[Tensor] = []
            for name in SCHEDULERS:
                inversion, found, largest = self.step(precision, coupling, name)
                expected = expected or found
                errors = inversion, relative(found, expected), relative(found, self.truth)
                points.append(Point(sweep, self.setting, precision, coupling, name, *errors, largest))
                tick()
        return points


def cells() -> list[tuple[str, str]]:
    """Precisions with the couplings that they can have: exact sums need streams of more digits than bfloat16's."""
    return [(p, c) for p in PRECISIONS for c in COUPLINGS if p != "bfloat16" or c == "Additive"]


def table(points: Sequence[Point], metric: str, title: str, column: Callable[[Setting], str]) -> str:
    """Markdown: a row a precision, coupling and scheduler, a column a setting."""
    columns = list(dict.fromkeys(column(p.setting) for p in points))
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for p in points:
        if p.scheduler != "Naive" or metric == "to_truth":
            row = rows.setdefault((p.precision, p.coupling, p.scheduler), {})
            row[column(p.setting)] = f"{getattr(p, metric):.1e}" if getattr(p, metric) else "0"
    lines = [["precision", "coupling", "scheduler", *columns], ["---"] * 3 + ["---:"] * len(columns)]
    lines += [[*key, *(row.get(c, "") for c in columns)] for key, row in rows.items()]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


METRICS = {
    "inversion": "Inversion error of the input",
    "to_naive": "Gradient error against Naive, same precision",
    "to_truth": "Gradient error against float64",
}


def draw(points: Sequence[Point], path: Path, column: Callable[[Setting], Any], label: str) -> None:
    """A panel a metric: a colour a precision, a line style a coupling, under Reversible; Naive dotted."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 3), METRICS.items(), strict=True):
        for precision, coupling in cells():
            for scheduler in ("Reversible", "Naive") if metric == "to_truth" else ("Reversible",):
                line = [p for p in points if (p.precision, p.coupling, p.scheduler) == (precision, coupling, scheduler)]
                style = ":" if scheduler == "Naive" else "-" if coupling == "Additive" else "--"
                axes.plot(
                    [column(p.setting) for p in line],
                    [max(getattr(p, metric), FLOOR) for p in line],
                    style,
                    color=f"C{list(PRECISIONS).index(precision)}",
                    marker="o" if coupling == "Additive" else "s",
                    markersize=4,
                    label=f"{precision}, {coupling}" + (", Naive" if scheduler == "Naive" else ""),
                )
        if all(isinstance(column(p.setting), int) for p in points):
            axes.set_xscale("log")
        axes.set(title=title, xlabel=label, yscale="log")
        axes.axhline(FLOOR, color="grey", linewidth=0.5)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="x-small")
    figure.suptitle(f"Scheduler: Reversible. An error of zero is drawn at {FLOOR:g}.", fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


@app.command()
def main(
    depths: Annotated[str, typer.Option(help="Numbers of blocks, comma-separated.")] = "1,3,12,48,192",
    deep: Annotated[int, typer.Option(min=0, help="One more number of blocks, of the small width; 0: none.")] = 1000,
    width: Annotated[int, typer.Option(min=1, help="Channels of a stream.")] = 64,
    deep_width: Annotated[int, typer.Option(min=1, help="Channels of a stream of the deepest stack.")] = 16,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads; they divide both widths.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an image.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 2,
    at: Annotated[int, typer.Option(min=1, help="Number of blocks for which weights are varied.")] = 12,
    scales: Annotated[str, typer.Option(help="What weights are multiplied with, comma-separated.")] = "1,2,4",
    train_steps: Annotated[int, typer.Option(min=1, help="Steps of AdamW for the trained weights.")] = 50,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/drift"),
) -> None:
    """Measure inversion and gradient errors; write points.json, table.md and plots."""
    if width % heads or (deep and deep_width % heads):
        raise typer.BadParameter(f"expected a divisor of {width} and {deep_width}, got {heads}", param_hint="--heads")
    by_depth = [Setting(depth, width) for depth in whole_numbers(depths, "--depths")]
    by_weights = [Setting(at, width, s, n) for s in whole_numbers(scales, "--scales") for n in (0, train_steps)]
    points: list[Point] = []
    todo = [("depth", s) for s in by_depth] + [("weights", s) for s in by_weights]
    todo += [("depth", Setting(deep, deep_width))] if deep else []
    described = {"heads": heads, "tokens": tokens, "batch": batch, "environment": environment(torch.device("cpu"))}
    with tqdm(total=len(todo) * len(cells()) * len(SCHEDULERS), unit="step") as bar:
        for sweep, setting in todo:
            bar.set_description(f"{setting.depth} blocks, {setting.weights}")
            points += Stage(setting, heads, tokens, batch).measure(sweep, bar.update)
            with replacing(out / "points.json") as temporary:
                temporary.write_text(json.dumps({**described, "points": [asdict(p) for p in points]}, indent=1) + "\n")
    texts = []
    for sweep, column, about in (
        ("depth", lambda s: f"{s.depth}" + (f" (width {s.width})" if s.width != width else ""), "by blocks"),
        ("weights", lambda s: s.weights, f"by weights, {at} blocks"),
    ):
        chosen = [p for p in points if p.sweep == sweep]
        texts += [table(chosen, metric, f"{title}, {about}", column) for metric, title in METRICS.items()]
    draw([p for p in points if p.sweep == "depth"], out / "depth.png", lambda s: s.depth, "blocks")
    draw([p for p in points if p.sweep == "weights"], out / "weights.png", lambda s: s.weights.replace(", ", "\n"), "")
    with replacing(out / "table.md") as temporary:
        temporary.write_text("\n\n".join(texts) + "\n")
    typer.echo("\n\n".join(texts))
    typer.echo(f"{len(points)} points in {out}.")


if __name__ == "__main__":
    app()
