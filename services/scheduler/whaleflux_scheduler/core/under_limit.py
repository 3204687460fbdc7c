"""Room under a limit: who has to leave so that a job's queue may take what it asks for. A swap within the limited part of the tree.

A limit counts GPUs wherever they are: so who leaves need not be where the job goes. What is chosen is the least of what loses least, as
elsewhere (`placement.preempt`), by the same order of who yields to whom (`preemption.may_stop`), and nobody outside of the limited part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from whaleflux_scheduler.core.holdings import Holdings, claim_id, count, held_by, job_of
from whaleflux_scheduler.core.model import ACTIVE, Job, JobState
from whaleflux_scheduler.core.placement.api import NoPlacement, PlaceRequest, PreemptionPlan, Victim
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.preemption import asked_to_leave, claimant_of, may_stop
from whaleflux_scheduler.core.quota import QueueNode
from whaleflux_scheduler.core.request import by_count, gpus_of

_STAYS = ACTIVE | {JobState.RECOVERING}


def room_under_limit(
    engine: Engine, holdings: Holdings, request: PlaceRequest, job: Job
) -> PreemptionPlan | NoPlacement | None:
    """Whose leaving lets the job start under the limits of its queue; None: there are too few.

    NoPlacement: there are enough by number, but it would fit nowhere then either.
    """
    found: NoPlacement | None = None
    free = engine.free_gpus()
    with holdings.without(job.name):
        returned = engine.free_gpus() - free
        for alike in by_count(request):
            with _supposing(engine, holdings, job, gpus_of(alike), returned) as limit:
                victims = limit.may_leave() if limit is not None else []
                if not victims or limit is None or not limit.could_be_enough(victims):
                    continue
                answer = engine.preempt(alike, victims, limit)
            if isinstance(answer, NoPlacement):
                found = answer
            elif answer.victims:  # without, all it takes is that those leave who are about to
                return answer
    return found


class UnderLimit:
    """The job's queue as if some had left (`placement.api.Limit`). Those that are leaving already have."""

    def __init__(
        self, engine: Engine, holdings: Holdings, job: Job, gpus: int, returned: int, within: QueueNode
    ) -> None:
        self._engine, self._holdings, self._job, self._gpus, self._within = engine, holdings, job, gpus, within
        self._quota, self._returned = holdings.shares.quota, returned
        self._there = dict.fromkeys(name for name in self._quota.jobs_below(within) if name in holdings.jobs)
        self._left: dict[str, tuple[str, int]] = {}  # by what the engine calls it: its queue, and GPUs
        for id_ in self._leaving():
            self.leaves(id_)
        self._gone = frozenset(self._left)
        self._more = sum(
            gpus for _, gpus in self._left.values()
        )  # GPUs of those who left that the engine does not know of

    def _leaving(self) -> Iterator[str]:
        """What leaves, or loses its claim, whatever is decided now."""
        asked = asked_to_leave(self._holdings, claimant_of(self._holdings, self._job, self._gpus))
        for name in self._there:
            if name != self._job.name and (name in asked or self._is_over(name)):
                yield name
                if name in asked and self._holdings.claim(name) is not None:
                    yield claim_id(name)

    def _is_over(self, name: str) -> bool:
        """Whether it holds only what it has not left yet. What it was given a moment ago, its record does not say."""
        job = self._holdings.jobs[name]
        return job.state not in _STAYS and held_by(job) == self._holdings.held(name)

    def leaves(self, id_: str) -> None:
        """As if this victim had left."""
        if id_ not in self._left:
            name = job_of(id_)
            queue = self._holdings.jobs[name].queue
            self._left[id_] = queue, self._counted(id_, name)
            self._quota.suppose(queue, -self._left[id_][1])

    def stays(self, id_: str) -> None:
        """As if it had not."""
        queue, gpus = self._left.pop(id_)
        self._quota.suppose(queue, gpus)

    def _counted(self, id_: str, name: str) -> int:
        """GPUs that its queue counts for it: a claim for all that is claimed, the job for what else it holds."""
        if not self._holdings.jobs[name].spec.gpus:
            return 0
        beside = self._holdings.count_of(name) - count(self._holdings.claimed(name))
        return count(self._holdings.claimed(name)) if id_ == claim_id(name) else beside

    def enough(self) -> bool:
        """Whether the job's queue may take what it asks for, without those."""
        own, quota, spec = self._holdings.count_of(self._job.name), self._quota, self._job.spec
        limit = quota.admit(self._job.queue, self._gpus, own=own, free=self._free, lends_back=not spec.is_service)
        return limit is None

    def _free(self) -> int:
        """What the job itself holds is free in the engine now; it does not ask for that once more."""
        return self._engine.free_gpus() - self._returned + self._more

    def may_leave(self) -> list[Victim]:
        """Those who may be stopped for the job in the part of the tree that is limited."""
        victims = may_stop(self._holdings, self._job, self._gpus, self._there)
        return [victim for victim in victims if victim.id not in self._gone]

    def could_be_enough(self, victims: list[Victim]) -> bool:
        """Whether it would be, if all of these left; as far as numbers tell."""
        if self._within is self._quota.fleet:  # it is idle GPUs that count, which the engine knows
            return True
        gpus = Counter[str]()
        for victim in victims:
            name = job_of(victim.id)
            gpus[self._holdings.jobs[name].queue] += self._counted(victim.id, name)
        self._suppose(gpus, -1)
        enough = self.enough()
        self._suppose(gpus, +1)
        return enough

    def _suppose(self, gpus: Mapping[str, int], sign: int) -> None:
        """As if the jobs of these queues held so many more; of victims the engine does not know yet."""
        self._more -= sign * sum(gpus.values())
        for queue, count_ in gpus.items():
            self._quota.suppose(queue, sign * count_)

    def end(self) -> None:
        """The queues are as they were."""
        for id_ in list(self._left):
            self.stays(id_)


@contextmanager
def _supposing(engine: Engine, holdings: Holdings, job: Job, gpus: int, returned: int) -> Iterator[UnderLimit | None]:
    within = holdings.shares.quota.limited_at(job.queue, gpus, holdings.count_of(job.name))
    if within is None:
        yield None
        return
    limit = UnderLimit(engine, holdings, job, gpus, returned, within)
    try:
        yield limit
    finally:
        limit.end()
