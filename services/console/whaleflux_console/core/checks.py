"""What must hold of a ledger, as pure functions that say what does not. Tests and the service after each close use the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM, Adjustment, Facts, Holding, Presence, PriceSpan
from whaleflux_console.core.intervals import sweep
from whaleflux_console.core.money import charge
from whaleflux_console.core.rows import CLASSES, OVERLAP, LedgerRow

GROUPINGS: Mapping[str, Callable[[LedgerRow], Hashable]] = {
    "hour": lambda row: row.hour_ms,
    "day": lambda row: row.hour_ms // (24 * HOUR_MS),
    "cell": lambda row: (row.hour_ms, row.card),
    "card": lambda row: row.card,
    "node": lambda row: row.node,
    "site": lambda row: row.site,
    "gpu class": lambda row: row.gpu_class,
    "queue": lambda row: row.queue,
    "user": lambda row: row.user,
    "job": lambda row: (row.job, row.uid),
    "attempt": lambda row: (row.uid, row.attempt),
    "model": lambda row: row.model,
    "price": lambda row: (row.price_kind, row.price_source, row.micros_per_hour),
    "adjustment": lambda row: row.adjustment,
}


def faults(facts: Facts, hour_ms: int, rows: Sequence[LedgerRow]) -> tuple[str, ...]:
    """Everything that is wrong with the rows of an hour; empty when the ledger of that hour is right."""
    return (
        *row_faults(rows),
        *residual_faults(rows),
        *cell_faults(facts, hour_ms, rows),
        *holder_faults(facts, hour_ms, rows),
    )


def row_faults(rows: Iterable[LedgerRow]) -> Iterator[str]:
    """Classes that do not sum to their row's bill, negative sums outside of credits, impossible times, one row twice."""
    seen: Counter[Hashable] = Counter()
    for row in rows:
        where = f"{row.card or row.adjustment} at {row.hour_ms} for {row.job or 'nobody'}"
        if len(row.micros) != len(CLASSES) or sum(row.micros) != row.bill_micros:
            yield f"{where}: classes sum to {sum(row.micros)}, the bill is {row.bill_micros}"
        if not row.adjustment and min(row.micros, default=0) < 0:
            yield f"{where}: {min(row.micros)} of a class is negative, and it is no credit"
        if not 0 <= row.gpu_ms <= HOUR_MS:
            yield f"{where}: {row.gpu_ms} ms are not within an hour"
        key = (
            row.hour_ms,
            row.version,
            row.card,
            row.node,
            row.gpu_class,
            row.uid,
            row.attempt,
            GROUPINGS["price"](row),
        )
        seen[(*key, row.adjustment)] += 1
        if seen[(*key, row.adjustment)] == 2:
            yield f"{where}: two rows of one version"


def residuals(rows: Iterable[LedgerRow], group: Callable[[LedgerRow], Hashable]) -> dict[Hashable, int]:
    """Bill less classes of each group, micro-dollars; only what is not 0."""
    found: dict[Hashable, int] = defaultdict(int)
    for row in rows:
        found[group(row)] += row.bill_micros - sum(row.micros)
    return {key: residual for key, residual in found.items() if residual}


def residual_faults(rows: Sequence[LedgerRow]) -> Iterator[str]:
    """Groups whose classes do not sum to their bill, for every grouping there is."""
    for name, group in GROUPINGS.items():
        for key, residual in residuals(rows, group).items():
            yield f"{name} {key}: {residual} micro-dollars belong to no class"


def cell_faults(facts: Facts, hour_ms: int, rows: Iterable[LedgerRow]) -> Iterator[str]:
    """Cards whose rows do not sum to what the card cost and was there in that hour: gaps, overlaps, money made or lost."""
    there = _cells(facts, hour_ms)
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for row in rows:
        if not row.adjustment:
            ms, micros = found[row.card]
            found[row.card] = (ms + row.gpu_ms, micros + row.bill_micros)
    for card in sorted({*there, *found}):
        if found[card] != there[card]:
            yield f"{card} at {hour_ms}: rows have {found[card]} ms and micro-dollars, the card {there[card]}"


