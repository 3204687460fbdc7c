"""The router's memory: the snapshot that decisions read, the loads that they add, and who may ask."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from whaleflux.clock import Clock
from whaleflux.names import last, ulid
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.store.cache import Cache
from whaleflux.trust.sight import Sight
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router import convert
from whaleflux_inference_router.core.load_tracker import LoadTracker
from whaleflux_inference_router.core.ranking import RANKED, Model, Replica, Request, RoutingDecision, Snapshot, rank
from whaleflux_inference_router.rights import ANYBODY, ModelRights, sees

_SPREAD = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly: each share gets its part of any few requests
_BEFORE_OWNERS = "operator/-"  # keys without an owner were made when operators alone made keys


@dataclass(frozen=True, slots=True)
class Opening:
    """What somebody may ask: the models that they see, or of those only some, by id."""

    sight: Sight
    only: frozenset[str] = frozenset()
    key: str = ""  # id of the key; "": none was asked for


class RoutingState:
    """One per process. `reachable` is set by the endpoint service once a front door listens to it."""

    def __init__(
        self,
        clock: Clock,
        models: Cache[pb.Model],
        replicas: Cache[pb.Replica],
        api_keys: Cache[pb.ApiKey],
        views: Cache[pb.RouterView],
        rights: ModelRights | None = None,
    ) -> None:
        self.clock, self.rights, self.views = clock, rights or ModelRights(), views
        self.models, self.replicas, self.api_keys = models, replicas, api_keys
        self.load_tracker = LoadTracker(clock.monotonic())
        self.reachable: frozenset[str] | None = None
        self.snapshot = Snapshot()
        self._hashes: dict[str, pb.ApiKey] = {}
        self._sent = 0
        self.changed = asyncio.Event()

    def decide(self, request: Request, most: int = 0) -> RoutingDecision:
        """The ranking now, whole or the best `most`; adds no load."""
        return rank(request, self.snapshot, self.load_tracker.loads, self.clock.monotonic(), self.reachable, most)

    def send(self, request: Request, fingerprint: bytes = b"", *, most: int = RANKED) -> tuple[str, RoutingDecision]:
        """Decides and counts the request at the first of the ranking; returns the decision's id with it."""
        self._sent += 1
        drawn = replace(request, draw=self._sent * _SPREAD % 1.0)
        decision, decision_id = self.decide(drawn, most), ulid()
        first = decision.ranking[0].replica.name
        self.load_tracker.open(decision_id, first, self.clock.monotonic(), fingerprint)
        return decision_id, decision

    def engines_ended_by(self, fingerprint: bytes) -> int:
        """How many engines ended lately while they worked on this request."""
        return self.load_tracker.fatal_requests.engines_ended(fingerprint, self.clock.monotonic())

    def opened_by(self, secret: str) -> Opening | None:
        """What an API key opens, None where there is none, or it has ended, or its owner is not admitted any more; compared by hash."""
        found = self._hashes.get(hashlib.sha256(secret.encode()).hexdigest())
        if found is None or 0 < found.expire_time.seconds <= self.clock.now().timestamp():
            return None
        owner = self.rights.known(found.owner or _BEFORE_OWNERS)
        return (
            None
            if owner is None
            else Opening(self.rights.sight_of(owner), frozenset(map(last, found.models)), last(found.name))
        )

    def open_to_all(self) -> Opening:
        """What is open where no key is asked for: models in queues that are for everybody."""
        return Opening(self.rights.sight_of(ANYBODY))

    def model(self, model_id: str) -> pb.Model | None:
        """The model as it is stored; None: there is none."""
        return self.models.get(keys.MODELS + model_id)

    def opens(self, opening: Opening, model_id: str) -> bool:
        """Whether the model is there for them."""
        model = self.model(model_id)
        return model is not None and sees(opening.sight, model)

    async def seen(self, cache: Cache[Any], revision: int) -> None:
        """Returns when decisions here know `cache` at `revision`: whoever is told of a change can use it."""
        await cache.at_least(revision)
        self._swap()

    def replica_at(self, address: str, decision_id: str) -> str:
        """Name of a replica with this address, "" when there is none; of several (a server may serve several models) one of the request's model."""
        found = [r.name for r in self.replicas.values.values() if r.address == address]
        model = convert.model_of(self.load_tracker.sent_to(decision_id) or "models/")
        return next((name for name in found if convert.model_of(name) == model), found[0] if found else "")

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
        self.load_tracker.keep_only({r.name for r in self.replicas.values.values()})
        self._hashes = {key.secret: key for key in self.api_keys.values.values()}
        self.changed.set()
        self.changed = asyncio.Event()


@asynccontextmanager
async def routing(store: Store, clock: Clock, rights: ModelRights | None = None) -> AsyncIterator[RoutingState]:
    """A `RoutingState` over caches of the store."""
    async with (
        Cache(store, keys.MODELS, convert.model) as models,
        Cache(store, keys.REPLICAS, convert.replica) as replicas,
        Cache(store, keys.API_KEYS, convert.api_key) as api_keys,
        Cache(store, keys.ROUTER_VIEWS, convert.router_view) as views,
    ):
        made = RoutingState(clock, models, replicas, api_keys, views, rights)
        made._swap()
        yield made
