"""When those who hold GPUs are expected to have left, and from that when a waiting job could start, and where. Pure.

What is learned of jobs is put down at once and looked at when somebody asks, so that a fleet where nobody waits pays nothing for it. A
question is answered by counting where that is enough (`Availability`), and by the placement engine where it is not.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from whaleflux_scheduler.core.availability import MOST_RELEASED, Availability, End, Start, earliest
from whaleflux_scheduler.core.estimates import Estimates, end_of, safe_s
from whaleflux_scheduler.core.holdings import Holdings
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.placement.api import PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.placement.node_room import NodeRoom
from whaleflux_scheduler.core.preemption import claimant_of
from whaleflux_scheduler.core.quota import Claimant
from whaleflux_scheduler.core.rebalance import resumes
from whaleflux_scheduler.core.request import gpus_of

AGAIN_S = 60.0  # after which who should have left, and has not, is guessed again
REST_S = 3_600.0  # that a job runs at least before it makes room for one that it passed
MOST_PASSED = 1_024  # that are looked at for one job
MOST_GUESSED = 1_024  # in one look: some 20 ms


class ExpectedEnds:
    """See the module."""

    def __init__(self, engine: Engine, holdings: Holdings, estimates: Estimates) -> None:
        self._engine, self._holdings, self._estimates = engine, holdings, estimates
        self._profile = Availability()
        self._changed: dict[str, None] = {}  # jobs of which something was learned since their ends were guessed
        self._by_begin: list[tuple[float, str]] = []  # (seconds since the epoch, name)
        self._begins: dict[str, float] = {}
        self._began: dict[str, float] = {}  # jobs that were given GPUs, which their records do not say yet: when

    # what is the case

    def learn(self, name: str) -> None:
        """There is news of the job; after holdings has it."""
        if name in self._profile or self._holdings.held(name):
            self._changed[name] = None
        else:
            self._changed.pop(name, None)
        self._began.pop(name, None)

    def starts(self, job: Job, now: datetime) -> None:
        """It was given GPUs."""
        self._changed[job.name] = None
        self._began[job.name] = now.timestamp()

    def catch_up(self, now: datetime) -> bool:
        """Guesses what changed, and those who should have left by now; False: there is more of that than one look is worth."""
        changes = self._holdings.reclaimed
        self._changed.update(dict.fromkeys(sorted(name for name in changes if name in self._profile)))
        changes.clear()
        for name in list(itertools.islice(self._changed, MOST_GUESSED)):
            del self._changed[name]
            self._profile.set(name, self._guess(name, now), self._holdings.unclaimed(name))
            self._note_begin(name)
        now_s = now.timestamp()
        late = self._profile.overdue(now_s)
        for name in late[:MOST_GUESSED]:
            end_s = self._guess(name, now)
            self._profile.set(name, max(now_s + AGAIN_S, end_s) if end_s else None, self._holdings.unclaimed(name))
        return not self._changed and len(late) <= MOST_GUESSED

    def _guess(self, name: str, now: datetime) -> float | None:
        """Seconds since the epoch; None: it holds nothing, or never leaves."""
        job = self._holdings.jobs.get(name)
        if job is None or not self._holdings.held(name):
            return None
        if (began_s := self._began.get(name)) is not None:
            lasts_s = safe_s(self._estimates, job)
            return None if lasts_s == math.inf else began_s + lasts_s
        end = end_of(self._estimates, job, now)
        return end.safe.timestamp() if end else None

    # what follows

    def expected_start(
        self,
        job: Job,
        ahead: Sequence[Job],
        promised: Mapping[str, float],
        now: datetime,
        returns: Sequence[tuple[datetime, int]] = (),
    ) -> tuple[datetime, datetime] | None:
        """When the job starts if those ahead do first, by likely and by safe ends; None: not as those end who are known.

        Jobs that were promised a start, seconds since the epoch, are in nobody's way before that. GPUs are counted alone, those of the types that
        the job may have: a job that wants them close together may start later; one that others let pass, sooner. `returns`: when so many GPUs
        come free that no job has: those of reservations.
        """
        self.catch_up(now)
        models = set(job.spec.any_of) or {""}
        before = [other for other in ahead if other.name not in promised and _may_take(other, models)]
        free, wanted = self._free(models), sum(other.spec.gpus for other in (*before, job))
        found = self._soonest(max(1, wanted - free), models)
        ends = [(end.likely, end.safe, count) for count, one in found if (end := end_of(self._estimates, one, now))]
        ends += [
            over for name, at_s in promised.items() if (over := self._end_of_promised(name, at_s, models)) is not None
        ]
        ends += [(at, at, gpus) for at, gpus in returns]
        lasting = [(other.spec.gpus, self._estimates.of(other, other.run_s)) for other in before]
        gpus = job.spec.gpus
        likely = start_in_turn(
            free, [(_left_s(e[0], now), e[2]) for e in ends], [(n, one.likely_s) for n, one in lasting], gpus
        )
        safe = start_in_turn(
            free, [(_left_s(e[1], now), e[2]) for e in ends], [(n, one.safe_s) for n, one in lasting], gpus
        )
        return (
            None if likely is None or safe is None else (now + timedelta(seconds=likely), now + timedelta(seconds=safe))
        )

    def _free(self, models: set[str]) -> int:
        """Whole GPUs of these models that new work may use now."""
        if "" in models:
            return self._engine.free_gpus()
        return sum(gpus for model, gpus in self._engine.free_by_model().items() if model in models)

    def _end_of_promised(self, name: str, start_s: float, models: set[str]) -> tuple[datetime, datetime, int] | None:
        job = self._holdings.jobs.get(name)
        if job is None or job.spec.is_service or not _may_take(job, models):
            return None
        start, lasts = datetime.fromtimestamp(start_s, UTC), self._estimates.of(job, job.run_s)
        likely, safe = (start + timedelta(seconds=all_s - job.run_s) for all_s in (lasts.likely_s, lasts.safe_s))
        return likely, safe, job.spec.gpus

    def _soonest(self, gpus: int, models: set[str]) -> Iterator[tuple[int, Job]]:
        """The first ones who leave until so many GPUs of these models are free; for who leaves soon by its safe end probably does so first."""
        for _, name in itertools.islice(self._profile.until(math.inf), MOST_RELEASED):
            if gpus <= 0:
                return
            if (job := self._holdings.jobs.get(name)) is not None and _could_help(job, models):
                count = self._profile.gpus(name)
                gpus -= count
                yield count, job

    def earliest(
        self, job: Job, request: PlaceRequest, now: datetime, by_s: float, passed: Sequence[str] = ()
    ) -> tuple[Start | None, bool]:
        """The earliest start of the job that is not after `by_s`, if there is one, and whether the engine was asked in vain. After `catch_up`.

        Those who `passed` it leave as soon as they are asked to.
        """
        own = self._own_held_by_others(job.name)
        here = self._holdings.count_of(job.name) - sum(own.values())
        short = gpus_of(request) - self._engine.free_gpus() - here
        freed = self._profile.freed_by(by_s) + sum(map(self._profile.gpus, passed))
        if short > freed + sum(count for name, count in own.items() if self._profile.leaves_by(name, by_s)):
            return None, False
        leaving = self._leaving(job, request, by_s, own)
        if passed:
            asked, others = set(passed), leaving
            leaving = itertools.chain(self._asked(passed, now), (end for end in others if end[1] not in asked))
        vacate, now_s = self._vacating(job.name), now.timestamp()
        with self._holdings.without(job.name):
            room = self._engine.room_of(request)
            first = self._enough(leaving, gpus_of(request), room, job.name)
            if first is None:
                return None, room.total >= gpus_of(request)
            ends = itertools.chain(first, leaving)
            start = earliest(self._engine, request, ends, vacate, now_s=now_s, least=len(first))
        return start, start is None

    def _enough(self, leaving: Iterator[End], gpus: int, room: NodeRoom, claimant: str) -> list[End] | None:
        """The first ones until they leave so much room; None: all of them do not."""
        found: list[End] = []
        while room.most < gpus:
            end = next(leaving, None)
            if end is None or len(found) == MOST_RELEASED:
                return None
            found.append(end)
            for node, freed in self._holdings.let_go(end[1], claimant):
                room.frees(node, freed)
        return found

    def passed(self, job: Job, now: datetime) -> list[str]:
        """Who began while the job waited, though it has waited for more GPU-hours than they had; who began last first. After `catch_up`.

        They have run for `REST_S` and as long as all their attempts before, and would go on from a checkpoint.
        """
        claimant, waited_gpu_s = claimant_of(self._holdings, job, job.spec.gpus), _waited_gpu_s(job, now)
        since_s, rested_s = job.create_time.timestamp(), now.timestamp() - REST_S
        first, last = (bisect.bisect_right(self._by_begin, (at_s, chr(0x10FFFF))) for at_s in (since_s, rested_s))
        latest = reversed(self._by_begin[max(first, last - MOST_PASSED) : last])
        return [
            other.name
            for begun_s, name in latest
            if (other := self._leaves_gpus(name)) is not None
            and begun_s + other.run_s <= now.timestamp()
            and _waited_gpu_s(other, datetime.fromtimestamp(begun_s, UTC)) < waited_gpu_s
            and claimant.outlasts(name, other.queue, other.spec.priority)
        ]

    def _leaves_gpus(self, name: str) -> Job | None:
        """The job, if GPUs come free when it leaves."""
        there = self._profile.gpus(name) and name in self._engine.placements
        return self._holdings.jobs.get(name) if there else None

    def _asked(self, names: Iterable[str], now: datetime) -> Iterator[End]:
        """When they have left if they are asked to now."""
        return ((now.timestamp() + self._holdings.jobs[name].grace_s, name) for name in names)

    def _note_begin(self, name: str) -> None:
        """Jobs that run and may be suspended for whom they passed, in the order in which they began."""
        known_s, begun_s = self._begins.pop(name, None), self._may_leave_since_s(name)
        if known_s is not None:
            del self._by_begin[bisect.bisect_left(self._by_begin, (known_s, name))]
        if begun_s is not None:
            self._begins[name] = begun_s
            bisect.insort(self._by_begin, (begun_s, name))

    def _may_leave_since_s(self, name: str) -> float | None:
        """Seconds since the epoch when it began; None: it is not to be suspended for others."""
        job = self._holdings.jobs.get(name)
        if job is None or job.attempt is None or not self._holdings.held(name) or not resumes(job):
            return None
        stays = job.spec.is_service or job.spec.time_limit_s is not None
        return None if stays else job.attempt.allocate_time.timestamp()

    def _own_held_by_others(self, name: str) -> Counter[str]:
        """Who holds how much of what the job claims."""
        claim = self._holdings.claim(name)
        held = self._holdings.held_of(claim) if claim is not None else Counter[str]()
        del held[name]
        return held

    def _leaving(self, job: Job, request: PlaceRequest, by_s: float, own: Counter[str]) -> Iterator[End]:
        """Who may be counted on to leave GPUs that the job could use, or may be asked to, in order."""
        claimant = claimant_of(self._holdings, job, gpus_of(request))
        models = (
            {option.model for option in request.requirement.any_of} if not request.requirement.mig_profile else {""}
        )
        for end_s, name in self._profile.until(by_s):
            other = self._holdings.jobs.get(name)
            if other is None or not (self._profile.gpus(name) or own[name]) or name not in self._engine.placements:
                continue
            if name != job.name and _may_be_counted_on(other, claimant) and _could_help(other, models):
                yield end_s, name

    def _vacating(self, claimant: str) -> _Vacating:
        return _Vacating(self._engine, self._holdings, claimant)


def _may_be_counted_on(other: Job, claimant: Claimant) -> bool:
    """Nobody who could stay longer: of a higher priority, or within a guarantee that is not the claimant's."""
    return other.spec.time_limit_s is not None or claimant.outlasts(other.name, other.queue, other.spec.priority)


