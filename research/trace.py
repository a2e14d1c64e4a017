"""How much of revlib one training step runs: distinct lines, files, and crossings between files.

    python -m research.trace

The step is a warm one, of two blocks on a CPU: what a reader of one backward pass has to follow, with every guard.
"""

import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import revlib
from revlib import Checkpoint, Functional, Naive, PaReprop, Reversible, ReversibleSequence
from revlib.schedulers import Scheduler

HOME = str(Path(revlib.__file__).parent)


def traced(scheduler: Scheduler) -> tuple[Counter[str], int, int]:
    """Returns the distinct lines of each file, the functions, and the crossings between files, of the second step."""
    torch.manual_seed(0)
    stack = ReversibleSequence([(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)], scheduler=scheduler)
    lines: set[tuple[str, int]] = set()
    functions: set[Any] = set()
    crossings, last = 0, ""

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal crossings, last
        name = frame.f_code.co_filename
        if not name.startswith(HOME):
            return None
        if event == "line":
            lines.add((name, frame.f_lineno))
            functions.add(frame.f_code)
            crossings, last = crossings + (last not in ("", name)), name
        return trace

    for k in range(2):
        x = torch.randn(3, 4, requires_grad=True)
        if k:
            threading.settrace(trace)
            sys.settrace(trace)
        try:
            y1, y2 = stack(x, x)
            (y1.sum() + y2.square().sum()).backward()
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
    return Counter(name.removeprefix(HOME + "/") for name, _ in lines), len(functions), crossings


def main(files: bool = typer.Option(False, help="Also list the lines of each file.")) -> None:
    """Print a table of what one step runs under each of some schedulers."""
    table = Table("scheduler", "lines", "files", "functions", "crossings")
    found = {str(s): traced(s) for s in (Naive(), Reversible(), Checkpoint(), PaReprop(), Functional())}
    for name, (counts, functions, crossings) in found.items():
        table.add_row(name.partition("(")[0], *map(str, (counts.total(), len(counts), functions, crossings)))
    console = Console()
    console.print(table)
    if files:
        for name, count in found[str(Reversible())][0].most_common():
            console.print(f"{count:5} {name}")


if __name__ == "__main__":
    typer.run(main)
