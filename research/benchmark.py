"""Memory and time of a stack of ViT blocks under every scheduler, and under what users have today.

    python -m research.benchmark                                    # a few minutes on two CPU cores
    python -m research.benchmark --device cuda --batch-size 128
    python -m research.benchmark --depths 4,12,48 --repeats 0       # memory only

Memory is counted in stream tensors (batch x tokens x width elements): bytes of live storages on a CPU, the allocator's
maximum on CUDA. Time is a ratio within one interleaved run: in each round every contender takes one training step.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from research.files import replacing
from research.machine import environment, pick_device
from revlib import ReversibleSequence
from revlib.schedulers import Checkpoint, Naive, Reversible
from revlib.testing import Footprint, footprint

Run = Callable[[Tensor], Sequence[Tensor]]
app = typer.Typer(add_completion=False)


@dataclass
class Point:
    """One contender at one depth. Memory in stream tensors; seconds a step; time relative to naive and to checkpointing
    the same blocks with torch, as medians of the ratios within each round."""

    contender: str
    depth: int
    held: float
    peak: float
    seconds: float | None = None
    to_naive: float | None = None
    to_checkpoint: float | None = None


def block(width: int, heads: int) -> tuple[nn.Module, nn.Module]:
    """Attention and MLP of a pre-norm ViT block, from timm."""
    return (
        nn.Sequential(nn.LayerNorm(width), Attention(width, heads, qkv_bias=True)),
        nn.Sequential(nn.LayerNorm(width), Mlp(width, 4 * width)),
    )


def two_streams(F: nn.Module, G: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    y1 = x1 + F(x2)
    return y1, x2 + G(y1)


def one_stream(F: nn.Module, G: nn.Module, x: Tensor) -> Tensor:
    x = x + F(x)
    return x + G(x)


def contenders(width: int, heads: int, depth: int, device: torch.device) -> tuple[dict[str, Run], list[nn.Parameter]]:
    """The same blocks, run in every way."""
    stack = ReversibleSequence(block(width, heads) for _ in range(depth)).to(device)
    blocks = [tuple(pair) for pair in stack]

    def scheduled(scheduler: Naive | Reversible | Checkpoint) -> Run:
        def run(x: Tensor) -> Sequence[Tensor]:
            stack.scheduler = scheduler
            return stack(x, x)

        return run

    def torch_checkpoint(x: Tensor) -> Sequence[Tensor]:
        x1, x2 = x, x
        for F, G in blocks:
            x1, x2 = checkpoint(two_streams, F, G, x1, x2, use_reentrant=False)
        return x1, x2

    def one_stream_stored(x: Tensor) -> Sequence[Tensor]:
        for F, G in blocks:
            x = one_stream(F, G, x)
        return (x,)

    def one_stream_checkpoint(x: Tensor) -> Sequence[Tensor]:
        for F, G in blocks:
            x = checkpoint(one_stream, F, G, x, use_reentrant=False)
        return (x,)

    runs = {
        "naive": scheduled(Naive()),
        "reversible": scheduled(Reversible()),
        "checkpoint": scheduled(Checkpoint()),
        "torch checkpoint of the same blocks": torch_checkpoint,
        "one stream, stored": one_stream_stored,
        "one stream, torch checkpoint": one_stream_checkpoint,
    }
    return runs, list(stack.parameters())


def cuda_footprint(run: Run, x: Tensor, parameters: Sequence[Tensor]) -> Footprint:
    """As revlib.testing.footprint, by the caching allocator's count."""
    for t in (x, *parameters):
        t.grad = torch.zeros_like(t)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    loss = torch.stack([y.float().square().mean() for y in run(x)]).sum()
    held = torch.cuda.memory_allocated() - base
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    return Footprint(held, torch.cuda.max_memory_allocated() - base)


