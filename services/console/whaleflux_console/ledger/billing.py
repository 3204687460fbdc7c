"""An hour's rows out of what is known of it, as Arrow tables in and out. Pure, and busy for seconds where the hour is a large one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from whaleflux_console.core import checks
from whaleflux_console.core.bill import rows_of_hour
from whaleflux_console.core.facts import HOUR_MS, Facts
from whaleflux_console.core.price_book import Price, priced
from whaleflux_console.ledger import schemas

SHOWN_FAULTS = 5


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of an hour."""

    hour_ms: int
    told: tuple[Any, ...]  # FACTS, oldest first
    samples: Any  # MINUTES
    steps: Any  # WORK
    prices: Sequence[Price]  # all that are declared

    @property
    def size(self) -> int:
        """Rows of all tables."""
        return sum(table.num_rows for table in (*self.told, self.samples, self.steps))


@dataclass(frozen=True, slots=True)
class Billed:
    """`faults`: what does not add up, the first of it."""

    rows: Any  # HOURS
    residual_micros: int
    faults: tuple[str, ...]


def billed(known: Known) -> Billed:
    """The hour's rows, checked."""
    facts = schemas.facts_of(known.told, known.samples, known.steps)
    facts = priced(_by_number(facts), known.prices, known.hour_ms, known.hour_ms + HOUR_MS)
    rows = rows_of_hour(facts, known.hour_ms)
    residual_micros = sum(abs(row.bill_micros - sum(row.micros)) for row in rows)
    faults = checks.faults(facts, known.hour_ms, rows)[:SHOWN_FAULTS]
    return Billed(schemas.rows_table(rows), residual_micros, faults)


def _by_number(facts: Facts) -> Facts:
    """Steps by the number of their attempt, which ranks know by its epoch; without adjustments that were taken back."""
    numbers = {(one.uid, one.epoch): one.attempt for one in facts.attempts}
    steps = (
        replace(one, attempt=numbers[one.uid, one.attempt]) for one in facts.steps if (one.uid, one.attempt) in numbers
    )
    return replace(facts, steps=tuple(steps), adjustments=tuple(one for one in facts.adjustments if one.micros))
