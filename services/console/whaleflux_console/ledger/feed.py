"""From the stream into the ledger: read by place, kept, and only then is the place in the ledger further on.

The bus keeps no position for it: the ledger's own is in the same commit as the reports, so a crash repeats nothing and leaves nothing out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from whaleflux.clock import Clock
from whaleflux.events.api import MAX_READ, Bus, StoredEvent
from whaleflux.events.subjects import USAGE_ROOT
from whaleflux_console.ledger.ledger import Ledger, Reports
from whaleflux_console.ledger.reported import instant_ms, reports_of

log = logging.getLogger(__name__)

SUBJECTS = (f"{USAGE_ROOT}.>",)
EVERY_S = 60.0  # between commits: a file per minute and hour
MOST_BYTES = 16 << 20  # of reports that wait for the next commit
_PAUSE_S = 1.0


class Feed:
    """One reader, of the ledger's leader."""

    def __init__(
        self,
        ledger: Ledger,
        bus: Bus,
        clock: Clock,
        *,
        every_s: float = EVERY_S,
        decode: Callable[[Sequence[StoredEvent]], Reports] = reports_of,
    ) -> None:
        self._ledger, self._bus, self._clock, self._every_s, self._decode = ledger, bus, clock, every_s, decode
        self._waiting: list[StoredEvent] = []
        self._missed = 0
        self._kept_s = clock.monotonic()

    async def run(self) -> None:
        """Until cancelled. Raises what the ledger's writes raise: it is opened anew then."""
        while True:
            if not await self.step():
                await self._clock.sleep(min(_PAUSE_S, self._every_s))

    async def step(self) -> bool:
        """Reads what comes next and keeps what has waited long enough; whether there may be more at once."""
        if again := self._ledger.state.position.again:
            await self._read_again(*again[0])
            return True
        began_ms = instant_ms(self._clock.now())
        events, more = await self._next()
        self._waiting += events
        waiting_bytes = sum(len(event.data) for event in self._waiting)
        if waiting_bytes >= MOST_BYTES or self._clock.monotonic() - self._kept_s >= self._every_s:
            await self.keep(None if more else began_ms)
        return more

    async def keep(self, all_until_ms: int | None = None) -> None:
        """Puts what waits into the ledger. `all_until_ms`: the stream had nothing else at that instant."""
        waiting, missed = self._waiting, self._missed
        self._waiting, self._missed, self._kept_s = [], 0, self._clock.monotonic()
        if waiting:
            await self._ledger.append(await asyncio.to_thread(self._decode, waiting), missed=missed)
        if all_until_ms is not None:
            await self._ledger.advance(all_until_ms)

    async def _next(self) -> tuple[Sequence[StoredEvent], bool]:
        """Events behind those that were read, and whether the stream has more of them."""
        last, last_id = self._read_to()
        excerpt = await self._bus.read(SUBJECTS, start=max(1, last), limit=MAX_READ)
        first = excerpt.events[0] if excerpt.events else None
        if excerpt.last < last or (first and first.sequence == last and first.id != last_id):
            log.warning("the stream of usage began anew: its %s reports are read from the first on", excerpt.last)
            await self.keep()
            await self._ledger.begin_stream_anew()
            return (), True
        new = excerpt.events[1:] if first and first.sequence == last else excerpt.events
        if new and new[0].sequence > last + 1:
            self._missed += new[0].sequence - last - 1
            log.warning(
                "%s reports of usage were gone before they were read: what they told is not known", self._missed
            )
        return new, excerpt.matching > len(excerpt.events)

    def _read_to(self) -> tuple[int, str]:
        position = self._ledger.state.position
        return (self._waiting[-1].sequence, self._waiting[-1].id) if self._waiting else (position.sequence, position.id)

    async def _read_again(self, first: int, last: int) -> None:
        """A stretch whose files are gone, or its beginning."""
        excerpt = await self._bus.read(SUBJECTS, start=first, limit=MAX_READ)
        events = [event for event in excerpt.events if event.sequence <= last]
        if not events:
            await self._ledger.give_up(last)
            return
        if events[0].sequence > first:
            await self._ledger.give_up(events[0].sequence - 1)
        await self._ledger.append_again(await asyncio.to_thread(self._decode, events))
