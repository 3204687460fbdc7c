"""How long a job will run: what it says of itself, else what jobs like it did. Pure, of bounded memory.

A `time_limit` is a hard end: the scheduler itself keeps it. `expected` and what is learned are guesses: of the last runs of the same family
(queue, name without trailing numbers, GPUs), as predictions from recent runs of the same user serve backfilling better than what users ask for
(Tsafrir et al., "Backfilling using system-generated predictions rather than user runtime estimates", 2007). Who runs longer than guessed is guessed
again: by the runs that were longer still, else twice as long as it has run.

Everything is learned from the records of ended jobs, so that a new leader learns the same.
"""

from __future__ import annotations

import bisect
import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache

from whaleflux_scheduler.core import running_time
from whaleflux_scheduler.core.model import Job, JobState

DEFAULT_S = 4 * 3600.0  # of a job that nothing is known of
LEAST_S, LONGEST_S = 60.0, 10 * 365 * 86400.0
KEPT_RUNS = 16  # of each family
ENOUGH_OF_OTHERS = 4  # runs of any name that say something of a new one; fewer may be tries that failed at once
MOST_FAMILIES = 20_000
MOST_SEEN = 20_000  # ended jobs that are remembered as learned
LATE_S = 1.0  # by which runs that take equally long differ, with what it takes to see that they have ended
START_S = 60.0  # from the placement until all ranks run, where that is not over yet
_DIGITS, _BETWEEN = "0123456789", ("-", "_", ".")

Family = tuple[str, str, int]
"""Queue, name without numbers, GPUs; "" and 0 stand for all."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of running, all attempts together. `hard_s`: it does not run longer, whatever happens; None: nothing ends it.

    Half of all such jobs run for `likely_s` at most, nine of ten for `safe_s`. `source` says from where that is known, in words.
    """

    likely_s: float
    safe_s: float
    hard_s: float | None
    source: str


class Estimates:
    """What was learned."""

    def __init__(self) -> None:
        self._runs: OrderedDict[Family, deque[float]] = OrderedDict()
        self._ordered: dict[Family, list[float]] = {}  # the same in order, of those of which somebody asked
        self._seen: OrderedDict[str, None] = OrderedDict()

    @property
    def families(self) -> int:
        """Of how many something is known."""
        return len(self._runs)

    def learn(self, job: Job) -> bool:
        """An ended job; True when it told something new.

        One that never ran, was cancelled (how long it would have run is not known), or was learned before, tells nothing.
        """
        if not job.ended or job.state is JobState.CANCELLED or job.run_s <= 0 or job.spec.is_service:
            return False
        if (key := job.uid or job.name) in self._seen:
            return False
        self._seen[key] = None
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        for family in _families(job.queue, job.id, job.spec.gpus):
            runs = self._runs.get(family)
            if runs is None:
                runs = self._runs[family] = deque(maxlen=KEPT_RUNS)
            runs.append(job.run_s)
            self._runs.move_to_end(family)
            self._ordered.pop(family, None)
        while len(self._runs) > MOST_FAMILIES:
            self._ordered.pop(self._runs.popitem(last=False)[0], None)
        return True

    def of(self, job: Job, ran_s: float = 0.0) -> Estimate:
        """What is to be expected of a job that has run for `ran_s` so far; both guesses are longer than that."""
        hard_s, said_s = job.spec.time_limit_s, job.spec.expected_s
        if said_s is not None:
            likely_s = safe_s = _doubled(said_s, ran_s)
            source = "its expected" if ran_s < said_s else "it runs longer than its expected"
        else:
            likely_s, safe_s, source = self._learned(job, ran_s, hard_s)
        if hard_s is not None:
            likely_s, safe_s = min(likely_s, hard_s), min(safe_s, hard_s)
        return Estimate(likely_s, safe_s, hard_s, source)

    def left_s(self, job: Job, ran_s: float) -> float | None:
        """In how many seconds a job that has run for `ran_s` probably ends by itself; None: nobody knows, or it runs for longer than was known.

        Half of all such jobs are over by then. Who runs for as long as was known, and `LATE_S` more, ends at any moment.
        """
        hard_s, said_s, before_s = job.spec.time_limit_s, job.spec.expected_s, ran_s - LATE_S
        if said_s is not None:
            known = [said_s] * (said_s > before_s)
        else:
            longer = self._longer(job, ran_s) or self._longer(job, before_s)
            known = [_quantile(longer, 0.5)] if longer else []
        ends = [*known, hard_s] if hard_s is not None else known
        return max(0.0, min(ends) - ran_s) if ends else None

    def _longer(self, job: Job, ran_s: float) -> list[float]:
        """Runs like it that were longer, in order; of the narrowest family that has any."""
        for family in _families(job.queue, job.id, job.spec.gpus):
            ordered = self._in_order(family)
            longer = ordered[bisect.bisect_right(ordered, ran_s) :]
            if longer and (family[1] or len(ordered) >= ENOUGH_OF_OTHERS):
                return longer
        return []

    def _in_order(self, family: Family) -> list[float]:
        """Its runs, the shortest first: sorted when somebody asks, until the next one ends."""
        known = self._ordered.get(family)
        if known is None:
            if not (runs := self._runs.get(family)):
                return []
            known = self._ordered[family] = sorted(runs)
        return known

    def _learned(self, job: Job, ran_s: float, hard_s: float | None) -> tuple[float, float, str]:
        if longer := self._longer(job, ran_s):
            likely_s, safe_s = _quantile(longer, 0.5), _quantile(longer, 0.9)
            return max(likely_s, LEAST_S), max(safe_s, LEAST_S), f"the last {len(longer)} runs like it"
        guess_s = _doubled(DEFAULT_S if hard_s is None else hard_s, ran_s)
        return guess_s, guess_s, "its time limit" if hard_s is not None else "no run like it is known"


