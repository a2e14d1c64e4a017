"""The log of a run, as JSON lines: first what was run and where, then one line an epoch."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args, get_type_hints

from research.shared.files import replacing


class Row(TypedDict):
    """One epoch. Losses are means over images, accuracies fractions. Train is measured while training, on what the
    model sees: augmented, mixed, against smoothed labels. Test is of the running average of weights where there is one.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    lr: float
    seconds: float


Metric = Literal["train_loss", "test_loss", "train_accuracy", "test_accuracy"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclasses.dataclass
class Log:
    """The contents of log.jsonl."""

    header: dict[str, Any]
    rows: list[Row]

    def write(self, path: Path) -> None:
        """Write the whole log, atomically."""
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in [self.header, *self.rows]))

    def append(self, row: Row, path: Path) -> None:
        """Add one epoch, and write the whole log: a reader never meets half a line."""
        self.rows.append(row)
        self.write(path)

    @property
    def resumed(self) -> list[int]:
        """The epochs after which the run was stopped, and later resumed."""
        return list(self.header.get("resumed", []))


def read_log(path: Path) -> Log:
    """Read a log.jsonl. Raises: ValueError, which names the line that is wrong."""
    header: dict[str, Any] = {}
    rows: list[Row] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if number == 1:
            header = record
        elif missing := get_type_hints(Row).keys() - record.keys():
            raise ValueError(f"{path}, line {number}: lacks {', '.join(sorted(missing))}")
        else:
            rows.append(record)
    if not rows:
        raise ValueError(f"{path}: holds no finished epoch")
    return Log(header, rows)


def duration(seconds: float) -> str:
    """A duration in words, such as 2 h 05 min, or 12 s."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def told(row: Row) -> str:
    """An epoch in one line."""
    train, test = (f"{row[f'{s}_loss']:.4f} {row[f'{s}_accuracy']:7.2%}" for s in ("train", "test"))  # type: ignore[literal-required]
    return f"train {train}  test {test}  lr {row['lr']:.2e}  {row['seconds']:.1f} s"
