"""Ray clusters, as the leader keeps them: their heads run, and they have the workers that what waits in them asks for.

Each look is level-triggered: record, jobs and the newest reading in (`ray_view`), what differs out. A job is made by the transaction that counts it
in the cluster's record, fenced by leadership and by that record as it was looked at (`ray_writes`): so whatever crashes between, and whoever looks at
old news, none is made twice. What is decided: `core.ray_parts`; how many workers there are: `ray_sizer`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.reasons import ErrorReason
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Fenced, Store
from whaleflux.store.cache import Cache
from whaleflux.store.election import Leader
from whaleflux.telemetry import Metric
from whaleflux.trust import audit
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core import ray_parts
from whaleflux_scheduler.core.ray_clusters import RayClusterState
from whaleflux_scheduler.core.ray_parts import End, Forget, Make, Worker
from whaleflux_scheduler.jobs import key_of
from whaleflux_scheduler.planner_thread import PlannerThread
from whaleflux_scheduler.ray_plans import RayPlans
from whaleflux_scheduler.ray_records import StoredRayCluster
from whaleflux_scheduler.ray_sizer import RaySizer, Tell
from whaleflux_scheduler.ray_status import status_of
from whaleflux_scheduler.ray_view import Known, RayView
from whaleflux_scheduler.ray_writes import RayWrites

log = logging.getLogger(__name__)
EVERY_S, APART_S = 1.0, 0.05  # between two looks, at most and at least
AGAIN_S = 5.0  # until a cluster is looked at again that could not be


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
        self._view, self._clock, self._some = RayView(clusters, jobs, clock), clock, asyncio.Event()
        self._writes = RayWrites(store, leader, self._view, clock)
        self._sizer = RaySizer(self._view, self._writes, plans, planner, caught_up, tell, self._some.set, clock)

    # what comes

    def take(self, node: str, said: agent_pb2.RayReading) -> None:
        """From an agent: of the task that reads a cluster, on the node where it was placed. Else it is dropped, and counted."""
        stored = self._view.jobs.get(key_of(said.job))
        part = None if stored is None or not stored.message.HasField("ray") else stored.message.ray
        attempt = stored.value.attempt if stored is not None else None
        if stored is not None and attempt is not None and (stored.value.ended or attempt.epoch != said.epoch):
            return  # what is over still speaks
        placed = attempt is not None and any(task.node == node for task in attempt.tasks)
        if part is None or part.role == pb.RAY_ROLE_WORKER or not placed:
            telemetry.counter(Metric.CLAIMS_REFUSED).labels("ray").inc()
            audit.note_refused(said.job, ErrorReason.NOT_OWN_NODE)
            return
        record = self._view.clusters.get(keys.of_name(keys.RAY_CLUSTERS, part.cluster))
        if record is None or record.value.uid != part.cluster_uid:
            return
        if self._view.readings.take(part.cluster, node, said):
            if (known := self._view.find(part.cluster_uid)) is not None:
                known.decided = b""  # whoever reads anew has to be told again
            self._some.set()

    # looks

    async def run(self) -> None:
        """For ever; raises Fenced when another leads."""
        self._view.load()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            while True:
                await self._next()
                for stored in list(self._view.clusters.values.values()):
                    await self._look(stored)
                self._view.forget()

    async def _follow(self) -> None:
        async for _ in self._view.clusters.changes():
            self._some.set()

    async def _next(self) -> None:
        try:
            async with asyncio.timeout(EVERY_S):
                await self._some.wait()
        except TimeoutError:
            pass
        self._some.clear()
        await self._clock.sleep(APART_S)

    async def _look(self, stored: StoredRayCluster) -> None:
        """One cluster. What others changed meanwhile, or cannot be had now, is seen in the next look."""
        known = self._view.of(stored.value.uid)
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
                self._clock.monotonic() + AGAIN_S,
            )
            log.exception("%s cannot be looked at", stored.value.name)

    async def _keep(self, stored: StoredRayCluster, known: Known) -> None:
        cluster, now = stored.value, self._clock.now()
        if unread := self._view.unreadable(known):
            known.message = f"{unread} {convert.UNREADABLE}: nothing of the cluster is made or ended until then"
            return
        parts = self._view.parts(known)
        reading = self._view.reading(stored)
        session = reading.session if reading is not None else ""
        since = convert.instant(stored.message, "state_time") or now
        for act in ray_parts.acts(cluster, parts, session, since, now):
            match act:
                case Make(role):
                    await self._writes.make(stored, known, role, [Worker()], pb.RayPart())
                    return  # the record is another one now
                case End(job, why):
                    await self._writes.end(job, why)
                case Forget():
                    await self._writes.forget(stored)
                    return
        if cluster.state is RayClusterState.UP:
            await self._sizer.size(stored, known, reading)
        else:
            known.message = "is taken down: its workers drain, then its head ends"

    # what is shown

    def status(self, name: str) -> pb.RayClusterStatus | None:
        """What is known of it now; None: this leader has not looked at it yet."""
        return status_of(self._view, name, self._clock.monotonic())
