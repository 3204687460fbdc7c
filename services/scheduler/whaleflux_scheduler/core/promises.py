"""Promised starts: the first large gangs that do not fit get GPUs and a time; others may use these GPUs until then. Pure.

As in backfilling with reservations (EASY, conservative), but for the first `depth` large jobs only, each on GPUs of its own, and with promises
that hold under wrong estimates: who is on promised GPUs when their time comes was expected to have left, and is suspended through a checkpoint.
A promise is a claim in the job's record (`ClaimPurpose.RESERVATION`): a new leader keeps it. It moves earlier when GPUs come free sooner, and
later only when its place is lost.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from whaleflux_scheduler.core.availability import MOST_RELEASED, Availability, Start, earliest
from whaleflux_scheduler.core.estimates import Estimates, end_of, safe_s
from whaleflux_scheduler.core.holdings import KEPT, Holdings, claim_id
from whaleflux_scheduler.core.model import Claim, ClaimPurpose, Job
from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.queue_order import order_of

MARGIN_S = 15.0  # between when the last one has left and the promised start: what agents and the store need
LAPSES_S = 600.0  # after the promised start, when GPUs did not come free at all: another place is looked for
AGAIN_S, LONGEST_AGAIN_S = 60.0, 1800.0  # between two looks at one job
MOST_LOOKS = 4  # in one step


@dataclass(frozen=True, slots=True)
class PromiseRules:
    """Who is promised a start: the first `large` jobs of those that need several nodes, and the first `patient` of others.

    Others need several GPUs, and have waited for `patience_s`. Nothing is promised beyond `horizon_s`: GPUs would be kept for too long.
    """

    large: int = 16
    patient: int = 4
    patience_s: float = 600.0
    horizon_s: float = 3 * 86400.0


@dataclass(slots=True)
class _Asking:
    """A job that waits, and may be promised a start."""

    job: Job
    large: bool
    again_s: float = 0.0  # when to look (again)


class _Line:
    """Jobs in the order of their turns, each once."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, str]] = []
        self._of: dict[str, tuple[int, float, str]] = {}

    def join(self, job: Job) -> None:
        if self._of.get(job.name) != (entry := order_of(job)):
            self._of[job.name] = entry
            heapq.heappush(self._heap, entry)

    def leave(self, name: str) -> None:
        self._of.pop(name, None)
        if len(self._heap) > 2 * len(self._of) + 1_000:
            self._heap = sorted(self._of.values())

    def first(self, most: int) -> list[str]:
        """The first ones, at most so many."""
        found: list[tuple[int, float, str]] = []
        while self._heap and len(found) < most:
            entry = heapq.heappop(self._heap)
            if self._of.get(entry[2]) == entry and entry not in found:
                found.append(entry)
        for entry in found:
            heapq.heappush(self._heap, entry)
        return [name for _, _, name in found]


