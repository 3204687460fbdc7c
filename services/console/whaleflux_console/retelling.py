"""Of an hour of whose facts a file is damaged its owners are asked again: what they still know takes the file's place.

It does so only where the hour's rows lack nothing by it: an hour is never billed anew by half of what was told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from whaleflux.errors import Unavailable
from whaleflux_console.biller import bill
from whaleflux_console.core.checks import lacking
from whaleflux_console.core.facts import Facts
from whaleflux_console.ledger.billing import Known
from whaleflux_console.ledger.ledger import Ledger
from whaleflux_console.ledger.schemas import facts_table, table_rows
from whaleflux_console.pricing import Pricing

AGAIN_MS = 3_600_000  # between two times that owners are asked of one hour
_MOST = 1_000  # hours of which is remembered when that was
_SHOWN = 3


class Retelling:
    """`owners_know`: everything that they know now of an hour."""

    def __init__(self, ledger: Ledger, owners_know: Callable[[int], Awaitable[Facts]], pricing: Pricing) -> None:
        self._ledger, self._owners_know, self._pricing = ledger, owners_know, pricing
        self._asked: dict[int, tuple[int, str]] = {}  # hour -> when, and why it stayed as it was

    async def told_again(self, hour_ms: int, now_ms: int) -> str:
        """Empty: the hour can be closed again. Else why it stays as it was. Raises NotBilled; Unavailable where the ledger's folder is."""
        asked_ms, why = self._asked.get(hour_ms, (-AGAIN_MS, ""))
        if now_ms - asked_ms < AGAIN_MS and why:
            return why
        try:
            facts = await self._owners_know(hour_ms)
        except Unavailable as late:  # that proves nothing: they are asked when the hour is due again
            return late.message
        if lacks := await self._lacks(hour_ms, facts):
            why = f"its owners no longer know of {'; '.join(lacks[:_SHOWN])}"
            self._asked = dict([*self._asked.items(), (hour_ms, (now_ms, why))][-_MOST:])
            return why
        damaged = await self._ledger.damaged_facts(hour_ms)
        await self._ledger.tell(hour_ms, facts)
        await self._ledger.recover(damaged)
        return ""

    async def _lacks(self, hour_ms: int, facts: Facts) -> tuple[str, ...]:
        """What the rows in force have that those by these facts would not."""
        before = await self._ledger.rows(hour_ms)
        if not before or not before[0].version:
            return ()
        made = await self._ledger.inputs(hour_ms, sound_facts=True)
        told = (*made.told, await asyncio.to_thread(facts_table, facts))
        known = Known(hour_ms, told, made.samples, made.steps, self._pricing.prices)
        found = await bill(known, self._ledger.engine.scratch)
        return await asyncio.to_thread(lambda: tuple(lacking(before, table_rows(found.rows))))
