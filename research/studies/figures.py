"""The two pictures of the front page, drawn from the committed points of the benchmark by research.report.

Colours are those of Okabe and Ito, which stay apart under every common kind of colour blindness; lines also differ in
their marks, and carry their names at their ends.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from research.benchmarking.pareto import fixed_batch
from research.benchmarking.points import Point
from research.shared.files import replacing

LINES = {  # contender: (its name on the front page, colour, mark)
    "naive": ("plain autograd", "#000000", "o"),
    "budget-0.5": ("Budget(fraction=0.5)", "#E69F00", "s"),
    "one-stream-checkpoint": ("torch's checkpoint, one stream", "#D55E00", "^"),
    "reversible": ("Reversible()", "#0072B2", "D"),
    "reversible-in-2-parts": ("Reversible(), MLP in two parts", "#009E73", "v"),
}
NAMES = {name: text for name, (text, *_) in LINES.items()} | {
    "budget-0.25": "Budget(fraction=0.25)",
    "budget-0.75": "Budget(fraction=0.75)",
    "checkpoint": "Checkpoint()",
    "checkpoint-2": "Checkpoint(every=2)",
    "anchored-4": "Anchored(4)",
    "keep-last-1": "KeepLast(1)",
    "one-stream": "one stream, plain",
    "one-stream-selective-attention": "torch's selective checkpoint, one stream",
    "torch-checkpoint": "torch's checkpoint, two streams",
    "torch-selective-attention": "torch's selective checkpoint, two streams",
    "memcnn": "memcnn",
    "revtorch": "revtorch",
    "invtorch": "invtorch",
}


def draw_memory(points: Sequence[Point], path: Path) -> None:
    """Peak activation memory against depth, of the five lines that matter, with the last value beside each."""
    batch = fixed_batch(points)
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots()
    ends = []
    for contender, (name, colour, mark) in LINES.items():
        line = sorted(
            (p.depth, p.peak / 1e6)
            for p in points
            if p.contender == contender and p.batch == batch and p.peak is not None
        )
        thick = 3 if contender == "reversible" else 1.8
        axes.plot(*zip(*line, strict=True), color=colour, marker=mark, markersize=6, linewidth=thick)
        ends.append((line[-1], f"{name}: {line[-1][1]:.0f} MB", colour))
    for ((depth, megabytes), text, colour), height in zip(ends, _apart([e[0][1] for e in ends]), strict=True):
        axes.annotate(
            text, (depth, megabytes), (depth * 1.03, height), color=colour, va="center", fontsize=10, weight="bold"
        )
    depths = sorted({p.depth for p in points})
    axes.set(yscale="log", xlabel="blocks", ylabel="peak activation memory [MB]", xlim=(0, 82), xticks=depths)
    axes.set_yticks([10, 100, 1000], ["10", "100", "1000"])
    axes.set_title(f"One training step through ViT blocks, batch {batch}", fontsize=11, loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def _apart(heights: Sequence[float], factor: float = 1.28) -> list[float]:
    """Heights for the labels: where two are closer than the factor, the lower one moves down."""
    placed: dict[int, float] = {}
    for i in sorted(range(len(heights)), key=lambda i: -heights[i]):
        placed[i] = min([heights[i], *(h / factor for h in placed.values())])
    return [placed[i] for i in range(len(heights))]


def draw_time(points: Sequence[Point], path: Path) -> None:
    """Time over that of plain autograd against memory, at the greatest depth; those on the Pareto front by name."""
    depth = max(p.depth for p in points)
    # The plain network of one stream is left out, since it lies where the plain one of two streams does.
    spots = {
        p.contender: (p.peak / 1e6, p.to_naive)
        for p in points
        if p.depth == depth and p.peak is not None and p.to_naive is not None and p.contender != "one-stream"
    }
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for x, y in spots.values():
        axes.plot(x, y, "o", color="0.6", markersize=5)
    for x, y, names in _front(spots):
        axes.plot(x, y, "D", color="#0072B2", markersize=7)
        label = "\n".join(names)
        axes.annotate(
            label, (x, y), (7, 5), textcoords="offset points", fontsize=9, color="#00456b", weight="bold", va="bottom"
        )
    edge = [(x, y) for x, y, _ in _front(spots)]
    axes.plot(*zip(*edge, strict=True), color="#0072B2", alpha=0.35, linewidth=5, drawstyle="steps-post", zorder=1)
    ticks = [10, 20, 50, 100, 200, 500, 1000]
    axes.set(xscale="log", xlabel="peak activation memory [MB]", ylabel="time of a step / plain autograd")
    axes.set(xlim=(12, 2600), ylim=(0.93, 1.75))
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.tick_params(which="minor", bottom=False)
    axes.set_title(
        f"{depth} ViT blocks; grey: another takes less memory and at most 1 % more time", fontsize=11, loc="left"
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def _front(spots: Mapping[str, tuple[float, float]]) -> list[tuple[float, float, list[str]]]:
    """The spots (memory, time) that are over 1 % faster than all smaller ones, smallest first, with names."""
    found: list[tuple[float, float, list[str]]] = []
    for x, y in sorted(spots.values()):
        if not found or y < found[-1][1] * 0.99:
            near = [NAMES[name] for name, (a, b) in spots.items() if abs(a / x - 1) < 0.01 and abs(b / y - 1) < 0.015]
            found.append((x, y, near))
    return found


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
