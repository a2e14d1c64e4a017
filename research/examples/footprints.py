"""Bytes of activations that a training step takes of RevNet and of the U-Net, by depth and by how they are run.

    python -m research.examples.footprints --out research/results/examples

One sequence, with bijections between its stages; a stack a stage, with plain operations between the stages; torch's
checkpoint around every block; and plain training. Bytes are counted on a CPU, exactly: held between forward and
backward, and at the peak of backward.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import groupby, product
from pathlib import Path

import torch
import typer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from research.examples import revnet, unet
from revlib import Naive, Reversible, ReversibleSequence
from revlib.bijections import Bijection
from revlib.testing import footprint

Run = Callable[..., Sequence[Tensor]]


def chained(parts: Sequence[Run]) -> Run:
    return lambda *state: reduce(lambda state, part: part(*state), parts, state)


def staged(items: list) -> Run:
    """A reversible stack for each run of blocks; bijections in between are plain operations."""
    groups = groupby(items, lambda item: isinstance(item, Bijection))
    return chained([ReversibleSequence(g, scheduler=Naive() if plain else Reversible()) for plain, g in groups])


def checkpointed(items: list) -> Run:
    """torch's checkpoint around every block."""
    parts = [ReversibleSequence([item], scheduler=Naive()) for item in items]
    return chained([partial(checkpoint, part, use_reentrant=False) for part in parts])


WAYS: dict[str, Callable[[list], Run]] = {
    "one sequence": ReversibleSequence,
    "a stack a stage": staged,
    "torch's checkpoint": checkpointed,
    "plain": lambda items: ReversibleSequence(items, scheduler=Naive()),
}


Row = tuple[str, str, int, float, float]  # network, way, depth, held and peak


def measure(depths: Sequence[int], size: int, width: int, batch: int) -> list[Row]:
    """The memory of a step in units of its input: a batch of ``width`` channels at ``size`` by ``size``, or a volume of
    about as many elements."""
    edge = round(size ** (2 / 3)) // 4 * 4
    networks = {
        "RevNet": ((size, size), lambda depth: revnet.items(width, (depth,) * 3, groups=4)),
        "U-Net": ((size, size), lambda depth: unet.items(width, depth, 2, 2)),
        "U-Net, 3-D": ((edge, edge, edge), lambda depth: unet.items(width, depth, 2, 3)),
    }
    rows = []
    for (network, (shape, make)), (way, build), depth in product(networks.items(), WAYS.items(), depths):
        x, items = torch.randn(batch, width, *shape, requires_grad=True), make(depth)
        found = footprint(build(items), [x], ReversibleSequence(items).parameters())
        rows.append((network, way, depth, found.held / x.nbytes, found.peak / x.nbytes))
    return rows


def table(rows: Sequence[Row], command: str) -> str:
    """The table in Markdown: a line for each network and way, a column for each depth."""
    depths = sorted({row[2] for row in rows})
    head = ["network", "run as", *(f"held, {d}" for d in depths), *(f"peak, {d}" for d in depths)]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (2 * len(depths))]
    for (network, way), group in groupby(rows, lambda row: row[:2]):
        found = list(group)
        cells = [f"{row[3]:.1f}" for row in found] + [f"{row[4]:.1f}" for row in found]
        lines.append("| " + " | ".join([network, way, *cells]) + " |")
    note = "Activations in units of the input of the first stage, by blocks a stage (of the U-Net: on each side)."
    return f"# Memory across resolutions\n\n{note}\nWritten by `{command}`.\n\n" + "\n".join(lines) + "\n"


OUT = Path("research/results/examples")


def main(out: Path = OUT, depths: str = "1,2,4,8", size: int = 64, width: int = 32, batch: int = 4) -> None:
    rows = measure([int(d) for d in depths.split(",")], size, width, batch)
    out.mkdir(parents=True, exist_ok=True)
    text = table(rows, f"python -m research.examples.footprints --out {out}")
    (out / "footprints.md").write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
