"""The conserved identity: generated histories billed hour by hour; what belongs to no class must be exactly 0.

python -m benchmarks.ledger_identity [--quick] --json FILE
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.ledger_lab.histories import START_MS, History, adjustments, history, large_hour, told_otherwise
from whaleflux_console.core import checks
from whaleflux_console.core.adjustments import by_hour, matches
from whaleflux_console.core.bill import rows_of_hour
from whaleflux_console.core.facts import HOUR_MS, Adjustment, Facts
from whaleflux_console.core.rows import LedgerRow

HISTORIES, QUICK = 10_000, 300
CARDS, QUICK_CARDS, HOUR_S = 10_000, 500, 20.0


def measure(options: Options) -> Report:
    """Bills generated histories and counts what does not sum, for every grouping, with invoices, told twice and restated."""
    count = QUICK if options.quick else HISTORIES
    found, totals, begun = Counter[str](), Counter[str](), time.process_time()
    for number in range(count):
        for fault in _faults(Random(options.seed * 1_000_003 + number), totals):
            found[fault] += 1
    cpu_s = time.process_time() - begun
    residual = sum(amount for name, amount in found.items() if name.startswith("by "))
    checked = (*_CHECKED, *(f"by {name}" for name in checks.GROUPINGS))
    rows: list[Row] = [{"checked": name, "histories": count, "faults": found[name]} for name in checked]
    cards = QUICK_CARDS if options.quick else CARDS
    return Report(
        rows=rows,
        targets=[
            Target("residual of any grouping", residual, 0, "micro-dollars"),
            Target("other faults", sum(found.values()) - residual, 0, "faults"),
            Target("an hour of 10,000 cards", _hour_s(cards) * CARDS / cards, HOUR_S, "CPU s", per="python"),
        ],
        simulated="histories are generated; the arithmetic is the service's",
        notes=[
            f"{totals['hours']:,} hours, {totals['rows']:,} rows, {totals['micros'] / 1e6:,.2f} US dollars, {cpu_s:.1f} CPU s",
            f"the hour was billed for {cards:,} cards and a tenth as many attempts, a report and a sample a minute and card",
        ],
    )


def _hour_s(cards: int) -> float:
    """CPU seconds that the bill of one large hour takes."""
    facts = large_hour(cards)
    begun = time.process_time()
    rows_of_hour(facts, START_MS)
    return time.process_time() - begun


_CHECKED = ("rows, cells and holders", "invoices", "told twice, in another order")


def _faults(random: Random, totals: Counter[str]) -> list[str]:
    """What is wrong with one history; residuals once per micro-dollar."""
    made = history(random)
    usage = _billed(made, made.facts)
    found = [_CHECKED[0] for hour, rows in usage.items() for _ in checks.faults(made.facts, hour, rows)]
    again = _billed(made, told_otherwise(random, made.facts))
    found += [_CHECKED[2]] * (again != usage)
    invoices = adjustments(random, made.hours)
    rows = [row for of_hour in _with_invoices(made, invoices, usage).values() for row in of_hour]
    found += [_CHECKED[1] for _ in checks.invoice_faults(invoices, rows)]
    expected = sum(row.bill_micros for of_hour in usage.values() for row in of_hour) + sum(
        one.micros for one in invoices
    )
    for name, group in checks.GROUPINGS.items():
        off = sum(abs(residual) for residual in checks.residuals(rows, group).values())
        off += abs(sum(sum(row.micros) for row in rows) - expected)
        found += [f"by {name}"] * off
    totals.update(hours=len(made.hours), rows=len(rows), micros=expected)
    return found


def _billed(made: History, facts: Facts) -> dict[int, tuple[LedgerRow, ...]]:
    return {hour: rows_of_hour(facts, hour) for hour in made.hours}


def _with_invoices(
    made: History, invoices: Sequence[Adjustment], usage: dict[int, tuple[LedgerRow, ...]]
) -> dict[int, tuple[LedgerRow, ...]]:
    """The hours closed again, once their invoices are known."""
    parts = [part for one in invoices for part in by_hour(one, _matching(one, usage))]
    return {
        hour: rows_of_hour(
            replace(made.facts, adjustments=tuple(part for part in parts if hour <= part.start_ms < hour + HOUR_MS)),
            hour,
            version=2,
        )
        for hour in made.hours
    }


def _matching(one: Adjustment, usage: dict[int, tuple[LedgerRow, ...]]) -> dict[int, int]:
    found: dict[int, int] = {}
    for hour, rows in usage.items():
        mine = [row.bill_micros for row in rows if matches(one, row)]
        if mine:
            found[hour] = sum(mine)
    return found


if __name__ == "__main__":
    sys.exit(main("ledger_identity", measure))