class Promises:
    """See the module. `learn`, `waits` and `leaves` say what is the case; `due` and `to_promise` what is to be done about it."""

    def __init__(
        self, engine: Engine, holdings: Holdings, estimates: Estimates, rules: PromiseRules | None = None
    ) -> None:
        self._engine, self._holdings, self.rules = engine, holdings, rules or PromiseRules()
        self._estimates, self._ends = estimates, Availability()
        self._largest_node = 0
        self._asking: dict[str, _Asking] = {}
        self._lines = {True: _Line(), False: _Line()}  # large ones without a promise, and others
        self._starts: dict[str, float] = {}  # promised, seconds since the epoch
        self._changed: set[str] = set()  # jobs of which something was learned since ends were guessed
        self._due: dict[str, float] = {}  # when to look who has to leave
        self._places: dict[str, object] = {}  # promised GPUs
        self._named: dict[str, frozenset[str]] = {}  # victims that the record names

    # what is the case

    def knows_node(self, gpus: int) -> None:
        """A node with so many GPUs."""
        self._largest_node = max(self._largest_node, gpus)

    def learn(self, job: Job) -> None:
        """The job as it is stored; after holdings has learned it."""
        self._changed.add(job.name)
        self._named.pop(job.name, None)
        if job.claim is not None and job.claim.victims:
            self._named[job.name] = frozenset(job.claim.victims)
        self._keep(job.name)

    def forget(self, name: str) -> None:
        """Its record is gone."""
        self.leaves(name)
        self._changed.add(name)
        self._named.pop(name, None)
        self._keep(name)

    def catch_up(self, now: datetime) -> None:
        """Guesses when those leave of whom something was learned."""
        for name in self._changed:
            job = self._holdings.jobs.get(name) if self._holdings.held(name) else None
            end = end_of(self._estimates, job, now) if job is not None else None
            self._ends.set(name, end.safe.timestamp() if end else None)
        self._changed.clear()

    def starts(self, job: Job, now: datetime) -> None:
        """It was given GPUs, which its record does not say yet."""
        lasts_s = safe_s(self._estimates, job)
        self._ends.set(job.name, None if lasts_s == math.inf else now.timestamp() + lasts_s)
        self._keep(job.name)
        for claimant in self._holdings.claimants_on(job.name):
            if claimant in self._starts:
                leave_s = self._leave_by(self._starts[claimant], job.name)
                self._due[claimant] = min(self._due.get(claimant, math.inf), leave_s)

    def waits(self, job: Job, request: PlaceRequest) -> None:
        """It may be placed, and asks for this."""
        if request.units < 2 or request.without_gpus or any(group.share for group in request.groups):
            return
        large = self._largest_node > 0 and request.units > self._largest_node
        known = self._asking.get(job.name)
        self._lines[not large].leave(job.name)  # the largest node may be another now
        self._asking[job.name] = _Asking(job, large, known.again_s if known else 0.0)
        if job.name not in self._starts:
            self._lines[large].join(job)

    def leaves(self, name: str) -> None:
        """It waits no more."""
        if self._asking.pop(name, None) is not None:
            self._leave_lines(name)

    def _leave_lines(self, name: str) -> None:
        for line in self._lines.values():
            line.leave(name)

    def claims(self, name: str) -> None:
        """Holdings has another claim of the job."""
        self._keep(name)

    def _keep(self, name: str) -> None:
        """The promise that holdings has for the job."""
        claim = self._holdings.claim(name)
        asking = self._asking.get(name)
        if claim is None or claim.purpose is not ClaimPurpose.RESERVATION or claim.start_time is None:
            self._due.pop(name, None)
            self._places.pop(name, None)
            if self._starts.pop(name, None) is not None and asking is not None:
                self._lines[asking.large].join(asking.job)
            return
        self._leave_lines(name)
        start_s = claim.start_time.timestamp()
        if (self._starts.get(name), self._places.get(name)) != (start_s, claim.nodes):
            self._places[name] = claim.nodes
            self._starts[name] = start_s
            holders = self._holdings.holders_of(claim)
            self._due[name] = min((self._leave_by(start_s, holder) for holder in holders), default=start_s)

    def _leave_by(self, start_s: float, holder: str) -> float:
        """When the holder has to be asked to leave so that it has left at the promised time."""
        return start_s - MARGIN_S - self._holdings.jobs[holder].grace_s

    # who may use promised GPUs

    def lasts(self, job: Job) -> int:
        """A class of jobs that are over equally soon, by factors of 1.4: one answer does for those that ask for the same."""
        lasts_s = safe_s(self._estimates, job)
        return 99 if lasts_s == math.inf else int(2 * math.log2(max(1.0, lasts_s)))

    def behind(self, job: Job, now: datetime) -> list[str]:
        """Jobs whose promises the job does not delay: it has left before their time comes."""
        if not self._starts:
            return []
        over_s = now.timestamp() + safe_s(self._estimates, job) + MARGIN_S
        return [name for name, start_s in self._starts.items() if over_s <= start_s and name != job.name]

    def covered(self, claimants: Iterable[str] | None = None) -> int:
        """GPUs that nobody holds and that are kept for these promises, by default for all."""
        placed = self._engine.placements
        kept = (placed.get(claim_id(name)) for name in (self._starts if claimants is None else claimants))
        return sum(placement.gpus for placement in kept if placement is not None)

    # what is to be done

    @property
    def next_look(self) -> float:
        """Seconds since the epoch when somebody has to leave; infinite: nobody has to."""
        return min(self._due.values(), default=math.inf)

    def due(self, now: datetime) -> list[tuple[str, Claim]]:
        """Claims whose GPUs have to come free now, with those who have to leave. Named again until the records name them."""
        now_s = now.timestamp()
        return [
            (name, claim)
            for name in [name for name, at_s in self._due.items() if at_s <= now_s]
            if (claim := self._with_victims(name, now_s)) is not None
        ]

    def _with_victims(self, name: str, now_s: float) -> Claim | None:
        claim, start_s = self._holdings.claim(name), self._starts[name]
        assert claim is not None
        leave_by = {holder: self._leave_by(start_s, holder) for holder in self._holdings.holders_of(claim) - {name}}
        late = {holder for holder, at_s in leave_by.items() if at_s <= now_s}
        later = min((at_s for holder, at_s in leave_by.items() if holder not in late), default=math.inf)
        named = self._named.get(name, frozenset())
        self._due[name] = min(later, now_s + 1.0 if late - named else now_s + AGAIN_S)
        if late <= named:
            return None
        return replace(claim, victims=tuple(sorted(named | late)))

    def to_promise(self, now: datetime) -> list[str]:
        """Whom to look for a promise, or for a better one; a few, the first ones in line."""
        now_s = now.timestamp()
        better = [name for name in self._starts if name in self._asking and self._asking[name].again_s <= now_s]
        return list(itertools.islice(itertools.chain(better, self._first_without(now_s)), MOST_LOOKS))

    def _first_without(self, now_s: float) -> Iterator[str]:
        """The first ones in line as far as there are promises left to give."""
        given = [self._asking[name].large for name in self._starts if name in self._asking]
        for large, most in ((True, self.rules.large), (False, self.rules.patient)):
            left = most - given.count(large)
            for name in self._lines[large].first(4 * MOST_LOOKS) if left > 0 else ():
                asking = self._asking[name]
                waited_s = now_s - asking.job.create_time.timestamp()
                if asking.again_s <= now_s and (large or waited_s >= self.rules.patience_s) and left > 0:
                    left -= 1
                    yield name

    def expected_start(self, gpus: int, now: datetime) -> tuple[datetime, datetime] | None:
        """When so many GPUs will have come free, by likely and by safe ends of those who run; None: not of those who are known.

        GPUs are counted alone: a job that wants them close together, or of one type, may start later.
        """
        self._guess_again(now)
        soonest = itertools.islice(self._ends.until(math.inf), MOST_RELEASED)
        known = [(end_s, job) for end_s, name in soonest if (job := self._holdings.jobs.get(name)) is not None]
        ends = [(end, job) for _, job in known if (end := end_of(self._estimates, job, now)) is not None]
        free = self._engine.free_gpus()
        likely = _free_at(sorted((end.likely, self._holdings.count_of(job.name)) for end, job in ends), gpus - free)
        safe = _free_at(sorted((end.safe, self._holdings.count_of(job.name)) for end, job in ends), gpus - free)
        return None if likely is None or safe is None else (max(likely, now), max(safe, now))

    def promise(self, job: Job, request: PlaceRequest, now: datetime) -> Claim | None:
        """A start for the job, or an earlier one than it was promised; None: none is in sight, or none that is worth a change."""
        now_s, before = now.timestamp(), self._holdings.claim(job.name)
        promised_s = self._starts.get(job.name, math.inf)
        self._look_again(job.name, now_s, promised_s)
        if before is not None and (promised_s == math.inf or before.victims or self._due[job.name] <= now_s):
            return None
        left_s = promised_s - now_s
        by_s = now_s + self.rules.horizon_s if left_s == math.inf else promised_s - max(60.0, 0.1 * left_s) - MARGIN_S
        start = self._earliest(job, request, now, by_s)
        return None if start is None else self._claim(start.placement, start.at_s + MARGIN_S)

    def _look_again(self, name: str, now_s: float, promised_s: float) -> None:
        left_s = promised_s - now_s if promised_s != math.inf else 0.0
        self._asking[name].again_s = now_s + min(max(AGAIN_S, 0.1 * left_s), LONGEST_AGAIN_S)

    def _claim(self, placement: Placement, start_s: float) -> Claim:
        gpus: dict[str, tuple[str, ...]] = {}
        for part in placement.nodes:
            gpus[part.node] = (*gpus.get(part.node, ()), *self._holdings.devices.uuids(part.node, part.gpus))
        start = datetime.fromtimestamp(start_s, UTC)
        return Claim(
            tuple(gpus.items()), (), start + timedelta(seconds=LAPSES_S), ClaimPurpose.RESERVATION, start_time=start
        )

    def _earliest(self, job: Job, request: PlaceRequest, now: datetime, by_s: float) -> Start | None:
        self._guess_again(now)
        ends = list(self._leaving(job, by_s))
        gpus = sum(self._holdings.count_of(name) for _, name in ends) + self._holdings.count_of(job.name)
        if gpus + self._engine.free_gpus() < request.units:
            return None
        with self._holdings.without(job.name):
            return earliest(
                self._engine, request, ends, _Leaving(self._engine, self._holdings, job.name), now_s=now.timestamp()
            )

    def _guess_again(self, now: datetime) -> None:
        """Of those who should have left by now."""
        for name in self._ends.overdue(now.timestamp()):
            job = self._holdings.jobs.get(name)
            end = end_of(self._estimates, job, now) if job is not None else None
            self._ends.set(name, max(now.timestamp() + AGAIN_S, end.safe.timestamp()) if end else None)

    def _leaving(self, job: Job, by_s: float) -> Iterator[tuple[float, str]]:
        """Who may be counted on to leave, or may be asked to, in order: nobody of a higher priority who could stay longer."""
        left = MOST_RELEASED
        for end_s, name in self._ends.until(by_s):
            other = self._holdings.jobs.get(name)
            if other is None or not other.spec.gpus or name not in self._engine.placements or name == job.name:
                continue
            if other.spec.priority > job.spec.priority and other.spec.time_limit_s is None:
                continue
            yield end_s, name
            left -= 1
            if not left:
                return


def _free_at(ends: list[tuple[datetime, int]], gpus: int) -> datetime | None:
    """When so many have come free, of (end, GPUs) in order."""
    for at, freed in ends:
        gpus -= freed
        if gpus <= 0:
            return at
    return None


class _Leaving:
    """Jobs leave the engine for a while, and what others claim of their GPUs stays taken."""

    def __init__(self, engine: Engine, holdings: Holdings, claimant: str) -> None:
        self._engine, self._holdings, self._claimant = engine, holdings, claimant
        self._placed: dict[str, Placement] = {}

    def vacate(self, name: str) -> None:
        self._placed[name] = self._engine.placements[name]
        self._engine.release(name)
        if (kept := self._holdings.claimed_by_others(name, self._claimant)) is not None:
            self._engine.apply(kept)

    def come_back(self, name: str) -> None:
        if (kept := f"{name}{KEPT}") in self._engine.placements:
            self._engine.release(kept)
        self._engine.apply(self._placed.pop(name))
