"""Compare the curves of two or more runs.

python -m research.compare runs/digits-vit-naive runs/digits-vit-reversible --out compare.png
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from research.studies.differences import largest_differences, show
from research.training.log import METRICS, Row, read_log
from research.training.plots import draw_curves

app = typer.Typer(add_completion=False)


@app.command()
def main(
    logs: Annotated[list[Path], typer.Argument(help="Two or more log.jsonl files, or folders of one.")],
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("runs/compare.png"),
) -> None:
    """Draw loss and accuracy of several runs in one picture, and print how far the curves lie apart."""
    runs = read_runs(logs)
    shared = set.intersection(*({row["epoch"] for row in rows} for rows in runs.values()))
    if not shared:
        raise typer.BadParameter("the runs have no epoch in common; nothing to compare.", param_hint="LOGS")
    draw_curves(runs, out)

    finals = Table(Column("run", no_wrap=True), "epochs", *(metric.replace("_", " ") for metric in METRICS))
    for name, rows in runs.items():
        finals.add_row(name, str(rows[-1]["epoch"]), *(show(metric, rows[-1][metric]) for metric in METRICS))
    differences = Table("curve", "largest difference", "at epoch", "between")
    for metric, (value, epoch, pair) in largest_differences(runs).items():
        differences.add_row(metric.replace("_", " "), f"{value:.6g}", str(epoch), " and ".join(pair))
    console = Console()
    console.print(finals, differences)
    console.print(f"over {len(shared)} shared epochs; curves in {out}", highlight=False)


def read_runs(logs: Sequence[Path]) -> dict[str, list[Row]]:
    """The rows of each log, by the name of its folder; by its whole path where names collide."""
    paths = [path / "log.jsonl" if path.is_dir() else path for path in logs]
    if len(set(paths)) < 2:
        raise typer.BadParameter(
            f"expected two or more different logs, got {len(set(paths))}; name the folders of two runs.",
            param_hint="LOGS",
        )
    names = [path.resolve().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    try:
        return {name: read_log(path).rows for name, path in zip(names, paths, strict=True)}
    except (OSError, ValueError) as error:
        told = f"{error.filename} cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise typer.BadParameter(
            f"{told}; name folders that research.train wrote, or the log.jsonl in them.", param_hint="LOGS"
        ) from error


if __name__ == "__main__":
    app()
