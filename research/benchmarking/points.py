"""What the benchmark finds, a point a contender and cell, and how it is stored, resumed and tabled."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from research.shared.files import replacing


@dataclass
class Point:
    """One contender at one model, depth and batch size. ``parameters`` are counted, memory is in bytes, times in
    seconds a step; ratios of times are medians of those within each round. ``gradient_error`` is the largest
    difference from naive's gradients, where the function is the same, relative to the largest entry of each, or to
    a thousandth of the largest of all. ``error`` says why a contender has no numbers."""

    contender: str
    model: str
    depth: int
    batch: int
    compiled: bool
    parameters: int
    unit: int  # bytes of a stream tensor
    held: int | None = None
    peak: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    gradient_error: float | None = None
    seconds: float | None = None
    to_naive: float | None = None
    to_checkpoint: float | None = None
    images_per_second: float | None = None
    error: str | None = None

    @property
    def cell(self) -> tuple[str, int, int]:
        return self.model, self.depth, self.batch


@dataclass
class Record:
    """The points of one setting in one environment."""

    setting: dict[str, Any]
    environment: dict[str, Any]
    points: list[Point]

    @classmethod
    def read(cls, path: Path) -> "Record":
        try:
            content = json.loads(path.read_text())
            return cls(content["setting"], content["environment"], [Point(**p) for p in content["points"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise typer.BadParameter(
                f"{path} holds no points of this benchmark ({error}); name another folder, or --overwrite it.",
                param_hint="--out",
            ) from error

    def write(self, path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def check(self, other: "Record", path: Path) -> None:
        """That another call measures the same, or an error that names what differs."""
        mine, theirs = self.setting | self.environment, other.setting | other.environment
        differing = [
            f"{key} was {mine.get(key)}, is {theirs.get(key)}"
            for key in mine | theirs
            if mine.get(key) != theirs.get(key)
        ]
        if differing:
            raise typer.BadParameter(
                f"{path} was measured otherwise: {'; '.join(differing)}. Repeat its call to go on with it, "
                "name another folder, or --overwrite it.",
                param_hint="--out",
            )


def table(points: Sequence[Point]) -> str:
    """A Markdown table: one row a contender, depth and batch size."""
    columns = [
        ("blocks", lambda p: str(p.depth)),
        ("batch", lambda p: str(p.batch)),
        ("how", lambda p: p.contender + (f" ({p.error})" if p.error else "")),
        ("compiled", lambda p: "yes" if p.compiled else "no"),
        ("held", lambda p: _shown(p.held, ".1f", p.unit)),
        ("peak", lambda p: _shown(p.peak, ".1f", p.unit)),
        ("peak MB", lambda p: _shown(p.peak, ".1f", 1e6)),
        ("allocated MB", lambda p: _shown(p.allocated, ".1f", 1e6)),
        ("reserved MB", lambda p: _shown(p.reserved, ".1f", 1e6)),
        ("gradient error", lambda p: _shown(p.gradient_error, ".0e")),
        ("s / step", lambda p: _shown(p.seconds, ".3f")),
        ("/ naive", lambda p: _shown(p.to_naive, ".2f")),
        ("/ torch checkpoint", lambda p: _shown(p.to_checkpoint, ".2f")),
        ("images / s", lambda p: _shown(p.images_per_second, ".1f")),
    ]
    if len({p.model for p in points}) > 1:
        columns.insert(0, ("model", lambda p: p.model))
    filled = [(name, [show(p) for p in points]) for name, show in columns]
    filled = [(name, cells) for name, cells in filled if any(cells)]  # no CUDA, no timing: no such columns
    ruler = "|".join("---" if name in ("model", "how") else "---:" for name, _ in filled)
    rows = zip(*(cells for _, cells in filled), strict=True)
    return "\n".join([_row(name for name, _ in filled), f"|{ruler}|", *map(_row, rows)])


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else format(value / unit, form)
