"""The router's memory: the snapshot that decisions read, the loads that they add, and who may ask."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from whaleflux.clock import Clock
from whaleflux.names import ulid
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.store.cache import Cache
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router import convert
from whaleflux_inference_router.core.load import LoadBook
from whaleflux_inference_router.core.policy import RANKED, Decision, Model, Replica, Request, Snapshot, decide


class Routing:
    """One per process. `reachable` is set by the endpoint service once a front door listens to it."""

    def __init__(
        self, clock: Clock, models: Cache[pb.Model], replicas: Cache[pb.Replica], api_keys: Cache[pb.ApiKey]
    ) -> None:
        self._clock = clock
        self.models, self.replicas, self.api_keys = models, replicas, api_keys
        self.book = LoadBook()
        self.reachable: frozenset[str] | None = None
        self.snapshot = Snapshot()
        self._hashes: dict[str, pb.ApiKey] = {}
        self.changed = asyncio.Event()

    def decide(self, request: Request, most: int = 0) -> Decision:
        """The ranking now, whole or the best `most`; adds no load."""
        return decide(request, self.snapshot, self.book.loads, self._clock.monotonic(), self.reachable, most)

    def send(self, request: Request) -> tuple[str, Decision]:
        """Decides and counts the request at the first of the ranking; returns the decision's id with it."""
        decision, decision_id = self.decide(request, RANKED), ulid()
        self.book.open(decision_id, decision.ranking[0].replica.name, self._clock.monotonic())
        return decision_id, decision

    def knows_key(self, secret: str) -> bool:
        """Whether an API key exists and has not ended; compared by hash."""
        found = self._hashes.get(hashlib.sha256(secret.encode()).hexdigest())
        if found is None:
            return False
        return not found.expire_time.seconds or found.expire_time.seconds > self._clock.now().timestamp()

    async def seen(self, cache: Cache[Any], revision: int) -> None:
        """Returns when decisions here know `cache` at `revision`: whoever is told of a change can use it."""
        await cache.at_least(revision)
        self._swap()

    def replica_at(self, address: str) -> str:
        """Name of the replica with this address, "" when there is none."""
        return next((r.name for r in self.replicas.values.values() if r.address == address), "")

    async def keep_current(self) -> None:
        """Swaps the snapshot at each change, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for cache in (self.models, self.replicas, self.api_keys):
                group.create_task(self._follow(cache))

    async def _follow(self, cache: Cache[pb.Model] | Cache[pb.Replica] | Cache[pb.ApiKey]) -> None:
        self._swap()
        async with aclosing(cache.changes()) as changes:
            async for _ in changes:
                self._swap()

    def _swap(self) -> None:
        models: dict[str, Model] = {}
        for message in self.models.values.values():
            found = convert.routed_model(message)
            models[found.id] = found
        grouped: dict[str, list[Replica]] = {}
        for replica in self.replicas.values.values():
            grouped.setdefault(convert.model_of(replica.name), []).append(convert.routed_replica(replica))
        self.snapshot = Snapshot(models, {m: tuple(sorted(r, key=lambda x: x.name)) for m, r in grouped.items()})
        self.book.keep_only({r.name for r in self.replicas.values.values()})
        self._hashes = {key.secret: key for key in self.api_keys.values.values()}
        self.changed.set()
        self.changed = asyncio.Event()


@asynccontextmanager
async def routing(store: Store, clock: Clock) -> AsyncIterator[Routing]:
    """A `Routing` over caches of the store."""
    async with (
        Cache(store, keys.MODELS, convert.model) as models,
        Cache(store, keys.REPLICAS, convert.replica) as replicas,
        Cache(store, keys.API_KEYS, convert.api_key) as api_keys,
    ):
        made = Routing(clock, models, replicas, api_keys)
        made._swap()
        yield made
