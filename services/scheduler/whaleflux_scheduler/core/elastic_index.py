"""The running elastic jobs of a plan, in the orders in which they are asked: who gives GPUs first, and who gains most by more. Pure.

A change costs a search in sorted lists; nobody is gone through but those who are asked for. A job that is not
to grow for a while sleeps, and is not asked until then, or until its record changes.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from whaleflux_scheduler.core import elastic, resize
from whaleflux_scheduler.core.model import Job, JobState

Key = tuple[float, float, str]
"""What goes first, what goes first among these, the job's name."""


@dataclass(slots=True)
class _Known:
    job: Job
    gpus: int
    extra: int  # beyond its least, and not given away already
    gives: Key
    gains: Key
    asleep_until_s: float = -math.inf


class ElasticIndex:
    """See the module."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._givers: list[Key] = []  # lowest priority, then least loss first
        self._gainers: list[Key] = []  # highest priority, then greatest rise first; those who sleep are left out
        self._asleep: list[tuple[float, str]] = []  # a heap
        self._jobs: Counter[int] = Counter()  # by priority
        self._held: Counter[int] = Counter()
        self._extra: Counter[int] = Counter()

    def __bool__(self) -> bool:
        return bool(self._known)

    def __getitem__(self, name: str) -> Job:
        return self._known[name].job

    def learn(self, job: Job) -> bool:
        """A job as it is stored; True when it may give others GPUs that it could not before: it began to run, or is looked at again.

        A record that changed while it runs (its step did) is no reason to try again who waits.
        """
        before = self._known.get(job.name)
        if not job.spec.is_elastic or job.state is not JobState.RUNNING or job.attempt is None:
            self.forget(job.name)
            return False
        known = before.job if before is not None else None
        if before is None or not _alike(before.job, job):
            self.forget(job.name)
            self._add(job)
        else:
            before.job = job
            self._wake(job.name, before)
        began = known is None or known.epoch != job.epoch or (known.claim is not None and job.claim is None)
        return (began or known is job) and self._known[job.name].extra > 0

    def forget(self, name: str) -> None:
        known = self._known.pop(name, None)
        if known is None:
            return
        _remove(self._givers, known.gives)
        _remove(self._gainers, known.gains)
        self._count(known, -1)

    def _add(self, job: Job) -> None:
        assert job.attempt is not None
        gpus, priority = job.attempt.gpus, float(job.spec.priority)
        extra = gpus - elastic.least(job.spec) if job.claim is None else 0
        loss = resize.loss(job, gpus, elastic.below(job.spec, gpus)) if extra else 0.0
        known = _Known(job, gpus, extra, (priority, loss, job.name), (-priority, -resize.best_rise(job), job.name))
        self._known[job.name] = known
        if extra:
            insort(self._givers, known.gives)
        self._wake(job.name, known)
        self._count(known, +1)

    def _count(self, known: _Known, sign: int) -> None:
        priority = known.job.spec.priority
        for counter, what in ((self._jobs, 1), (self._held, known.gpus), (self._extra, known.extra)):
            counter[priority] += sign * what
            if not counter[priority]:
                del counter[priority]

    # giving

    def has_more(self, name: str) -> bool:
        """Whether the job has more than its least."""
        return name in self._known and self._known[name].extra > 0

    def spare(self, priority: int) -> int:
        """GPUs that jobs of at most that priority have beyond their least."""
        return sum(gpus for of, gpus in self._extra.items() if of <= priority)

    def part(self, priority: int, free: int) -> int:
        """What each would have if those of at most that priority, and one more, had equal parts of what they have and what is free."""
        jobs = sum(count for of, count in self._jobs.items() if of <= priority)
        held = sum(gpus for of, gpus in self._held.items() if of <= priority)
        return (held + free) // (jobs + 1)

    def givers(self) -> Iterator[Job]:
        """Those who have more than their least: of the lowest priority first, there those whose speed falls least."""
        return (self._known[name].job for _, _, name in self._givers)

    # gaining

    def wake(self, now_s: float) -> bool:
        """Wakes those whose time has come; whether there are any."""
        any_ = False
        while self._asleep and self._asleep[0][0] <= now_s:
            until_s, name = heapq.heappop(self._asleep)
            if self._sleeps(until_s, name):
                self._wake(name, self._known[name])
                any_ = True
        return any_

    def gainers(self) -> Iterator[Job]:
        """Those who are awake and could use more: of the highest priority first, there those whose speed rises most."""
        return (self._known[name].job for _, _, name in tuple(self._gainers))

    @property
    def wakes_s(self) -> float:
        """When the first of those who sleep may be asked again, in seconds since the epoch; infinite: nobody sleeps."""
        while self._asleep and not self._sleeps(*self._asleep[0]):
            heapq.heappop(self._asleep)
        return self._asleep[0][0] if self._asleep else math.inf

    def _sleeps(self, until_s: float, name: str) -> bool:
        known = self._known.get(name)
        return known is not None and known.asleep_until_s == until_s

    def sleep(self, name: str, until_s: float) -> None:
        """It is not asked before."""
        known = self._known[name]
        _remove(self._gainers, known.gains)
        known.asleep_until_s = until_s
        heapq.heappush(self._asleep, (until_s, name))

    def _wake(self, name: str, known: _Known) -> None:
        known.asleep_until_s = -math.inf
        if known.gains[1] < 0 and known.job.claim is None:
            _remove(self._gainers, known.gains)
            insort(self._gainers, known.gains)


def _alike(before: Job, job: Job) -> bool:
    """Whether nothing differs that its places in the orders come from."""
    return (before.epoch, before.spec, before.claim, before.gpu_s) == (job.epoch, job.spec, job.claim, job.gpu_s)


def _remove(order: list[Key], key: Key) -> None:
    at = bisect_left(order, key)
    if at < len(order) and order[at] == key:
        del order[at]
