"""Promised starts: the first large gangs that do not fit get GPUs and a time; others may use these GPUs until then. Pure.

As in backfilling with reservations (EASY, conservative), but for the first large jobs only (`promise_lines`), each on GPUs of its own, and with
promises that hold under wrong estimates: who is on promised GPUs when their time comes was expected to have left, and is suspended through a
checkpoint. A promise is a claim in the job's record (`ClaimPurpose.RESERVATION`): a new leader keeps it. It moves earlier when GPUs come free
sooner, and later only when its place is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from whaleflux_scheduler.core.availability import Start
from whaleflux_scheduler.core.estimates import LEAST_S, START_S, Estimates
from whaleflux_scheduler.core.expected_ends import ExpectedEnds
from whaleflux_scheduler.core.holdings import Holdings
from whaleflux_scheduler.core.lending import MARGIN_S
from whaleflux_scheduler.core.model import Claim, ClaimPurpose, Job
from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.preemption import claimant_of
from whaleflux_scheduler.core.promise_lines import AGAIN_S, PromiseLines, PromiseRules
from whaleflux_scheduler.core.quota import Claimant

PASSED_GAIN_S = 1_800.0  # that a start has to be sooner for those who passed to make room
LAPSES_S = 600.0  # after the promised start, when GPUs did not come free at all: another place is looked for
MOST_WINDOWS = 8  # for one answer


class Promises:
    """See the module. `learn`, `waits` and `leaves` say what is the case; `due` and `to_promise` what is to be done about it."""

    def __init__(
        self, engine: Engine, holdings: Holdings, estimates: Estimates, rules: PromiseRules | None = None
    ) -> None:
        self._holdings = holdings
        self.rules = rules or PromiseRules()
        self._ends = ExpectedEnds(engine, holdings, estimates)
        self._lines = PromiseLines(self.rules)
        self.starts_s: dict[str, float] = {}  # promised, seconds since the epoch; by job
        self._due: dict[str, float] = {}  # when to look who has to leave
        self._places: dict[str, object] = {}  # promised GPUs
        self._named: dict[str, frozenset[str]] = {}  # victims that the record names

    # what is the case

    def knows_node(self, gpus: int) -> None:
        """A node with so many GPUs."""
        self._lines.knows_node(gpus)

    def learn(self, job: Job) -> None:
        """The job as it is stored; after holdings has learned it."""
        self._ends.learn(job.name)
        self._named.pop(job.name, None)
        if job.claim is not None and job.claim.victims:
            self._named[job.name] = frozenset(job.claim.victims)
        self._keep(job.name)

    def forget(self, name: str) -> None:
        """Its record is gone."""
        self.leaves(name)
        self._ends.learn(name)
        self._named.pop(name, None)
        self._keep(name)

    def starts(self, job: Job, now: datetime) -> None:
        """It was given GPUs, which its record does not say yet."""
        self._ends.starts(job, now)
        self._keep(job.name)
        for claimant in self._holdings.claimants_on(job.name):
            if claimant in self.starts_s:
                leave_s = self._leave_by(self.starts_s[claimant], job.name)
                self._due[claimant] = min(self._due.get(claimant, math.inf), leave_s)

    def waits(self, job: Job, request: PlaceRequest) -> None:
        """It may be placed, and asks for this."""
        self._lines.waits(job, request)

    def leaves(self, name: str) -> None:
        """It waits no more."""
        self._lines.leaves(name)

    def claims(self, name: str) -> None:
        """Holdings has another claim of the job."""
        self._keep(name)

    def _keep(self, name: str) -> None:
        """The promise that holdings has for the job."""
        claim = self._holdings.claim(name)
        if claim is None or claim.purpose is not ClaimPurpose.RESERVATION or claim.start_time is None:
            if self.starts_s.pop(name, None) is not None:
                del self._due[name], self._places[name]
                self._lines.lost(name)
            return
        self._lines.was_given(name)
        start_s = claim.start_time.timestamp()
        if (self.starts_s.get(name), self._places.get(name)) != (start_s, claim.nodes):
            self._places[name] = claim.nodes
            self.starts_s[name] = start_s
            holders = self._holdings.holders_of(claim)
            self._due[name] = min((self._leave_by(start_s, holder) for holder in holders), default=start_s)

    def _leave_by(self, start_s: float, holder: str) -> float:
        """When the holder has to be asked to leave so that it has left at the promised time."""
        return start_s - MARGIN_S - self._holdings.jobs[holder].grace_s

    def has(self, name: str) -> bool:
        """Whether it was promised a start."""
        return name in self.starts_s

    # who may use promised GPUs

    def windows(self, job: Job, now: datetime) -> Iterator[tuple[float, list[str]]]:
        """In how many seconds a job has to be over, and whose promises it does not delay then; the longest time first."""
        now_s = now.timestamp()
        starts = sorted(((at_s, name) for name, at_s in self.starts_s.items() if name != job.name), reverse=True)
        for number, (at_s, _) in enumerate(starts[:MOST_WINDOWS], 1):
            if (left_s := at_s - now_s - MARGIN_S - START_S - job.grace_s) >= LEAST_S:
                yield left_s, [name for _, name in starts[:number]]

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
        claim, start_s = self._holdings.claim(name), self.starts_s[name]
        assert claim is not None
        claimant = claimant_of(self._holdings, self._holdings.jobs[name], sum(len(uuids) for _, uuids in claim.nodes))
        leave_by = {holder: self._leave_by(start_s, holder) for holder in self._holdings.holders_of(claim) - {name}}
        late = {holder for holder, at_s in leave_by.items() if at_s <= now_s and self._makes_way(holder, claimant)}
        later = min((at_s for at_s in leave_by.values() if at_s > now_s), default=math.inf)
        named = self._named.get(name, frozenset())
        self._due[name] = min(later, now_s + 1.0 if late - named else now_s + AGAIN_S)
        if late <= named:
            return None
        return replace(claim, victims=tuple(sorted(named | late)))

    def _makes_way(self, holder: str, claimant: Claimant) -> bool:
        """Whether who is late has to leave. Who came to be within a guarantee since it was counted on stays: that goes before a promise."""
        job = self._holdings.jobs[holder]
        return job.spec.time_limit_s is not None or claimant.outlasts(holder, job.queue, job.spec.priority)

    def to_promise(self, now: datetime) -> list[str]:
        """Whom to look for a promise, or for a better one; a few, the first ones in line. Each is to be looked at, or put off."""
        return self._lines.due(now.timestamp())

    def not_yet(self, name: str) -> None:
        """There is no time for it in this step: it is due in the next one."""
        self._lines.not_yet(name)

    @property
    def missed(self) -> bool:
        """Whether there was no time in the last step for somebody who was due."""
        return self._lines.missed

    def put_off(self, name: str, now: datetime) -> None:
        """It cannot have a promise for now."""
        self._lines.put_off(name, now.timestamp())

    def expected_start(
        self, job: Job, ahead: Sequence[Job], now: datetime, returns: Sequence[tuple[datetime, int]] = ()
    ) -> tuple[datetime, datetime] | None:
        """As `ExpectedEnds.expected_start`."""
        return self._ends.expected_start(job, ahead, self.starts_s, now, returns)

    def soonest(self, job: Job, request: PlaceRequest, now: datetime, by_s: float) -> Start | None:
        """The earliest start of the request that is not after `by_s`, seconds since the epoch; None: none is in sight."""
        return self._ends.earliest(job, request, now, by_s)[0] if self._ends.catch_up(now) else None

    def promise(self, job: Job, request: PlaceRequest, now: datetime) -> Claim | None:
        """A start for the job, or an earlier one than it was promised; None: none is in sight, or none that is worth a change."""
        now_s, before = now.timestamp(), self._holdings.claim(job.name)
        promised_s = self.starts_s.get(job.name, math.inf)
        left_s = max(0.0, promised_s - now_s) if promised_s != math.inf else 0.0
        if before is not None and (promised_s == math.inf or before.victims or self._due[job.name] <= now_s):
            self._lines.put_off(job.name, now_s, left_s)
            return None
        if not self._ends.catch_up(now):
            self._lines.not_yet(job.name)
            return None
        by_s = now_s + self.rules.horizon_s if before is None else promised_s - max(60.0, 0.1 * left_s) - MARGIN_S
        start, vain = self._ends.earliest(job, request, now, by_s)
        soon_s = min(start.at_s if start is not None else math.inf, promised_s) - PASSED_GAIN_S
        if now_s < soon_s and now_s - job.create_time.timestamp() >= self.rules.let_pass_s:
            passed = self._ends.passed(job, now)
            sooner = self._ends.earliest(job, request, now, min(by_s, soon_s), passed)[0] if passed else None
            start = sooner or start
        self._lines.put_off(job.name, now_s, left_s, vain=vain)
        return None if start is None else self._claim(start.placement, start.at_s + MARGIN_S)

    def _claim(self, placement: Placement, start_s: float) -> Claim:
        gpus: dict[str, tuple[str, ...]] = {}
        for part in placement.nodes:
            gpus[part.node] = (*gpus.get(part.node, ()), *self._holdings.devices.uuids(part.node, part.gpus))
        start = datetime.fromtimestamp(start_s, UTC)
        return Claim(
            tuple(gpus.items()), (), start + timedelta(seconds=LAPSES_S), ClaimPurpose.RESERVATION, start_time=start
        )
