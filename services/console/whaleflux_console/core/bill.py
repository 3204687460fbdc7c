"""The ledger of one clock hour: every card's bill, divided over who held it and what the time went into. Exact: rows sum to the bill."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from whaleflux_console.core.adjustments import adjusted
from whaleflux_console.core.attribution import Attribution
from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM, Facts, Fragmented, Holding, Presence, PriceSpan
from whaleflux_console.core.intervals import overlap_ms, sweep
from whaleflux_console.core.lost_work import Key
from whaleflux_console.core.money import charge, split
from whaleflux_console.core.rows import CLASSES, NO_PRICE, OVERLAP, Basis, CostClass, LedgerRow
from whaleflux_console.core.step_split import Split

NOBODY: Key = ("", 0)
Told = Presence | Holding | PriceSpan | Fragmented


@dataclass(slots=True)
class Line:
    """One holder's part of a cell. Weights are milliseconds x part of the card x share of the device, in the order of CLASSES."""

    job: str = ""
    weights: list[int] = field(default_factory=lambda: [0] * len(CLASSES))
    measured: bool = False
    modelled: bool = False
    blind: bool = False

    def add(self, found: Split, weight: int) -> None:
        for i, ms in enumerate(found.ms):
            if ms:
                self.weights[i] += ms * weight
        self.measured = self.measured or found.measured
        self.modelled = self.modelled or found.modelled
        self.blind = self.blind or found.blind

    @property
    def basis(self) -> Basis:
        if self.modelled:
            return Basis.MODELLED
        return Basis.ALLOCATION if self.blind and not self.measured else Basis.MEASURED


@dataclass(slots=True)
class Cell:
    """One card within one hour at one price."""

    bill_micros: int = 0
    present_ms: int = 0
    note: str = ""
    lines: dict[Key, Line] = field(default_factory=lambda: defaultdict(Line))


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """What all rows of a cell have in common."""

    card: str
    node: str
    gpu_class: str
    price_kind: str
    price_source: str
    micros_per_hour: int


@dataclass(slots=True)
class Use:
    """One device at one time."""

    part_ppm: int = 0
    available: bool = True
    fragmented: bool = False
    shares: dict[Key, int] = field(default_factory=dict)
    jobs: dict[Key, str] = field(default_factory=dict)


def rows_of_hour(facts: Facts, hour_ms: int, *, version: int = 1) -> tuple[LedgerRow, ...]:
    """The rows of the hour that begins at `hour_ms`, by card, price and holder, then its adjustments.

    `facts` is what touches the hour (see Facts). Cost grows with what the facts hold. Raises ValueError for an instant that begins no hour,
    and for an adjustment that reaches beyond the hour: cut it first (`adjustments.by_hour`).
    """
    if hour_ms % HOUR_MS:
        raise ValueError(f"{hour_ms} begins no clock hour: give a multiple of {HOUR_MS}")
    work = Attribution(facts)
    priced: list[tuple[LedgerRow, list[int]]] = []
    for told in _by_card(facts, hour_ms):
        cells = _cells(told, hour_ms, work)
        priced += chain.from_iterable(_rows(place, cells[place], hour_ms, work, version) for place in sorted(cells))
    return (*(row for row, _ in priced), *adjusted(facts.adjustments, priced, hour_ms, version))


def _by_card(facts: Facts, hour_ms: int) -> Iterator[list[Told]]:
    """What touches the hour, card by card; what is held or free without being in the fleet is nobody's bill."""
    end_ms = hour_ms + HOUR_MS
    cards: dict[str, list[Told]] = defaultdict(list)
    card_of: dict[str, str] = {}
    for presence in facts.presences:
        if overlap_ms(presence, hour_ms, end_ms):
            cards[presence.card].append(presence)
            card_of[presence.device] = presence.card
    uses: Iterable[Holding | Fragmented] = chain(facts.holdings, facts.fragmented)
    for one in uses:
        if one.device in card_of and overlap_ms(one, hour_ms, end_ms):
            cards[card_of[one.device]].append(one)
    for price in facts.prices:
        if price.card in cards and overlap_ms(price, hour_ms, end_ms):
            cards[price.card].append(price)
    for card in sorted(cards):
        yield cards[card]


def _cells(told: Iterable[Told], hour_ms: int, work: Attribution) -> dict[Place, Cell]:
    cells: dict[Place, Cell] = defaultdict(Cell)
    for start, end, active in sweep(told, hour_ms, hour_ms + HOUR_MS):
        presence = next((one for one in active if isinstance(one, Presence)), None)
        if presence is None:
            continue
        price = min((one for one in active if isinstance(one, PriceSpan)), key=_order, default=None)
        cell = cells[_place(presence, price)]
        cell.present_ms += end - start
        cell.bill_micros += charge(price, start, end) if price else 0
        _divide(cell, _uses(active), start, end, work)
    return cells


