"""What is known of Ray clusters: their records, their jobs, the newest reading of each, and what a leadership remembers of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from whaleflux.clock import Clock
from whaleflux.store.cache import Cache
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import ray_jobs
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.core.ray_joining import Joining
from whaleflux_scheduler.core.ray_parts import Part, Role
from whaleflux_scheduler.jobs import key_of
from whaleflux_scheduler.ray_readings import Reading, Readings
from whaleflux_scheduler.ray_records import StoredRayCluster

FORGOTTEN_S = 60.0  # an ended head counts so long for when the next one is made


@dataclass(slots=True)
class Known:
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


class RayView:
    """See the module."""

    def __init__(self, clusters: Cache[StoredRayCluster], jobs: Cache[StoredJob], clock: Clock) -> None:
        self.clusters, self.jobs, self.readings, self._clock = clusters, jobs, Readings(clock), clock
        self._known: dict[str, Known] = {}

    def load(self) -> None:
        """The jobs of all clusters that there are; from then on the leader alone makes them."""
        for stored in self.jobs.values.values():
            if stored.message.HasField("ray") and not _over(stored):
                self.of(stored.message.ray.cluster_uid).jobs.add(stored.value.name)

    def of(self, uid: str) -> Known:
        """What is remembered of a cluster, from now on."""
        return self._known.setdefault(uid, Known(set()))

    def find(self, uid: str) -> Known | None:
        """The same; None: it was not looked at yet."""
        return self._known.get(uid)

    def forget(self) -> None:
        """What is remembered of clusters that are gone."""
        there = [stored.value for stored in self.clusters.values.values()]
        self.readings.keep(one.name for one in there)
        for gone in self._known.keys() - {one.uid for one in there}:
            del self._known[gone]

    def parts(self, known: Known) -> list[Part]:
        """Its jobs that are there, and those that have just ended; what is over is forgotten."""
        found = [stored for name in known.jobs if (stored := self.jobs.get(key_of(name))) is not None]
        over = {one.value.name for one in found if _over(one) and self._is_old(one)}
        known.jobs -= over
        parts = [ray_jobs.part_of(one) for one in found if one.value.readable and one.value.name not in over]
        return sorted(parts, key=lambda part: part.job)

    def unreadable(self, known: Known) -> str:
        """A job of which nothing is known: whether it is the head, runs, or has ended."""
        found = (self.jobs.get(key_of(name)) for name in known.jobs)
        return next((one.value.name for one in found if one is not None and not one.value.readable), "")

    def reading(self, stored: StoredRayCluster) -> Reading | None:
        """The newest, of the head or reader that runs now; None: it is not known what waits."""
        reading = self.readings.fresh(stored.value.name)
        job = self.jobs.get(key_of(reading.job)) if reading is not None else None
        if reading is None or job is None or job.value.attempt is None:
            return None
        runs = job.value.state is JobState.RUNNING and job.value.attempt.epoch == reading.epoch
        return reading if runs and job.message.ray.cluster_uid == stored.value.uid else None

    def address(self, stored: StoredRayCluster, known: Known) -> str:
        """Where workers join."""
        if stored.value.address:
            return stored.value.address
        return next((p.address for p in self.parts(known) if p.role is Role.HEAD and not p.ended and p.address), "")

    def last_words(self, part: Part) -> str:
        """Why the attempt before ended, in its first line."""
        stored = self.jobs.get(key_of(part.job))
        attempts = list(stored.value.attempts()) if stored is not None else []
        why = next((one.end_reason for one in reversed(attempts) if one.end_reason), "")
        return f" ({why.splitlines()[0][:300]})" if why else ""

    def _is_old(self, stored: StoredJob) -> bool:
        end = stored.value.end_time
        return end is not None and (self._clock.now() - end).total_seconds() > FORGOTTEN_S


def _over(stored: StoredJob) -> bool:
    return stored.value.ended and not any(stored.value.holding())


def failed(part: Part) -> bool:
    """A worker that ended badly."""
    return part.role is Role.WORKER and part.state is JobState.FAILED
