"""A checked question as SQL: the rows that its limit keeps, then one row of everything."""

from __future__ import annotations

from typing import Any

from whaleflux_console.core.rows import CLASSES
from whaleflux_console.ledger.question import BILL, CLASS, TIMES, Question
from whaleflux_console.ledger.schemas import DAY_SUMS, MICROS


def sql(question: Question, source: str) -> tuple[str, list[Any]]:
    """Columns: 0 for rows or 1 for the total, the keys as the question's `by`, then DAY_SUMS. `source` has `at_ms` beside those."""
    where = " AND ".join(f"{name} IN (SELECT unnest(?))" for name in question.where)
    parameters = [list(values) for values in question.where.values()]
    keys = [_key(each) for each in question.by if each != CLASS]
    sums = ", ".join([*keys, *(f"sum({name}) AS {name}" for name in DAY_SUMS)])
    grouped = f" GROUP BY {', '.join(str(place) for place in range(1, len(keys) + 1))}" if keys else ""
    groups = f"SELECT {sums} FROM ({source}){' WHERE ' + where if where else ''}{grouped}"
    total = ", ".join(["1", *("NULL" for _ in question.by), *(f"sum({name})" for name in DAY_SUMS)])
    if not question.by:
        return f"WITH groups AS MATERIALIZED ({groups}) SELECT {total} FROM groups", parameters
    order = "bill_micros" if question.order == BILL else f"{question.order}_micros"
    columns = ", ".join([*_names(question), *DAY_SUMS])
    kept = f"SELECT 0 AS kind, {columns} FROM ({_classed(question)}) ORDER BY {order} DESC, {', '.join(_names(question))} LIMIT {question.limit}"
    return (
        f"WITH groups AS MATERIALIZED ({groups}) SELECT * FROM ({kept}) UNION ALL SELECT {total} FROM groups ORDER BY 1",
        parameters,
    )


def _key(name: str) -> str:
    return (
        f"(at_ms // {TIMES[name]} * {TIMES[name]})::VARCHAR AS {_column(name)}"
        if name in TIMES
        else f"{name} AS {_column(name)}"
    )


def _column(name: str) -> str:
    return f"by_{name}"


def _names(question: Question) -> list[str]:
    return [_column(name) for name in question.by]


def _classed(question: Question) -> str:
    """The groups, or of each group one row per class that costs something."""
    if CLASS not in question.by:
        return "SELECT * FROM groups"
    keys = ", ".join(_column(each) for each in question.by if each != CLASS)
    parts = []
    for kind, own in zip(CLASSES, MICROS, strict=True):
        sums = ", ".join(f"{own if name == own else 0} AS {name}" for name in MICROS)
        head = f"{keys + ', ' if keys else ''}'{kind}' AS {_column(CLASS)}"
        parts.append(f"SELECT {head}, 0 AS gpu_ms, {own} AS bill_micros, {sums} FROM groups WHERE {own} <> 0")
    return " UNION ALL ".join(parts)
