"""What a step costs the host: tiny blocks, for which the kernels take next to no time.

    python -m research.host_time

One thread, processor time, all contenders in turn within one run, medians. ``plain`` is autograd on the same functions
without revlib, ``checkpoint`` torch's non-reentrant checkpoint of each block (F, G). The second table leaves out one
guard at a time, which nobody should: it only tells what each of them costs.
"""

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from research.shared.files import replacing
from research.shared.machine import environment
from revlib import (
    Anchored,
    Budget,
    Checkpoint,
    Coupling,
    ExactAdditive,
    Functional,
    KeepLast,
    Naive,
    Reversible,
    ReversibleSequence,
    engine,
)
from revlib.schedulers import Scheduler

Run = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Setting:
    """Sizes of the blocks and their input."""

    width: int = 16
    heads: int = 2
    tokens: int = 8
    batch: int = 1


def blocks(depth: int, at: Setting) -> list[tuple[nn.Module, nn.Module]]:
    """Pre-norm ViT blocks, as pairs of functions."""
    torch.manual_seed(0)

    def pair() -> tuple[nn.Module, nn.Module]:
        attention, mlp = Attention(at.width, at.heads), Mlp(at.width, 4 * at.width)
        return tuple(nn.Sequential(nn.LayerNorm(at.width), f) for f in (attention, mlp))  # type: ignore[return-value]

    return [pair() for _ in range(depth)]


def block(F: nn.Module, G: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """The block, as a user would write it without revlib."""
    x1 = x1 + F(x2)
    return x1, x2 + G(x1)


def contenders(depth: int, at: Setting) -> dict[str, Run]:
    """What is compared, by name."""
    pairs = blocks(depth, at)

    def plain(x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        for F, G in pairs:
            x1, x2 = block(F, G, x1, x2)
        return x1, x2

    def checkpointed(x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        for F, G in pairs:
            x1, x2 = checkpoint(block, F, G, x1, x2, use_reentrant=False)
        return x1, x2

    def stack(scheduler: Scheduler, coupling: Coupling | None = None) -> Run:
        return ReversibleSequence(blocks(depth, at), coupling, scheduler)

    found: dict[str, Run] = {"plain": plain, "checkpoint": checkpointed}
    schedulers: list[Scheduler] = [
        *(Naive(), Reversible(), Checkpoint(), Checkpoint(every=2), Anchored(4), KeepLast(4)),
        *(Budget(fraction=0.5), Functional()),
    ]
    found |= {_name(s): stack(s) for s in schedulers}
    exact: list[Scheduler] = [Naive(), Reversible(), Checkpoint()]
    found |= {f"{_name(s)}, exact": stack(s, ExactAdditive()) for s in exact}
    if importlib.util.find_spec("revtorch"):
        import revtorch

        halves = nn.ModuleList(revtorch.ReversibleBlock(F, G, split_along_dim=-1) for F, G in blocks(depth, at))
        sequence = revtorch.ReversibleSequence(halves)
        found["revtorch"] = lambda x1, x2: sequence(torch.cat([x1, x2], -1)).chunk(2, -1)
    return found


def _name(scheduler: Scheduler) -> str:
    return str(scheduler).replace("tolerance=None", "").replace(", )", ")").replace("every=1", "")


def measured(runs: dict[str, Run], at: Setting, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of a training step of each, by turns; the median of so many rounds."""
    x = torch.randn(at.batch, at.tokens, at.width)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in track(range(rounds + 5), "steps", transient=True):
        for name, run in runs.items():
            x1, x2 = (x.clone().requires_grad_() for _ in range(2))
            began = time.process_time()
            y1, y2 = run(x1, x2)
            (y1.sum() + y2.sum()).backward()
            if k >= 5:
                times[name].append(time.process_time() - began)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


ALL = "all of them"


@contextmanager
def without(name: str) -> Iterator[None]:
    """Passes that lack one guard, or all of them. For measuring only: gradients may be wrong."""
    make: Any = engine._guards

    def some(*args: Any) -> Any:
        guards, recovery = make(*args)
        left = [g for g in guards.guards if name != ALL and type(g).__name__ != name]
        return type(guards)(left), recovery

    engine._guards = some
    try:
        yield
    finally:
        engine._guards = make


def guard_costs(depth: int, at: Setting, rounds: int) -> dict[str, float]:
    """Milliseconds of a step under ``Reversible()`` with every guard, and without each of them."""
    stack = ReversibleSequence(blocks(depth, at))

    def leaving_out(name: str) -> Run:
        def run(x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
            with without(name):
                return stack(x1, x2)

        return run

    names = ["none left out", "Randomness", "Settings", "ModuleStates", "Edits", "RecoveryCheck", "EarlyStop", ALL]
    return measured({name: leaving_out(name) for name in names}, at, rounds)


def markdown(found: dict[str, dict[str, float]], costs: dict[str, float]) -> list[str]:
    """Two tables: ratios to torch's checkpoint at each depth, and what each guard costs."""
    depths = list(found)
    lines = ["| contender | " + " | ".join(f"{d} blocks" for d in depths) + " |"]
    lines.append("| --- |" + " ---: |" * len(depths))
    for name in found[depths[0]]:
        ratios = (f"{found[d][name] / found[d]['checkpoint']:.2f}" for d in depths)
        lines.append(f"| {name} | {' | '.join(ratios)} |")
    lines += ["", "| guard left out of 12 blocks | ms | saved, us a step |", "| --- | ---: | ---: |"]
    for name, ms in costs.items():
        lines.append(f"| {name} | {ms:.2f} | {(costs['none left out'] - ms) / 24 * 1e3:.1f} |")
    return lines


def main(
    depths: Annotated[str, typer.Option(help="Numbers of blocks, comma-separated.")] = "4,12,48",
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each contender.")] = 40,
    width: Annotated[int, typer.Option(help="Width of a stream; 192 with --tokens 197 --batch 8 is a ViT-Ti.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens.")] = 8,
    batch: Annotated[int, typer.Option(help="Images.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the tables and numbers into this folder.")] = None,
) -> None:
    """Measure, print two tables, and write them if asked."""
    torch.set_num_threads(1)
    at = Setting(width, max(1, width // 64) if width > 16 else 2, tokens, batch)
    found = {depth: measured(contenders(int(depth), at), at, rounds) for depth in depths.split(",")}
    costs = guard_costs(12, at, rounds)
    here = environment(torch.device("cpu"))
    lines = [
        f"Processor time of a training step over that of torch's checkpoint of the same blocks, medians of {rounds}; "
        f"width {width}, {tokens} tokens, batch {batch}; {here['device']}, one thread, torch {here['torch']}.",
        "",
        *markdown(found, costs),
    ]
    typer.echo("\n".join(lines))
    if out is not None:
        sizes = f"--width {width} --tokens {tokens} --batch {batch}"
        texts = {
            "table.md": "\n".join(lines),
            "command.txt": f"python -m research.host_time --depths {depths} --rounds {rounds} {sizes} --out {out}",
            "host_time.json": json.dumps({"environment": here, "ms": found, "guards": costs}, indent=1),
        }
        for file, text in texts.items():
            with replacing(out / file) as temporary:
                temporary.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
