"""The steps of a job: pure functions from a job and what was observed of it to the next job.

`advance` makes at most one transition, so that every stored state follows the table of `state_machine`; call it again until nothing changes.
Placing is decided elsewhere (`planner`) and applied by `place`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from whaleflux.clock import CLOCK_SKEW
from whaleflux.quantities import shown_duration
from whaleflux_scheduler.core import (
    accounting,
    after_failure,
    attempt_failures,
    cost,
    dependencies,
    running_time,
    task_observations,
)
from whaleflux_scheduler.core.changed import changed
from whaleflux_scheduler.core.model import (
    ACTIVE,
    Attempt,
    AttemptSplit,
    Cause,
    Claim,
    ClaimPurpose,
    Job,
    JobState,
    SchedulingDecision,
    Task,
    TaskPhase,
)
from whaleflux_scheduler.core.observed import (
    IN_ORDER,
    AttemptFailure,
    EndReason,
    Observations,
    Timeouts,
)
from whaleflux_scheduler.core.state_machine import goes_on, rule, transition

PAST_ATTEMPTS = 10
SUSPEND_MARGIN_S = 10.0  # beyond the grace: what agents may need to report
LOOK_FIRST_S, LOOKS = 60.0, 12  # an elastic job may be worth a resize by then, and each time after it ran twice as long
GOING_ON_S = 60.0  # how long what a stopped job goes on with is kept for it beyond that
PAST_TASKS = 64  # of a larger past attempt only the tasks that still hold GPUs are kept


def advance(job: Job, observed: Observations, now: datetime, timeouts: Timeouts) -> Job:
    """The job after what was observed; the same object when nothing changes."""
    if not job.readable:
        return job
    job = task_observations.observe(job, observed)
    if job.ended:
        return job
    job = _with_first_step(job, observed)
    if job.cancel_requested:
        return _finish(job, JobState.CANCELLED, EndReason.CANCELLED, job.cause.message or "cancelled", now)
    if (done := _done_after_all(job)) is not None:
        return _finish_after_all(job, done, now)
    if job.state in ACTIVE:
        return _active(job, observed, now, timeouts)
    if job.state is JobState.RECOVERING and observed.diagnosis and observed.diagnosis.epoch == job.epoch:
        return _kept_back(after_failure.advance(job, observed.diagnosis, now, timeouts))
    if job.state is JobState.SUSPENDING:
        return _suspending(job, observed.since, now)
    if job.state is JobState.QUEUED and job.awaits:
        return _awaiting(job, observed, now)
    if job.claim is not None and not _claim_holds(job.claim, observed, now):
        return replace(job, claim=None)
    return job


def _with_first_step(job: Job, observed: Observations) -> Job:
    attempt, first = job.attempt, observed.first_step_time
    if not job.spec.is_elastic or first is None or attempt is None or attempt.first_step_time is not None:
        return job
    return replace(job, attempt=replace(attempt, first_step_time=first))


def next_epoch(job: Job) -> int:
    """The epoch of the next attempt: leaving an attempt has raised it already, the first placement has not."""
    return job.epoch if job.attempt is not None and job.attempt.epoch < job.epoch else job.epoch + 1


def next_number(job: Job) -> int:
    """The number of the next attempt, from 1. The record keeps the newest attempts only, so the last one tells it, or is counted."""
    return 1 + max((number for number, _ in job.numbered()), default=0)


def task_id(job: Job, epoch: int, group_rank: int) -> str:
    return f"{job.queue}.{job.id}.{epoch}.{group_rank}"


@dataclass(frozen=True, slots=True)
class GpuAssignment:
    """GPUs for a job: (node, GPU UUIDs in rank order) by group rank."""

    nodes: tuple[tuple[str, tuple[str, ...]], ...]
    usd_per_hour: float = 0.0
    communication_s: float = 0.0
    gpus_by_model: tuple[tuple[str, int], ...] = ()
    share_bytes: int = 0  # of each GPU's memory; 0: whole GPUs
    cpu_ranks: tuple[int, ...] = ()  # by node, of work without GPUs
    gpu_parts: tuple[float, ...] = ()  # by node, of parts of GPUs: how many GPUs they are together
    remote_datasets: tuple[str, ...] = ()  # that are not pulled for it
    ranks: tuple[
        tuple[int, ...], ...
    ] = ()  # by node, of its GPUs, where a map numbers them; else they are counted node by node
    laid: str = ""  # how, in words
    best_communication_s: float | None = None  # on the best place of an empty fleet; None: not known
    best_free_communication_s: float | None = None  # on the best place of what was free
    split: AttemptSplit | None = None

    @property
    def rank_counts(self) -> dict[str, int]:
        """How many ranks, by node."""
        counts = self.cpu_ranks or [len(uuids) for _, uuids in self.nodes]
        return {node: count for (node, _), count in zip(self.nodes, counts, strict=True)}


def place(
    job: Job,
    where: GpuAssignment,
    decision: SchedulingDecision,
    now: datetime,
    *,
    traceparent: str = "",
    restore: str = "",
) -> Job:
    """QUEUED or RECOVERING -> STARTING in the next epoch."""
    epoch = next_epoch(job)
    past = job.past_attempts if job.attempt is None else (*job.past_attempts, job.attempt)
    attempt = Attempt(
        epoch=epoch,
        tasks=tuple(tasks_of(job, epoch, where)),
        allocate_time=now,
        traceparent=traceparent,
        restore_checkpoint=restore,
        communication_s=where.communication_s,
        usd_per_hour=where.usd_per_hour,
        number=next_number(job),
        gpus_by_model=where.gpus_by_model,
        remote_datasets=where.remote_datasets,
        best_communication_s=where.best_communication_s,
        best_free_communication_s=where.best_free_communication_s,
        split=where.split,
    )
    return transition(
        job,
        JobState.STARTING,
        epoch=epoch,
        attempt=attempt,
        past_attempts=_kept(past),
        decision=changed(decision, tasks=()),  # the attempt has them
        state_message=decision.summary,
        not_before=None,
    )


def requeue(job: Job, message: str) -> Job:
    """RECOVERING -> QUEUED: there is no room now, or it has to pause."""
    return transition(job, JobState.QUEUED, state_message=message)


def claim(job: Job, claim: Claim, message: str) -> Job:
    """RECOVERING or QUEUED -> QUEUED: GPUs are kept for it, and those who hold them are to leave."""
    return transition(job, JobState.QUEUED, claim=claim, state_message=message)


def may_go_on(job: Job) -> bool:
    """Whether it can be made to go on elsewhere, or with more or fewer GPUs: it runs, and nothing of the kind has begun."""
    return job.state is JobState.RUNNING and job.claim is None and not job.cancel_requested


def claim_while_running(job: Job, claim: Claim, why: str = "") -> Job:
    """RUNNING, and GPUs are kept where it is to go on; written before anything is stopped for it. `why` is told when it stops."""
    cause = Cause("", "", why, rule(_END_OF[claim.purpose])) if why and claim.purpose in _END_OF else job.cause
    return replace(job, claim=claim, cause=cause)


_END_OF = {ClaimPurpose.MOVE: EndReason.MOVED, ClaimPurpose.RESIZE: EndReason.RESIZED}


def go_on(job: Job, now: datetime) -> Job:
    """RUNNING -> SUSPENDING, to start again from its checkpoint on what it claims."""
    assert job.claim is not None and job.attempt is not None
    end = _END_OF[job.claim.purpose]
    message = job.cause.message if job.cause.actor == rule(end) else _goes_on_how(job, job.claim)
    ended = cost.end_attempt(job, now, f"{end}: {message}")
    cause = Cause("", "", message, rule(end))
    return transition(
        ended, JobState.SUSPENDING, state_message=message, cause=cause, claim=_kept_until_placed(job, now)
    )


def _goes_on_how(job: Job, claim: Claim) -> str:
    if claim.purpose is ClaimPurpose.MOVE:
        return f"moves to {', '.join(node for node, _ in claim.nodes[:3])}"
    gpus = sum(len(uuids) for _, uuids in claim.nodes)
    return f"goes on with {gpus} GPUs instead of {job.attempt.gpus if job.attempt else 0}"


def _kept_until_placed(job: Job, now: datetime) -> Claim | None:
    """What it goes on with lasts at least until it has stopped and was placed, however long it waited for that place."""
    if job.claim is None or not goes_on(job):
        return None
    least = now + timedelta(seconds=job.grace_s + SUSPEND_MARGIN_S + GOING_ON_S)
    return replace(job.claim, expire_time=max(job.claim.expire_time, least))


def suspend(job: Job, by: str, now: datetime) -> Job:
    """STARTING or RUNNING -> SUSPENDING: its tasks get SIGTERM and may still save in their epoch; what has not begun ends at once.

    One that shrinks instead keeps what it claims.
    """
    if job.claim is not None and job.claim.purpose is ClaimPurpose.RESIZE:
        return go_on(job, now)
    message = f"makes room for {by}"
    ended = cost.end_attempt(job, now, f"{EndReason.PREEMPTED}: {message}")
    cause = Cause(by, "", message, rule("preemption"))
    return transition(
        ended, JobState.SUSPENDING, state_message=message, cause=cause, claim=_kept_until_placed(job, now)
    )


def cancel(job: Job, by: Cause, now: datetime) -> Job:
    """Ends it now; its GPUs stay taken until its agents report that nothing is left. The epoch stays: a last save may commit."""
    return advance(replace(job, cancel_requested=True, cause=by), Observations(), now, Timeouts())


def only_waits(job: Job) -> bool:
    """Whether nothing but a place, or a request to end it, can change it: most of a burst, and of what a new leader finds."""
    return (
        job.state is JobState.QUEUED
        and job.attempt is None
        and job.claim is None
        and not job.awaits
        and not job.cancel_requested
    )


def due(job: Job, observed: Observations, now: datetime, timeouts: Timeouts) -> datetime | None:
    """When to look at the job again even if nothing is reported of it."""
    if only_waits(job):
        return after_failure.paused_until(job, now)
    return min((at for at in _dues(job, observed, timeouts) if at > now), default=None)


def _dues(job: Job, observed: Observations, timeouts: Timeouts) -> Iterator[datetime]:
    attempt = job.attempt
    if job.state is JobState.QUEUED and job.not_before is not None:
        yield job.not_before
    if job.claim is not None:
        yield job.claim.expire_time
    if job.state is JobState.SUSPENDING and attempt is not None and attempt.end_time is not None:
        yield (observed.since or attempt.end_time) + timedelta(seconds=job.grace_s + SUSPEND_MARGIN_S + 0.1)
    if attempt is None or job.state not in ACTIVE:
        return
    if job.state is JobState.RUNNING and job.spec.is_elastic and attempt.run_time is not None:
        yield from (attempt.run_time + timedelta(seconds=LOOK_FIRST_S * 2**time) for time in range(LOOKS))
    if job.state is JobState.STARTING:
        for seconds in (timeouts.accept_s, timeouts.start_s, timeouts.fetch_s):
            yield (observed.since or attempt.allocate_time) + timedelta(seconds=seconds)
    if spent := cost.budget_ends_at(job):
        yield spent + timedelta(seconds=0.1)
    if (over := running_time.latest_end(job)) is not None:
        yield over
    if not job.spec.never_reroute:
        for node in attempt.nodes:
            if since := observed.nodes.get(node, IN_ORDER).partitioned_since:
                yield since + timedelta(seconds=attempt_failures.partition_wait_s(job, timeouts))


def tasks_of(job: Job, epoch: int, where: GpuAssignment) -> Iterator[Task]:
    rank = 0
    for group_rank, (node, gpus) in enumerate(where.nodes):
        cpu_ranks = where.cpu_ranks[group_rank] if where.cpu_ranks else 0
        id_, share = task_id(job, epoch, group_rank), where.share_bytes
        parts = where.gpu_parts[group_rank] if where.gpu_parts else 0.0
        task = Task(id_, node, gpus, rank, group_rank, share_bytes=share, cpu_ranks=cpu_ranks, gpu_parts=parts)
        yield _numbered(task, where.ranks[group_rank]) if where.ranks else task
        rank += task.ranks


def _numbered(task: Task, ranks: tuple[int, ...]) -> Task:
    """With these ranks; where they follow one another the first tells them all, as agents of any version know it."""
    if ranks == tuple(range(ranks[0], ranks[0] + len(ranks))):
        return replace(task, first_rank=ranks[0])
    return replace(task, first_rank=-1, global_ranks=ranks)


def _kept(past: Sequence[Attempt]) -> tuple[Attempt, ...]:
    kept = []
    for age, attempt in enumerate(reversed(past)):
        holding = tuple(attempt.holding())
        if age < PAST_ATTEMPTS or holding:
            small = len(attempt.tasks) <= PAST_TASKS and age < PAST_ATTEMPTS
            kept.append(attempt if small else replace(attempt, tasks=holding))
    return tuple(reversed(kept))


def _active(job: Job, observed: Observations, now: datetime, timeouts: Timeouts) -> Job:
    if job.spec.stop_on_nan and observed.loss is not None and not math.isfinite(observed.loss):
        why = f"its loss is {observed.loss} at step {observed.step}, and its on_nan says stop"
        return _finish(job, JobState.FAILED, EndReason.LOSS, why, now)
    if failure := attempt_failures.find(job, observed, now, timeouts):
        return fence(job, failure, now)
    attempt = job.attempt
    assert attempt is not None
    if _is_over(cost.budget_is_spent, job, observed, now):
        spent = f"its budget of {job.spec.budget_usd:g} USD is spent; raise it and submit again"
        return _finish(job, JobState.FAILED, EndReason.BUDGET, spent, now)
    if job.state is JobState.STARTING:
        after = _starting(job, attempt, now)
        wanted = observed.claimed_by and after.state is JobState.STARTING
        return suspend(after, observed.claimed_by, now) if wanted else after
    if _ended_well(attempt):
        return _finish(job, JobState.SUCCEEDED, EndReason.DONE, "all ranks ended well", now)
    if _is_over(running_time.time_is_up, job, observed, now):
        over = f"its time_limit of {shown_duration(job.spec.time_limit_s or 0.0)} is over; raise it and submit again"
        return _finish(job, JobState.FAILED, EndReason.TIME_LIMIT, over, now)
    return suspend(job, observed.claimed_by, now) if observed.claimed_by else _going_on(job, observed, now)


def _is_over(up: Callable[[Job, datetime], bool], job: Job, observed: Observations, now: datetime) -> bool:
    """Whether its time, or its money, is up; what would be since long, by a clock that nobody has borne out, is not believed."""
    return up(job, now) and not (observed.clock_doubted and up(job, now - CLOCK_SKEW))


def _going_on(job: Job, observed: Observations, now: datetime) -> Job:
    """To the place that it claims, once that is free; where it is, when that place cannot be had any more."""
    if not goes_on(job) or job.claim is None:
        return job
    if not _claim_holds(job.claim, observed, now):
        return replace(job, claim=None)
    return go_on(job, now) if observed.claim_is_free else job


def _ended_well(attempt: Attempt) -> bool:
    """By itself, that is: what was stopped is KILLED, whatever its exit code."""
    return all(task.phase is TaskPhase.EXITED and task.exit_code == 0 for task in attempt.tasks)


def _done_after_all(job: Job) -> Attempt | None:
    """The attempt that was given up, yet ended well, as its agents told later; its work is not done again unless that began already."""
    if job.spec.is_service or (job.state in ACTIVE and job.attempt is not None and job.attempt.started):
        return None
    last = next((attempt for attempt in reversed(tuple(job.attempts())) if attempt.started), None)
    if last is None or not accounting.is_whole(job, last):
        return None
    return last if _ended_well(last) else None


def _finish_after_all(job: Job, done: Attempt, now: datetime) -> Job:
    message = "all ranks ended well"
    why = f"{EndReason.DONE}: {message}, though it was given up ({done.end_reason})"
    known = replace(done, end_reason=why[:2000])
    past = tuple(known if attempt is done else attempt for attempt in job.past_attempts)
    current = known if job.attempt is done else job.attempt
    over = replace(job, attempt=current, past_attempts=past, not_before=None)
    message = f"{message} in attempt {done.number or done.epoch}, which had been given up"
    return _finish(over, JobState.SUCCEEDED, EndReason.DONE, message, now)


def _starting(job: Job, attempt: Attempt, now: datetime) -> Job:
    phases = [task.phase for task in attempt.tasks]
    if not attempt.started and attempt.rendezvous and all(phase.reached(TaskPhase.ACCEPTED) for phase in phases):
        return replace(job, attempt=replace(attempt, started=True))
    if attempt.started and all(phase.reached(TaskPhase.RUNNING) for phase in phases):
        running = replace(attempt, run_time=now)
        message = f"runs on {len(attempt.tasks)} node{'s' * (len(attempt.tasks) != 1)}"
        return transition(
            job, JobState.RUNNING, attempt=running, start_time=job.start_time or now, state_message=message
        )
    message = _preparing(attempt)
    return replace(job, state_message=message) if message not in ("", job.state_message) else job


_PREPARING = {TaskPhase.PULLING: "pulls", TaskPhase.FETCHING: "fetches", TaskPhase.SETTING_UP: "setup"}


def _preparing(attempt: Attempt) -> str:
    """What may take long before the ranks, and where; "" for nothing."""
    for phase, what in _PREPARING.items():
        if tasks := [task for task in attempt.tasks if task.phase is phase]:
            which = (
                f" {tasks[0].message}" if tasks[0].message else ""
            )  # the image, the dataset, code and why it has to wait
            return f"{what}{which} on {tasks[0].node}" + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
    return ""


def fence(job: Job, failure: AttemptFailure, now: datetime) -> Job:
    """Ends the attempt: whatever it still writes is of an old epoch from here on."""
    attempt = job.attempt
    assert attempt is not None
    return transition(
        cost.end_attempt(job, now, f"{failure.reason}: {failure.message}"),
        JobState.RECOVERING,
        epoch=job.epoch + 1,
        state_message=failure.message,
        cause=Cause(failure.node or failure.task, attempt.traceparent, failure.message, rule(failure.reason)),
    )


def _claim_holds(claim: Claim, observed: Observations, now: datetime) -> bool:
    """Whether what was claimed may still be had."""
    nodes = (observed.nodes.get(node, IN_ORDER) for node, _ in claim.nodes)
    return (
        now < claim.expire_time
        and not observed.claimed_by
        and not any(node.unreachable or node.retired or node.draining for node in nodes)
    )


def _awaiting(job: Job, observed: Observations, now: datetime) -> Job:
    """Cancelled when what it waits for can never be; with less to wait for when something of it has come."""
    if broken := dependencies.never(job.awaits, observed.ends):
        awaited, why = broken
        return _finish(
            replace(job, cause=Cause(awaited.job, "", why, rule("dependency"))),
            JobState.CANCELLED,
            EndReason.CANCELLED,
            why,
            now,
        )
    left = dependencies.left(job.awaits, observed.ends)
    if left is job.awaits or not dependencies.worth_writing(job.awaits, left, observed.gone):
        return job
    return replace(job, awaits=left, state_message="")


def _kept_back(job: Job) -> Job:
    """A job that is held goes back into its queue, where it stays."""
    return requeue(job, f"held; {job.state_message}") if job.hold and job.state is JobState.RECOVERING else job


def _suspending(job: Job, since: datetime | None, now: datetime) -> Job:
    attempt = job.attempt
    assert attempt is not None and attempt.end_time is not None
    late = (now - (since or attempt.end_time)).total_seconds() > job.grace_s + SUSPEND_MARGIN_S
    if not late and not all(task.over for task in attempt.tasks):
        return job
    how = attempt_failures.ended_by(attempt) or EndReason.PREEMPTED
    again = f"{how}; waits for GPUs"
    return transition(job, JobState.QUEUED, epoch=job.epoch + 1, state_message=again, cause=job.cause)


def _finish(job: Job, state: JobState, end: EndReason, message: str, now: datetime) -> Job:
    over = cost.end_attempt(job, now, f"{end}: {message}")
    cause = job.cause if state is JobState.CANCELLED else Cause("", job.cause.traceparent, "", rule(end))
    return transition(over, state, end_time=now, state_message=message, cause=cause, awaits=(), hold=None)


def written_down(before: Job, after: Job, now: datetime) -> Job:
    """`after` as it is stored at `now` in place of `before`: with the time of its state, and what was known when its attempt ended."""
    attempt, last = after.attempt, before.attempt
    if attempt is not None and attempt.end_time is not None and last is not None and last.end_time is None:
        after = replace(after, attempt=replace(attempt, step=after.step, loss=after.loss))
    return after if after.state is before.state else replace(after, state_time=now)