def _cells(facts: Facts, hour_ms: int) -> dict[str, tuple[int, int]]:
    """Of each card: milliseconds that it was there, and what they cost by its newest price."""
    told: dict[str, list[Presence | PriceSpan]] = defaultdict(list)
    things: Iterable[Presence | PriceSpan] = chain(facts.presences, facts.prices)
    for one in things:
        told[one.card].append(one)
    cells: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for card, of_card in told.items():
        for start, end, active in sweep(of_card, hour_ms, hour_ms + HOUR_MS):
            if any(isinstance(one, Presence) for one in active):
                prices = [one for one in active if isinstance(one, PriceSpan)]
                newest = max(prices, key=lambda price: price.start_ms, default=None)
                ms, micros = cells[card]
                cells[card] = (ms + end - start, micros + (charge(newest, start, end) if newest else 0))
    return cells


def holder_faults(facts: Facts, hour_ms: int, rows: Sequence[LedgerRow]) -> Iterator[str]:
    """Attempts that are billed for more or less time than they held. Each row is rounded to whole ms; what was scaled is passed by."""
    held = _held(facts, hour_ms)
    scaled = {row.card for row in rows if row.note == OVERLAP}
    billed: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for row in rows:
        if row.uid and not row.adjustment:
            billed[row.card, row.uid, row.attempt].append(row.gpu_ms)
    for key in sorted({*held, *billed}):
        gap = abs(sum(billed[key]) * WHOLE_PPM**2 - held.get(key, 0))
        if key[0] not in scaled and gap > max(1, len(billed[key])) * WHOLE_PPM**2:
            yield f"{key} at {hour_ms}: billed for {sum(billed[key])} ms, held {held.get(key, 0) // WHOLE_PPM**2}"


def _held(facts: Facts, hour_ms: int) -> dict[tuple[str, str, int], int]:
    """Of each card and attempt: milliseconds x part of the card x share of the device."""
    told: dict[str, list[Presence | Holding]] = defaultdict(list)
    things: Iterable[Presence | Holding] = chain(facts.presences, facts.holdings)
    for one in things:
        told[one.device].append(one)
    held: dict[tuple[str, str, int], int] = defaultdict(int)
    for of_device in told.values():
        for start, end, active in sweep(of_device, hour_ms, hour_ms + HOUR_MS):
            parts = {one.card: one.part_ppm for one in active if isinstance(one, Presence)}
            shares: dict[tuple[str, int], int] = defaultdict(int)
            for one in active:
                if isinstance(one, Holding):
                    shares[one.uid, one.attempt] = max(shares[one.uid, one.attempt], one.share_ppm)
            for card, part in parts.items():
                for (uid, attempt), share in shares.items():
                    held[card, uid, attempt] += (end - start) * part * share
    return held


def lacking(before: Sequence[LedgerRow], after: Sequence[LedgerRow]) -> Iterator[str]:
    """Of what rows of an hour have more than other rows of it: cards, holders, adjustments. Each row is rounded to whole ms."""
    had, has = _times(before), _times(after)
    for (card, uid, attempt), times in sorted(had.items()):
        found = has.get((card, uid, attempt), [])
        if sum(found) + len(found) + len(times) < sum(times):
            yield f"{card} for {uid or 'anybody'}"
    were, are = ({row.adjustment for row in rows if row.adjustment} for rows in (before, after))
    yield from sorted(were - are)


def _times(rows: Iterable[LedgerRow]) -> dict[tuple[str, str, int], list[int]]:
    """Milliseconds of each card, and of each holder on it."""
    found: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for row in rows:
        if not row.adjustment:
            for key in {(row.card, "", 0), (row.card, row.uid, row.attempt)}:
                found[key].append(row.gpu_ms)
    return found


def invoice_faults(adjustments: Iterable[Adjustment], rows: Iterable[LedgerRow]) -> Iterator[str]:
    """Adjustments whose rows, over all hours of their windows, do not sum to them."""
    found: Counter[str] = Counter()
    for row in rows:
        if row.adjustment:
            found[row.adjustment] += row.bill_micros
    for one in adjustments:
        if found[one.name] != one.micros:
            yield f"{one.name}: rows sum to {found[one.name]} micro-dollars, it is {one.micros}"
