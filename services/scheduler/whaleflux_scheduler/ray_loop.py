"""Ray clusters, as the leader keeps them: their heads run, and they have the workers that what waits in them asks for.

Each look is level-triggered: record, jobs and the newest reading in, what differs out. A job is made by the transaction that counts it in the
cluster's record, fenced by leadership and by that record as it was looked at: so whatever crashes between, and whoever looks at old news, none is
made twice. What is decided: `core.ray_parts`, `core.ray_sizing`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.reasons import ErrorReason
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Delete, Fenced, Held, Present, Put, Store, Unchanged
from whaleflux.store.cache import Cache
from whaleflux.store.election import Leader
from whaleflux.store.once import commit_once
from whaleflux.telemetry import Metric
from whaleflux.trust import audit
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert, ray_jobs
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core import lifecycle, ray_parts, ray_sizing, verbs
from whaleflux_scheduler.core.model import Cause, JobState
from whaleflux_scheduler.core.ray_clusters import RayClusterState
from whaleflux_scheduler.core.ray_joining import Joining
from whaleflux_scheduler.core.ray_leaving import Idle, leaving
from whaleflux_scheduler.core.ray_parts import End, Forget, Make, Part, Role, Worker
from whaleflux_scheduler.core.ray_sizing import Sizing
from whaleflux_scheduler.jobs import key_of
from whaleflux_scheduler.planner_thread import PlannerThread
from whaleflux_scheduler.ray_plans import RayPlans, unmet_of
from whaleflux_scheduler.ray_readings import Read, Reading, Readings
from whaleflux_scheduler.ray_records import RAY_CLUSTERS, StoredRayCluster

log = logging.getLogger(__name__)
EVERY_S, APART_S = 1.0, 0.05  # between two looks, at most and at least
# Between sizings of a cluster: so many times what the last one took, so that others have their turn.
SIZE_APART_S, MOST_APART_S, OTHERS_SHARE = 0.2, 5.0, 4.0
ANEW_S = 5.0  # a cluster of which nothing changed is sized again: the fleet may have
MOST_STARTS = 16  # in one transaction; the next look goes on
MOST_LEAVING = 100  # workers that are told so at once
MOST_INFEASIBLE = 100  # shapes of which a reader is told
FORGOTTEN_S = 60.0  # an ended head counts so long for when the next one is made
Tell = Callable[[str, agent_pb2.SyncResponse], bool]


@dataclass(slots=True)
class _Known:
    """What this leadership remembers of a cluster."""

    jobs: set[str]
    message: str = ""
    unmet: Sequence[pb.RayUnmet] = ()
    leaving: Sequence[str] = ()
    sized: object = None  # of what it was sized last
    sized_s: float = float("-inf")
    size_again_s: float = float("-inf")
    again_s: float = float("-inf")  # it is not looked at before
    decided: bytes = b""
    joining: Joining = field(default_factory=Joining)


class RayLoop:
    """Lives as long as its leadership. `caught_up` returns when the planner knows what has come; `tell` sends to a node's agent."""

    def __init__(
        self,
        store: Store,
        leader: Leader,
        clusters: Cache[StoredRayCluster],
        jobs: Cache[StoredJob],
        plans: RayPlans,
        planner: PlannerThread,
        caught_up: Callable[[], Awaitable[None]],
        tell: Tell,
        clock: Clock,
    ) -> None:
        self._store, self._held, self._clusters, self._jobs = store, Held(leader), clusters, jobs
        self._plans, self._planner, self._caught_up, self._tell, self._clock = plans, planner, caught_up, tell, clock
        self._known: dict[str, _Known] = {}
        self._readings = Readings(clock)
        self._some = asyncio.Event()

    # what comes

    def take(self, node: str, said: agent_pb2.RayReading) -> None:
        """From an agent: of the task that reads a cluster, on the node where it was placed. Else it is dropped, and counted."""
        stored = self._jobs.get(key_of(said.job))
        part = None if stored is None or not stored.message.HasField("ray") else stored.message.ray
        attempt = stored.value.attempt if stored is not None else None
        if stored is not None and attempt is not None and (stored.value.ended or attempt.epoch != said.epoch):
            return  # what is over still speaks
        placed = attempt is not None and any(task.node == node for task in attempt.tasks)
        if part is None or part.role == pb.RAY_ROLE_WORKER or not placed:
            telemetry.counter(Metric.CLAIMS_REFUSED).labels("ray").inc()
            audit.note_refused(said.job, ErrorReason.NOT_OWN_NODE)
            return
        record = self._clusters.get(keys.of_name(keys.RAY_CLUSTERS, part.cluster))
        if record is None or record.value.uid != part.cluster_uid:
            return
        if self._readings.take(part.cluster, node, said):
            if (known := self._known.get(part.cluster_uid)) is not None:
                known.decided = b""  # whoever reads anew has to be told again
            self._some.set()

    # looks

    async def run(self) -> None:
        """For ever; raises Fenced when another leads."""
        self._load()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            while True:
                await self._next()
                for stored in list(self._clusters.values.values()):
                    await self._look(stored)
                self._forget()

    def _load(self) -> None:
        """The jobs of all clusters that there are; from then on this leader alone makes them."""
        for stored in self._jobs.values.values():
            if stored.message.HasField("ray") and not _over(stored):
                self._of(stored.message.ray.cluster_uid).jobs.add(stored.value.name)

    def _of(self, uid: str) -> _Known:
        return self._known.setdefault(uid, _Known(set()))

    async def _follow(self) -> None:
        async for _ in self._clusters.changes():
            self._some.set()

    async def _next(self) -> None:
        try:
            async with asyncio.timeout(EVERY_S):
                await self._some.wait()
        except TimeoutError:
            pass
        self._some.clear()
        await self._clock.sleep(APART_S)

    def _later(self, in_s: float) -> None:
        """Another look, when a cluster may be sized again."""
        asyncio.get_running_loop().call_later(in_s, self._some.set)

    def _forget(self) -> None:
        there = [stored.value for stored in self._clusters.values.values()]
        self._readings.keep(one.name for one in there)
        for gone in self._known.keys() - {one.uid for one in there}:
            del self._known[gone]

    async def _look(self, stored: StoredRayCluster) -> None:
        """One cluster. What others changed meanwhile, or cannot be had now, is seen in the next look."""
        known = self._of(stored.value.uid)
        if self._clock.monotonic() < known.again_s:
            return
        try:
            await self._keep(stored, known)
        except Fenced:
            raise
        except ConditionFailed:
            telemetry.counter(Metric.CAS_CONFLICTS).labels("ray_cluster").inc()
        except StatusError as error:
            known.message = f"waits: {error.message}"[:500]
            log.info("%s waits: %s", stored.value.name, error)
        except Exception:  # what a program says of its cluster ends no leadership
            known.message, known.again_s = (
                "cannot be looked at: see the scheduler's log",
                self._clock.monotonic() + ANEW_S,
            )
            log.exception("%s cannot be looked at", stored.value.name)

    async def _keep(self, stored: StoredRayCluster, known: _Known) -> None:
        cluster, now = stored.value, self._clock.now()
        if unread := self._unreadable(known):
            known.message = f"{unread} {convert.UNREADABLE}: nothing of the cluster is made or ended until then"
            return
        parts = self._parts(known)
        reading = self._reading(stored)
        session = reading.session if reading is not None else ""
        since = convert.instant(stored.message, "state_time") or now
        for act in ray_parts.acts(cluster, parts, session, since, now):
            match act:
                case Make(role):
                    await self._make(stored, known, role, [Worker()], pb.RayPart())
                    return  # the record is another one now
                case End(job, why):
                    await self._end(job, why)
                case Forget():
                    await self._store.commit(Delete(stored.entry.key), when=[Unchanged(stored.entry), self._held])
                    return
        if cluster.state is RayClusterState.UP:
            await self._size(stored, known, reading)
        else:
            known.message = "is taken down: its workers drain, then its head ends"

    def _parts(self, known: _Known) -> list[Part]:
        found = [stored for name in known.jobs if (stored := self._jobs.get(key_of(name))) is not None]
        over = {one.value.name for one in found if _over(one) and self._is_old(one)}
        known.jobs -= over
        parts = [ray_jobs.part_of(one) for one in found if one.value.readable and one.value.name not in over]
        return sorted(parts, key=lambda part: part.job)

    def _unreadable(self, known: _Known) -> str:
        """A job of which nothing is known: whether it is the head, runs, or has ended."""
        found = (self._jobs.get(key_of(name)) for name in known.jobs)
        return next((one.value.name for one in found if one is not None and not one.value.readable), "")

    def _is_old(self, stored: StoredJob) -> bool:
        end = stored.value.end_time
        return end is not None and (self._clock.now() - end).total_seconds() > FORGOTTEN_S

    def _reading(self, stored: StoredRayCluster) -> Reading | None:
        """The newest, of the head or reader that runs now; None: it is not known what waits."""
        reading = self._readings.fresh(stored.value.name)
        job = self._jobs.get(key_of(reading.job)) if reading is not None else None
        if reading is None or job is None or job.value.attempt is None:
            return None
        runs = job.value.state is JobState.RUNNING and job.value.attempt.epoch == reading.epoch
        return reading if runs and job.message.ray.cluster_uid == stored.value.uid else None

    async def _size(self, stored: StoredRayCluster, known: _Known, reading: Reading | None) -> None:
        if reading is None:
            known.message = self._why_unknown(stored, self._parts(known))
            return
        began_s = self._clock.monotonic()
        if began_s < known.size_again_s:
            self._later(known.size_again_s - began_s)
            return
        read = await reading.understand()
        if read is None:
            known.message = f"what waits cannot be read: {reading.wrong}"[:500]
            return
        parts, now_s = self._parts(known), self._clock.monotonic()
        failed = {part.job for part in parts if _failed(part)} - reading.been
        known.joining.look(failed, frozenset(reading.been), now_s)
        known.leaving = await self._leaving(reading, read, parts)
        looked_at = (reading.epoch, reading.number, stored.entry.revision, tuple((p.job, p.state) for p in parts))
        later = any(not one.never for one in known.unmet)
        if looked_at == known.sized and now_s - known.sized_s < (EVERY_S if later else ANEW_S):
            self._decide(known, reading, read, parts)
            return
        sizing = await self._sizing(stored, reading, read, parts)
        known.sized, known.sized_s = looked_at, now_s
        took_s = self._clock.monotonic() - began_s
        known.size_again_s = began_s + max(SIZE_APART_S, min(MOST_APART_S, took_s * OTHERS_SHARE))
        known.unmet = unmet_of(read.demand, sizing.plans)
        for end in sizing.end:
            await self._end(end.job, end.why)
        await self._start(stored, known, reading, read, sizing)
        self._decide(known, reading, read, self._parts(known))

    async def _leaving(self, reading: Reading, read: Read, parts: Sequence[Part]) -> list[str]:
        """Workers that go before their time; none where the cluster is to hold something whatever runs."""
        since_s = self._clock.monotonic() - reading.came_s
        mine = {part.job: part.worker for part in parts if part.role is Role.WORKER and not part.ended}
        idle = [
            Idle(node.instance, mine[job].gpus, mine[job].gpu_type, node.idle_ms / 1000 + since_s)
            for node in read.demand.nodes
            if node.status == "IDLE" and (job := node.instance.rpartition("/")[0]) in mine
        ]
        if read.demand.constraints or not idle:
            return []
        return leaving(idle, await self._planner.ask(lambda plan: plan.gpus_wanted()))

    async def _sizing(self, stored: StoredRayCluster, reading: Reading, read: Read, parts: Sequence[Part]) -> Sizing:
        await self._caught_up()
        nodes, now = await self._planner.ask(lambda plan: plan.free_nodes()), self._clock.now()
        session = read.demand.session
        seen = reading.seen(read, [part.job for part in parts])
        seen = replace(seen, cluster=replace(seen.cluster, first=self._plans.first(session)))
        sizing = await self._plans.alone(lambda resize: ray_sizing.size(stored.value, seen, parts, nodes, now, resize))
        self._plans.remember(session, seen.cluster, sizing.plans)
        return sizing

    async def _start(
        self, stored: StoredRayCluster, known: _Known, reading: Reading, read: Read, sizing: Sizing
    ) -> None:
        joins = pb.RayPart(address=self._address(stored, known), session=read.demand.session)
        known.message = _said(sizing, stored.value.max_gpus, read)
        if not sizing.start or not joins.address:
            return
        if (left_s := known.joining.not_before_s - self._clock.monotonic()) > 0:
            known.message = self._why_none_are_started(known, left_s)
            return
        await self._make(stored, known, Role.WORKER, sizing.start[:MOST_STARTS], joins)
        if not reading.answered:
            reading.answered = True
            telemetry.histogram(Metric.RAY_START_DELAY).observe(self._clock.monotonic() - reading.came_s)
        if len(sizing.start) > MOST_STARTS:
            self._some.set()

    def _address(self, stored: StoredRayCluster, known: _Known) -> str:
        """Where workers join."""
        if stored.value.address:
            return stored.value.address
        return next((p.address for p in self._parts(known) if p.role is Role.HEAD and not p.ended and p.address), "")

    # what is written

    async def _make(
        self, stored: StoredRayCluster, known: _Known, role: Role, workers: Sequence[Worker], joins: pb.RayPart
    ) -> None:
        """Jobs, and their number in the record, in one transaction. Raises ConditionFailed when the record is another by now."""
        cluster, now = stored.value, self._clock.now()
        numbers = range(cluster.jobs_made + 1, cluster.jobs_made + 1 + len(workers))
        jobs = [
            ray_jobs.record(cluster, role, number, now, joins, one)
            for number, one in zip(numbers, workers, strict=True)
        ]
        after = RAY_CLUSTERS.put(stored.entry.key, replace(cluster, jobs_made=numbers[-1]), stored)
        puts = [Put(key_of(job.name), convert.JOBS.pack(job)) for job in jobs]
        queue = Present(keys.QUEUES + cluster.queue)
        when: list[Condition] = [Unchanged(stored.entry), self._held, queue, *(Absent(put.key) for put in puts)]
        revision = await commit_once(self._store, after, *puts, when=when, key=stored.entry.key)
        known.jobs.update(job.name for job in jobs)
        await asyncio.gather(self._jobs.at_least(revision), self._clusters.at_least(revision))

    async def _end(self, name: str, why: str) -> None:
        """Cancels a job; one that changes at this moment is looked at again."""
        stored = self._jobs.get(key_of(name))
        if stored is None or not stored.value.readable or stored.value.ended:
            return
        job, now = stored.value, self._clock.now()
        cause = Cause("ray", job.traceparent, why, ray_jobs.ACTOR)
        after = lifecycle.written_down(job, verbs.cancel(job, cause, now), now)
        put = convert.JOBS.put(stored.entry.key, after, stored)
        try:
            revision = await commit_once(
                self._store, put, when=[Unchanged(stored.entry), self._held], key=stored.entry.key
            )
            await self._jobs.at_least(revision)
        except Fenced:
            raise
        except ConditionFailed:
            telemetry.counter(Metric.CAS_CONFLICTS).labels("job").inc()

    def _decide(self, known: _Known, reading: Reading, read: Read, parts: Sequence[Part]) -> None:
        """Tells the reader what was decided, when that is another than it was told."""
        pending = Counter(
            p.worker.kind for p in parts if p.role is Role.WORKER and not p.ended and p.job not in read.instances
        )
        decision = {
            "leave": known.leaving[:MOST_LEAVING],
            "version": read.demand.version,
            "pending": [{"type": kind, "count": count} for kind, count in sorted(pending.items())],
            "infeasible": [
                {"resources": dict(one.bundle.resources), "count": min(one.count, 100)}
                for one in list(known.unmet)[:MOST_INFEASIBLE]
                if one.never
            ],
        }
        content = json.dumps(decision | {"version": 0}, sort_keys=True).encode()
        if content == known.decided:
            return
        whole = json.dumps(decision).encode()
        number = int.from_bytes(hashlib.sha256(whole).digest()[:7]) or 1  # whoever leads: another decision has another
        message = agent_pb2.RayDecision(job=reading.job, epoch=reading.epoch, number=number, decision=whole)
        known.decided = content if self._tell(reading.node, agent_pb2.SyncResponse(ray=message)) else b""

    # what is shown

    def status(self, name: str) -> pb.RayClusterStatus | None:
        """What is known of it now; None: this leader has not looked at it yet."""
        stored = self._clusters.get(keys.of_name(keys.RAY_CLUSTERS, name))
        known = self._known.get(stored.value.uid) if stored is not None else None
        if stored is None or known is None:
            return None
        parts = [part for part in self._parts(known) if not part.gone]
        reading, age_s = self._readings.of(name), self._readings.age_s(name)
        read = reading.read if reading is not None else None
        came_s_ago = self._clock.monotonic() - reading.came_s if reading is not None else 0.0
        return pb.RayClusterStatus(
            address=self._address(stored, known),
            dashboard=reading.dashboard if reading is not None else "",
            session=reading.session if reading is not None else "",
            reading_age_s=age_s,
            stale=self._reading(stored) is None,
            message=known.message,
            parts=[
                _part_message(part, read, came_s_ago, reading.been if reading is not None else ()) for part in parts
            ],
            gpus=sum(part.worker.gpus for part in parts if not part.ended),
            nodes=len(read.instances) if read is not None else 0,
            waiting=read.waiting if read is not None else 0,
            unmet=known.unmet,
            demand=_with_those_under_way(read, parts) if read is not None else None,
        )

    def _why_unknown(self, stored: StoredRayCluster, parts: Sequence[Part]) -> str:
        role = ray_parts.first_role(stored.value)
        first = next((p for p in parts if p.role is role and not p.ended), None)
        if first is None:
            return f"its {role.word} is about to be made again"
        if first.state is not JobState.RUNNING:
            return f"its {role.word} is {first.state.name}{self._last_words(first)}; see: whaleflux explain {first.job}"
        age_s = self._readings.age_s(stored.value.name)
        silent = "was not heard yet" if age_s is None else f"was silent for {age_s:.0f} s"
        return f"its {role.word} {silent}: what waits is not known, so nothing is started or ended{self._last_words(first)}; see: whaleflux logs {first.job}"

    def _why_none_are_started(self, known: _Known, left_s: float) -> str:
        last = max((part for part in self._parts(known) if _failed(part)), key=lambda part: part.since, default=None)
        if last is None:
            return f"workers ended before they had joined; the next are started in {left_s:.0f} s"
        return (
            f"{last.job} ended before it had joined{self._last_words(last)}; the next are started in {left_s:.0f} s. "
            f"See: whaleflux logs {last.job}"
        )

    def _last_words(self, first: Part) -> str:
        """Why the attempt before ended, in its first line."""
        stored = self._jobs.get(key_of(first.job))
        attempts = list(stored.value.attempts()) if stored is not None else []
        why = next((one.end_reason for one in reversed(attempts) if one.end_reason), "")
        return f" ({why.splitlines()[0][:300]})" if why else ""


