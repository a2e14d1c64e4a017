"""Writes the table's missing rows, if asked to, and the README's section."""

import argparse
import csv
import re

from situations import SITUATIONS
from situations.base import COUPLINGS, NOT_RUN, REFUSED, SCHEDULERS, TABLE, by_hand, expected, verdict
from situations.render import README, rendered

parser = argparse.ArgumentParser()
parser.add_argument("--play", action="store_true", help="play the situations that the table does not have")
arguments = parser.parse_args()

if arguments.play:
    table, rows = expected() if TABLE.exists() else {}, []
    for s in SITUATIONS.values():
        for name, coupling in COUPLINGS.items():
            if (s.name, name) in table:
                row = table[s.name, name]
                rows.append([s.name, name, *row.verdicts.values(), row.error])
                continue
            want = by_hand(s, coupling) if name in s.couplings else None
            played = [(NOT_RUN, "") if want is None else verdict(s, scheduler, name, want) for scheduler in SCHEDULERS]
            faults = {told for v, told in played if v in ("wrong", "broken")}
            assert not faults, f"{s.name}, {name}: {faults}"
            errors = {told.partition(": ")[0]: told.partition(": ")[2] for v, told in played if v == REFUSED}
            assert len(errors) <= 1, f"{s.name}, {name}: {errors}"
            patterns = [
                f"{kind}: {re.escape(message)}" for kind, message in errors.items()
            ]  # to be made general by hand
            rows.append([s.name, name, *(v for v, _ in played), *(patterns or [""])])
            print(s.name, name, *sorted({v for v, _ in played}), sep="; ", flush=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["situation", "coupling", *SCHEDULERS, "error"])
        writer.writerows(rows)

README.write_text(rendered(README.read_text()))
