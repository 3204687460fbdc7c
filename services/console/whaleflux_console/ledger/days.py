"""A day's ledger rows, rolled up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.schemas import DAY_KEYS, DAY_SUMS, DAYS, HOURS
from whaleflux_console.ledger.shelf import rows_in


def day_table(engine: Engine, day_ms: int, hours: Sequence[Path]) -> Any:
    """The hours' files as DAYS."""
    source = rows_in(hours) if hours else "SELECT * FROM empty"
    table = engine.table(f"{rolled_up(source, str(day_ms))} ORDER BY {', '.join(DAY_KEYS)}", empty=HOURS.empty_table())
    return table.select(DAYS.names).cast(DAYS)


def rolled_up(source: str, start: str) -> str:
    """SQL: ledger rows of `source` summed by everything but card and attempt, under the SQL expression `start`, which comes first."""
    keys, sums = ", ".join(DAY_KEYS), ", ".join(f"sum({name})::BIGINT AS {name}" for name in DAY_SUMS)
    return f"SELECT {start}::BIGINT AS day_ms, {keys}, {sums} FROM ({source}) GROUP BY ALL"
