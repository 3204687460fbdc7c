"""The loop that keeps each model at its replicas: jobs are created, asked for their health, drained and ended.

Runs at the leader alone; every write is fenced by its leadership. Look at the world, decide by `core.replicas`, write
what differs; what fails is tried again at the next turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from whaleflux import hostport, names, telemetry
from whaleflux.clock import Clock
from whaleflux.errors import FailedPrecondition, StatusError
from whaleflux.store import keys
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
from whaleflux_inference_router.engine_probe import EngineProbe, HttpProbe
from whaleflux_inference_router.engine_proofs import EngineProofs
from whaleflux_inference_router.replica_jobs import ReplicaHost, ReplicaJobs, job_name
from whaleflux_inference_router.replica_starts import ReplicaStarts
from whaleflux_inference_router.resolver import Resolver
from whaleflux_inference_router.rollouts import Rollouts
from whaleflux_inference_router.router_views import RouterViews
from whaleflux_inference_router.routing_state import RoutingState

TURN_S = 0.25
IDLE_TURN_S = 1.0  # while there is no model: a new one is seen that much later
PROBES_AT_ONCE = 64
READY_EVERY_S = 1.0  # between probes of a replica that is READY
MODELS_EVERY_S = 10.0  # between looks at the list of models of a replica that is READY
DRAIN_S = 600.0  # longest wait for requests under way
_log = telemetry.get_logger(__name__)


class ReplicaManager:
    """One leadership's work; remembers nothing that the store or a probe could not tell the next one."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        routing: RoutingState,
        jobs: ReplicaJobs,
        leader: Leadership,
        probe: EngineProbe | None = None,
        resolver: Resolver | None = None,
        views: RouterViews | None = None,
    ) -> None:
        self._store, self._clock, self._routing, self._jobs = store, clock, routing, jobs
        self._probe, self._resolver = probe or HttpProbe(), resolver or Resolver(clock)
        self._held = Held(leader)
        self._proofs = EngineProofs(self._probe, clock)
        self._views = views or RouterViews(store, clock, routing, "")
        self._rollouts = Rollouts(store, clock, routing, jobs, self._views, self._held)
        self._failed: dict[str, int] = {}  # probes failed in a row, by replica and address
        self._probed_at_s: dict[str, float] = {}
        self._models_at_s: dict[str, float] = {}  # when a replica was asked for its list of models
        self._mismatch: dict[str, str] = {}  # and what was wrong with it
        self._starts = ReplicaStarts(jobs, clock)
        self._draining_since_s: dict[str, float] = {}
        self._probing = asyncio.Semaphore(PROBES_AT_ONCE)

    async def run(self) -> None:
        """Until cancelled, or Fenced."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._jobs.watch_jobs())
                group.create_task(self._turns())
        finally:
            telemetry.gauge(Metric.MODELS_SHORT).set(0)  # another replica's to say now
            await self._proofs.close()

    async def _turns(self) -> None:
        while True:
            try:
                await self.turn()
            except Fenced:
                raise
            except (StatusError, ConditionFailed) as later:
                _log.warning(Event.REPLICA_DOWN, reason=str(later))
            models, replicas = self._routing.models.values, self._routing.replicas.values
            await self._clock.sleep(TURN_S if models or replicas else IDLE_TURN_S)

    async def turn(self) -> None:
        """One look at every model, side by side."""
        models = {convert.model_of(m.name): m for m in self._routing.models.values.values()}
        replicas: dict[str, dict[str, pb.Replica]] = {}
        for replica in self._routing.replicas.values.values():
            replicas.setdefault(convert.model_of(replica.name), {})[replica.name.rsplit("/", 1)[1]] = replica
        unreadable = {
            key.removeprefix(keys.MODELS) for key in self._routing.models.unreadable
        }  # not gone: left as they are
        known = (models.keys() | replicas.keys()) - unreadable
        work = [self._model(models.get(m), m, replicas.get(m, {})) for m in known]
        await _all(*work)
        self._forget()
        counts = [convert.state_of(r) for r in self._routing.replicas.values.values()]
        for state in State:
            telemetry.gauge(Metric.REPLICAS).labels(state.value).set(counts.count(state))
        short = sum(_ready(replicas.get(model_id, {})) < model.replicas.min for model_id, model in models.items())
        telemetry.gauge(Metric.MODELS_SHORT).set(short)

    async def _model(self, model: pb.Model | None, model_id: str, existing: dict[str, pb.Replica]) -> None:
        should: tuple[Wanted, ...] = ()
        if model is not None:
            self._rollouts.note(model, existing)
            standing = {replica_id: convert.standing(replica) for replica_id, replica in existing.items()}
            should = wanted(model_id, self._rollouts.counts(model), model.engine.addresses, standing)
        await _all(*(self._remove(existing[replica_id]) for replica_id in surplus(existing, should)))
        if model is not None:  # side by side: a replica that hangs does not keep the others waiting
            await _all(*(self._keep(model, model_id, one, existing.get(one.id)) for one in should))
            await self._rollouts.go_on(model)

    async def _keep(self, model: pb.Model, model_id: str, one: Wanted, replica: pb.Replica | None) -> None:
        if replica is None:
            await self._create(model, model_id, one)
        elif convert.state_of(replica) is State.UNKNOWN:
            return
        elif convert.state_of(replica) is State.DRAINING:  # wanted again: it goes first, then a new one comes
            await self._remove(replica)
        else:
            await self._refresh(model, one, replica)

    async def _create(self, model: pb.Model, model_id: str, one: Wanted) -> None:
        name = names.replica(model_id, one.id)
        made = pb.Replica(name=name, state=pb.REPLICA_STATE_STARTING, message="it was just made")
        made.declared_address = one.address
        made.job = "" if one.address else job_name(model, one.id)
        if made.job and (other := self._whose(made)):
            _log.warning(
                Event.REPLICA_DOWN, replica=name, reason=f"{made.job} runs {other}; give the model another name"
            )
            return
        made.queue, made.owner, made.version, made.site = model.queue, model.owner, one.version, one.site
        engine = convert.engine_at(model, one.version, one.site)
        made.health_path = engine.health_path
        made.gpus = engine.gpus or (0 if engine.shape else 1)  # what it gets is decided when its job is made
        await self._write(made, None)

    def _whose(self, replica: pb.Replica) -> str:
        """Name of another model's replica that the job is of; "": nobody else's."""
        found = (r.name for r in self._routing.replicas.values.values() if r.job == replica.job)
        return next((name for name in found if name != replica.name), "")

    async def _refresh(self, model: pb.Model, one: Wanted, replica: pb.Replica) -> None:
        """Brings a replica's record to what its job and its health path say."""
        address, host, why_not, note = "", ReplicaHost(), self._jobs.waits_for(replica.job, replica.owner), ""
        if one.address:
            address, why_not, note = await self._dialled(model, one.address)
        else:
            why_not = await self._starts.ensure(model, one, replica) or why_not
            address = replica.address
            if self._jobs.is_known(replica.job, replica.owner):
                told, node, gpus = self._jobs.endpoint(replica.job, replica.owner)
                address, why_not, note = await self._dialled(model, told) if told else ("", why_not, "")
                host = await self._jobs.host(node, gpus) if node else host
        engine = convert.engine_at(
            model, one.version, one.site
        )  # of one that was rolled back the replica's record alone knows it
        path = replica.health_path or (engine.health_path if convert.is_engine_known(model, one.version) else "")
        failed = await self._health(replica, address, path or "/health")
        mismatch = await self._wrong_model(replica, address) if failed == 0 else ""
        unproven = self._unproven(replica, address) if failed == 0 and not mismatch else ""
        state, why = state_after(convert.state_of(replica), Observed(address, failed, mismatch, why_not, unproven))
        changed = pb.Replica()
        changed.CopyFrom(replica)
        changed.state, changed.message = convert.state_number(state), why or note
        changed.address = address
        if (job := self._jobs.of(replica.job, replica.owner)) is not None:
            changed.gpus = job.spec.gpus
        if host.node:
            changed.node, changed.gpu_model = host.node, host.gpu_model
            changed.gpu_memory_bytes, changed.usd_per_hour = host.gpu_memory_bytes, host.usd_per_hour
        if changed != replica:
            await self._write(changed, replica)

    def _unproven(self, replica: pb.Replica, address: str) -> str:
        """What keeps it from being READY: its first token. One that is READY has made it."""
        key = f"{replica.name}@{address}"
        if convert.state_of(replica) is State.READY:
            self._proofs.again(key)
            return ""
        return self._proofs.missing(key, address, convert.model_of(replica.name))

    async def _dialled(self, model: pb.Model, address: str) -> tuple[str, str, str]:
        """The address that the front door dials, or "" and why there is none; and which others of its name it does not dial.

        Also of a replica that runs here: what its agent says is judged like what a model's file says.
        """
        try:
            found = await self._resolver.dialled(address, convert.exempt(model))
        except FailedPrecondition as refused:
            return "", refused.message, ""
        except StatusError as unknown:
            return "", f"{unknown.message}; correct the model's addresses, or the name server", ""
        return found.address, "", found.note

    def _forget(self) -> None:
        """What is known of replicas that exist no more."""
        replicas = self._routing.replicas.values.values()
        addresses, jobs = {f"{r.name}@{r.address}" for r in replicas}, {r.job for r in replicas}
        names_ = {r.name for r in replicas}
        by_address: tuple[dict[str, Any], ...] = (self._failed, self._probed_at_s, self._models_at_s, self._mismatch)
        for known, kept in (
            *((known, addresses) for known in by_address),
            (self._draining_since_s, names_),
        ):
            for gone in known.keys() - kept:
                del known[gone]
        self._proofs.keep_only(addresses)
        models = {m.name for m in self._routing.models.values.values()}
        self._starts.keep_only(models, jobs)
        self._rollouts.keep_only(models, names_)
        self._resolver.keep_only({hostport.parse(r.declared_address)[0] for r in replicas if r.declared_address})

    async def _health(self, replica: pb.Replica, address: str, path: str) -> int:
        """Probes failed in a row; -1 before the first. READY ones are asked less often, unless they just failed."""
        key = f"{replica.name}@{address}"
        now_s = self._clock.monotonic()
        failures = self._failed.get(key, -1)
        load = self._routing.load_tracker.loads.get(replica.name)
        suspicious = failures != 0 or (load is not None and load.penalty(now_s) > 1)
        if not address or (not suspicious and now_s - self._probed_at_s.get(key, -1e9) < READY_EVERY_S):
            return failures
        self._probed_at_s[key] = now_s
        async with self._probing:
            alive = await self._probe.is_well(address, path)
        self._failed[key] = 0 if alive else max(failures, 0) + 1
        return self._failed[key]

    async def _wrong_model(self, replica: pb.Replica, address: str) -> str:
        """What is wrong when the engine lists its models and this one is not among them; "" when all is well.

        An engine that keeps no list is believed: not known is not absent.
        """
        key, now_s = f"{replica.name}@{address}", self._clock.monotonic()
        every_s = MODELS_EVERY_S if convert.state_of(replica) is State.READY else READY_EVERY_S
        if now_s - self._models_at_s.get(key, -1e9) >= every_s:
            self._models_at_s[key] = now_s
            async with self._probing:
                served = await self._probe.served_models(address)
            model = convert.model_of(replica.name)
            wrong = served is not None and model not in served
            self._mismatch[key] = f"serves {', '.join(sorted(served or ())[:5])} and not {model}" if wrong else ""
        return self._mismatch.get(key, "")

    async def _remove(self, replica: pb.Replica) -> None:
        """DRAINING, then its job ends, then the record goes."""
        if convert.state_of(replica) is State.UNKNOWN:
            return
        if convert.state_of(replica) is not State.DRAINING:
            changed = pb.Replica()
            changed.CopyFrom(replica)
            changed.state, changed.message = pb.REPLICA_STATE_DRAINING, "it is not wanted any more"
            await self._write(changed, replica)
            return
        since_s = self._draining_since_s.setdefault(replica.name, self._clock.monotonic())
        now_s = self._clock.monotonic()
        if now_s - since_s < DRAIN_S and self._views.may_be_busy(replica.name):
            return
        if replica.job and not await self._jobs.end_job(replica.job, replica.owner):
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
    """All of it side by side; a status error is said and tried again at the next turn, anything else is raised."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, StatusError) and not isinstance(outcome, Fenced):
            _log.info(Event.REPLICA_DOWN, reason=outcome.message)
        elif isinstance(outcome, BaseException):
            raise outcome


def _unchanged(replica: pb.Replica) -> Unchanged:
    """The replica's key is still at the revision that its etag names."""
    revision = int(replica.etag.strip('"'))
    return Unchanged(Entry(convert.replica_key(replica.name), b"", revision, 0))


def _ready(replicas: Mapping[str, pb.Replica]) -> int:
    return sum(convert.state_of(replica) is State.READY for replica in replicas.values())
