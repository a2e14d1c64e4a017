"""The table as a section of the page beside this file, which names the functions and not their lines."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from situations import SITUATIONS, THEMES
from situations.base import COUPLINGS, NOT_APPLICABLE, NOT_RUN, REFUSED, SCHEDULERS, SUPPORTED, TABLE, Row, expected

PAGE = Path(__file__).parent / "README.md"
MARKS = "<!-- situations -->\n", "<!-- /situations -->\n"
SIGNS = {SUPPORTED: "✓", REFUSED: "refused", NOT_APPLICABLE: "–", NOT_RUN: ""}


def section() -> str:
    """What stands between the marks."""
    table = expected()
    return "\n".join([_counts(table), *_themes(table), _elsewhere()])


def _themes(table: dict[tuple[str, str], Row]) -> list[str]:
    parts = []
    for module, title in THEMES.items():
        theme = module.__name__.rpartition(".")[2]
        situations = [s for s in SITUATIONS.values() if s.theme == theme]
        heads = " | ".join(f"`{s}`" for s in SCHEDULERS)
        lines = [f"| | function in [{theme}.py]({theme}.py) | {heads} |", "|---|---|" + ":-:|" * len(SCHEDULERS)]
        for s in situations:
            cells = [_cell([table[s.name, c].verdicts[scheduler] for c in COUPLINGS]) for scheduler in SCHEDULERS]
            note = " (slow)" if s.slow else ""
            lines.append(f"| {s.name}{note} | `{s.play.__name__}` | {' | '.join(cells)} |")
        parts.append("\n".join([f"## {title}", "", f"{len(situations)} situations.", "", *lines, ""]))
    return parts


def _cell(verdicts: list[str]) -> str:
    """One sign where all couplings agree, and the couplings by sign where they do not."""
    signs = [SIGNS[v] for v in verdicts]
    run = [s for v, s in zip(verdicts, signs, strict=True) if v != NOT_RUN]
    if len(set(run)) == 1 and len(run) in (1, len(signs)):
        return run[0] + ("¹" if len(run) == 1 else "")
    by_sign: dict[str, list[str]] = {}
    for coupling, sign in zip(COUPLINGS, signs, strict=True):
        by_sign.setdefault(sign, []).append(coupling.partition("(")[0])
    most = max(by_sign, key=lambda sign: len(by_sign[sign]))
    return "; ".join([most, *(f"{', '.join(cs)}: {sign}" for sign, cs in by_sign.items() if sign != most)])


def _elsewhere() -> str:
    lines = ["## On several processes", "", "Other tests play these; they are not part of the table.", ""]
    lines += ["| | test | |", "|---|---|:-:|"]
    with (TABLE.parent / "elsewhere.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            path, _, test = row["test"].partition("::")
            code = (TABLE.parent.parent.parent / path).read_text()
            assert f"\ndef {test}(" in code, f"elsewhere.csv names {row['test']}, which does not exist"
            lines.append(f"| {row['situation']} | [`{test}`](../{Path(path).name}) | {SIGNS[row['verdict']]} |")
    return "\n".join([*lines, ""])


def _counts(table: dict[tuple[str, str], Row]) -> str:
    counts = Counter(v for row in table.values() for v in row.verdicts.values())
    told = ", ".join(f"{counts[v]:,} {v}" for v in (SUPPORTED, REFUSED, NOT_APPLICABLE, NOT_RUN))
    return (
        f"{len(SITUATIONS)} situations under {len(SCHEDULERS)} schedulers and {len(COUPLINGS)} couplings are "
        f"{sum(counts.values()):,} cells: {told}.\n"
    )


def rendered(page: str) -> str:
    """The page with the section as it should be."""
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return "".join([before, MARKS[0], "\n", section(), "\n", MARKS[1], after])
