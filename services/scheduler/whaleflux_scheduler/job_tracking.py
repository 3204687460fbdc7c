"""What the leader remembers about one unfinished job beside its record: reports on their way, its step, why its last attempt ended."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from whaleflux_scheduler.agent_sessions import AgentSession
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.model import Attempt, Job, JobState, SchedulingDecision
from whaleflux_scheduler.core.observed import AttemptFailure, Report
from whaleflux_scheduler.diagnosis import DiagnosisResult


@dataclass(frozen=True, slots=True, eq=False)
class PendingReport:
    """A report on its way into the store. Two that say the same are still two: each is acknowledged and settled by itself."""

    report: Report
    session: AgentSession
    sequence: int  # 0: not to be acknowledged

    def stored(self) -> None:
        if self.sequence:
            self.session.stored(self.sequence)


@dataclass(frozen=True, slots=True)
class Progress:
    """The newest step of an attempt."""

    epoch: int
    step: int
    loss: float | None
    time: datetime  # when the step was completed, as far as is known here
    first_time: datetime | None = None  # when the first one of the attempt was


@dataclass(frozen=True, slots=True)
class Offer:
    """A job as it was offered to the planner: what was stored, what follows from the reports, and the reports that this accounts for."""

    stored: StoredJob
    job: Job
    reports: tuple[PendingReport, ...]


class JobTracking:
    """See the module."""

    def __init__(self) -> None:
        self._reports: dict[PendingReport, None] = {}  # in the order in which they came
        self._progress: Progress | None = None
        self._step_is_due = False
        self._loss_was_finite = True  # so far in this attempt
        self._failure: AttemptFailure | None = None
        self._asked_epoch = 0
        self._diagnosed: DiagnosisResult | None = None
        self._avoided: dict[str, datetime] = {}  # node -> until
        self._launches: dict[str, str] = {}  # task -> traceparent of its launch
        self._offer: Offer | None = None
        self._waits: SchedulingDecision | None = None
        self._not_storable = 0  # revision of the record
        self._nodes: tuple[int, frozenset[str]] = 0, frozenset()  # an epoch, and where its attempt is placed
        self._seen: tuple[int, JobState, datetime] | None = None  # an epoch and a state, and since when
        self._moved: tuple[object, timedelta] | None = (
            None  # when an attempt began as stored, and how the clock moved since
        )

    # reports

    @property
    def reports(self) -> tuple[PendingReport, ...]:
        """Not stored yet, the oldest first."""
        return tuple(self._reports)

    def add_report(self, pending: PendingReport) -> None:
        self._reports[pending] = None
        if pending.report.traceparent:
            self._launches[pending.report.task] = pending.report.traceparent

    def settle(self, reports: Iterable[PendingReport]) -> list[PendingReport]:
        """These are in the store or say nothing new; returns those that were not settled before.

        A job's reports are looked at again while an earlier look at them is still being written.
        """
        settled = [pending for pending in reports if pending in self._reports]
        for pending in settled:
            del self._reports[pending]
        return settled

    def launch_of(self, task: str) -> str:
        """The W3C context of the task's launch, "" when it is not known."""
        return self._launches.get(task, "")

    # steps

    def advance_step(self, newest: Progress) -> bool:
        """Takes a step; True when it is to be written though nothing else is: with the first loss of its attempt that is NaN or infinite.

        All others are written with the job's next state: a job that runs well costs the store nothing.
        """
        known = self._progress
        if known is None or known.epoch != newest.epoch:
            self._loss_was_finite, known = True, None
        newest = replace(newest, first_time=known.first_time if known else newest.time)
        if known is None:
            pass
        elif newest.step < known.step:
            return False
        elif newest.step == known.step:  # told again, perhaps with a loss
            newest = replace(newest, time=known.time)
        self._progress = newest
        if not self._loss_was_finite or newest.loss is None or math.isfinite(newest.loss):
            return False
        self._loss_was_finite, self._step_is_due = False, True
        return True

    def progress_in(self, attempt: Attempt | None) -> Progress | None:
        """The newest step of this attempt."""
        progress = self._progress
        return progress if progress and attempt is not None and progress.epoch == attempt.epoch else None

    def with_step(self, job: Job) -> Job:
        """The job with the newest step of its attempt."""
        progress = self.progress_in(job.attempt)
        if progress is None or (job.step, job.loss) == (progress.step, progress.loss):
            return job
        return replace(job, step=progress.step, loss=progress.loss)

    @property
    def step_is_due(self) -> bool:
        """Whether the step is to be written though nothing else is."""
        return self._step_is_due

    def step_written(self) -> None:
        self._step_is_due = False

    def nodes_of(self, attempt: Attempt) -> frozenset[str]:
        """Where the attempt is placed; gathered once, since each step of each of its nodes asks."""
        if self._nodes[0] != attempt.epoch:
            self._nodes = attempt.epoch, frozenset(attempt.nodes)
        return self._nodes[1]

    def seen_since(self, job: Job, now: datetime) -> datetime:
        """Since when this leader knows the job in its state and epoch, by its own clock: no other leader's clock sets its deadlines."""
        if self._seen is None or self._seen[:2] != (job.epoch, job.state):
            self._seen = job.epoch, job.state, now
        return self._seen[2]

    def clock_moved(self, job: Job | None, by: timedelta) -> None:
        """The clock was set, ahead or back: what lasts, lasts no longer and no shorter. `job`: as it is stored."""
        self._avoided = {node: until + by for node, until in self._avoided.items()}
        if self._seen is not None:
            epoch, state, since = self._seen
            self._seen = epoch, state, since + by
        if job is not None and job.attempt is not None and job.attempt.end_time is None:
            known = self._moved
            self._moved = job.attempt.began, by + (known[1] if known and known[0] == job.attempt.began else timedelta())

    def by_this_clock(self, job: Job) -> Job:
        """The job as if its running attempt had begun by the clock as it is now; written like this with the job's next state."""
        attempt = job.attempt
        if self._moved is None or attempt is None or attempt.began != self._moved[0]:
            return job
        by = self._moved[1]
        return replace(
            job,
            attempt=replace(
                attempt,
                allocate_time=attempt.allocate_time + by,
                run_time=attempt.run_time and attempt.run_time + by,
                first_step_time=attempt.first_step_time and attempt.first_step_time + by,
            ),
        )

    # the end of an attempt

    def failed(self, failure: AttemptFailure | None) -> None:
        """Why the attempt is about to be fenced."""
        self._failure = failure

    @property
    def failure(self) -> AttemptFailure | None:
        return self._failure

    def ask_once(self, epoch: int) -> bool:
        """True for the first call with this epoch: others are to be asked what its end means."""
        first, self._asked_epoch = self._asked_epoch != epoch, epoch
        return first

    def diagnose(self, result: DiagnosisResult, avoid_until: datetime) -> None:
        """What others said about the end; its culprits are avoided for a while."""
        self._diagnosed, self._launches = result, {}
        self._avoided |= dict.fromkeys(result.diagnosis.culprits, avoid_until)

    @property
    def diagnosed(self) -> DiagnosisResult | None:
        return self._diagnosed

    def avoided(self, now: datetime) -> frozenset[str]:
        """Nodes that the job does not get now."""
        return frozenset(node for node, until in self._avoided.items() if until > now)

    def avoided_until(self, now: datetime) -> Iterable[datetime]:
        """When it may get them again."""
        return [until for until in self._avoided.values() if until > now]

    # placement

    @property
    def offer(self) -> Offer | None:
        return self._offer

    def offer_as(self, offer: Offer) -> None:
        self._offer = offer

    def withdraw_offer(self) -> None:
        self._offer = None

    def not_storable(self, revision: int) -> None:
        """What was decided for the job as it was in that revision is more than the store takes."""
        self._offer, self._not_storable = None, revision

    def cannot_be_stored(self, revision: int) -> bool:
        """Whether that was said of this revision."""
        return self._not_storable == revision

    @property
    def waits(self) -> SchedulingDecision | None:
        """Why it waits, as last decided."""
        return self._waits

    def wait_because(self, decision: SchedulingDecision) -> None:
        self._waits = decision

    def placed(self) -> None:
        """A new attempt begins: what was said about the last one is over."""
        self._diagnosed = self._failure = self._waits = self._offer = None
