"""Who can never start under the limits of queues, however long it waits: a limit is below what it asks for, or others keep too much. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from whaleflux_scheduler.core import wait_reasons
from whaleflux_scheduler.core.known_fleet import KnownFleet
from whaleflux_scheduler.core.model import Job, SchedulingDecision
from whaleflux_scheduler.core.queue_shares import QueueShares
from whaleflux_scheduler.core.quota import QueueLimit
from whaleflux_scheduler.core.reserving import Reserved

MOST_STUCK = 20  # of a queue, that are named


class NeverStarts:
    """See the module. What is reserved for a job was admitted with its reservation, whatever the limits are now."""

    def __init__(self, fleet: KnownFleet, shares: QueueShares, reserved: Reserved) -> None:
        self._fleet, self._shares, self._reserved = fleet, shares, reserved

    def ever_over(self, queue: str, gpus: int) -> QueueLimit | None:
        """The limit of the queue, or of one above it, that is below so many GPUs; None: there is none."""
        limits = ((up.id, up.queue.max_gpus) for up in self._shares.quota.node(queue).path())
        return next((QueueLimit(id_, 0, most) for id_, most in limits if 0 < most < gpus), None)

    def is_full(self, limit: QueueLimit, job: Job, now: datetime) -> SchedulingDecision:
        """Why the job waits that this limit keeps back: for others to end, or for ever."""
        gpus = job.spec.gpus
        if small := self.ever_over(job.queue, gpus):
            return wait_reasons.never_in_queue(small, gpus, now)
        if limit.kept and (kept := self._kept_for_others(job)):
            return wait_reasons.never_beside(gpus, self._fleet.capacity.gpus, kept, now)
        return wait_reasons.queue_is_full(limit, now)

    def stuck(self, jobs: Iterable[Job]) -> dict[str, list[str]]:
        """By queue, names of those of these jobs, which wait, that can never start under the limits as they are; some of them."""
        found = dict[str, list[str]]()
        for job in jobs:
            if len(found.get(job.queue, ())) < MOST_STUCK and self._never(job):
                found.setdefault(job.queue, []).append(job.name)
        return found

    def _never(self, job: Job) -> bool:
        if self._reserved.find(job.spec) is not None:
            return False
        if self.ever_over(job.queue, job.spec.gpus):
            return True
        if not self._shares.quota.guarantees or self._fleet.holdings.holds(job.name):
            return False  # what it claims already is its own
        return self._kept_for_others(job) > 0

    def _kept_for_others(self, job: Job) -> int:
        """GPUs that others are guaranteed and do not lend, where these leave too few however idle the fleet is; 0: they do not."""
        gpus, there = job.spec.gpus, self._fleet.capacity.gpus
        needed = self._shares.quota.fleet_needed(job.queue, gpus, lends_back=not job.spec.is_service)
        return needed - gpus if not self._fleet.left_out and gpus <= there < needed else 0