def family_of(name: str) -> str:
    """A job's id without what counts its repetitions: "train-7", "train-8" and "train_0012" are all "train"."""
    while (shorter := name.rstrip(_DIGITS)) != name:
        shorter = shorter[:-1] if shorter[-1:] in _BETWEEN else shorter
        if not shorter:
            break
        name = shorter
    return name


@dataclass(frozen=True, slots=True)
class End:
    """When a job has left its GPUs: `likely` when it ends by itself, `safe` when it is not even counted on to be quick, its grace included.

    `hard`: it does not stay longer than `safe`, since the scheduler ends it then.
    """

    likely: datetime
    safe: datetime
    hard: bool


def end_of(estimates: Estimates, job: Job, now: datetime) -> End | None:
    """When a job that holds GPUs gives them back; None: nothing ends it (a service)."""
    attempt = job.attempt
    if attempt is None or not job.readable or (job.spec.is_service and job.spec.time_limit_s is None):
        return None
    grace = timedelta(seconds=job.grace_s)
    if attempt.end_time is not None:  # being stopped
        over = max(now, attempt.end_time + grace)
        return End(over, over, hard=True)
    estimate = estimates.of(job, running_time.run_s(job, now))
    begun = attempt.run_time or attempt.allocate_time + timedelta(seconds=START_S)

    def after(seconds: float) -> datetime:
        return max(now, begun + timedelta(seconds=min(seconds - job.run_s, LONGEST_S)))

    hard = estimate.hard_s is not None
    return End(after(estimate.likely_s), after(estimate.hard_s or estimate.safe_s) + grace, hard)


def safe_s(estimates: Estimates, job: Job) -> float:
    """Seconds from its start in which a waiting job has left its GPUs again, its grace included; infinite for a service.

    By its time limit where it has one, whatever it expects or jobs like it took: within that it is not stopped for others' promises.
    """
    limit_s = job.spec.time_limit_s
    if job.spec.is_service and limit_s is None:
        return math.inf
    lasts_s = limit_s if limit_s is not None else estimates.of(job, job.run_s).safe_s
    return START_S + lasts_s - job.run_s + job.grace_s


@lru_cache(maxsize=4_096)
def _families(queue: str, id: str, gpus: int) -> tuple[Family, ...]:
    """From the narrowest to all."""
    family = family_of(id)
    return (queue, family, gpus), (queue, family, 0), (queue, "", gpus), ("", "", gpus)


def _doubled(guess_s: float, ran_s: float) -> float:
    """The guess, doubled until it is more than what was run."""
    guess_s = max(guess_s, LEAST_S)
    return guess_s if ran_s < guess_s else guess_s * 2.0 ** (math.floor(math.log2(ran_s / guess_s)) + 1)


def _quantile(ordered: list[float], part: float) -> float:
    """The smallest of them that `part` of them do not exceed."""
    return ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1)]
