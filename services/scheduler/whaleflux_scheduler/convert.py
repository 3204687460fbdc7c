"""Jobs and queues between the contract (`whaleflux.v1`) and the core."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux.store.codec import Codec, Stored, merge_repeated
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.model import (
    Attempt,
    Cause,
    Decision,
    Job,
    JobKind,
    JobState,
    Queue,
    Rule,
    Spec,
    Task,
    TaskPhase,
)
from whaleflux_scheduler.core.observed import Report

StoredJob = Stored[Job, pb.Job]
StoredQueue = Stored[Queue, pb.Queue]


def instant(message: Any, field: str) -> datetime | None:
    """The UTC instant in a Timestamp field, None when it is not set."""
    return getattr(message, field).ToDatetime(tzinfo=UTC) if message.HasField(field) else None


def timestamp(at: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(at)
    return stamp


def seconds(message: Any, field: str) -> float | None:
    """A Duration field in seconds, None when it is not set."""
    if not message.HasField(field):
        return None
    duration: Duration = getattr(message, field)
    return duration.seconds + duration.nanos / 1e9


# specs

SMALL_SPEC_BYTES = 4096  # larger ones are not remembered


def spec_of(message: pb.JobSpec) -> Spec:
    """What a job asks for; unknown kinds count as TRAINING. Specs never change and are read with every state of their job."""
    data = message.SerializeToString()
    return _known_spec(data) if len(data) <= SMALL_SPEC_BYTES else _read_spec(message)


@lru_cache(maxsize=4096)
def _known_spec(data: bytes) -> Spec:
    return _read_spec(pb.JobSpec.FromString(data))


def _read_spec(message: pb.JobSpec) -> Spec:
    retry = message.retry
    has_retry = message.HasField("retry")
    return Spec(
        command=tuple(message.command),
        image=message.image,
        gpus=message.gpus,
        min_nodes=message.nodes.min,
        max_nodes=message.nodes.max,
        any_of=tuple(message.gpu.any_of),
        min_memory_bytes=message.gpu.min_memory_bytes,
        min_compute_capability=message.gpu.min_compute_capability,
        placement=tuple(Rule(r.group, r.level, r.size, r.preferred) for r in message.placement),
        datasets=tuple(message.datasets),
        require_local_data=message.require_local_data,
        environment=tuple(message.environment.items()),
        priority=message.priority,
        max_restarts=retry.max_restarts if has_retry else None,
        backoff_s=seconds(retry, "backoff") if has_retry else None,
        checkpoint_every_steps=message.checkpoint.every_steps,
        checkpoint_keep=message.checkpoint.keep,
        checkpoint_location=message.checkpoint.location,
        partition_wait_s=seconds(message.on_partition, "wait") if message.HasField("on_partition") else None,
        never_reroute=message.on_partition.never_reroute,
        deadline=instant(message, "deadline_time"),
        budget_usd=message.budget_usd,
        kind=JobKind.SERVICE if message.kind == pb.JOB_KIND_SERVICE else JobKind.TRAINING,
        working_directory=message.working_directory,
        cpu_millicores_per_rank=message.cpu_millicores_per_rank,
        memory_bytes_per_rank=message.memory_bytes_per_rank,
        stop_grace_s=seconds(message, "stop_grace"),
        sites=tuple(message.sites),
    )


# jobs


def job_of(message: pb.Job) -> Job:
    """The job as stored; its decision stays in the message."""
    created = instant(message, "create_time")
    return Job(
        name=message.name,
        spec=spec_of(message.spec),
        state=JobState(message.state),
        create_time=created or datetime.fromtimestamp(0, UTC),
        state_message=message.state_message,
        epoch=message.epoch,
        attempt=attempt_of(message.attempt) if message.HasField("attempt") else None,
        restarts=message.restarts,
        recoveries=message.recoveries,
        start_time=instant(message, "start_time"),
        end_time=instant(message, "end_time"),
        traceparent=message.traceparent,
        cause=Cause(message.cause.resource, message.cause.traceparent, message.cause.message),
        step=message.step,
        loss=message.loss,
        cost_usd=message.cost_usd,
        past_attempts=tuple(map(attempt_of, message.past_attempts)),
        cancel_requested=message.cancel_requested,
        not_before=instant(message, "not_before_time"),
    )


def attempt_of(message: pb.Attempt) -> Attempt:
    return Attempt(
        epoch=message.epoch,
        tasks=tuple(map(task_of, message.tasks)),
        allocate_time=instant(message, "allocate_time") or datetime.fromtimestamp(0, UTC),
        rendezvous=message.rendezvous,
        run_time=instant(message, "run_time"),
        end_time=instant(message, "end_time"),
        end_reason=message.end_reason,
        incident=message.incident,
        traceparent=message.traceparent,
        restore_checkpoint=message.restore_checkpoint,
        communication_s=message.communication_s,
        usd_per_hour=message.usd_per_hour,
        started=message.started,
    )


def task_of(message: pb.Task) -> Task:
    return Task(
        id=message.id,
        node=message.node,
        gpus=tuple(message.gpu_indices),
        first_rank=message.first_rank,
        group_rank=message.group_rank,
        phase=TaskPhase(message.phase),
        exit_code=message.exit_code,
        message=message.message,
        endpoint=message.endpoint,
        lost=message.lost,
    )


def _merge_job(job: Job, message: pb.Job) -> None:
    """Sets what this version knows; the spec never changes, and a decision only when there is a new one."""
    message.name = job.name
    message.state = job.state.value  # type: ignore[assignment]  # a test compares the enums
    message.state_message = job.state_message
    message.epoch = job.epoch
    message.restarts, message.recoveries = job.restarts, job.recoveries
    message.step, message.loss, message.cost_usd = job.step, job.loss, job.cost_usd
    message.traceparent = job.traceparent
    message.cancel_requested = job.cancel_requested
    for field, at in (
        ("create_time", job.create_time),
        ("start_time", job.start_time),
        ("end_time", job.end_time),
        ("not_before_time", job.not_before),
    ):
        _set_instant(message, field, at)
    message.cause.resource = job.cause.resource
    message.cause.traceparent = job.cause.traceparent
    message.cause.message = job.cause.message
    if job.decision is not None:
        message.decision.CopyFrom(decision_message(job.decision))
    _merge_attempts(job, message)


def _merge_attempts(job: Job, message: pb.Job) -> None:
    """The usual write changes the current attempt only; a new attempt pushes the last one to the past."""
    past = [attempt.epoch for attempt in message.past_attempts]
    if past == [a.epoch for a in job.past_attempts] and job.attempt and message.attempt.epoch == job.attempt.epoch:
        for kept, attempt in zip(message.past_attempts, job.past_attempts, strict=True):
            _merge_attempt(attempt, kept)
        _merge_attempt(job.attempt, message.attempt)
        return
    if message.HasField("attempt"):
        message.past_attempts.append(message.attempt)
    message.ClearField("attempt")
    merge_repeated(
        message.past_attempts,
        job.attempts(),
        message_key=lambda m: m.epoch,
        value_key=lambda a: a.epoch,
        merge=_merge_attempt,
    )
    if job.attempt is not None:
        message.attempt.CopyFrom(message.past_attempts.pop())


def _merge_attempt(attempt: Attempt, message: pb.Attempt) -> None:
    message.epoch = attempt.epoch
    message.rendezvous = attempt.rendezvous
    message.end_reason, message.incident = attempt.end_reason, attempt.incident
    message.traceparent = attempt.traceparent
    message.restore_checkpoint = attempt.restore_checkpoint
    message.communication_s, message.usd_per_hour = attempt.communication_s, attempt.usd_per_hour
    message.started = attempt.started
    for field, at in (
        ("allocate_time", attempt.allocate_time),
        ("run_time", attempt.run_time),
        ("end_time", attempt.end_time),
    ):
        _set_instant(message, field, at)
    if [task.id for task in message.tasks] == [task.id for task in attempt.tasks]:
        for kept, task in zip(message.tasks, attempt.tasks, strict=True):
            _merge_task(task, kept)
        return
    merge_repeated(
        message.tasks,
        attempt.tasks,
        message_key=lambda m: m.id,
        value_key=lambda t: t.id,
        merge=_merge_task,
    )


def _merge_task(task: Task, message: pb.Task) -> None:
    message.id, message.node = task.id, task.node
    message.gpu_indices[:] = task.gpus
    message.first_rank, message.group_rank = task.first_rank, task.group_rank
    message.phase = task.phase.value  # type: ignore[assignment]
    message.exit_code, message.message = task.exit_code, task.message
    message.endpoint, message.lost = task.endpoint, task.lost


def _set_instant(message: Any, field: str, at: datetime | None) -> None:
    if at is None:
        message.ClearField(field)
    else:
        getattr(message, field).FromDatetime(at)


JOBS: Codec[Job, pb.Job] = Codec(pb.Job, job_of, _merge_job)


def task_message(task: Task) -> pb.Task:
    message = pb.Task()
    _merge_task(task, message)
    return message


def decision_message(decision: Decision) -> pb.Decision:
    """The record that users read."""
    return pb.Decision(
        time=timestamp(decision.time),
        placed=decision.placed,
        summary=decision.summary,
        reasons=decision.reasons,
        alternatives=[
            pb.Alternative(
                summary=o.summary, relative_communication=o.relative_communication, usd_per_hour=o.usd_per_hour
            )
            for o in decision.alternatives
        ],
        exclusions=[pb.Exclusion(constraint=text, nodes=count) for text, count in decision.exclusions],
        smallest_change=decision.smallest_change,
        ahead=decision.ahead,
        position=decision.position,
        preempts=decision.preempts,
        usd_per_hour=decision.usd_per_hour,
        communication_s=decision.communication_s,
        tasks=map(task_message, decision.tasks),
    )


# queues


def queue_of(message: pb.Queue) -> Queue:
    return Queue(message.name, message.weight or 1.0, message.max_gpus)


def _merge_queue(queue: Queue, message: pb.Queue) -> None:
    message.name, message.weight, message.max_gpus = queue.name, queue.weight, queue.max_gpus


QUEUES: Codec[Queue, pb.Queue] = Codec(pb.Queue, queue_of, _merge_queue)


# agents

_PHASES = frozenset(int(phase) for phase in TaskPhase)


def report_of(message: agent_pb2.TaskReport) -> Report:
    """What an agent says of a task; a phase that this version does not know counts as not reported."""
    known = message.phase in _PHASES
    return Report(
        task=message.task,
        phase=TaskPhase(message.phase) if known else TaskPhase.UNSPECIFIED,
        exit_code=message.exit_code,
        out_of_memory=message.out_of_memory,
        message=message.message[:2000],
        rendezvous=message.rendezvous[:300],
        endpoint=message.endpoint[:300],
        traceparent=message.traceparent[:64],
        failed_rank=message.failed_rank,
    )


def desired_task(stored: StoredJob, task: Task) -> agent_pb2.DesiredTask:
    """One task as its agent should make it."""
    job, attempt = stored.value, stored.value.attempt
    assert attempt is not None
    message = agent_pb2.DesiredTask(
        task=task_message(task),
        job=job.name,
        epoch=attempt.epoch,
        spec=stored.message.spec,
        world_size=attempt.gpus,
        group_world_size=len(attempt.tasks),
        rendezvous=attempt.rendezvous,
        start=attempt.started,
        restart_count=job.restarts,
        traceparent=attempt.traceparent,
        restore_checkpoint=attempt.restore_checkpoint,
        checkpoint_location=job.spec.checkpoint_location,
    )
    for volatile in ("phase", "exit_code", "message", "endpoint", "lost"):  # the agent's own news is not sent back
        message.task.ClearField(volatile)
    return message
