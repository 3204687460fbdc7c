"""Who is about to end is not stopped: what a stop costs is weighed against the wait that it saves. Pure.

A job that may have others stopped waits for them instead where all of them are expected to end by themselves within a minute (`MOST_S`), and that costs
fewer GPU-seconds than to stop them: those that the job waits, against those of its victims, which save, start again and do once more what they had
not saved. So a stop is as quick as ever whose victims end later, or of whom that is not known, and no job waits for longer than a minute in
this way, however wrong the estimates are and whoever takes what comes free: priority is put off, never defeated. A worker of a Ray cluster waits for a few
seconds only: a task waits for it, and is to begin within fifteen, of which seeing it, a save and the worker's start take most.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from whaleflux_scheduler.core import running_time
from whaleflux_scheduler.core.estimates import Estimates
from whaleflux_scheduler.core.holdings import Holdings
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.rebalance import FAILED_SAVES, restart_s, resumes, unsaved_s

MOST_S = 60.0  # that a job waits so in all, before others are stopped for it, whenever they would end
RAY_MOST_S = 2.0  # the same of a worker of a Ray cluster
AGAIN_S = 1.0  # the shortest time between two looks at one job


@dataclass(frozen=True, slots=True)
class LetsEnd:
    """Whom a waiting job lets end, from the plan that would stop them. Instants, not seconds: a look is due exactly when a clock of microseconds shows it."""

    victims: tuple[str, ...]
    since: datetime
    ends: datetime  # when all of them are expected to have ended
    look: datetime  # when to decide again
    stops: datetime  # when they, or others, are stopped at the latest


def stop_cost_gpu_s(job: Job, now: datetime, saved: datetime | None = None) -> float:
    """GPU-seconds that it costs to stop the job now and start it again; `saved`: when its newest checkpoint was committed.

    Who goes on from checkpoints saves one more when it is stopped, so only a share of what is unsaved counts (that of saves that fail).
    """
    lost_s = (FAILED_SAVES if resumes(job) else 1.0) * unsaved_s(job, now, saved)
    return job.attempt.gpus * (restart_s(job) + lost_s) if job.attempt is not None else 0.0


class SoonOver:
    """Who lets whom end, for `most_s` at most (0: nobody does). A new leader does not know of it: a wait begins again then, once."""

    def __init__(self, holdings: Holdings, estimates: Estimates) -> None:
        self.most_s = MOST_S
        self._holdings, self._estimates = holdings, estimates
        self._waits: dict[str, LetsEnd] = {}
        self._looks: list[tuple[datetime, str]] = []  # a heap; may hold looks that are over

    def of(self, name: str, now: datetime) -> LetsEnd | None:
        """What the job waits for at this moment instead of having others stopped; None: nothing."""
        known = self._waits.get(name)
        return known if known is not None and now < known.look else None

    @property
    def next_look(self) -> float:
        """Seconds since the epoch when somebody is to be decided on again; infinite: nobody waits."""
        while self._looks and self._stale(*self._looks[0]):
            heapq.heappop(self._looks)
        return self._looks[0][0].timestamp() if self._looks else math.inf

    def due(self, now: datetime) -> list[str]:
        """Who is to be decided on again; each is told once."""
        found = []
        while self.next_look != math.inf and self._looks[0][0] <= now:
            found.append(heapq.heappop(self._looks)[1])
        return found

    def _stale(self, look: datetime, name: str) -> bool:
        known = self._waits.get(name)
        return known is None or known.look != look

    def forget(self, name: str) -> None:
        """It does not wait any more, or others have been asked to leave for it."""
        self._waits.pop(name, None)

    def lets_end(self, job: Job, victims: Collection[str], now: datetime) -> bool:
        """Whether the job waits for these instead of having them stopped."""
        found = self.weighed(job, victims, now)
        if found is None:
            return False
        self._waits[job.name] = found
        heapq.heappush(self._looks, (found.look, job.name))
        return True

    def weighed(self, job: Job, victims: Collection[str], now: datetime) -> LetsEnd | None:
        """How the job would wait for these; None: to stop them costs less, or it has waited for long enough."""
        most_s = min(self.most_s, RAY_MOST_S) if job.is_ray_worker else self.most_s
        wait_s = self._worth_waiting_s(job, victims, now, most_s)
        if wait_s is None:
            return None
        known = self._waits.get(job.name)
        since = known.since if known is not None else now
        look, stops = now + timedelta(seconds=max(AGAIN_S, wait_s)), since + timedelta(seconds=most_s)
        return LetsEnd(tuple(victims), since, now + timedelta(seconds=wait_s), look, stops) if look <= stops else None

    def _worth_waiting_s(self, job: Job, victims: Collection[str], now: datetime, most_s: float) -> float | None:
        """Seconds until all of them have probably ended, if to wait for that costs less than to stop them; None: it does not."""
        longest_s, cost_gpu_s = 0.0, 0.0
        for name in victims:
            victim = self._holdings.jobs[name]
            left_s = self._left_s(victim, now)
            if left_s is None or left_s > most_s:
                return None
            longest_s = max(longest_s, left_s)
            cost_gpu_s += stop_cost_gpu_s(victim, now, self._holdings.saved.get(name))
        return longest_s if victims and longest_s * job.spec.gpus <= cost_gpu_s else None

    def _left_s(self, job: Job, now: datetime) -> float | None:
        if not self._holdings.held(job.name):
            return None  # it loses a claim, which costs nothing
        return self._estimates.left_s(job, running_time.run_s(job, now))
