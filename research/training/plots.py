"""Curves of one or more runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure  # without pyplot: always Agg, no global state, no window

from research.shared.files import replacing
from research.training.log import Row


def draw_curves(runs: Mapping[str, Sequence[Row]], path: Path, resumed: Sequence[int] = ()) -> None:
    """Loss and accuracy against epoch: a colour per run, test solid and train dashed, the last values in the legend.

    Each run is drawn thinner than the one before it, so that of runs that are the same none hides another. Up to twenty
    epochs are points, too, so that a run of one is seen. A dotted line marks where a run was resumed, after each of the
    epochs in ``resumed``.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for number, (name, rows) in enumerate(runs.items()):
            width = 1.5 + 2.5 * (len(runs) - 1 - number) / max(1, len(runs) - 1)
            epochs = [row["epoch"] for row in rows]
            for split, style in (("test", "-"), ("train", "--")):
                values = [row[f"{split}_{metric}"] for row in rows]  # type: ignore[literal-required]
                last = f"{values[-1]:.2%}" if metric == "accuracy" else f"{values[-1]:.4g}"
                axes.plot(
                    epochs, values, style, color=f"C{number}", linewidth=width,
                    marker="." if len(rows) <= 20 else "", markersize=4 * width, label=f"{name} {split}: {last}",
                )  # fmt: skip
        for number, epoch in enumerate(resumed):
            axes.axvline(epoch + 0.5, linestyle=":", color="grey", label=None if number else "resumed")
        axes.set(xlabel="epoch", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        axes.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
