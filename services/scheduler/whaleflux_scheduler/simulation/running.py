"""One simulated job: its record, as the production core has it, and the work that is left of it.

Every transition is the production core's own (`lifecycle`): this module says what an agent, a node and a checkpoint would have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from whaleflux_scheduler.core import cost, running_time
from whaleflux_scheduler.core.changed import changed
from whaleflux_scheduler.core.elastic import model_of
from whaleflux_scheduler.core.model import Attempt, Job, JobState, TaskPhase
from whaleflux_scheduler.core.observed import Diagnosis, EndReason, NodeCondition
from whaleflux_scheduler.simulation.timeline import second_of
from whaleflux_scheduler.simulation.workload import Delays, Submission


@dataclass(slots=True, eq=False)
class SimulatedJob:
    """`left_s`: seconds that it still has to run on the GPUs of its spec. `turn` counts attempts, so that events of old ones are told."""

    job: Job
    submission: Submission
    row: int  # among the outcomes
    left_s: float
    rate: float = 1.0  # work per second in this attempt
    works_from_s: float = 0.0  # in this attempt: after loading the checkpoint
    placed_s: float = 0.0
    turn: int = 0
    held: float = 0.0  # GPUs
    there: bool = False  # its attempt is on its nodes, with or without GPUs

    def starts_work(self, at_s: float, gpus: int, delays: Delays) -> float:
        """All its ranks run; returns when it will have done its work."""
        own_s = self.submission.restart_s
        restored = (delays.restart_s if own_s is None else own_s) if self.job.past_attempts else 0.0
        self.rate = self.submission.rate(gpus, model_of(self.job))
        self.works_from_s = at_s + restored
        return self.works_from_s + self.left_s / self.rate

    def keeps_work(self, at_s: float) -> None:
        """What it did in this attempt is saved, if its ranks have run."""
        if self.job.attempt is None or self.job.attempt.run_time is None:
            return
        self.left_s = max(0.0, self.left_s - max(0.0, at_s - self.works_from_s) * self.rate)

    def loses_work(self, at_s: float, every_s: float) -> None:
        """What it did since its last regular checkpoint is lost."""
        self.keeps_work(self.saved_s(at_s, every_s))

    def saved_s(self, at_s: float, every_s: float) -> float:
        """When its newest regular checkpoint was written; when it began to work, if it has none."""
        worked_s = max(0.0, at_s - self.works_from_s)
        return self.works_from_s + (worked_s - worked_s % every_s if every_s else 0.0)


def running(job: Job, now: datetime) -> Job:
    """STARTING -> RUNNING: all ranks run."""
    attempt = job.attempt
    assert attempt is not None
    began = changed(attempt, started=True, run_time=now)
    return changed(job, state=JobState.RUNNING, attempt=began, start_time=job.start_time or now, state_message="runs")


def finished(job: Job, now: datetime) -> Job:
    """RUNNING -> SUCCEEDED: all ranks ended well. Of its attempts only what they cost and took is kept: there are a million of such jobs."""
    attempt = job.attempt
    assert attempt is not None
    over = Attempt(
        attempt.epoch, (), attempt.allocate_time, run_time=attempt.run_time, end_time=now, end_reason=EndReason.DONE
    )
    return Job(
        job.name,
        job.spec,
        JobState.SUCCEEDED,
        job.create_time,
        epoch=job.epoch,
        attempt=over,
        start_time=job.start_time,
        end_time=now,
        cost_usd=cost.job_cost_usd(job, now),
        uid=job.uid,
        run_s=running_time.run_s(job, now),
        gpu_s=cost.job_gpu_s(job, now),
    )


def with_tasks(job: Job, phase: TaskPhase) -> Job:
    """Its agents report that nothing is left of any of its tasks."""
    attempt = job.attempt
    if attempt is None:
        return job
    return replace(job, attempt=_over(attempt, phase), past_attempts=tuple(_over(p, phase) for p in job.past_attempts))


def _over(attempt: Attempt, phase: TaskPhase) -> Attempt:
    if not any(task.holds for task in attempt.tasks):
        return attempt
    tasks = tuple(replace(task, phase=phase, lost=False) if task.holds else task for task in attempt.tasks)
    return replace(attempt, tasks=tasks)


def diagnosed(job: Job) -> Diagnosis:
    """What health_monitor would say of a node that was lost: no fault of the work."""
    return Diagnosis(job.epoch, message=job.state_message)


def condition_of(what: str) -> NodeCondition:
    """What a node's event means for those on it."""
    return NodeCondition(draining="maintenance") if what == "drain" else NodeCondition(unreachable="simulated loss")


def limit_s(job: Job) -> float:
    """When the running attempt will have used up the job's time limit; infinity for none."""
    limit, attempt = job.spec.time_limit_s, job.attempt
    if limit is None or attempt is None or attempt.run_time is None:
        return float("inf")
    return second_of(attempt.run_time) + max(0.0, limit - job.run_s)
