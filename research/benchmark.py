"""Memory and time of a stack of blocks under every scheduler, and under what users have today.

    python -m research.benchmark                                    # a few minutes on two CPU cores
    python -m research.benchmark --device cuda --batch-sizes 32,128 --contenders all
    python -m research.benchmark --depths 4,12,48 --repeats 0       # memory only
    python -m research.benchmark --models vit,swin,mvit --tokens 196
    python -m research.benchmark --device cuda --graphs             # the device alone: nothing waits for Python
    python -m research.benchmark --compiled --depths 4,12 --contenders naive,reversible,torch-compile-budget-0.5

Memory is counted in stream tensors (batch x tokens x width elements), see research/instruments.py. Time is a ratio
within one interleaved run: in each round every contender takes one training step. A call that was interrupted, or that
asks for more depths and batch sizes, goes on where the folder's points.json ends.
"""

import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

from research.benchmarking.contenders import BLOCKS, CONTENDERS, DEFAULT
from research.benchmarking.instruments import Replay, Run, Step, cost, eager, step_seconds
from research.benchmarking.pareto import draw_limits, draw_memory, draw_pareto, limits_table
from research.benchmarking.points import Point, Record, table
from research.settings.flags import whole_numbers
from research.shared.captured import WARM_UPS
from research.shared.files import replacing
from research.shared.machine import environment, pick_device

Tick = Callable[[], object]
Clock = Callable[[], float]
app = typer.Typer(add_completion=False)


def autocast(run: Run) -> Run:
    def call(x: Tensor) -> Sequence[Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16):
            return run(x)

    return call


def measure(
    points: Sequence[Point],
    x: Tensor,
    heads: int,
    compiled: bool,
    amp: bool,
    graphs: bool,
    repeats: int,
    tick: Tick,
    clock: Clock = time.perf_counter,
) -> None:
    """Fill in the points of one cell."""
    if any(p.compiled for p in points):
        torch.compiler.reset()  # forget what was compiled for other shapes
        # The contenders share their functions, so each of these is compiled often.
        importlib.import_module("torch._dynamo").config.recompile_limit = 64
    torch.manual_seed(0)
    first = points[0]
    blocks = BLOCKS[first.model](first.depth, x.shape[-1], heads, x.shape[1])
    modules = nn.ModuleList(f for pair in blocks for f in pair).to(x.device)
    if compiled:
        for module in modules:
            module.compile(dynamic=False)
    parameters = list(modules.parameters())
    steps: dict[str, Step] = {}
    expected: list[Tensor] = []
    pool: Any = None
    for point in points:
        point.parameters = sum(p.numel() for p in parameters)
        contender = CONTENDERS[point.contender]
        with excused(point, anything=graphs):
            run = contender.build(blocks, compiled)
            run = autocast(run) if amp else run
            warm_up = contender.warm_up if x.is_cuda else 1  # compiles, measures what fits, takes what is taken once
            if graphs:
                shared, pool = pool, None  # a capture that fails spoils its pool
                replay = steps[point.contender] = Replay(run, x, parameters, max(warm_up, WARM_UPS), shared)
                pool, found_cost = replay.graph.pool(), replay.cost
            else:
                step = steps[point.contender] = eager(run)
                for _ in range(warm_up):
                    step(x)
                found_cost = cost(run, x, parameters)
            vars(point).update(asdict(found_cost))
            found = [t.grad for t in (x, *parameters)]
            if point.contender == "naive":
                expected = [g.clone() for g in found if g is not None]
            if contender.streams == 2 and expected:
                least = 1e-3 * max(g.abs().max().item() for g in expected)
                point.gradient_error = max(difference(f, e, least) for f, e in zip(found, expected, strict=True))
        tick()
    if repeats:
        time_rounds(points, steps, x, repeats, tick, clock)


@contextmanager
def excused(point: Point, anything: bool = False) -> Iterator[None]:
    """Note that the memory did not suffice, or that another library failed, and go on. A failure of revlib itself is
    raised, unless ``anything`` may fail."""
    kind = Exception if anything or CONTENDERS[point.contender].package else torch.OutOfMemoryError
    try:
        yield
    except kind as error:
        lines = str(error).strip().splitlines() or [""]
        point.error = f"{type(error).__name__}: {lines[0][:100]}"


def difference(found: Tensor | None, expected: Tensor, least: float) -> float:
    """The largest error of a gradient, relative to its own size, or to ``least`` if that is larger: some gradients are
    nothing but rounding errors, such as that of a bias that adds the same to all keys."""
    if found is None:
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(max(least, 1e-30))).item()


def time_rounds(
    points: Sequence[Point],
    steps: dict[str, Step],
    x: Tensor,
    repeats: int,
    tick: Tick,
    clock: Clock = time.perf_counter,
) -> None:
    rounds: list[dict[str, float]] = []
    for number in range(repeats + 1):
        order = [p for p in points if p.error is None]
        start = number % max(len(order), 1)
        rounds.append({})
        for point in [*order[start:], *order[:start]]:
            # The order rotates, since a contender pays for the heap that the one before it leaves behind.
            with excused(point):
                rounds[-1][point.contender] = step_seconds(steps[point.contender], x, clock)
        tick()
    for point in points:
        timed = [r for r in rounds[1:] if point.contender in r]  # the first round warms up
        if point.error is None and timed:
            point.seconds = statistics.median(r[point.contender] for r in timed)
            point.images_per_second = point.batch / point.seconds
            for field, base in (("to_naive", "naive"), ("to_checkpoint", "torch-checkpoint")):
                ratios = [r[point.contender] / r[base] for r in timed if base in r]
                setattr(point, field, statistics.median(ratios) if ratios else None)