def step_seconds(run: Run, x: Tensor) -> float:
    """One forward and backward pass."""
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    torch.stack([y.float().square().mean() for y in run(x)]).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(depth: int, x: Tensor, heads: int, repeats: int, tick: Callable[[], object]) -> list[Point]:
    runs, parameters = contenders(x.shape[-1], heads, depth, x.device)
    unit = x.numel() * x.element_size()
    points = []
    for name, run in runs.items():
        found = cuda_footprint(run, x, parameters) if x.is_cuda else footprint(run, [x], parameters)
        points.append(Point(name, depth, found.held / unit, found.peak / unit))
        tick()
    if repeats:
        rounds: list[dict[str, float]] = []
        for number in range(repeats + 1):
            order = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
            # Rotated, since a contender pays for the heap that the one before it leaves behind.
            rounds.append({name: step_seconds(runs[name], x) for name in order})
            tick()
        for point in points:  # the first round warms up
            times = [r[point.contender] for r in rounds[1:]]
            point.seconds = statistics.median(times)
            point.to_naive, point.to_checkpoint = (
                statistics.median(t / r[base] for t, r in zip(times, rounds[1:], strict=True))
                for base in ("naive", "torch checkpoint of the same blocks")
            )
    return points


def draw(points: Sequence[Point], path: Path) -> None:
    """Peak activation memory against depth, logarithmic in both."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(p.contender for p in points)):
        line = [(p.depth, p.peak) for p in points if p.contender == name]
        style = {"linewidth": 3} if name == "reversible" else {"linewidth": 1.3}
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=f"C{number}", label=name, **style)
    depths = sorted({p.depth for p in points})
    axes.set(xscale="log", yscale="log", xlabel="blocks", ylabel="peak activation memory [stream tensors]")
    axes.set_xticks(depths, [str(d) for d in depths], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def table(points: Sequence[Point]) -> str:
    """A Markdown table: one row a contender and depth."""
    lines = ["| blocks | how | held | peak | s / step | / naive | / torch checkpoint |", "|---:|---|" + "---:|" * 5]
    for p in points:
        times = [p.seconds, p.to_naive, p.to_checkpoint]
        cells = " | ".join("" if t is None else f"{t:.{3 if i == 0 else 2}f}" for i, t in enumerate(times))
        lines.append(f"| {p.depth} | {p.contender} | {p.held:.1f} | {p.peak:.1f} | {cells} |")
    return "\n".join(lines)


@app.command()
def main(
    depths: Annotated[str, typer.Option(help="Numbers of blocks, comma-separated.")] = "4,12,24,48,64",
    width: Annotated[int, typer.Option(min=1, help="Channels of a stream.")] = 192,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads; they divide the width.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an image.")] = 197,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 8,
    repeats: Annotated[int, typer.Option(min=0, help="Timed rounds after one that warms up; 0: memory only.")] = 7,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/benchmark"),
) -> None:
    """Measure memory and time against depth; write points.json, table.md and memory.png."""
    try:
        numbers = sorted({int(d) for d in depths.split(",")})
    except ValueError:
        raise typer.BadParameter(f"expected numbers such as 4,12,48, got {depths!r}", param_hint="--depths") from None
    if width % heads:
        raise typer.BadParameter(f"expected a divisor of --width {width}, got {heads}", param_hint="--heads")
    place = pick_device(device)
    torch.manual_seed(0)
    x = torch.randn(batch_size, tokens, width, device=place, requires_grad=True)
    points: list[Point] = []
    with tqdm(total=len(numbers) * (6 + (repeats + 1 if repeats else 0)), unit="measurement") as bar:
        for depth in numbers:
            bar.set_description(f"{depth} blocks")
            points += measure(depth, x, heads, repeats, bar.update)
    setting = {
        "width": width,
        "heads": heads,
        "tokens": tokens,
        "batch_size": batch_size,
        "dtype": str(x.dtype),
    }
    record = {"setting": setting, "environment": environment(place), "points": [asdict(p) for p in points]}
    with replacing(out / "points.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    with replacing(out / "table.md") as temporary:
        temporary.write_text(table(points) + "\n")
    draw(points, out / "memory.png")
    typer.echo(table(points))
    typer.echo(f"Memory in stream tensors of {x.numel() * x.element_size():,} bytes. Written to {out}.")


if __name__ == "__main__":
    app()
