"""Plots of the benchmark: memory against depth and throughput, and what would fit into a given memory."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from research.benchmarking.points import Point
from research.shared.files import replacing

GB = 1e9
ADAM = 16  # bytes a float32 parameter: weight, gradient, two moments
MEMORIES = [8, 16, 24, 40, 80]  # GB, as cards have it

Limit = Callable[[float], float]  # bytes -> how many blocks, or images, fit


def _most(values: Sequence[tuple[int, int]]) -> int:
    """Of pairs (a, b), the a that has the most different b; if several have as many, the largest."""
    return max(values, key=lambda pair: (len({b for a, b in values if a == pair[0]}), pair[0]))[0]


def fixed_batch(points: Sequence[Point]) -> int:
    """The batch size at which depths are compared: the largest of those with most depths."""
    return _most([(p.batch, p.depth) for p in points])


def fixed_depth(points: Sequence[Point]) -> int:
    """The depth at which batch sizes are compared: the largest of those with most batch sizes."""
    return _most([(p.depth, p.batch) for p in points])


def front(points: Sequence[Point]) -> list[Point]:
    """The points than which no other is both faster and smaller, fastest first."""
    kept: list[Point] = []
    for p in sorted(points, key=lambda p: (-(p.images_per_second or 0), p.peak or 0)):
        if not kept or (p.peak or 0) < (kept[-1].peak or 0):
            kept.append(p)
    return kept


# ---------------------------------------------------------------------------------------------- what fits
def _limit(line: Sequence[tuple[int, int]], fixed_bytes: float, bytes_each: float) -> Limit:
    """How many fit into a memory, by a straight line through pairs (number, peak bytes). Parameters take
    ``fixed_bytes``, and ``bytes_each`` for each."""
    slope, intercept = statistics.linear_regression(*zip(*line, strict=True))
    each = slope + bytes_each

    def limit(memory: float) -> float:
        left = memory - intercept - fixed_bytes
        return max(left / each, 0.0) if each > 0 else (math.inf if left >= 0 else 0.0)

    return limit


def depth_limits(points: Sequence[Point], parameters: bool) -> dict[str, Limit]:
    """Per contender measured at two depths or more, how many blocks fit, at the fixed batch size."""
    batch, found = fixed_batch(points), {}
    for name, group in by_contender([p for p in points if p.batch == batch]).items():
        line = [(p.depth, p.peak) for p in group if p.peak is not None]
        if len({depth for depth, _ in line}) > 1:
            found[name] = _limit(line, 0, ADAM * group[0].parameters / group[0].depth if parameters else 0)
    return found


def batch_limits(points: Sequence[Point], parameters: bool) -> dict[str, Limit]:
    """Per contender measured at two batch sizes or more, how many images fit, at the fixed depth."""
    depth, found = fixed_depth(points), {}
    for name, group in by_contender([p for p in points if p.depth == depth]).items():
        line = [(p.batch, p.peak) for p in group if p.peak is not None]
        if len({batch for batch, _ in line}) > 1:
            found[name] = _limit(line, ADAM * group[0].parameters if parameters else 0, 0)
    return found


def by_contender(points: Sequence[Point]) -> dict[str, list[Point]]:
    return {name: [p for p in points if p.contender == name] for name in dict.fromkeys(p.contender for p in points)}


def _counted(parameters: bool) -> str:
    return "activations" + (", float32 weights, gradients and Adam's moments" if parameters else " only")


def limits_table(points: Sequence[Point], parameters: bool) -> str:
    """What fits into common memories, as a Markdown table a model; empty where nothing can be extrapolated."""
    texts = []
    for model in dict.fromkeys(p.model for p in points):
        mine = [p for p in points if p.model == model and p.peak is not None]
        if not mine:
            continue
        for what, limits in (
            (f"blocks at batch {fixed_batch(mine)}", depth_limits(mine, parameters)),
            (f"images a step at {fixed_depth(mine)} blocks", batch_limits(mine, parameters)),
        ):
            if limits:
                head = f"Most {what} ({model}), extrapolated from straight lines; counted: {_counted(parameters)}."
                rows = [f"| {name} | {' | '.join(_floor(f(m * GB)) for m in MEMORIES)} |" for name, f in limits.items()]
                columns = " | ".join(f"{m} GB" for m in MEMORIES)
                texts.append("\n".join([head, "", f"| how | {columns} |", "|---|" + "---:|" * len(MEMORIES), *rows]))
    return "\n\n".join(texts)


def _floor(value: float) -> str:
    return "any" if math.isinf(value) else f"{math.floor(value):,}"


# ---------------------------------------------------------------------------------------------- plots
def _style(name: str, points: Sequence[Point]) -> dict[str, Any]:
    """A colour and a mark for each contender, the same in every panel of the points."""
    number = list(by_contender(points)).index(name)
    return {
        "color": f"C{number % 10}",
        "marker": "os^D"[number // 10 % 4],
        "markersize": 4,
        "linewidth": 3 if name == "reversible" else 1.3,
        "linestyle": "--" if name.startswith("one-stream") else "-",  # another function of the same blocks
        "label": name,
    }


def _finish(figure: Figure, path: Path) -> None:
    """Add a grid, and one legend for all panels; write the file."""
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(list(found.values()), list(found), loc="outside right upper", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def draw_memory(points: Sequence[Point], path: Path) -> None:
    """Peak activation memory against depth, logarithmic in both."""
    batch = fixed_batch(points)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, group in by_contender(points).items():
        line = sorted((p.depth, (p.peak or 0) / p.unit) for p in group if p.batch == batch)
        if line:
            axes.plot(*zip(*line, strict=True), **_style(name, points))
    depths = sorted({p.depth for p in points if p.batch == batch})
    axes.set(xscale="log", yscale="log", xlabel="blocks", ylabel="peak activation memory [stream tensors]")
    axes.set_title(f"batch {batch}", fontsize="medium")
    axes.set_xticks(depths, [str(d) for d in depths], minor=False)
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    _finish(figure, path)


def draw_pareto(points: Sequence[Point], path: Path) -> None:
    """Peak activation memory against throughput at the fixed depth, a point a batch size, and their Pareto front."""
    depth = fixed_depth(points)
    timed = [p for p in points if p.depth == depth and p.images_per_second is not None]
    if not timed:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    edge = [(p.images_per_second, (p.peak or 0) / 1e6) for p in front(timed)]
    stairs: dict[str, Any] = {"drawstyle": "steps-post", "color": "0.85", "linewidth": 6, "zorder": 0}
    axes.plot(*zip(*edge, strict=True), label="Pareto front", **stairs)
    for name, group in by_contender(timed).items():
        line = [(p.images_per_second, (p.peak or 0) / 1e6) for p in sorted(group, key=lambda p: p.batch)]
        axes.plot(*zip(*line, strict=True), **_style(name, points))
    sizes = ", ".join(str(b) for b in sorted({p.batch for p in timed}))
    axes.set(yscale="log", xlabel="images per second", ylabel="peak activation memory [MB]")
    axes.set_title(f"{depth} blocks, batch {sizes}", fontsize="medium")
    _finish(figure, path)


def draw_limits(points: Sequence[Point], path: Path, parameters: bool) -> None:
    """What fits into a memory, extrapolated: the largest batch size and the largest depth."""
    panels = [
        (f"images a step, {fixed_depth(points)} blocks", batch_limits(points, parameters)),
        (f"blocks, batch {fixed_batch(points)}", depth_limits(points, parameters)),
    ]
    panels = [(label, limits) for label, limits in panels if limits]
    if not panels:
        return
    figure = Figure(figsize=(4 + 4 * len(panels), 4.5), layout="constrained")
    memories = [80 * 2 ** (-i / 10) for i in range(90, -1, -1)]  # GB
    for axes, (label, limits) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, limit in limits.items():
            line = [(m, limit(m * GB)) for m in memories]
            line = [(m, n) for m, n in line if 1 <= n < math.inf]
            axes.plot([m for m, _ in line], [n for _, n in line], markevery=15, **_style(name, points))
        axes.set(xscale="log", yscale="log", xlabel="memory [GB]", ylabel=f"most {label}")
    figure.suptitle(f"Extrapolated from straight lines; counted: {_counted(parameters)}", fontsize="medium")
    _finish(figure, path)
