"""Adjustments of invoices, spread over the hours of their windows once these are closed, and taken back again.

What an hour was told is told again by name, so that a round that ended anywhere is repeated and nothing counts twice. The record says
SPREADING before the first hour is told and SPREAD when the last one was; each change is fenced by the leader and by the record's own version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from whaleflux import telemetry
from whaleflux.errors import Aborted
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Delete, Entry, Put, Store, Unchanged
from whaleflux.store.election import Leader
from whaleflux.store.reading import read_all
from whaleflux.telemetry import Event
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console import convert
from whaleflux_console.core.adjustments import by_hour
from whaleflux_console.core.facts import HOUR_MS, Adjustment, Facts
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.ledger import Ledger
from whaleflux_console.ledger.manifest import DAY_MS, Kind

_log = telemetry.get_logger("whaleflux.console.invoicing")
_AT_ONCE = 500  # hours of one commit
_DONE = {pb.ADJUSTMENT_STATE_SPREAD, pb.ADJUSTMENT_STATE_TOO_OLD}


class Invoicing:
    """Of the ledger's leader: `round` once a tick, before hours are closed."""

    def __init__(self, store: Store, ledger: Ledger, leader: Leader) -> None:
        self._store, self._ledger, self._leader = store, ledger, leader

    async def round(self, now_ms: int) -> None:
        """Everything that can be spread or taken back now."""
        read = read_all((await self._store.list(keys.ADJUSTMENTS)).entries, _record)
        for entry, record in read.values:
            try:
                await self._step(entry, record, now_ms)
            except Damaged as damage:  # that hour is made again first, and the adjustment waits for it
                self._ledger.note([damage])
                await self._ledger.recover([damage])
            except (Aborted, ConditionFailed):  # somebody takes it back at this moment: the next round sees that
                _log.info(Event.LEDGER_TROUBLE, reason=f"{record.name} changed meanwhile")

    async def _step(self, entry: Entry, record: pb.Adjustment, now_ms: int) -> None:
        one = convert.adjustment_of(record)
        if record.state == pb.ADJUSTMENT_STATE_TAKING_BACK:
            await self._tell(self._none(one, ()))
            await self._store.commit(Delete(entry.key), when=[self._leader.held, Unchanged(entry)])
        elif not self._is_done(record) and self._is_over(one):
            if one.start_ms < now_ms - self._ledger.rules.minute_days * DAY_MS:
                await self._note(entry, record, pb.ADJUSTMENT_STATE_TOO_OLD)
                return
            entry = await self._note(entry, record, pb.ADJUSTMENT_STATE_SPREADING)
            parts = by_hour(one, await self._ledger.bills(self._hours(one), one.site, one.gpu_class))
            await self._tell({part.start_ms // HOUR_MS * HOUR_MS: part for part in parts} | self._none(one, parts))
            await self._note(entry, record, pb.ADJUSTMENT_STATE_SPREAD)

    def _is_done(self, record: pb.Adjustment) -> bool:
        spread_here = record.ledger == self._ledger.id
        return record.state in _DONE and (spread_here or record.state == pb.ADJUSTMENT_STATE_TOO_OLD)

    def _is_over(self, one: Adjustment) -> bool:
        """Whether every hour of its window that there is was closed, and none is to come."""
        rules = self._ledger.rules
        over = -(-one.end_ms // HOUR_MS) * HOUR_MS + rules.close_after_ms <= self._ledger.state.watermark_ms
        return over and not any(_touches(one, hour_ms) for hour_ms in self._ledger.open_hours())

    def _hours(self, one: Adjustment) -> list[int]:
        hours = (at for kind, at in self._ledger.state.spans if kind is Kind.HOURS)
        return sorted(hour_ms for hour_ms in hours if _touches(one, hour_ms))

    def _none(self, one: Adjustment, parts: Sequence[Adjustment]) -> dict[int, Adjustment]:
        """Hours that an earlier round may have told a part, and that have none now."""
        told = {part.start_ms // HOUR_MS * HOUR_MS for part in parts}
        hours = {*self._hours(one), one.start_ms // HOUR_MS * HOUR_MS} - told
        return {hour_ms: _of_hour(one, hour_ms) for hour_ms in hours}

    async def _tell(self, parts: Mapping[int, Adjustment]) -> None:
        for some in _portions(sorted(parts.items())):
            await self._ledger.tell_hours({hour_ms: Facts(adjustments=(part,)) for hour_ms, part in some})
            self._ledger.hurry(hour_ms for hour_ms, _ in some)

    async def _note(self, entry: Entry, record: pb.Adjustment, state: Any) -> Entry:
        record.state, record.ledger = state, self._ledger.id
        value = record.SerializeToString(deterministic=True)
        if value == entry.value:
            return entry
        revision = await self._store.commit(Put(entry.key, value), when=[self._leader.held, Unchanged(entry)])
        return replace(entry, value=value, revision=revision, version=entry.version + 1)


def _record(entry: Entry) -> pb.Adjustment:
    return pb.Adjustment.FromString(entry.value)


def _touches(one: Adjustment, hour_ms: int) -> bool:
    return one.start_ms < hour_ms + HOUR_MS and hour_ms < one.end_ms


def _of_hour(one: Adjustment, hour_ms: int) -> Adjustment:
    start_ms, end_ms = max(hour_ms, one.start_ms), min(hour_ms + HOUR_MS, one.end_ms)
    return replace(one, micros=0, start_ms=start_ms, end_ms=end_ms)


def _portions(parts: Sequence[tuple[int, Adjustment]]) -> Iterator[Sequence[tuple[int, Adjustment]]]:
    for first in range(0, len(parts), _AT_ONCE):
        yield parts[first : first + _AT_ONCE]
