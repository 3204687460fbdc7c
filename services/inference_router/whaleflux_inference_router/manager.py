"""The loop that keeps each model at its replicas: jobs are created, asked for their health, drained and ended.

Runs at the leader alone; every write is fenced by its leadership. Look at the world, decide by `core.replicas`, write
what differs; what fails is tried again at the next turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any
from urllib.parse import quote

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import Refusal
from whaleflux.store.api import (
    Absent,
    Condition,
    ConditionFailed,
    Delete,
    Entry,
    Fenced,
    Held,
    Leadership,
    Put,
    Store,
    Unchanged,
)
from whaleflux.telemetry import Event, Metric
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router import convert
from whaleflux_inference_router.core.replicas import Observed, State, Wanted, state_after, surplus, wanted
from whaleflux_inference_router.fleet import Fleet, Place, job_name
from whaleflux_inference_router.routing import Routing

TURN_S = 0.25
PROBE_S = 1.0
PROBES_AT_ONCE = 64
READY_EVERY_S = 1.0  # between probes of a replica that is READY
REPLACE_EVERY_S = 10.0  # for a job that has ended
DRAIN_S = 30.0  # longest wait for requests under way
_log = telemetry.get_logger(__name__)


class Manager:
    """One leadership's work; remembers nothing that the store or a probe could not tell the next one."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        routing: Routing,
        fleet: Fleet,
        leader: Leadership,
        probe: Callable[[str, str], Awaitable[bool]] | None = None,
    ) -> None:
        self._store, self._clock, self._routing, self._fleet = store, clock, routing, fleet
        self._probe = probe or answers
        self._held = Held(leader)
        self._failed: dict[str, int] = {}  # probes failed in a row, by replica and address
        self._probed_at_s: dict[str, float] = {}
        self._replaced_at_s: dict[str, float] = {}
        self._draining_since_s: dict[str, float] = {}
        self._probing = asyncio.Semaphore(PROBES_AT_ONCE)

    async def run(self) -> None:
        """Until cancelled, or Fenced."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._fleet.watch_jobs())
            group.create_task(self._turns())

    async def _turns(self) -> None:
        while True:
            try:
                await self.turn()
            except Fenced:
                raise
            except (Refusal, ConditionFailed) as later:
                _log.warning(Event.REPLICA_DOWN, reason=str(later))
            await self._clock.sleep(TURN_S)

    async def turn(self) -> None:
        """One look at every model, side by side."""
        models = {convert.model_of(m.name): m for m in self._routing.models.values.values()}
        replicas: dict[str, dict[str, pb.Replica]] = {}
        for replica in self._routing.replicas.values.values():
            replicas.setdefault(convert.model_of(replica.name), {})[replica.name.rsplit("/", 1)[1]] = replica
        work = [self._model(models.get(m), m, replicas.get(m, {})) for m in models.keys() | replicas.keys()]
        await _all(*work)
        self._forget()
        counts = [convert.state_of(r) for r in self._routing.replicas.values.values()]
        for state in State:
            telemetry.gauge(Metric.REPLICAS).labels(state.value).set(counts.count(state))

    async def _model(self, model: pb.Model | None, model_id: str, existing: dict[str, pb.Replica]) -> None:
        should = wanted(model_id, model.replicas.min, model.engine.addresses) if model else ()
        await _all(*(self._remove(existing[replica_id]) for replica_id in surplus(existing, should)))
        if model is not None:  # side by side: a replica that hangs does not keep the others waiting
            await _all(*(self._keep(model, model_id, one, existing.get(one.id)) for one in should))

    async def _keep(self, model: pb.Model, model_id: str, one: Wanted, replica: pb.Replica | None) -> None:
        if replica is None:
            await self._create(model_id, one)
        elif convert.state_of(replica) is State.DRAINING:  # wanted again: it goes first, then a new one comes
            await self._remove(replica)
        else:
            await self._refresh(model, one, replica)

    async def _create(self, model_id: str, one: Wanted) -> None:
        name = f"models/{model_id}/replicas/{one.id}"
        made = pb.Replica(name=name, state=pb.REPLICA_STATE_STARTING, address=one.address, message="it was just made")
        made.job = "" if one.address else job_name(one.id)
        await self._write(made, None)

    async def _refresh(self, model: pb.Model, one: Wanted, replica: pb.Replica) -> None:
        """Brings a replica's record to what its job and its health path say."""
        address, place = one.address, Place()
        if not one.address:
            await self._ensure_job(model, one, replica.job)
            address, node, gpus = self._fleet.endpoint(replica.job)
            place = await self._fleet.place(node, gpus) if node else Place()
        failed = await self._health(replica, address, model.engine.health_path or "/health")
        state, why = state_after(convert.state_of(replica), Observed(address, failed))
        changed = pb.Replica()
        changed.CopyFrom(replica)
        changed.state, changed.message = convert.state_number(state), why
        changed.address, changed.gpus = address, model.engine.gpus or 1
        if place.node:
            changed.node, changed.gpu_model = place.node, place.gpu_model
            changed.gpu_memory_bytes, changed.usd_per_hour = place.gpu_memory_bytes, place.usd_per_hour
        if changed != replica:
            await self._write(changed, replica)

    async def _ensure_job(self, model: pb.Model, one: Wanted, job: str) -> None:
        """A replica's job exists and has not ended; a replica that ends again and again is started now and then."""
        if not self._fleet.synced:
            return
        if job not in self._fleet.jobs:
            await self._fleet.ensure_job(model, one.id)
        elif self._fleet.has_ended(job):
            now_s = self._clock.monotonic()
            if now_s - self._replaced_at_s.get(job, -REPLACE_EVERY_S) >= REPLACE_EVERY_S:
                self._replaced_at_s[job] = now_s
                await self._fleet.end_job(job)

    def _forget(self) -> None:
        """What is known of replicas that exist no more."""
        replicas = self._routing.replicas.values.values()
        addresses, jobs = {f"{r.name}@{r.address}" for r in replicas}, {r.job for r in replicas}
        for known, kept in ((self._failed, addresses), (self._probed_at_s, addresses), (self._replaced_at_s, jobs)):
            for gone in known.keys() - kept:
                del known[gone]

    async def _health(self, replica: pb.Replica, address: str, path: str) -> int:
        """Probes failed in a row; -1 before the first. READY ones are asked less often, unless they just failed."""
        key = f"{replica.name}@{address}"
        now_s = self._clock.monotonic()
        failures = self._failed.get(key, -1)
        load = self._routing.book.loads.get(replica.name)
        suspicious = failures != 0 or (load is not None and load.penalty(now_s) > 1)
        if not address or (not suspicious and now_s - self._probed_at_s.get(key, -1e9) < READY_EVERY_S):
            return failures
        self._probed_at_s[key] = now_s
        async with self._probing:
            alive = await self._probe(address, path)
        self._failed[key] = 0 if alive else max(failures, 0) + 1
        return self._failed[key]

    async def _remove(self, replica: pb.Replica) -> None:
        """DRAINING, then its job ends, then the record goes."""
        if convert.state_of(replica) is not State.DRAINING:
            changed = pb.Replica()
            changed.CopyFrom(replica)
            changed.state, changed.message = pb.REPLICA_STATE_DRAINING, "it is not wanted any more"
            await self._write(changed, replica)
            return
        since_s = self._draining_since_s.setdefault(replica.name, self._clock.monotonic())
        load = self._routing.book.loads.get(replica.name)
        if load is not None and load.in_flight and self._clock.monotonic() - since_s < DRAIN_S:
            return
        if replica.job and not await self._fleet.end_job(replica.job):
            return
        self._draining_since_s.pop(replica.name, None)
        await self._commit(Delete(convert.replica_key(replica.name)), when=[_unchanged(replica)])

    async def _write(self, changed: pb.Replica, before: pb.Replica | None) -> None:
        key = convert.replica_key(changed.name)
        if before is None or before.state != changed.state:
            changed.transition_time.FromDatetime(self._clock.now())
            state = convert.state_of(changed)
            event = Event.REPLICA_UP if state is State.READY else Event.REPLICA_DOWN
            _log.info(event, replica=changed.name, state=state.value, reason=changed.message)
        condition: Condition = Absent(key) if before is None else _unchanged(before)
        await self._commit(Put(key, convert.encode(changed)), when=[condition])

    async def _commit(self, write: Put | Delete, when: Sequence[Condition]) -> None:
        """Writes under this leadership and waits to see it; somebody else's change is seen at the next turn."""
        try:
            revision = await self._store.commit(write, when=[*when, self._held])
        except Fenced:
            raise
        except ConditionFailed:
            return
        await self._routing.replicas.at_least(revision)


async def _all(*work: Coroutine[Any, Any, None]) -> None:
    """All of it side by side; a refusal is said and tried again at the next turn, anything else is raised."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, Refusal) and not isinstance(outcome, Fenced):
            _log.info(Event.REPLICA_DOWN, reason=outcome.message)
        elif isinstance(outcome, BaseException):
            raise outcome


def _unchanged(replica: pb.Replica) -> Unchanged:
    """The replica's key is still at the revision that its etag names."""
    revision = int(replica.etag.strip('"'))
    return Unchanged(Entry(convert.replica_key(replica.name), b"", revision, 0))


async def answers(address: str, path: str) -> bool:
    """Whether GET `path` there is answered with 200 within `PROBE_S`."""
    host, _, port = address.rpartition(":")
    request = f"GET {quote(path)} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
    try:
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(request.encode("latin-1"))
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):
        return False
    return status.split(b" ")[1:2] == [b"200"]