def _over(stored: StoredJob) -> bool:
    return stored.value.ended and not any(stored.value.holding())


def _said(sizing: Sizing, max_gpus: int, read: Read) -> str:
    """One sentence."""
    words = [f"{read.waiting} wait" if read.waiting else "nothing waits"]
    if sizing.start:
        words.append(f"{len(sizing.start)} workers more are started")
    if sizing.end:
        words.append(f"{len(sizing.end)} that waited for GPUs are not needed any more")
    if sizing.short_gpus:
        words.append(f"{sizing.short_gpus} GPUs more are wanted, and max_gpus is {max_gpus}")
    return "; ".join(words)


def _with_those_under_way(read: Read, parts: Sequence[Part]) -> pb.RayDemand:
    demand = pb.RayDemand()
    demand.CopyFrom(read.demand)
    for part in parts:
        if part.role is Role.WORKER and not part.ended and part.job not in read.instances:
            coming = ray_sizing.under_way(part)
            demand.nodes.add(id=coming.id, status=coming.status, total=coming.total, labels=coming.labels)
    return demand


def _failed(part: Part) -> bool:
    """A worker that ended badly."""
    return part.role is Role.WORKER and part.state is JobState.FAILED


def _part_message(part: Part, read: Read | None, came_s_ago: float, been: Collection[str]) -> pb.RayClusterPart:
    return pb.RayClusterPart(
        job=part.job,
        role=f"RAY_ROLE_{part.role.name}",
        state=f"JOB_STATE_{part.state.name}",
        gpus=part.worker.gpus,
        gpu_type=part.worker.gpu_type,
        message=_part_words(part, read, came_s_ago, been),
    )


def _part_words(part: Part, read: Read | None, came_s_ago: float, been: Collection[str]) -> str:
    if part.ended:
        return "ends"
    if part.role is not Role.WORKER or part.state is not JobState.RUNNING:
        return ""
    nodes = read.demand.nodes if read is not None else ()
    node = next((one for one in nodes if one.instance.rpartition("/")[0] == part.job), None)
    if node is None:
        return "has left, and ends" if part.job in been else "on its way"
    if node.status == "IDLE":
        return f"idle for {node.idle_ms / 1000 + came_s_ago:.0f} s"
    return "drains" if node.status == "DRAINING" else "works"
