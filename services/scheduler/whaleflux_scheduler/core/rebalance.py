"""Which running jobs should go elsewhere: so that a gang that waits finds room, or to run closer or cheaper themselves. Pure.

A move costs the GPU-seconds of a save, a restart and what a save that fails would lose. It is proposed when what it gains is worth several
times that: GPU-seconds that the gang would otherwise wait, communication, dollars. Who is moved had its checkpoints configured, is no service,
was left alone for a while, and gets no worse place. What all moves of a day cost is bounded by a share of the fleet's GPU time.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from whaleflux_scheduler.core import running_time
from whaleflux_scheduler.core.attempt_failures import ended_by
from whaleflux_scheduler.core.estimates import Estimates, end_of
from whaleflux_scheduler.core.going_on import Place
from whaleflux_scheduler.core.lifecycle import may_go_on
from whaleflux_scheduler.core.model import Attempt, Claim, ClaimPurpose, Job
from whaleflux_scheduler.core.observed import EndReason
from whaleflux_scheduler.core.placement.api import PlaceRequest

SAVE_S, USUAL_START_S = (
    30.0,
    60.0,
)  # of a job of which nothing is known: its last save, and its start from the checkpoint
FAILED_SAVES = 0.1  # the share of last saves that is taken to fail
ENDS_SOON_S = 10 * (SAVE_S + USUAL_START_S)  # who is over by then is not moved any more
LEAST_MOVING = 16  # GPUs
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class RebalanceRules:
    """The bounds: of one plan, and of what moves may cost.

    `budget`: the share of the fleet's GPU time that the moves of a day cost at most. `moving`: the share of its GPUs whose jobs move at once, at
    most (or `LEAST_MOVING` of them, or as many as the gang has for which they move): what checkpoint storage has to take. `worth`: how many times
    its cost a move must gain. `rest_s`: how long a job is left alone after any restart. `patience_s`: how long a gang waits first. `longest_wait_s`: no wait is expected to be longer.
    """

    most_moves: int = 128  # of one plan: what a look may cost
    moving: float = 0.02
    most_gangs: int = 4
    most_closer: int = 8
    budget: float = 0.01
    worth: float = 2.0
    rest_s: float = 3600.0
    patience_s: float = 60.0
    longest_wait_s: float = 4 * 3600.0
    again_s: float = 300.0  # before a gang that was not helped is looked at again


@dataclass(frozen=True, slots=True)
class Gang:
    """A job that waits and fits nowhere, and what it asks of the engine."""

    job: Job
    request: PlaceRequest


@dataclass(frozen=True, slots=True)
class JobMove:
    """A running job, and where it is to go on. Its cost in GPU-seconds."""

    job: Job
    to: Place
    cost_gpu_s: float

    @property
    def gpus(self) -> int:
        return sum(len(uuids) for _, uuids in self.to)


@dataclass(frozen=True, slots=True)
class Proposal:
    """Moves that are worth it together. With a `gang`: it starts on `room` when they have left; else they run closer or cheaper."""

    moves: tuple[JobMove, ...]
    gain_gpu_s: float
    gang: Job | None = None
    room: Place = ()
    gain_usd: float = 0.0
    request: PlaceRequest | None = None  # of the gang

    @property
    def cost_gpu_s(self) -> float:
        return sum(move.cost_gpu_s for move in self.moves)

    @property
    def gpus(self) -> int:
        """Of those who move."""
        return sum(move.gpus for move in self.moves)

    @property
    def why(self) -> str:
        """One sentence, with gain and cost."""
        cost = f"for {_hours(self.cost_gpu_s)} of restarts"
        if self.gang is not None:
            return f"makes room for {self.gang.name}: saves {_hours(self.gain_gpu_s)} of waiting {cost}"
        saved = [f"${self.gain_usd:.2f}"] * (self.gain_usd > 0.005) + [_hours(self.gain_gpu_s)] * (self.gain_gpu_s > 0)
        return f"runs closer or cheaper: saves {' and '.join(saved)} {cost}"


def _hours(gpu_s: float) -> str:
    return f"{gpu_s / 3600:.2g} GPU-hours"


@dataclass(frozen=True, slots=True)
class RebalancePlan:
    """What would be done now. `etag` is the same as long as the same jobs would go from and to the same GPUs."""

    time: datetime
    proposals: tuple[Proposal, ...]
    budget_left_gpu_s: float

    @property
    def etag(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for proposal in self.proposals:
            digest.update(repr((proposal.gang and identity(proposal.gang), proposal.room)).encode())
            for move in proposal.moves:
                digest.update(repr((identity(move.job), held_place(move.job), move.to)).encode())
        return digest.hexdigest()


def moving_gpus(claims: Iterable[Claim]) -> int:
    """GPUs of jobs that are on their way to a new place."""
    return sum(len(uuids) for claim in claims if claim.purpose is ClaimPurpose.MOVE for _, uuids in claim.nodes)


def identity(job: Job) -> tuple[str, str, int]:
    """This job in this attempt."""
    return job.name, job.uid, job.epoch


def held_place(job: Job) -> Place:
    """The GPUs of its attempt."""
    return tuple((task.node, task.gpus) for task in job.attempt.tasks) if job.attempt else ()


# who may be moved, at what cost


def may_move(job: Job, now: datetime, rules: RebalanceRules) -> bool:
    """Whether the job itself can and may go on elsewhere at this moment."""
    over = over_at(job)
    soon = over is not None and over <= now + timedelta(seconds=ENDS_SOON_S)
    return could_move(job) and rested(job, now, rules.rest_s) and not soon


def could_move(job: Job) -> bool:
    """Whether it could go on elsewhere at some time: it runs on whole GPUs, goes on from checkpoints, and changes neither size nor place already."""
    spec, attempt = job.spec, job.attempt
    if not may_go_on(job) or attempt is None or attempt.run_time is None or spec.is_service:
        return False
    alone = not spec.share_memory_bytes and not spec.reservation
    return 0 < attempt.gpus == spec.gpus and alone and resumes(job)


def resumes(job: Job) -> bool:
    """Whether it goes on from a checkpoint: its file says how often it saves, or where."""
    spec = job.spec
    return bool(spec.checkpoint_every_steps or spec.checkpoint_location or spec.elastic_resumes)


def rested(job: Job, now: datetime, rest_s: float) -> bool:
    """Whether its last restart, for whatever reason, is long ago."""
    last = job.past_attempts[-1] if job.past_attempts else None
    ended = last.end_time if last is not None else None
    return ended is None or (now - ended).total_seconds() >= rest_s


def over_at(job: Job) -> datetime | None:
    """When its time limit ends it; None: nothing does."""
    return running_time.latest_end(job)


def move_cost_gpu_s(job: Job, now: datetime, saved: datetime | None = None) -> float:
    """GPU-seconds that a move costs: saving, starting again as long as its last start took, and what a failed save would lose.

    `saved`: when its newest checkpoint was committed.
    """
    assert job.attempt is not None
    return job.attempt.gpus * (restart_s(job) + FAILED_SAVES * unsaved_s(job, now, saved))


def restart_s(job: Job) -> float:
    """To save and to start again, which takes as long as its last start did."""
    attempt, start_s = job.attempt, USUAL_START_S
    if attempt is not None and attempt.run_time is not None:
        start_s = max(start_s, (attempt.run_time - attempt.allocate_time).total_seconds())
    return min(SAVE_S, job.grace_s) + start_s


def unsaved_s(job: Job, now: datetime, saved: datetime | None = None) -> float:
    """The work since its newest checkpoint, seconds: since it began to run, at most the time between two of them, where its steps tell."""
    attempt = job.attempt
    if attempt is None or attempt.run_time is None:
        return 0.0
    ran_s = max(0.0, (now - attempt.run_time).total_seconds())
    since_s = ran_s if saved is None else max(0.0, (now - saved).total_seconds())
    return min(since_s, ran_s * unsaved_share(job))


def unsaved_share(job: Job) -> float:
    """Of the time that its attempt has run, what lies between two regular checkpoints; all of it where its steps do not tell."""
    last = job.past_attempts[-1].step if job.past_attempts else -1
    steps, every = job.step - max(last, 0), job.spec.checkpoint_every_steps
    return min(1.0, every / steps) if every and steps > 0 else 1.0


# who waits, and what that costs


def expected_wait_s(job: Job, now: datetime, longest_s: float) -> float:
    """How long it would probably still wait: until its promised start, else as long as it has waited already."""
    claim = job.claim
    if claim is not None and claim.purpose is ClaimPurpose.RESERVATION and claim.start_time is not None:
        return max(0.0, min((claim.start_time - now).total_seconds(), longest_s))
    return max(0.0, min((now - waits_since(job)).total_seconds(), longest_s))


def waits_since(job: Job) -> datetime:
    """When it was submitted, or its last attempt ended."""
    ended = job.attempt.end_time if job.attempt is not None else None
    return max(job.create_time, ended) if ended is not None else job.create_time


def gain_gpu_s(gang: Job, movers: Sequence[Job], now: datetime, rules: RebalanceRules) -> float:
    """GPU-seconds that the gang waits less if these leave for it now."""
    leave_s = max((min(SAVE_S, mover.grace_s) for mover in movers), default=0.0)
    return gang.spec.gpus * max(0.0, expected_wait_s(gang, now, rules.longest_wait_s) - leave_s)


# what moves may cost in all


@dataclass(slots=True)
class Budget:
    """GPU-seconds that moves of the last day cost: of those that were ordered here, and of those that records tell of."""

    share: float
    _spent: dict[tuple[str, int], tuple[datetime, float]] = field(default_factory=dict)

    def spend(self, job: Job, cost_gpu_s: float, now: datetime) -> None:
        """The job is moved out of its present epoch."""
        self._spent[job.uid or job.name, job.epoch] = (now, cost_gpu_s)

    def learn(self, job: Job) -> None:
        """What its record tells of moves."""
        for attempt, again in _moved(job) if job.past_attempts else ():
            if attempt.end_time is not None and again.run_time is not None:
                cost = attempt.gpus * (again.run_time - attempt.end_time).total_seconds()
                self._spent.setdefault((job.uid or job.name, attempt.epoch), (attempt.end_time, max(0.0, cost)))

    def left_gpu_s(self, gpus: int, now: datetime) -> float:
        """What is left of the day's share of a fleet with so many GPUs."""
        since = now - timedelta(seconds=DAY_S)
        self._spent = {key: spent for key, spent in self._spent.items() if spent[0] > since}
        return self.share * gpus * DAY_S - sum(cost for _, cost in self._spent.values())


def _moved(job: Job) -> Iterator[tuple[Attempt, Attempt]]:
    """Attempts that ended by a move, each with the one that went on."""
    attempts = list(job.attempts())
    for attempt, again in itertools.pairwise(attempts):
        if ended_by(attempt) is EndReason.MOVED:
            yield attempt, again


def left_s(estimates: Estimates, job: Job, now: datetime) -> float:
    """How long a running job probably still runs, seconds. What is not said is guessed low: no longer than it has run already."""
    end = end_of(estimates, job, now)
    if end is None:
        return 0.0
    left = max(0.0, (end.likely - now).total_seconds())
    return left if job.spec.expected_s is not None else min(left, running_time.run_s(job, now))
