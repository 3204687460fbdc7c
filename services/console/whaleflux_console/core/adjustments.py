"""What an invoice says more or less than the prices, spread over what its window cost: first over hours, then over an hour's cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from whaleflux_console.core.facts import HOUR_MS, Adjustment
from whaleflux_console.core.money import split
from whaleflux_console.core.rows import CLASSES, NO_CARD, Basis, CostClass, LedgerRow


def matches(adjustment: Adjustment, row: LedgerRow) -> bool:
    """Whether it is for what the row is for, in an hour that its window touches. Adjustments adjust no adjustments."""
    touches = adjustment.start_ms < row.hour_ms + HOUR_MS and row.hour_ms < adjustment.end_ms
    right = adjustment.site in {"", row.site} and adjustment.gpu_class in {"", row.gpu_class}
    return touches and right and not row.adjustment


def by_hour(adjustment: Adjustment, bills: Mapping[int, int]) -> tuple[Adjustment, ...]:
    """Its part of each hour, in proportion to `bills`: hour_ms -> what the matching rows of that hour cost, micro-dollars.

    Where they cost nothing, hours get equal parts; where there are no hours, all is the window's first hour's. The parts sum to the whole.
    """
    first = adjustment.start_ms - adjustment.start_ms % HOUR_MS
    hours = sorted(hour for hour in bills if hour < adjustment.end_ms and adjustment.start_ms < hour + HOUR_MS) or [
        first
    ]
    weights = [max(0, bills.get(hour, 0)) for hour in hours]
    parts = split(adjustment.micros, weights if any(weights) else [1] * len(hours))
    return tuple(
        replace(
            adjustment,
            micros=part,
            start_ms=max(hour, adjustment.start_ms),
            end_ms=min(hour + HOUR_MS, adjustment.end_ms),
        )
        for hour, part in zip(hours, parts, strict=True)
    )


def adjusted(
    adjustments: Iterable[Adjustment], priced: Sequence[tuple[LedgerRow, list[int]]], hour_ms: int, version: int
) -> Iterator[LedgerRow]:
    """The rows of the adjustments that touch the hour. `priced`: its rows with the weights of their classes."""
    unique = {one.name: one for one in adjustments if one.start_ms < hour_ms + HOUR_MS and hour_ms < one.end_ms}
    for one in unique.values():
        if one.start_ms < hour_ms or one.end_ms > hour_ms + HOUR_MS:
            raise ValueError(
                f"{one.name} reaches beyond the hour: cut it with by_hour, so that its parts sum to the whole"
            )
        over = [(row, weights) for row, weights in priced if matches(one, row)]
        yield from _spread(one, over) if over else [_nowhere(one, hour_ms, version)]


def _spread(adjustment: Adjustment, over: Sequence[tuple[LedgerRow, list[int]]]) -> Iterator[LedgerRow]:
    """In proportion to what the rows cost; where they cost nothing, to the time that they stand for."""
    micros = [part for row, _ in over for part in row.micros]
    weights = micros if any(micros) else [weight for _, of_row in over for weight in of_row]
    parts = split(adjustment.micros, weights)
    for i, (row, _) in enumerate(over):
        of_row = tuple(parts[i * len(CLASSES) : (i + 1) * len(CLASSES)])
        if any(of_row):
            yield replace(
                row,
                adjustment=adjustment.name,
                gpu_ms=0,
                bill_micros=sum(of_row),
                micros=of_row,
                note=adjustment.reason,
            )


def _nowhere(adjustment: Adjustment, hour_ms: int, version: int) -> LedgerRow:
    """A row of its own, so that the invoice sums all the same."""
    return LedgerRow(
        hour_ms=hour_ms,
        card="",
        node="",
        site=adjustment.site,
        gpu_class=adjustment.gpu_class,
        queue="",
        user="",
        job="",
        uid="",
        attempt=0,
        model="",
        gpu_ms=0,
        bill_micros=adjustment.micros,
        micros=tuple(adjustment.micros if kind is CostClass.UNKNOWN else 0 for kind in CLASSES),
        basis=Basis.ALLOCATION,
        price_kind="",
        price_source="",
        adjustment=adjustment.name,
        version=version,
        note=NO_CARD,
    )
