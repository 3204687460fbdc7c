"""The offers as the keeper of leases knows them in a round, and what it learns of them: whether they have machines, and let them stay."""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux.clock import Clock
from whaleflux.store import keys
from whaleflux.store.api import Condition, ConditionFailed, Entry, Fenced, Put, Store, Unchanged
from whaleflux.store.reading import read_all
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory.core.offers import TRUSTED, Offer, trust
from whaleflux_inventory.lease_records import core_offer, offer_of


class OfferBook:
    """`held`: the condition of whoever leads, which every write carries."""

    def __init__(self, store: Store, clock: Clock, held: Condition) -> None:
        self._store, self._clock, self._held = store, clock, held
        self._known: dict[str, tuple[Entry, pb.Offer]] = {}

    async def read(self) -> None:
        """All that can be read, as they are now."""
        read = read_all((await self._store.list(keys.OFFERS)).entries, offer_of)
        self._known = {offer.name: (entry, offer) for entry, offer in read.values}

    def records(self) -> list[pb.Offer]:
        return [offer for _, offer in self._known.values()]

    def record(self, name: str) -> pb.Offer:
        """Raises KeyError for one that is not there."""
        return self._known[name][1]

    def among(self, names: Sequence[str]) -> list[Offer]:
        """Those that are there, in this order."""
        return [core_offer(self._known[name][1]) for name in names if name in self._known]

    async def believe(self, name: str) -> None:
        """It has given a machine."""
        known = self._known.get(name)
        if known is not None and known[1].refusals:
            record = known[1]
            record.refusals, record.refusal = 0, ""
            record.ClearField("refused_time")
            await self._write(known[0], record)

    async def distrust(self, name: str, why: str) -> None:
        """It had no machine, or has taken one away. What several leases hear while it is not believed anyway is no further time in a row."""
        known = self._known.get(name)
        if known is None:
            return
        record, now = known[1], self._clock.now()
        if trust(core_offer(record), now.timestamp()) >= TRUSTED:
            record.refusals += 1
        record.refusal = why[:500]
        record.refused_time.FromDatetime(now)
        await self._write(known[0], record)

    async def _write(self, entry: Entry, record: pb.Offer) -> None:
        record.etag = ""
        value = record.SerializeToString(deterministic=True)
        try:
            revision = await self._store.commit(Put(entry.key, value), when=[Unchanged(entry), self._held])
        except Fenced:
            raise
        except ConditionFailed:  # another lease had the same answer in this moment, or an operator changed it
            return
        self._known[record.name] = Entry(entry.key, value, revision, entry.created), record
