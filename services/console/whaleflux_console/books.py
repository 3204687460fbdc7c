"""The ledger's keeper as a process part: opens the ledger as its leader, follows the owners, and begins anew after what could not be reached."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import FailedPrecondition, Unavailable
from whaleflux.events.api import Bus
from whaleflux.retry import Backoff
from whaleflux.store.api import Store
from whaleflux.store.election import Leader
from whaleflux.telemetry import Event
from whaleflux_console.bookkeeper import Bookkeeper, Progress
from whaleflux_console.core.chronicle import Chronicle
from whaleflux_console.invoicing import Invoicing
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.feed import EVERY_S, Feed
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.ledger import Ledger, open_ledger
from whaleflux_console.ledger.rules import Rules
from whaleflux_console.owners import Owners
from whaleflux_console.peers import Peers
from whaleflux_console.pricing import Pricing
from whaleflux_console.retelling import Retelling
from whaleflux_console.saves import Saves

_log = telemetry.get_logger("whaleflux.console.books")
_AGAIN = Backoff(first_s=1.0, longest_s=30.0)
_WELL_S = 120.0  # after which trouble counts anew


@dataclass(frozen=True, slots=True)
class Books:
    """Everything that keeping the ledger takes."""

    store: Store
    clock: Clock
    bus: Bus | None  # None: nobody reports what GPUs did
    folder: Folder
    engine: Engine
    peers: Peers
    rules: Rules
    tick_s: float
    progress: Progress
    rebuild: bool = False

    async def keep(self, leader: Leader) -> None:
        """While it leads."""
        failures = 0
        while True:
            began_s = self.clock.monotonic()
            try:
                await self._keep_once(leader)
            except* (Unavailable, FailedPrecondition) as group:
                error = _first(group)
                self.progress.trouble = str(error)
                _log.warning(Event.LEDGER_TROUBLE, reason=str(error))
            failures = 1 if self.clock.monotonic() - began_s > _WELL_S else failures + 1
            await self.clock.sleep(_AGAIN.pause_s(failures))

    async def _keep_once(self, leader: Leader) -> None:
        ledger = await open_ledger(
            self.folder, self.store, leader, rules=self.rules, engine=self.engine, rebuild=self.rebuild
        )
        chronicle = Chronicle()
        owners = Owners(self.peers, Saves(self.peers.checkpoint), chronicle, self.clock)
        pricing = Pricing(self.store)
        invoicing = Invoicing(self.store, ledger, leader)
        bookkeeper = Bookkeeper(
            ledger,
            leader,
            chronicle,
            pricing,
            invoicing,
            self.clock,
            self.progress,
            Retelling(ledger, owners.know, pricing),
        )
        await bookkeeper.resume()
        async with asyncio.TaskGroup() as group:
            group.create_task(owners.run())
            group.create_task(self._rounds(owners, bookkeeper))
            group.create_task(self._feed(ledger))

    async def _feed(self, ledger: Ledger) -> None:
        """What agents report; without a bus there is nothing to wait for."""
        if self.bus is not None:
            await Feed(ledger, self.bus, self.clock).run()
        while True:
            await ledger.advance(round(self.clock.now().timestamp() * 1000))
            await self.clock.sleep(EVERY_S)

    async def _rounds(self, owners: Owners, bookkeeper: Bookkeeper) -> None:
        await owners.ready.wait()
        while True:
            owners.note_fragments()
            await bookkeeper.tick()
            await self.clock.sleep(self.tick_s)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
