"""Writes the table's missing rows, if asked to, and the page that shows it."""

import argparse
import csv
import re

from situations import SITUATIONS
from situations.base import COUPLINGS, NOT_RUN, REFUSED, SCHEDULERS, TABLE, by_hand, expected, verdict
from situations.render import PAGE, rendered

parser = argparse.ArgumentParser()
parser.add_argument("--play", action="store_true", help="play the situations that the table does not have")
arguments = parser.parse_args()

if arguments.play:
    table, rows = expected() if TABLE.exists() else {}, []
    for s in SITUATIONS.values():
        for name, coupling in COUPLINGS.items():
            if (s.name, name) in table:
                row = table[s.name, name]
                rows.append([s.name, name, *row.verdicts.values(), row.error, row.functional])
                continue
            want = by_hand(s, coupling) if name in s.couplings else None
            played = [(NOT_RUN, "") if want is None else verdict(s, scheduler, name, want) for scheduler in SCHEDULERS]
            faults = {told for v, told in played if v in ("wrong", "broken")}
            assert not faults, f"{s.name}, {name}: {faults}"
            refused = {k: told for k, (v, told) in zip(SCHEDULERS, played, strict=True) if v == REFUSED}
            functional = refused.pop("Functional()", "")
            assert len({told.partition(": ")[0] for told in refused.values()}) <= 1, f"{s.name}, {name}: {refused}"
            patterns = [next(iter(refused.values()), ""), functional]
            # To be made general by hand.
            patterns = [p and f"{p.partition(': ')[0]}: {re.escape(p.partition(': ')[2])}" for p in patterns]
            rows.append([s.name, name, *(v for v, _ in played), *patterns])
            print(s.name, name, *sorted({v for v, _ in played}), sep="; ", flush=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["situation", "coupling", *SCHEDULERS, "error", "error under Functional()"])
        writer.writerows(rows)

PAGE.write_text(rendered(PAGE.read_text()))
