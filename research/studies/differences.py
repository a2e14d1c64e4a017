"""How far the curves of runs lie apart."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from research.training.log import METRICS, Metric, Row

Runs = Mapping[str, Sequence[Row]]


def largest_differences(runs: Runs) -> dict[Metric, tuple[float, int, tuple[str, str]]]:
    r"""Per metric $\max_{t,a,b} |m_a(t) - m_b(t)|$ over shared epochs and pairs of runs; its t, (a, b)."""
    by_epoch = {name: {row["epoch"]: row for row in rows} for name, rows in runs.items()}
    return {
        metric: max(
            (
                (abs(by_epoch[a][t][metric] - by_epoch[b][t][metric]), t, (a, b))
                for a, b in combinations(runs, 2)
                for t in by_epoch[a].keys() & by_epoch[b].keys()
            ),
            key=lambda found: (found[0], -found[1]),
        )
        for metric in METRICS
    }


def show(metric: Metric, value: float) -> str:
    """A value as a reader expects it, such as accuracies in per cent."""
    return f"{value:.2%}" if metric.endswith("accuracy") else f"{value:.4f}"
