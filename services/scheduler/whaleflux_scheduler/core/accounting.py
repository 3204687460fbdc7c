"""What a job and each of its attempts were and cost, as it is kept when the job's record is long gone. Pure.

An attempt is accounted for when it ends, a job when it has ended; both again when their agents tell later how it really was. The
sums are those of `cost`: the attempts of a job cost together what the job cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from whaleflux_scheduler.core import cost
from whaleflux_scheduler.core.model import Attempt, Job, JobState, TaskPhase

MOST_NODES = 64  # named; all are counted


@dataclass(frozen=True, slots=True)
class Account:
    """See `whaleflux.v1.AccountRecord`. `attempt` 0: the job as a whole. Instants are UTC."""

    job: str
    uid: str
    attempt: int
    state: JobState
    create_time: datetime
    start_time: datetime | None
    run_time: datetime | None
    end_time: datetime | None
    end_reason: str
    exit_code: int
    gpus: int
    gpus_by_model: tuple[tuple[str, int], ...]
    nodes: tuple[str, ...]
    node_count: int
    step: int
    loss: float | None
    gpu_s: float
    cost_usd: float
    attempts: int
    incident: str


def of_attempt(job: Job, attempt: Attempt, now: datetime) -> Account:
    """One attempt, up to `now` while it is on."""
    ended = attempt.end_time is not None
    return Account(
        job=job.name,
        uid=job.uid,
        attempt=attempt.number,
        state=job.state,
        create_time=job.create_time,
        start_time=attempt.allocate_time,
        run_time=attempt.run_time,
        end_time=attempt.end_time,
        end_reason=attempt.end_reason,
        exit_code=exit_code(attempt),
        gpus=gpus(attempt),
        gpus_by_model=attempt.gpus_by_model,
        nodes=attempt.nodes[:MOST_NODES],
        node_count=len(attempt.nodes),
        step=attempt.step if ended else job.step,
        loss=attempt.loss if ended else job.loss,
        gpu_s=cost.attempt_gpu_s(attempt, attempt.end_time or now),
        cost_usd=cost.attempt_cost_usd(attempt, attempt.end_time or now),
        attempts=attempt.number,
        incident=attempt.incident,
    )


def of_job(job: Job, now: datetime) -> Account:
    """The job as a whole, up to `now` while it is not over; its place is the last attempt's."""
    last = job.attempt
    return Account(
        job=job.name,
        uid=job.uid,
        attempt=0,
        state=job.state,
        create_time=job.create_time,
        start_time=job.start_time,
        run_time=job.start_time,
        end_time=job.end_time,
        end_reason=job.state_message[:2000] if job.ended else "",
        exit_code=exit_code(last) if last is not None and job.state is not JobState.SUCCEEDED else 0,
        gpus=gpus(last) if last is not None else job.spec.gpus,
        gpus_by_model=last.gpus_by_model if last is not None else (),
        nodes=last.nodes[:MOST_NODES] if last is not None else (),
        node_count=len(last.nodes) if last is not None else 0,
        step=job.step,
        loss=job.loss,
        gpu_s=cost.job_gpu_s(job, now),
        cost_usd=cost.job_cost_usd(job, now),
        attempts=last.number if last is not None else 0,
        incident="",
    )


def over(job: Job) -> Iterator[Account]:
    """What is over of a job: its ended attempts, then the job when it has ended.

    Of a large past attempt the record keeps only some tasks; what was accounted for when it ended stays then.
    """
    for attempt in job.attempts():
        if attempt.end_time is not None and attempt.number and is_whole(job, attempt):
            yield of_attempt(job, attempt, attempt.end_time)
    if job.ended and job.end_time is not None:
        yield of_job(job, job.end_time)


def unfinished(job: Job, now: datetime) -> Iterator[Account]:
    """What is not over: the job, and the attempt that is on."""
    if not job.ended:
        yield of_job(job, now)
        if job.attempt is not None and job.attempt.end_time is None:
            yield of_attempt(job, job.attempt, now)


def is_whole(job: Job, attempt: Attempt) -> bool:
    """Whether its record has all of its tasks: of a large past attempt only some are kept."""
    if job.spec.gpus and attempt.gpus_by_model:  # as many as it was given, which need not be as many as were asked for
        return attempt.gpus == gpus(attempt)
    return attempt.ranks >= job.spec.world_size


def gpus(attempt: Attempt) -> int:
    """All that it held, also when its record keeps only some of its tasks."""
    return sum(count for _, count in attempt.gpus_by_model) or attempt.gpus


def exit_code(attempt: Attempt) -> int:
    """Of the first task that failed by itself, else of the first that was ended, 0 for none."""
    failed = [task.exit_code for task in attempt.tasks if task.failed]
    killed = [task.exit_code for task in attempt.tasks if task.phase is TaskPhase.KILLED and task.exit_code]
    return next(iter((*failed, *killed)), 0)