def _order(price: PriceSpan) -> tuple[int, int, str]:
    """Of several prices at one time (there should be one) the newest counts."""
    return -price.start_ms, price.micros_per_hour, price.source


def _place(presence: Presence, price: PriceSpan | None) -> Place:
    said = (price.kind.value, price.source, price.micros_per_hour) if price else ("", NO_PRICE, 0)
    return Place(presence.card, presence.node, presence.gpu_class, *said)


def _uses(active: Iterable[Told]) -> dict[str, Use]:
    """Each device that is there; what is told twice counts once."""
    uses: dict[str, Use] = {}
    for one in active:
        if isinstance(one, Presence):
            use = uses.setdefault(one.device, Use())
            use.part_ppm = max(use.part_ppm, one.part_ppm)
            use.available = use.available and one.available
    for one in active:
        if isinstance(one, Holding) and one.device in uses and one.share_ppm > 0:
            use, key = uses[one.device], (one.uid, one.attempt)
            use.shares[key] = max(use.shares.get(key, 0), one.share_ppm)
            use.jobs[key] = one.job
        elif isinstance(one, Fragmented) and one.device in uses:
            uses[one.device].fragmented = True
    return uses


def _within_whole(parts: Sequence[int], cell: Cell) -> list[int]:
    """Parts that sum to more than the whole are scaled to it, and the cell says so."""
    if sum(parts) <= WHOLE_PPM:
        return list(parts)
    cell.note = OVERLAP
    return split(WHOLE_PPM, parts)


def _divide(cell: Cell, uses: dict[str, Use], start: int, end: int, work: Attribution) -> None:
    """Adds the weights of one piece of time, WHOLE_PPM x WHOLE_PPM for each of its milliseconds."""
    devices = sorted(uses)
    parts = _within_whole([uses[device].part_ppm for device in devices], cell)
    for device, part in zip(devices, parts, strict=True):
        use = uses[device]
        keys = sorted(use.shares)
        shares = _within_whole([use.shares[key] for key in keys], cell)
        for key, share in zip(keys, shares, strict=True):
            line = cell.lines[key]
            line.job = use.jobs[key]
            line.add(_held(use, device, key, start, end, work), part * share)
        _free(cell, use, (end - start) * part * (WHOLE_PPM - sum(shares)))
    remainder = Use(available=any(use.available for use in uses.values()))
    _free(cell, remainder, (end - start) * WHOLE_PPM * (WHOLE_PPM - sum(parts)))


def _held(use: Use, device: str, key: Key, start: int, end: int, work: Attribution) -> Split:
    if use.available:
        return work.of(device, key, start, end)
    found = Split()
    found.add(CostClass.UNAVAILABLE, end - start)
    return found


def _free(cell: Cell, use: Use, weight: int) -> None:
    """What nobody holds."""
    if weight:
        kind = CostClass.FRAGMENTED if use.fragmented else CostClass.IDLE
        cell.lines[NOBODY].weights[CLASSES.index(kind if use.available else CostClass.UNAVAILABLE)] += weight


def _rows(
    place: Place, cell: Cell, hour_ms: int, work: Attribution, version: int
) -> Iterator[tuple[LedgerRow, list[int]]]:
    """The cell's rows, each with its weights. First over holders, so that what is learned of one's work changes nobody else's bill."""
    keys = sorted(cell.lines)
    held = [sum(cell.lines[key].weights) for key in keys]
    bills, times = split(cell.bill_micros, held), split(cell.present_ms, held)
    for key, bill_micros, gpu_ms in zip(keys, bills, times, strict=True):
        line = cell.lines[key]
        micros = tuple(split(bill_micros, line.weights))
        yield _row(place, key, line, micros, gpu_ms, hour_ms, version, work, cell.note), line.weights


def _row(
    place: Place,
    key: Key,
    line: Line,
    micros: tuple[int, ...],
    gpu_ms: int,
    hour_ms: int,
    version: int,
    work: Attribution,
    note: str,
) -> LedgerRow:
    attempt = work.attempt(key)
    return LedgerRow(
        hour_ms=hour_ms,
        card=place.card,
        node=place.node,
        site=_site(place.node),
        gpu_class=place.gpu_class,
        queue=attempt.queue if attempt else _queue(line.job),
        user=attempt.user if attempt else "",
        job=line.job,
        uid=key[0],
        attempt=key[1],
        model=attempt.model if attempt else "",
        gpu_ms=gpu_ms,
        bill_micros=sum(micros),
        micros=micros,
        basis=line.basis,
        price_kind=place.price_kind,
        price_source=place.price_source,
        version=version,
        micros_per_hour=place.micros_per_hour,
        note=note,
    )


def _site(node: str) -> str:
    """Site of sites/{site}/nodes/{node}."""
    return node.partition("/nodes/")[0].removeprefix("sites/")


def _queue(job: str) -> str:
    """queues/{queue} of queues/{queue}/jobs/{job}."""
    return job.rsplit("/jobs/", 1)[0]
