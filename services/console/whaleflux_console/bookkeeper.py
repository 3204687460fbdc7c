"""Keeps the ledger while this replica leads: tells it what owners say, closes hours, restates those that prices or invoices changed."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.store.election import Leader
from whaleflux.telemetry import Event, Metric
from whaleflux_console.biller import NotBilled, bill
from whaleflux_console.core.chronicle import Chronicle
from whaleflux_console.core.facts import HOUR_MS, Facts
from whaleflux_console.invoicing import Invoicing
from whaleflux_console.ledger.billing import Billed, Known
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.ledger import Ledger
from whaleflux_console.ledger.manifest import Kind
from whaleflux_console.ledger.schemas import facts_table
from whaleflux_console.pricing import Pricing
from whaleflux_console.retelling import Retelling

_log = telemetry.get_logger("whaleflux.console.bookkeeper")
_AGAIN_AT_ONCE = 500  # hours of one commit
_INTERIM_EVERY_S = 20.0
_INTERIM_PAUSE = 20.0
_MOST_SAID, _MOST_WRONG = 20, 1_000  # hours


@dataclass(slots=True)
class Progress:
    """What the ledger's keeper can say of itself, for people. Of another replica it is empty."""

    trouble: str = ""


class Bookkeeper:
    """`tick` is one round; it may end anywhere, and the next goes on from what the ledger has."""

    def __init__(
        self,
        ledger: Ledger,
        leader: Leader,
        chronicle: Chronicle,
        pricing: Pricing,
        invoicing: Invoicing,
        clock: Clock,
        progress: Progress,
        retelling: Retelling,
    ) -> None:
        self._ledger, self._leader, self._chronicle = ledger, leader, chronicle
        self._pricing, self._invoicing = pricing, invoicing
        self._clock, self._progress, self._retelling = clock, progress, retelling
        self._whole_until_ms = 0  # hours before are told whole
        self._house_kept_ms = 0
        self._next_interim_s = 0.0
        self._left: dict[int, str] = {}  # hours that could not be closed, and why
        self._wrong: dict[int, Billed] = {}  # hours that do not add up

    def now_ms(self) -> int:
        """By this process' clock."""
        return round(self._clock.now().timestamp() * 1000)

    async def resume(self) -> None:
        """Takes up what was going on when the ledger was last told. Before the owners are followed."""
        told = [hour for kind, hour in self._ledger.state.spans if kind is Kind.FACTS]
        if told:
            newest = max(told)
            for hour in (newest - HOUR_MS, newest):
                with contextlib.suppress(Damaged):  # said where the hour is closed; owners tell what is there
                    await asyncio.to_thread(self._chronicle.resume, await self._ledger.told(hour))
            self._whole_until_ms = newest

    async def tick(self) -> None:
        """Tells what is new, closes what is due."""
        now_ms = self.now_ms()
        self._say_trouble()
        await self._tell(now_ms)
        await self._restate_for_prices(now_ms)
        await self._invoicing.round(now_ms)
        for hour_ms in self._ledger.due():
            await self._close_or_leave(hour_ms)
        await self._interim(now_ms)
        self._say_trouble()
        if now_ms - self._house_kept_ms >= HOUR_MS:
            self._house_kept_ms = now_ms
            await self._ledger.keep_house(now_ms)

    async def _close_or_leave(self, hour_ms: int) -> None:
        """An hour of which what owners told is damaged, or that cannot be billed now, stays as it was: others do not wait for it."""
        try:
            try:
                await self.close(hour_ms)
            except Damaged as damage:
                await self._tell_again(hour_ms, damage)
        except (Damaged, NotBilled) as trouble:
            self._ledger.put_off(hour_ms)
            self._left[hour_ms] = str(trouble)
            _log.error(Event.LEDGER_TROUBLE, reason=str(trouble))
        else:
            self._left.pop(hour_ms, None)

    async def _tell_again(self, hour_ms: int, damage: Damaged) -> None:
        """Closes the hour by what owners still know of it. Raises Damaged when that is not enough."""
        self._ledger.note([damage])
        if why := await self._retelling.told_again(hour_ms, self.now_ms()):
            raise Damaged(damage.path, f"{damage.what}, and {why}")
        await self.close(hour_ms)

    async def close(self, hour_ms: int, *, so_far: Facts | None = None) -> None:
        """Closes or restates one hour. Rows that do not add up are told of, and are in the ledger all the same: money is not hidden.

        `so_far`: it stays open, and this goes on in it.
        """
        interim = so_far is not None
        made = await self._ledger.inputs(hour_ms)
        told = (*made.told, await asyncio.to_thread(facts_table, so_far)) if so_far else made.told
        known = Known(hour_ms, told, made.samples, made.steps, self._pricing.prices)
        found = await bill(known, self._ledger.engine.scratch)
        self._note(hour_ms, found)
        version = await self._ledger.close_with(replace(made, told=told), found.rows, interim=interim)
        if not interim:
            _log.info(Event.HOUR_CLOSED, hour=hour_ms, version=version, rows=found.rows.num_rows)

    async def _interim(self, now_ms: int) -> None:
        """What open hours cost so far, as often as that takes a twentieth of the time at most."""
        began_s = self._clock.monotonic()
        if began_s < self._next_interim_s:
            return
        for hour_ms in sorted({*self._ledger.open_hours(), now_ms // HOUR_MS * HOUR_MS}):
            so_far = await asyncio.to_thread(self._chronicle.copied().whole_hour, hour_ms, now_ms)
            with contextlib.suppress(Damaged, NotBilled):  # said where the hour is closed
                await self.close(hour_ms, so_far=so_far)
        took_s = self._clock.monotonic() - began_s
        self._next_interim_s = began_s + max(_INTERIM_EVERY_S, _INTERIM_PAUSE * took_s)

    def _note(self, hour_ms: int, found: Billed) -> None:
        self._wrong.pop(hour_ms, None)
        if found.residual_micros or found.faults:
            self._wrong[hour_ms] = found
            _log.error(Event.LEDGER_FAULT, hour=hour_ms, reason="; ".join(found.faults))
        telemetry.gauge(Metric.LEDGER_RESIDUAL).set(sum(one.residual_micros for one in self._wrong.values()))

    def _say_trouble(self) -> None:
        """What is wrong until it is right, the newest of it."""
        wrong = [f"the hour {hour} does not add up: {'; '.join(one.faults)}" for hour, one in self._wrong.items()]
        found = [*self._ledger.notes, *self._left.values(), *wrong]
        self._progress.trouble = "; ".join(dict.fromkeys(found[-_MOST_SAID:]))
        for hours in (self._left, self._wrong):
            while len(hours) > _MOST_WRONG:
                hours.pop(next(iter(hours)))

    async def _tell(self, now_ms: int) -> None:
        fresh = sorted((await asyncio.to_thread(self._chronicle.taken(now_ms).fresh, now_ms)).items())
        for first in range(0, len(fresh), _AGAIN_AT_ONCE):
            await self._ledger.tell_hours(dict(fresh[first : first + _AGAIN_AT_ONCE]))
        this_hour = now_ms // HOUR_MS * HOUR_MS
        if not self._whole_until_ms:
            self._whole_until_ms = self._chronicle.begin_ms(now_ms) // HOUR_MS * HOUR_MS
        while self._whole_until_ms < this_hour:
            whole = await asyncio.to_thread(self._chronicle.copied().whole_hour, self._whole_until_ms, now_ms)
            await self._ledger.tell(self._whole_until_ms, whole)
            self._whole_until_ms += HOUR_MS
            self._chronicle.forget(self._whole_until_ms - HOUR_MS)

    async def _restate_for_prices(self, now_ms: int) -> None:
        await self._pricing.read()
        windows = await self._pricing.changed()
        if not windows:
            return
        closed = [file.start_ms for file in self._ledger.state.all_of(Kind.HOURS)]
        hours = [hour for hour in closed if any(w.start_ms < hour + HOUR_MS and hour < w.end_ms for w in windows)]
        for first in range(0, len(hours), _AGAIN_AT_ONCE):
            await self._ledger.restate(hours[first : first + _AGAIN_AT_ONCE])
        await self._pricing.note(self._leader)
