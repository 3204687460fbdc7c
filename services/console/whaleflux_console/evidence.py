"""The ledger's window as recommendations need it, without what is in queues that the caller may not see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from whaleflux import names
from whaleflux_console.core.facts import HOUR_MS, PriceKind
from whaleflux_console.core.price_book import Price, said
from whaleflux_console.core.recommend.evidence import Pace, Part, Rented, Reserved, Spent, Window, share_ppm
from whaleflux_console.core.recommend.slow_node import LEAST_JOBS
from whaleflux_console.core.recommend.tracking import After
from whaleflux_console.core.rows import CostClass
from whaleflux_console.ledger.answers import Answers, Sum
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.manifest import DAY_MS, Kind, day_of
from whaleflux_console.ledger.question import MAX_ROWS, Question

MOST_JOBS = 1_000  # the dearest of those that held GPUs in the window's last two hours
_AT_END_MS = 2 * HOUR_MS
_CASH = ("on_demand", "spot")
_USAGE: dict[str, tuple[str, ...]] = {"adjustment": ("",)}  # without credits and invoices, which nobody can save


@dataclass(frozen=True, slots=True)
class Evidence:
    """Asks the ledger."""

    answers: Answers
    may_see: Callable[[str], bool]  # queues/{queue}
    reserved: Sequence[Price] = ()  # those on record, for whoever may see what the whole fleet costs
    sees_all: bool = False  # an operator: nodes are theirs

    async def window(self, hours: int) -> Window:
        """The last whole hours of the ledger. Raises Unavailable until it was read once."""
        state = self.answers.state
        end_ms = state.watermark_ms // HOUR_MS * HOUR_MS
        known = [start for kind, start in state.spans if kind is Kind.HOURS and start < end_ms]
        start_ms = max(end_ms - hours * HOUR_MS, min(known, default=end_ms), self.answers.hot_from_ms)
        if start_ms >= end_ms:
            return Window(end_ms, end_ms)
        last_ms = max(start_ms, end_ms - _AT_END_MS)
        held = await self._ask(last_ms, end_ms, ("job",), _USAGE, MOST_JOBS)
        hours = (end_ms - last_ms) // HOUR_MS
        gpus = {row.keys[0]: -(-row.gpu_ms // (HOUR_MS * hours)) for row in held if self._sees(row.keys[0])}
        jobs = await self._jobs(start_ms, end_ms, gpus)
        paces = await self._paces(start_ms, end_ms) if self.sees_all else []
        gone = {pace.job: 0 for pace in paces if pace.job not in gpus}
        others = await self._jobs(start_ms, end_ms, gone)
        nodes = await self._node_gpus(end_ms)
        pools = await self._pools(start_ms, end_ms, nodes)
        made = Window(start_ms, end_ms, jobs, pools, others, tuple(paces))
        if not self.sees_all:
            return made
        (whole,) = await self._ask(start_ms, end_ms, (), _USAGE) or (None,)
        rented = await self._rented(start_ms, end_ms, nodes)
        return replace(made, rented=rented, all_micros=whole.bill_micros if whole else 0)

    async def _rented(self, start_ms: int, end_ms: int, nodes: Mapping[str, int]) -> tuple[Rented, ...]:
        """What is paid by the hour where a reserved price is on record."""
        if not self.reserved:
            return ()
        hours: dict[tuple[str, str], list[Part]] = defaultdict(list)
        for row in await self._ask(
            start_ms, end_ms, ("site", "gpu_class", "hour"), _USAGE | {"price_kind": ("on_demand",)}
        ):
            hours[row.keys[0], row.keys[1]].append(_part(row))
        return tuple(
            Rented(
                Spent(f"{site}/{gpu_class}/on_demand", tuple(parts), node_gpus=nodes.get(f"{site}/{gpu_class}", 1)),
                best,
            )
            for (site, gpu_class), parts in hours.items()
            if (best := cheapest(self.reserved, site, gpu_class, end_ms)) is not None
        )

    async def after(self, jobs: Sequence[tuple[str, int]], pools: Sequence[tuple[str, int]]) -> _Afterwards:
        """What subjects cost since some times: from the first whole day (UTC) behind them."""
        end_ms = self.answers.state.watermark_ms // HOUR_MS * HOUR_MS
        first_ms = max(day_of(self.answers.hot_from_ms + DAY_MS - 1), end_ms - 35 * DAY_MS)
        since = {name: max(first_ms, (at // DAY_MS + 1) * DAY_MS) for name, at in (*jobs, *pools)}
        start_ms = day_of(min(since.values(), default=end_ms))
        parts: dict[str, list[tuple[int, Part]]] = defaultdict(list)
        if start_ms < end_ms and jobs:
            where = _USAGE | {"job": tuple(name for name, _ in jobs)}
            for row in await self._ask(start_ms, end_ms, ("job", "day"), where):
                parts[row.keys[0]].append((int(row.keys[1]), _part(row)))
        if start_ms < end_ms and pools:
            for row in await self._ask(start_ms, end_ms, ("site", "gpu_class", "day"), _USAGE | {"job": ("",)}):
                parts[f"{row.keys[0]}/{row.keys[1]}"].append((int(row.keys[2]), _part(row)))
        return _Afterwards(since, dict(parts), end_ms)

    def _sees(self, job: str) -> bool:
        return bool(job) and self.may_see(job.partition("/jobs/")[0])

    async def _paces(self, start_ms: int, end_ms: int) -> list[Pace]:
        """Of nodes that were slow in several jobs; none while a file is damaged, which is made again by itself."""
        try:
            found = [pace for pace in await self.answers.paces(start_ms, end_ms) if self._sees(pace.job)]
        except Damaged:
            return []
        jobs: dict[str, set[str]] = defaultdict(set)
        for pace in found:
            jobs[pace.node].add(pace.job)
        return [pace for pace in found if len(jobs[pace.node]) >= LEAST_JOBS]

    async def _jobs(self, start_ms: int, end_ms: int, gpus: Mapping[str, int]) -> tuple[Spent, ...]:
        """What these jobs cost, which hold so many GPUs now."""
        if not gpus:
            return ()
        days = (end_ms - start_ms) // DAY_MS + 2
        names = tuple(gpus)[: MAX_ROWS // days]
        where = _USAGE | {"job": names}
        by_day: dict[str, list[Sum]] = defaultdict(list)
        for row in await self._ask(start_ms, end_ms, ("job", "user", "day"), where):
            by_day[row.keys[0]].append(row)
        paid: dict[str, list[Sum]] = defaultdict(list)
        for row in await self._ask(start_ms, end_ms, ("job", "price_kind", "model"), where):
            paid[row.keys[0]].append(row)
        return tuple(
            Spent(
                name,
                tuple(_part(row) for row in by_day[name]),
                _cash_ppm(paid[name], 1),
                by_day[name][-1].keys[1],
                paid[name][-1].keys[2],
                gpus[name],
            )
            for name in names
            if by_day[name] and paid[name]
        )

    async def _pools(self, start_ms: int, end_ms: int, nodes: Mapping[str, int]) -> tuple[Spent, ...]:
        where = _USAGE | {"job": ("",)}
        hours: dict[str, list[Sum]] = defaultdict(list)
        for row in await self._ask(start_ms, end_ms, ("site", "gpu_class", "hour"), where):
            hours[f"{row.keys[0]}/{row.keys[1]}"].append(row)
        paid: dict[str, list[Sum]] = defaultdict(list)
        for row in await self._ask(start_ms, end_ms, ("site", "gpu_class", "price_kind"), where):
            paid[f"{row.keys[0]}/{row.keys[1]}"].append(row)
        return tuple(
            Spent(name, tuple(_part(row) for row in rows), _cash_ppm(paid[name], 2), node_gpus=nodes.get(name, 1))
            for name, rows in hours.items()
        )

    async def _node_gpus(self, end_ms: int) -> Mapping[str, int]:
        """GPUs of each pool's largest node in the last hour; of none while its file is damaged, which is made again by itself."""
        try:
            return await self.answers.node_cards(end_ms - HOUR_MS)
        except Damaged:
            return {}

    async def _ask(
        self, start_ms: int, end_ms: int, by: tuple[str, ...], where: dict[str, tuple[str, ...]], limit: int = MAX_ROWS
    ) -> tuple[Sum, ...]:
        return (await self.answers.ask(Question(start_ms, end_ms, by, where, limit=limit))).rows


