"""Writes what the leader's plan decides about reservations: that they begin and end, which GPUs they have, who leaves for them."""

from __future__ import annotations

import asyncio

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import Aborted, Unavailable
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Delete, Fenced, Held, Put, Store, Unchanged
from whaleflux.store.cache import Cache
from whaleflux.store.election import Leader
from whaleflux.store.once import commit_once
from whaleflux.telemetry import Metric
from whaleflux_scheduler.core.reservations import Reservation
from whaleflux_scheduler.reservation_records import RESERVATIONS, StoredReservation, is_old

AGAIN_S = 1.0  # while the store does not answer
PRUNE_EVERY_S = 3_600.0


class ReservationKeeper:
    """Lives as long as its leadership. What is refused, since the record changed, the plan decides again when it learns that."""

    def __init__(self, store: Store, leader: Leader, cache: Cache[StoredReservation], clock: Clock) -> None:
        self._store, self._held, self._cache, self._clock = store, Held(leader), cache, clock
        self._wanted: dict[str, Reservation] = {}
        self._some = asyncio.Event()

    def write(self, one: Reservation) -> None:
        """To be stored soon, in place of what was to be stored of it before."""
        self._wanted[one.name] = one
        self._some.set()

    async def run(self) -> None:
        """For ever; raises Fenced when another leads."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._prune())
            while True:
                await self._some.wait()
                self._some.clear()
                while self._wanted:
                    name = next(iter(self._wanted))
                    await self._write(self._wanted.pop(name))

    async def _write(self, one: Reservation) -> None:
        stored = self._cache.get(keys.of_name(keys.RESERVATIONS, one.name))
        if stored is None:
            return
        message = type(stored.message)()
        message.CopyFrom(stored.message)
        RESERVATIONS.merge(one, message)
        if message.state != stored.message.state:
            message.state_time.FromDatetime(self._clock.now())
        put = Put(stored.entry.key, RESERVATIONS.pack(message))
        try:
            revision = await commit_once(
                self._store, put, when=[Unchanged(stored.entry), self._held], key=stored.entry.key
            )
            await self._cache.at_least(revision)
        except Fenced:
            raise
        except ConditionFailed:
            telemetry.counter(Metric.CAS_CONFLICTS).labels("reservation").inc()
        except (Aborted, Unavailable):
            self._wanted.setdefault(one.name, one)
            await self._clock.sleep(AGAIN_S)

    async def _prune(self) -> None:
        """Those that were over long ago are deleted."""
        while True:
            await self._clock.sleep(PRUNE_EVERY_S)
            for stored in list(self._cache.values.values()):
                if is_old(stored.message, self._clock.now()):
                    try:
                        await self._store.commit(Delete(stored.entry.key), when=[Unchanged(stored.entry), self._held])
                    except Fenced:
                        raise
                    except (ConditionFailed, Unavailable):
                        continue