def choose(text: str, device: torch.device) -> list[str]:
    """The contenders that a flag names, and naive, without those that cannot run here."""
    names = list(CONTENDERS) if text == "all" else ["naive", *text.split(",")]
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise typer.BadParameter(
            f"expected all, or some of {', '.join(CONTENDERS)}; got {', '.join(unknown)}", param_hint="--contenders"
        )
    chosen = []
    for name in dict.fromkeys(names):
        if reason := CONTENDERS[name].why_not(device):
            typer.echo(f"without {name}: {reason}")
        else:
            chosen.append(name)
    return chosen


def report(record: Record, out: Path, parameters: bool) -> None:
    """Write the tables and the plots, and print the tables."""
    text = "\n\n".join(filter(None, [table(record.points), limits_table(record.points, parameters)]))
    with replacing(out / "table.md") as temporary:
        temporary.write_text(text + "\n")
    typer.echo(text)
    models = list(dict.fromkeys(p.model for p in record.points))
    for model in models:
        points = [p for p in record.points if p.model == model and p.peak is not None]
        suffix = f"-{model}" if len(models) > 1 else ""
        if points:
            draw_memory(points, out / f"memory{suffix}.png")
            draw_pareto(points, out / f"pareto{suffix}.png")
            draw_limits(points, out / f"limits{suffix}.png", parameters)
    typer.echo(f"Held and peak in tensors of the size of one stream. {len(record.points)} points in {out}.")


@app.command()
def main(
    contenders: Annotated[str, typer.Option(help="Names, comma-separated, or all.")] = ",".join(DEFAULT),
    models: Annotated[str, typer.Option(help=f"Kinds of blocks, comma-separated: {', '.join(BLOCKS)}.")] = "vit",
    depths: Annotated[str, typer.Option(help="Numbers of blocks, comma-separated.")] = "4,12,24,48,64",
    batch_sizes: Annotated[str, typer.Option(help="Images a step, comma-separated.")] = "8",
    width: Annotated[int, typer.Option(min=1, help="Channels of a stream.")] = 192,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads; they divide the width.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an image; square for maps.")] = 197,
    repeats: Annotated[int, typer.Option(min=0, help="Timed rounds after one that warms up; 0: memory only.")] = 7,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile F and G of every contender.")] = False,
    amp: Annotated[bool, typer.Option("--amp", help="Run forward under bfloat16 autocast.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Time replays of steps captured as CUDA graphs.")] = False,
    processor_time: Annotated[
        bool, typer.Option("--processor-time", help="Seconds of this process alone: where others share the CPU.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "cpu",
    parameters: Annotated[
        bool, typer.Option(help="Count weights, gradients and Adam's moments in what fits into a memory.")
    ] = True,
    out: Annotated[Path, typer.Option(help="Folder for the results, and to resume.")] = Path("runs/benchmark"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget the points of the folder.")] = False,
    plot_only: Annotated[bool, typer.Option("--plot-only", help="Draw the points of the folder anew.")] = False,
) -> None:
    """Measure memory and time against depth and batch size; write points.json, table.md and plots."""
    path = out / "points.json"
    if plot_only:
        return report(Record.read(path), out, parameters)
    depth_list, batch_list = whole_numbers(depths, "--depths"), whole_numbers(batch_sizes, "--batch-sizes")
    model_list = list(dict.fromkeys(models.split(",")))
    if unknown := [name for name in model_list if name not in BLOCKS]:
        raise typer.BadParameter(f"expected some of {', '.join(BLOCKS)}, got {unknown[0]}", param_hint="--models")
    if width % heads:
        raise typer.BadParameter(f"expected a divisor of --width {width}, got {heads}", param_hint="--heads")
    for name in model_list:
        try:
            BLOCKS[name](1, width, heads, tokens)
        except ValueError as error:
            raise typer.BadParameter(f"{error} (--models {name})", param_hint="--tokens") from error
    place = pick_device(device)
    if graphs and place.type != "cuda":
        raise typer.BadParameter(f"needs --device cuda, this one is {place.type}; drop it", param_hint="--graphs")
    names = choose(contenders, place)
    setting = {"width": width, "heads": heads, "tokens": tokens, "dtype": "torch.float32", "amp": amp,
               "compiled": compiled, "graphs": graphs, "repeats": repeats, "contenders": names}  # fmt: skip
    if processor_time:
        setting["clock"] = "processor"
    clock = time.process_time if processor_time else time.perf_counter
    record = Record(setting, environment(place), [])
    if path.exists() and not overwrite:
        before = Record.read(path)
        before.check(record, path)
        record = before
    done = {p.cell for p in record.points}
    todo = [cell for cell in product(model_list, depth_list, batch_list) if cell not in done]
    if done:
        typer.echo(f"{len(done)} cells of {path} measured before, {len(todo)} to go")
    warnings.filterwarnings("ignore", module="memcnn|revtorch|invtorch")
    with tqdm(total=len(todo) * (len(names) + (repeats + 1 if repeats else 0)), unit="measurement") as bar:
        for model, depth, batch in todo:
            bar.set_description(f"{depth} blocks, batch {batch}")
            x = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(0)).to(place)
            x.requires_grad_()
            unit = x.numel() * x.element_size()
            points = [
                Point(name, model, depth, batch, compiled or CONTENDERS[name].compiles, 0, unit) for name in names
            ]
            measure(points, x, heads, compiled, amp, graphs, repeats, bar.update, clock)
            record.points += points
            record.write(path)
    report(record, out, parameters)


if __name__ == "__main__":
    app()