@dataclass(frozen=True, slots=True)
class _Afterwards:
    """By subject: since when, and its days."""

    since: dict[str, int]
    parts: dict[str, list[tuple[int, Part]]]
    end_ms: int

    def of(self, subject: str, decided_ms: int, kinds: Sequence[CostClass]) -> After:
        """What it cost since the first whole day behind its decision."""
        start_ms = max(self.since.get(subject, self.end_ms), (decided_ms // DAY_MS + 1) * DAY_MS)
        found = [part for at, part in self.parts.get(subject, []) if at >= start_ms]
        bill, paid = sum(part.bill_micros for part in found), sum(part.of(*kinds) for part in found)
        return After(start_ms, max(start_ms, self.end_ms), bill, paid)


def cheapest(prices: Iterable[Price], site: str, gpu_class: str, now_ms: int) -> Reserved | None:
    """The least reserved price on record for a site's GPUs of a class that holds now or will."""
    found = [
        price
        for price in prices
        if price.kind is PriceKind.RESERVED
        and price.until_ms > now_ms
        and price.gpu_class == gpu_class
        and (not (where := price.node or price.site) or names.top(where) == site)
    ]
    best = min(found, key=lambda price: (price.micros_per_hour, price.name), default=None)
    return Reserved(best.name, best.micros_per_hour, said(best)) if best else None


def _part(row: Sum) -> Part:
    return Part(row.gpu_ms, row.micros)


def _cash_ppm(rows: Sequence[Sum], place: int) -> int:
    cash = sum(row.bill_micros for row in rows if row.keys[place] in _CASH)
    return share_ppm(cash, sum(row.bill_micros for row in rows))
