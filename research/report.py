"""Render everything under research/results into one page of tables and plots, research/results/README.md.

    python -m research.report

A folder with a log.jsonl is a run of research.train; one with a table.md is a study, which runs below it belong to.
Where it ran is read from the log, or from the study's json files; its command from command.txt or done.json.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from research.benchmarking.points import Record
from research.settings.config import RECIPES, Config, defaults
from research.shared.files import replacing
from research.studies import figures
from research.studies.differences import show
from research.studies.jobs import jobs
from research.training.checkpoint import FREE
from research.training.log import Log, read_log

RESULTS = Path(__file__).parent / "results"

HEAD = """# Results

Everything that was measured, rendered by `python -m research.report` from the files beside this one. To change the
text of the first section, edit [summary.md](summary.md). How the GPU was used is in [gpu](gpu/README.md).

"""
RUNS = """## Trainings

Accuracies are those of the last epoch. A run is **short** where it saw a part of the images, or fewer epochs than its
recipe or data set asks for: it shows that a recipe works, and nothing of where it would end. It is **not finished**
where its log has fewer epochs than the run was asked for: it may go on, or have been stopped. One seed each. CIFAR-10
is a copy of it as JPEG, with which others lost 2 to 3 %; commands want its folder as `--data-dir`.

| run | images | epochs | network | train accuracy | test accuracy | |
| --- | ---: | ---: | --- | ---: | ---: | --- |
"""

app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Page to write.", show_default="research/results/README.md")] = RESULTS
    / "README.md",
) -> None:
    """Render research/results: trainings first, then studies. For runs of your own there is research.compare."""
    with replacing(out) as temporary:
        temporary.write_text(render(RESULTS))
    points = Record.read(RESULTS / "benchmark" / "points.json").points
    figures.draw_memory(points, RESULTS / "figures" / "memory.png")
    figures.draw_time(points, RESULTS / "figures" / "time.png")
    typer.echo(f"wrote {out}")


def render(root: Path) -> str:
    studies = sorted(file.parent for file in root.rglob("table.md"))
    logs = {
        file.parent: read_log(file)
        for file in sorted(root.rglob("log.jsonl"))
        if not any(study in file.parents for study in studies)
    }
    return "".join(
        [HEAD, summary(root), RUNS, *trainings(root, logs), *(p for s in studies for p in study(root, s)), to_do(root)]
    )


def summary(root: Path) -> str:
    """The summary that was written by hand, if there is one."""
    file = root / "summary.md"
    return f"{file.read_text()}\n" if file.exists() else ""


def trainings(root: Path, logs: Mapping[Path, Log]) -> Iterator[str]:
    for folder, log in logs.items():
        yield row(root, folder, log)
    yield "\nEach of them, on one line: its folder, machine and command.\n\n"
    for folder, log in logs.items():
        name = folder.relative_to(root)
        yield f"- [{name}]({name}/log.jsonl), {machine(log.header['environment'])}: `{command(log.header['config'])}`\n"
    pictures = [*root.glob("*.png"), *(p for f in {*logs, *(f.parent for f in logs)} - {root} for p in f.glob("*.png"))]
    yield from images(root, sorted(pictures))


def row(root: Path, folder: Path, log: Log) -> str:
    config, last, name = log.header["config"], log.rows[-1], folder.relative_to(root)
    few = config["limit_train"] is not None or config["epochs"] < usual(config)["epochs"]
    ended = last["epoch"] == config["epochs"]
    network = [config["model"], config.get("coupling", "additive"), config["scheduler"]]
    precision = [config["amp_dtype"]] if config["amp"] else []
    cells = [
        f"[{name}]({name}/log.jsonl)",
        f"{config['limit_train']:,}" if config["limit_train"] else "all",
        f"{last['epoch']} of {config['epochs']}",
        ", ".join(network[:1] if network[0].startswith("plain") else network) + "".join(f", {p}" for p in precision),
        show("train_accuracy", last["train_accuracy"]),
        show("test_accuracy", last["test_accuracy"]),
        ", ".join(["**short**"] * few + ["**not finished**"] * (not ended)),
    ]
    return f"| {' | '.join(cells)} |\n"


def usual(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a call that names the recipe, or data set and model, and nothing else."""
    if config.get("recipe"):
        return RECIPES[config["recipe"]].as_json()
    return Config().as_json() | defaults(config["dataset"], config["model"])


def command(config: Mapping[str, Any]) -> str:
    """The command line that has these settings."""
    config = Config().as_json() | config  # flags that are newer than the log had the effect of their defaults
    before, found = usual(config), ["python -m research.train"]
    first = ["recipe"] if config.get("recipe") else ["dataset", "model"]
    names = [field.name for field in dataclasses.fields(Config) if field.name in config]
    for name in [*first, *(n for n in names if n not in {*first, *FREE})]:
        value, flag = config[name], "--" + name.replace("_", "-")
        if name in first or value != before[name]:
            found.append(flag if value is True else f"--no-{flag[2:]}" if value is False else f"{flag} {value}")
    return " ".join(found)


def study(root: Path, folder: Path) -> Iterator[str]:
    name = folder.relative_to(root)
    yield f"\n## {name}\n"
    if where := places(folder):
        yield f"\n{where}\n"
    if called := call(folder):
        yield f"\n`{called}`\n"
    yield f"\n<details><summary>Table</summary>\n\n{(folder / 'table.md').read_text().rstrip()}\n\n</details>\n"
    yield from images(root, sorted(folder.glob("*.png")))


def places(folder: Path) -> str:
    """The machine of a study, as its files or the first log below it tell."""
    for file in [*sorted(folder.glob("*.json")), *sorted(folder.rglob("log.jsonl"))]:
        record = json.loads(file.read_text().splitlines()[0] if file.suffix == ".jsonl" else file.read_text())
        here = record.get("environment") or record.get("setting", {})
        if "device" in here and "torch" in here:
            return machine(here)
    return ""


def call(folder: Path) -> str:
    if (folder / "command.txt").exists():
        return (folder / "command.txt").read_text().strip()
    if (folder / "done.json").exists():
        return " ".join(["python", *json.loads((folder / "done.json").read_text())["command"]])
    return ""


def machine(here: Mapping[str, Any]) -> str:
    threads = here["threads"]
    return f"{here['device']}, {threads} thread{'s' * (threads > 1)}, torch {here['torch']}"


def images(root: Path, files: list[Path]) -> Iterator[str]:
    for file in files:
        name = file.relative_to(root)
        yield f"\n![{name.with_suffix('')}]({name})\n"


def to_do(root: Path) -> str:
    """The jobs for a GPU that have left nothing in the folder of its results."""
    every = jobs("cuda", Path("DATA"), Path("runs/gpu"), tiny=False)
    head = (
        "\n## Not run yet\n\nJobs of `python -m research.gpu --data cifar10.tar.xz`, most telling first, of which "
        "there are no results here:\n\n"
    )
    left = [job for job in every if not (root / "gpu" / job.name).exists()]
    return head + "".join(f"- {job.name}: `python {' '.join(job.command[1:])}`\n" for job in left)


if __name__ == "__main__":
    app()
