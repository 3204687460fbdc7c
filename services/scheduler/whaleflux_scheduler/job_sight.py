"""What is known of a job at this moment: reports, nodes, who claims its GPUs, the ends of those it waits for, and when to look again.

Read from the records and from what agents and services told, each time anew; nothing here is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple

from whaleflux.store import keys
from whaleflux.store.cache import Cache
from whaleflux_scheduler.clock_watch import ClockWatch
from whaleflux_scheduler.convert import StoredJob, StoredQueue
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.holdings import held_by, is_reservation
from whaleflux_scheduler.core.model import ACTIVE, Claim, Job, JobState
from whaleflux_scheduler.core.observed import Observations, Timeouts
from whaleflux_scheduler.core.reservations import has_to_leave
from whaleflux_scheduler.job_tracking import JobTracking
from whaleflux_scheduler.jobs import key_of
from whaleflux_scheduler.leader_state import LeaderState
from whaleflux_scheduler.node_view import NodeView
from whaleflux_scheduler.reservation_records import StoredReservation


class Sources(NamedTuple):
    """What the leader reads, all current and owned by others."""

    jobs: Cache[StoredJob]
    queues: Cache[StoredQueue]
    reservations: Cache[StoredReservation]


class JobSight:
    """See the module. `doubted`: jobs that were looked at before agents had borne out the clock."""

    def __init__(
        self, sources: Sources, state: LeaderState, nodes: NodeView, watch: ClockWatch, timeouts: Timeouts
    ) -> None:
        self._sources, self._state, self._nodes = sources, state, nodes
        self._watch, self._timeouts = watch, timeouts
        self.doubted: set[str] = set()

    def observed(self, job: Job, tracking: JobTracking, now: datetime) -> Observations:
        where = (
            *(task.node for _, task in job.holding()),
            *(node for node, _ in (job.claim.nodes if job.claim else ())),
        )
        nodes = {name: condition for name in where if (condition := self._nodes.condition(name)) is not None}
        diagnosis = tracking.diagnosed.diagnosis if tracking.diagnosed is not None else None
        reports = tuple(pending.report for pending in tracking.reports)
        ends, gone = self._ends(job)
        claimed_by, free = self._claimed_by(job, now), self._claim_is_free(job)
        since, doubted = tracking.seen_since(job, now), not self._watch.confirmed
        observed = Observations(
            reports,
            nodes,
            diagnosis,
            claimed_by,
            free,
            ends=ends,
            gone=gone,
            since=since,
            clock_doubted=doubted,
        )
        if doubted and job.state in ACTIVE:
            self.doubted.add(job.name)
        progress = tracking.progress_in(job.attempt)
        return (
            observed
            if progress is None
            else replace(observed, step=progress.step, loss=progress.loss, first_step_time=progress.first_time)
        )

    def _ends(self, job: Job) -> tuple[dict[str, JobState], frozenset[str]]:
        """Where the jobs stand that it waits for, by uid, and which were deleted.

        Those whose records cannot be read are left out: that is not known.
        """
        ends, gone = {}, set[str]()
        for awaited in job.awaits:
            stored = self._sources.jobs.get(key_of(awaited.job))
            if stored is None or (stored.value.readable and stored.value.uid != awaited.uid):
                ends[awaited.uid] = self._state.unseen_end(job.name, awaited.uid)
                gone.add(awaited.uid)
            elif stored.value.readable:
                ends[awaited.uid] = stored.value.state
        return ends, frozenset(gone)

    def _claimed_by(self, job: Job, now: datetime) -> str:
        """A job or a reservation that waits for GPUs of this one, "" for none. Read from the records each time: so it is repeated until done."""
        if not (claimants := self._state.claimants_of(job.name)):
            return ""
        attempt = job.attempt
        held = {task.node: task.gpus for task in attempt.holding()} if attempt is not None else {}
        for name in sorted(claimants):
            if is_reservation(name):
                reserved = self._sources.reservations.get(keys.of_name(keys.RESERVATIONS, name))
                if reserved is not None and has_to_leave(job.name, held, reserved.value):
                    return name
                continue
            stored = self._sources.jobs.get(key_of(name))
            claim = stored.value.claim if stored is not None else None
            if claim is None or now >= claim.expire_time:
                continue
            if claim.asks(job, held):
                return name
        return ""

    def _claim_is_free(self, job: Job) -> bool:
        """Whether nobody else holds any of what a running job claims to go on there, and it is not uncertain whether it could."""
        if job.claim is None or job.state is not JobState.RUNNING or any(map(self._nodes.may_open, job.claim.gpus)):
            return False
        return not any(job.claim.concerns(held_by(other)) for other in self._others_on(job.claim, job.name))

    def _others_on(self, claim: Claim, name: str) -> Iterator[Job]:
        for other in {other for node, _ in claim.nodes for other in self._state.jobs_on(node)} - {name}:
            if (stored := self._sources.jobs.get(key_of(other))) is not None:
                yield stored.value

    def due(self, job: Job, tracking: JobTracking, observed: Observations, now: datetime) -> datetime | None:
        dues = list(tracking.avoided_until(now))
        if (at := lifecycle.due(job, observed, now, self._timeouts)) is not None:
            dues.append(at)
        return min(dues, default=None)