def _may_take(other: Job, models: set[str]) -> bool:
    """Whether a job that waits could be given GPUs of one of these models."""
    theirs = set(other.spec.any_of)
    return not theirs or "" in models | theirs or bool(theirs & models)


def _could_help(other: Job, models: set[str]) -> bool:
    """Whether it may hold GPUs of one of these models."""
    if "" in models or other.attempt is None or not other.attempt.gpus_by_model:
        return True
    return any(model in models for model, _ in other.attempt.gpus_by_model)


def start_in_turn(
    free: int, ends: Iterable[tuple[float, int]], ahead: Iterable[tuple[int, float]], gpus: int
) -> float | None:
    """In how many seconds so many GPUs are free for who is last in line. None: never.

    `ends` are (seconds, GPUs) of those who run, `ahead` (GPUs, seconds that it lasts) of those who start first, each as soon as it can; one that
    is larger than all of that is passed over.
    """
    leaving, at_s = list(ends), 0.0
    heapq.heapify(leaving)
    total = free + sum(count for _, count in leaving)
    for wanted, lasts_s in (*ahead, (gpus, 0.0)):
        if wanted > total:
            continue
        while free < wanted:
            at_s, freed = heapq.heappop(leaving)
            free += freed
        free -= wanted
        heapq.heappush(leaving, (at_s + lasts_s, wanted))
    return at_s if gpus <= total else None


def _left_s(at: datetime, now: datetime) -> float:
    return max(0.0, (at - now).total_seconds())


def _waited_gpu_s(job: Job, until: datetime) -> float:
    """GPU-seconds that it did not run since it was submitted."""
    return job.spec.gpus * ((until - job.create_time).total_seconds() - job.run_s)


class _Vacating:
    """Jobs leave the engine for a while, and what others than `claimant` claim of their GPUs stays taken."""

    def __init__(self, engine: Engine, holdings: Holdings, claimant: str) -> None:
        self._engine, self._holdings, self._claimant = engine, holdings, claimant

    def __call__(self, names: Sequence[str]) -> None:
        self._engine.release_all(names)
        for name in names:
            if (kept := self._holdings.claimed_by_others(name, self._claimant)) is not None:
                self._engine.apply(kept)
