"""Jobs of Ray clusters as the leader makes and ends them, each in a transaction that its leadership and the record as it was looked at fence."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Delete, Fenced, Held, Present, Put, Store, Unchanged
from whaleflux.store.election import Leader
from whaleflux.store.once import commit_once
from whaleflux.telemetry import Metric
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert, ray_jobs
from whaleflux_scheduler.core import lifecycle, verbs
from whaleflux_scheduler.core.model import Cause
from whaleflux_scheduler.core.ray_parts import Role, Worker
from whaleflux_scheduler.jobs import key_of
from whaleflux_scheduler.ray_records import RAY_CLUSTERS, StoredRayCluster
from whaleflux_scheduler.ray_view import Known, RayView


class RayWrites:
    """See the module. What it returns from, the caches of `view` know."""

    def __init__(self, store: Store, leader: Leader, view: RayView, clock: Clock) -> None:
        self._store, self._held, self._view, self._clock = store, Held(leader), view, clock

    async def make(
        self, stored: StoredRayCluster, known: Known, role: Role, workers: Sequence[Worker], joins: pb.RayPart
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
        await asyncio.gather(self._view.jobs.at_least(revision), self._view.clusters.at_least(revision))

    async def end(self, name: str, why: str) -> None:
        """Cancels a job; one that changes at this moment is looked at again."""
        stored = self._view.jobs.get(key_of(name))
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
            await self._view.jobs.at_least(revision)
        except Fenced:
            raise
        except ConditionFailed:
            telemetry.counter(Metric.CAS_CONFLICTS).labels("job").inc()

    async def forget(self, stored: StoredRayCluster) -> None:
        """The record goes. Raises ConditionFailed when it is another by now."""
        await self._store.commit(Delete(stored.entry.key), when=[Unchanged(stored.entry), self._held])
