"""Does it matter how activations come back? The same training under each scheduler, on several seeds.

    python -m research.parity --recipe minrev-vit --seeds 5 --out runs/parity
    python -m research.parity --recipe minrev-vit --seeds 5 --epochs 3 --limit-train 2000

It takes the flags of research.train. Of each seed there are five runs: timm's network of one stream and the same sizes
(plain), and the reversible one under Naive, Reversible and PaReprop, and under Reversible with the exact coupling; on a
CPU there is no side stream, so that PaReprop runs as Reversible does. Run it again to go on where it stopped. Writes
the runs themselves, runs.jsonl, table.md, curves.png.
"""

import dataclasses
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from research.settings.config import Config, flags
from research.settings.flags import whole
from research.shared.files import replacing
from research.studies.differences import largest_differences, show
from research.training import loop
from research.training.distributed import join
from research.training.log import METRICS, Metric, Row, read_log

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"scheduler": "naive", "coupling": "additive", "fusion": "mean"},
    "naive": {"scheduler": "naive", "coupling": "additive"},
    "reversible": {"scheduler": "reversible", "coupling": "additive"},
    "pareprop": {"scheduler": "pareprop", "coupling": "additive"},
    "exact": {"scheduler": "reversible", "coupling": "exact"},
}
SCHEDULERS = ("naive", "reversible", "pareprop")  # of the same network: these should draw one curve

Study = dict[str, dict[int, list[Row]]]  # variant -> seed -> epochs

app = typer.Typer(add_completion=False)


@app.command()
@flags
def main(config: Config, seeds: Annotated[int, typer.Option(help="Seeds, from --seed on.", **whole(1))] = 5) -> None:
    """Train each variant on each seed, and lay them side by side. --scheduler and --coupling are of no effect."""
    if config.model.startswith("plain"):
        raise typer.BadParameter("expected a reversible model; its plain twin comes by itself.", param_hint="--model")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise typer.BadParameter("a study is of one process; call it without torchrun.")
    out = config.out or Path("runs") / f"parity-{config.recipe or f'{config.dataset}-{config.model}'}"
    study: Study = {variant: {} for variant in VARIANTS}
    for seed in range(config.seed, config.seed + seeds):
        for variant in VARIANTS:
            typer.echo(f"{variant}, seed {seed}")
            study[variant][seed] = run(variant_of(config, variant, seed, out))
    write(study, out)
    typer.echo(f"see {out}/table.md and {out}/curves.png")


def variant_of(config: Config, variant: str, seed: int, out: Path) -> Config:
    """The settings of one run, which goes on where it was stopped."""
    model = {"model": f"plain-{config.model}"} if variant == "plain" else {}
    folder = out / variant / f"seed{seed}"
    paths = {"out": folder, "resume": (folder / "last.pt").exists(), "overwrite": False}
    return dataclasses.replace(config, seed=seed, **VARIANTS[variant], **model, **paths)


def run(config: Config) -> list[Row]:
    """The epochs of a run. None is done twice: resuming a finished run compares its flags, and does nothing more."""
    with join(config) as (processes, device):
        loop.train(config, processes, device)
    return read_log(config.folder / "log.jsonl").rows


def write(study: Study, out: Path) -> None:
    with replacing(out / "runs.jsonl") as temporary:
        lines = [{"variant": v, "seed": s} | rows[-1] for v, runs in study.items() for s, rows in runs.items()]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with replacing(out / "table.md") as temporary:
        temporary.write_text(table(study))
    with replacing(out / "curves.png") as temporary:
        draw(study).savefig(temporary, dpi=120)


def spread(values: Sequence[float], metric: Metric) -> str:
    """Mean ± standard deviation of the sample."""
    deviation = show(metric, statistics.stdev(values)) if len(values) > 1 else "?"
    return f"{show(metric, statistics.mean(values))} ± {deviation}"


def table(study: Study) -> str:
    """The results of each variant at its end, and how far the curves of one seed lie apart that should be the same."""
    seeds = list(next(iter(study.values())))
    epochs = len(next(iter(study.values()))[seeds[0]])
    lines = [
        f"After {epochs} epochs, mean ± standard deviation over {len(seeds)} seeds.",
        "",
        "| variant | " + " | ".join(metric.replace("_", " ") for metric in METRICS) + " |",
        "| --- |" + " ---: |" * len(METRICS),
    ]
    for variant, runs in study.items():
        cells = [spread([rows[-1][metric] for rows in runs.values()], metric) for metric in METRICS]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Largest difference in any epoch between any two of {', '.join(SCHEDULERS)}: same network, same seed.",
        "",
        "| seed | " + " | ".join(metric.replace("_", " ") for metric in METRICS) + " |",
        "| --- |" + " ---: |" * len(METRICS),
    ]
    found = {str(seed): largest_differences(of_seed(study, seed, SCHEDULERS)) for seed in seeds}
    exact = [largest_differences(of_seed(study, seed, ("naive", "exact"))) for seed in seeds]
    largest = {metric: max(differences[metric] for differences in found.values()) for metric in METRICS}
    found |= {
        "any": largest,
        "any, naive and exact": {m: max(differences[m] for differences in exact) for m in METRICS},
    }
    for name, differences in found.items():
        lines.append(f"| {name} | {' | '.join(f'{differences[metric][0]:.2g}' for metric in METRICS)} |")
    return "\n".join([*lines, ""])


def of_seed(study: Study, seed: int, variants: Sequence[str]) -> Mapping[str, Sequence[Row]]:
    return {variant: study[variant][seed] for variant in variants}


def draw(study: Study) -> Figure:
    """Test loss and accuracy against epoch: the mean of each variant, and a band of one standard deviation."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    metrics: tuple[Metric, ...] = ("test_loss", "test_accuracy")
    for axes, metric in zip(figure.subplots(1, 2), metrics, strict=True):
        for number, (variant, runs) in enumerate(study.items()):
            by_epoch = list(zip(*([row[metric] for row in rows] for rows in runs.values()), strict=True))
            epochs, means = range(1, len(by_epoch) + 1), [statistics.mean(values) for values in by_epoch]
            spreads = [
                statistics.pstdev(values) if len(values) == 1 else statistics.stdev(values) for values in by_epoch
            ]
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            # Dashes get shorter from curve to curve, so that one shows through where several lie on one another.
            style = ("-", "-", "--", ":", "-.")[number]
            axes.plot(epochs, means, style, color=f"C{number}", label=variant)
            axes.fill_between(epochs, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        axes.set(xlabel="epoch", ylabel=metric.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


if __name__ == "__main__":
    app()
