"""How a job moves: pure steps from a job and what was seen of it to the next job.

`advance` makes at most one move, so that every stored state follows the table of `machine`; call it again until nothing changes.
Placing is decided elsewhere (`planner`) and applied by `place`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from whaleflux_scheduler.core import breaks
from whaleflux_scheduler.core.machine import move
from whaleflux_scheduler.core.model import (
    ACTIVE,
    Attempt,
    Cause,
    Decision,
    Job,
    JobState,
    Task,
    TaskPhase,
    cost_of,
)
from whaleflux_scheduler.core.observed import STARTLESS, Break, End, Limits, Report, Seen, Standing, Verdict

PAST_ATTEMPTS = 10
SUSPEND_MARGIN_S = 10.0  # beyond the grace: what agents may need to report
PAST_TASKS = 64  # of a larger past attempt only the tasks that still hold GPUs are kept
TOLD_TASKS = 40  # of a larger attempt the messages of so many tasks are kept
DEFAULT_RESTARTS = 3
DEFAULT_BACKOFF_S, LONGEST_BACKOFF_S = 5.0, 300.0
SERVICE_BACKOFF_S, LONGEST_SERVICE_BACKOFF_S = 1.0, 60.0
SETTLED_S = 600.0  # a service that ran for so long starts counting its restarts anew
LONGEST_START_BACKOFF_S = 60.0


def advance(job: Job, seen: Seen, now: datetime, limits: Limits) -> Job:
    """The job after what was seen; the same object when nothing changes."""
    job = observe(job, seen)
    if job.ended:
        return job
    if job.cancel_requested:
        return _finish(job, JobState.CANCELLED, End.CANCELLED, job.cause.message or "cancelled", now)
    if job.state in ACTIVE:
        return _active(job, seen, now, limits)
    if job.state is JobState.RECOVERING and seen.verdict and seen.verdict.epoch == job.epoch:
        return _judged(job, seen.verdict, now, limits)
    if job.state is JobState.SUSPENDING:
        return _suspending(job, now)
    return job


def observe(job: Job, seen: Seen) -> Job:
    """The job with what was reported of its tasks and nodes, before anything is concluded."""
    return _with_nodes(_with_reports(job, seen.reports), seen.nodes)


def next_epoch(job: Job) -> int:
    """The epoch of the next attempt: leaving an attempt has raised it already, the first placement has not."""
    return job.epoch if job.attempt is not None and job.attempt.epoch < job.epoch else job.epoch + 1


def task_id(job: Job, epoch: int, group_rank: int) -> str:
    return f"{job.queue}.{job.id}.{epoch}.{group_rank}"


@dataclass(frozen=True, slots=True)
class Place:
    """GPUs for a job: (node, GPU indices in rank order) by group rank."""

    nodes: tuple[tuple[str, tuple[int, ...]], ...]
    usd_per_hour: float = 0.0
    communication_s: float = 0.0


def place(
    job: Job, where: Place, decision: Decision, now: datetime, *, traceparent: str = "", restore: str = ""
) -> Job:
    """QUEUED or RECOVERING -> STARTING in the next epoch."""
    epoch = next_epoch(job)
    past = job.past_attempts if job.attempt is None else (*job.past_attempts, job.attempt)
    attempt = Attempt(
        epoch=epoch,
        tasks=tuple(_tasks(job, epoch, where)),
        allocate_time=now,
        traceparent=traceparent,
        restore_checkpoint=restore,
        communication_s=where.communication_s,
        usd_per_hour=where.usd_per_hour,
    )
    return move(
        job,
        JobState.STARTING,
        epoch=epoch,
        attempt=attempt,
        past_attempts=_kept(past),
        decision=replace(decision, tasks=()),  # the attempt has them
        state_message=decision.summary,
        not_before=None,
    )


def requeue(job: Job, message: str) -> Job:
    """RECOVERING -> QUEUED: there is no room now, or it has to pause."""
    return move(job, JobState.QUEUED, state_message=message)


def suspend(job: Job, by: str, now: datetime) -> Job:
    """RUNNING -> SUSPENDING: its tasks get SIGTERM and may still save in their epoch."""
    assert job.attempt is not None
    attempt = replace(job.attempt, end_time=now, end_reason=f"{End.PREEMPTED}: makes room for {by}")
    cost_usd = job.cost_usd + cost_of(job.attempt, now)
    message = f"makes room for {by}"
    return move(
        job,
        JobState.SUSPENDING,
        attempt=attempt,
        cost_usd=cost_usd,
        state_message=message,
        cause=Cause(by, "", message),
    )


def cancel(job: Job, by: Cause, now: datetime) -> Job:
    """Ends it now; its GPUs stay taken until its agents report that nothing is left. The epoch stays: a last save may commit."""
    return advance(replace(job, cancel_requested=True, cause=by), Seen(), now, Limits())


def due(job: Job, seen: Seen, now: datetime, limits: Limits) -> datetime | None:
    """When to look at the job again even if nothing is heard of it."""
    return min((at for at in _dues(job, seen, limits) if at > now), default=None)


def _dues(job: Job, seen: Seen, limits: Limits) -> Iterator[datetime]:
    attempt = job.attempt
    if job.state is JobState.QUEUED and job.not_before is not None:
        yield job.not_before
    if job.state is JobState.SUSPENDING and attempt is not None and attempt.end_time is not None:
        yield attempt.end_time + timedelta(seconds=job.grace_s + SUSPEND_MARGIN_S + 0.1)
    if attempt is None or job.state not in ACTIVE:
        return
    if job.state is JobState.STARTING:
        for seconds in (limits.accept_s, limits.start_s, limits.fetch_s):
            yield attempt.allocate_time + timedelta(seconds=seconds)
    if job.spec.budget_usd > 0 and attempt.usd_per_hour > 0:
        left_h = (job.spec.budget_usd - job.cost_usd) / attempt.usd_per_hour
        yield attempt.allocate_time + timedelta(hours=min(left_h, 1e6), seconds=0.1)
    if not job.spec.never_reroute:
        for node in attempt.nodes:
            if since := seen.nodes.get(node, Standing()).partitioned_since:
                yield since + timedelta(seconds=breaks.partition_wait_s(job, limits))


def _tasks(job: Job, epoch: int, where: Place) -> Iterator[Task]:
    rank = 0
    for group_rank, (node, gpus) in enumerate(where.nodes):
        yield Task(task_id(job, epoch, group_rank), node, gpus, rank, group_rank)
        rank += len(gpus)


def _kept(past: Sequence[Attempt]) -> tuple[Attempt, ...]:
    kept = []
    for age, attempt in enumerate(reversed(past)):
        holding = tuple(attempt.holding())
        if age < PAST_ATTEMPTS or holding:
            small = len(attempt.tasks) <= PAST_TASKS and age < PAST_ATTEMPTS
            kept.append(attempt if small else replace(attempt, tasks=holding))
    return tuple(reversed(kept))


def _with_reports(job: Job, reports: Sequence[Report]) -> Job:
    """Phases only grow, and what is over stays over, but for GONE: nothing is left."""
    if not reports:
        return job
    by_task: dict[str, Report] = {}
    for report in reports:
        known = by_task.get(report.task)
        if known is None or report.phase >= known.phase:
            by_task[report.task] = report
    past = tuple(_reported(attempt, by_task) for attempt in job.past_attempts)
    current = job.attempt and _met(_reported(job.attempt, by_task), reports)
    if current is job.attempt and all(a is b for a, b in zip(past, job.past_attempts, strict=True)):
        return job
    return replace(job, attempt=current, past_attempts=past)


def _reported(attempt: Attempt, by_task: Mapping[str, Report]) -> Attempt:
    tasks = tuple(_task_after(task, by_task.get(task.id)) for task in attempt.tasks)
    if len(tasks) > TOLD_TASKS:
        tasks = tuple(_brief(tasks))
    return attempt if all(a is b for a, b in zip(tasks, attempt.tasks, strict=True)) else replace(attempt, tasks=tasks)


def _brief(tasks: Sequence[Task]) -> Iterator[Task]:
    """Of a large gang the words of some tasks are enough; those of all would not fit into one record."""
    told = 0
    for task in tasks:
        told += bool(task.message)
        yield replace(task, message="") if task.message and told > TOLD_TASKS else task


def _met(attempt: Attempt, reports: Sequence[Report]) -> Attempt:
    """The newest rendezvous that the agent of rank 0 chose; it may choose again until the gang was told to start."""
    chosen = [report.rendezvous for report in reports if report.rendezvous and report.task == attempt.tasks[0].id]
    return attempt if attempt.started or not chosen else replace(attempt, rendezvous=chosen[-1])


def _task_after(task: Task, report: Report | None) -> Task:
    if report is None or report.phase < task.phase or (task.over and report.phase is not TaskPhase.GONE):
        return task
    if task.over:  # GONE after a result: the result stays in the message
        after = replace(task, phase=TaskPhase.GONE, lost=False)
    else:
        message = ("out of memory; " if report.out_of_memory else "") + report.message
        after = replace(
            task,
            phase=report.phase,
            exit_code=report.exit_code,
            message=message[:2000],
            endpoint=report.endpoint or task.endpoint,
            lost=False if report.phase >= TaskPhase.EXITED else task.lost,
        )
    return task if after == task else after


def _with_nodes(job: Job, nodes: Mapping[str, Standing]) -> Job:
    """Marks tasks on unreachable nodes as lost, withdraws that when the node is back, and forgets those of retired nodes."""
    past = tuple(_standing(attempt, nodes) for attempt in job.past_attempts)
    current = job.attempt and _standing(job.attempt, nodes)
    if current is job.attempt and all(a is b for a, b in zip(past, job.past_attempts, strict=True)):
        return job
    return replace(job, attempt=current, past_attempts=past)


def _standing(attempt: Attempt, nodes: Mapping[str, Standing]) -> Attempt:
    tasks = tuple(_task_on(task, nodes.get(task.node)) for task in attempt.tasks)
    return attempt if all(a is b for a, b in zip(tasks, attempt.tasks, strict=True)) else replace(attempt, tasks=tasks)


def _task_on(task: Task, node: Standing | None) -> Task:
    if node is None or task.phase in (TaskPhase.GONE, TaskPhase.KILLED, TaskPhase.REFUSED):
        return task
    if node.retired:
        return replace(task, phase=TaskPhase.GONE, message=task.message or "its node was retired", lost=False)
    lost = bool(node.unreachable) and not task.over
    return task if lost == task.lost else replace(task, lost=lost)


def _active(job: Job, seen: Seen, now: datetime, limits: Limits) -> Job:
    if broken := breaks.find(job, seen, now, limits):
        return fence(job, broken, now)
    attempt = job.attempt
    assert attempt is not None
    if 0 < job.spec.budget_usd <= job.cost_at(now):
        spent = f"its budget of {job.spec.budget_usd:g} USD is spent; raise it and submit again"
        return _finish(job, JobState.FAILED, End.BUDGET, spent, now)
    if job.state is JobState.STARTING:
        return _starting(job, attempt, now)
    if all(task.phase is TaskPhase.EXITED for task in attempt.tasks):
        return _finish(job, JobState.SUCCEEDED, End.DONE, "all ranks ended well", now)
    return job


def _starting(job: Job, attempt: Attempt, now: datetime) -> Job:
    phases = [task.phase for task in attempt.tasks]
    if not attempt.started and attempt.rendezvous and all(phase >= TaskPhase.ACCEPTED for phase in phases):
        return replace(job, attempt=replace(attempt, started=True))
    if attempt.started and all(phase >= TaskPhase.RUNNING for phase in phases):
        running = replace(attempt, run_time=now)
        message = f"runs on {len(attempt.tasks)} node{'s' * (len(attempt.tasks) != 1)}"
        return move(job, JobState.RUNNING, attempt=running, start_time=job.start_time or now, state_message=message)
    return job


def fence(job: Job, broken: Break, now: datetime) -> Job:
    """Ends the attempt: whatever it still writes is of an old epoch from here on."""
    attempt = job.attempt
    assert attempt is not None
    over = replace(attempt, end_time=now, end_reason=f"{broken.end}: {broken.message}"[:2000])
    return move(
        job,
        JobState.RECOVERING,
        epoch=job.epoch + 1,
        attempt=over,
        cost_usd=job.cost_usd + cost_of(attempt, now),
        state_message=broken.message,
        cause=Cause(broken.node or broken.task, attempt.traceparent, broken.message),
    )


def ended_by(attempt: Attempt) -> End | None:
    """The first word of its end_reason."""
    word = attempt.end_reason.partition(":")[0]
    return End(word) if word in set(End) else None


def _judged(job: Job, verdict: Verdict, now: datetime, limits: Limits) -> Job:
    attempt = job.attempt
    assert attempt is not None
    end = ended_by(attempt)
    message = verdict.message or job.state_message
    changes = {
        "attempt": replace(attempt, incident=verdict.incident or attempt.incident),
        "cause": Cause(verdict.incident or job.cause.resource, verdict.traceparent or job.cause.traceparent, message),
        "state_message": message,
    }
    if end in STARTLESS:
        return _start_failed(job, limits, now, changes)
    if end in (End.DRAIN, End.PREEMPTED):
        return replace(job, **changes)  # type: ignore[arg-type]  # typed one by one above
    if not verdict.application_fault:
        return replace(job, recoveries=job.recoveries + 1, **changes)  # type: ignore[arg-type]
    restarts = 1 + (0 if job.spec.is_service and _settled(attempt) else job.restarts)
    allowed = DEFAULT_RESTARTS if job.spec.max_restarts is None else job.spec.max_restarts
    if not job.spec.is_service and restarts > allowed:
        failed = replace(job, **changes)  # type: ignore[arg-type]
        why = f"{message}; it was restarted {job.restarts} times, retry.max_restarts is {allowed}"
        return move(failed, JobState.FAILED, end_time=now, state_message=why)
    changes["restarts"] = restarts
    return _paused(replace(job, **changes), _backoff_s(job, restarts), now)  # type: ignore[arg-type]


def _start_failed(job: Job, limits: Limits, now: datetime, changes: dict[str, object]) -> Job:
    job = replace(job, **changes)  # type: ignore[arg-type]
    in_a_row = 0
    refused = 0
    for attempt in reversed(tuple(job.attempts())):
        if ended_by(attempt) not in STARTLESS:
            break
        in_a_row += 1
        refused += ended_by(attempt) is End.REFUSED
    if refused >= limits.refusals and refused == in_a_row and not job.spec.is_service:
        why = f"refused {refused} times in a row: {job.state_message}"
        return move(job, JobState.FAILED, end_time=now, state_message=why)
    pause_s = min(LONGEST_START_BACKOFF_S, 2.0 ** (in_a_row - 2)) if in_a_row > 1 else 0.0
    return _paused(job, pause_s, now)


def _settled(attempt: Attempt) -> bool:
    ran = attempt.run_time is not None and attempt.end_time is not None
    return ran and (attempt.end_time - attempt.run_time).total_seconds() >= SETTLED_S  # type: ignore[operator]


def _backoff_s(job: Job, restarts: int) -> float:
    given = job.spec.backoff_s
    if job.spec.is_service:
        base = SERVICE_BACKOFF_S if given is None else given
        return min(LONGEST_SERVICE_BACKOFF_S, base * 2.0 ** min(restarts - 2, 20)) if restarts > 1 else 0.0
    return min(LONGEST_BACKOFF_S, (DEFAULT_BACKOFF_S if given is None else given) * 2.0 ** min(restarts - 1, 20))


def _paused(job: Job, pause_s: float, now: datetime) -> Job:
    if pause_s <= 0:
        return job
    until = now + timedelta(seconds=pause_s)
    return move(
        job, JobState.QUEUED, not_before=until, state_message=f"{job.state_message}; tried again in {pause_s:g} s"
    )


def _suspending(job: Job, now: datetime) -> Job:
    attempt = job.attempt
    assert attempt is not None and attempt.end_time is not None
    late = (now - attempt.end_time).total_seconds() > job.grace_s + SUSPEND_MARGIN_S
    if not late and not all(task.over for task in attempt.tasks):
        return job
    return move(job, JobState.QUEUED, epoch=job.epoch + 1, state_message="preempted; waits for GPUs")


def _finish(job: Job, state: JobState, end: End, message: str, now: datetime) -> Job:
    attempt, cost_usd = job.attempt, job.cost_usd
    if attempt is not None and attempt.end_time is None:
        cost_usd += cost_of(attempt, now)
        attempt = replace(attempt, end_time=now, end_reason=f"{end}: {message}"[:2000])
    return move(job, state, attempt=attempt, cost_usd=cost_usd, end_time=now, state_message=message)
