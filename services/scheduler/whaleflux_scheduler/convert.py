"""Jobs and queues between the contract (`whaleflux.v1`) and the core."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux import names
from whaleflux.errors import FailedPrecondition
from whaleflux.manifests.job_fields import Spec
from whaleflux.manifests.job_spec import spec_of
from whaleflux.planning import wish
from whaleflux.reasons import ErrorReason
from whaleflux.store import keys
from whaleflux.store.api import Entry
from whaleflux.store.codec import Codec, Stored, merge_repeated
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.cost import micros_of
from whaleflux_scheduler.core.model import (
    Attempt,
    AttemptSplit,
    Awaited,
    Cause,
    Claim,
    ClaimPurpose,
    Hold,
    Job,
    JobState,
    Queue,
    SchedulingDecision,
    Task,
    TaskPhase,
    When,
)
from whaleflux_scheduler.core.observed import Report

_EPOCH = datetime.fromtimestamp(0, UTC)
StoredJob = Stored[Job, pb.Job]
UNREADABLE = "cannot be read by this version of the scheduler; update it"
StoredQueue = Stored[Queue, pb.Queue]


def instant(message: Any, field: str) -> datetime | None:
    """The UTC instant in a Timestamp field, None when it is not set."""
    if not message.HasField(field):
        return None
    stamp = getattr(message, field)
    try:
        return _EPOCH + timedelta(0, stamp.seconds, stamp.nanos // 1000)
    except OverflowError:
        raise DecodeError(f"{field}: {stamp.seconds} s after 1970 is no time that there is") from None


def timestamp(at: datetime) -> Timestamp:
    """A message of its own."""
    stamp = Timestamp()
    set_time(stamp, at)
    return stamp


def set_time(stamp: Timestamp, at: datetime) -> None:
    """As `FromDatetime`, in a quarter of its time: each record has several."""
    passed = at - _EPOCH
    stamp.seconds, stamp.nanos = passed.days * 86_400 + passed.seconds, passed.microseconds * 1000


# jobs


def loss_of(message: pb.Job | pb.Attempt | agent_pb2.TaskProgress) -> float | None:
    """None: none was reported. All NaN are one object, so that what is the same compares as the same."""
    if not message.HasField("loss"):
        return None
    return math.nan if math.isnan(message.loss) else message.loss


def set_loss(message: pb.Job | pb.Attempt, loss: float | None) -> None:
    if loss is None:
        message.ClearField("loss")
    else:
        message.loss = loss


_PHASES = frozenset(int(phase) for phase in TaskPhase)
_WHENS = frozenset(int(when) for when in When)
_PURPOSES = frozenset(int(purpose) for purpose in ClaimPurpose)
_STATES = frozenset(int(state) for state in JobState if state)


def job_of(message: pb.Job) -> Job:
    """The job as stored; its decision stays in the message. With a state or a phase of a newer version it is not `readable`.

    Raises DecodeError for a message without a name, as which an empty record reads.
    """
    if not message.name:
        raise DecodeError("the record of a job has no name")
    return _job_of(message, JobState(message.state) if _is_known(message) else JobState.UNSPECIFIED, {})


def _job_as(message: pb.Job, written: Job) -> Job:
    """The same of a message that `written` was stored as: the tasks of its attempts, of which there may be thousands, are its own."""
    tasks = {attempt.epoch: attempt.tasks for attempt in written.attempts()}
    return _job_of(message, written.state, tasks)


def _job_of(message: pb.Job, state: JobState, tasks: Mapping[int, tuple[Task, ...]]) -> Job:
    created = instant(message, "create_time")
    return Job(
        name=message.name,
        spec=_spec(message),
        state=state,
        create_time=created or datetime.fromtimestamp(0, UTC),
        state_message=message.state_message,
        epoch=message.epoch,
        attempt=_attempt_of(message.attempt, tasks) if message.HasField("attempt") else None,
        restarts=message.restarts,
        recoveries=message.recoveries,
        start_time=instant(message, "start_time"),
        end_time=instant(message, "end_time"),
        traceparent=message.traceparent,
        cause=Cause(message.cause.resource, message.cause.traceparent, message.cause.message, message.cause.actor),
        step=message.step,
        loss=loss_of(message),
        cost_usd=message.cost_usd,
        past_attempts=tuple(_attempt_of(past, tasks) for past in message.past_attempts),
        cancel_requested=message.cancel_requested,
        not_before=instant(message, "not_before_time"),
        uid=message.uid,
        state_time=instant(message, "state_time"),
        run_s=message.run_s,
        gpu_s=message.gpu_s,
        awaits=tuple(Awaited(one.job, one.uid, _when(one.when)) for one in message.awaits),
        hold=_hold(message.hold) if message.HasField("hold") else None,
        priority=message.priority if message.HasField("priority") else None,
        is_ray_worker=message.ray.role == pb.RAY_ROLE_WORKER,
        submitter=message.submitter,
        claim=claim_of(message.claim) if message.HasField("claim") else None,
    )


def _spec(message: pb.Job) -> Spec:
    """What was asked for, with the priority that it has now."""
    spec = spec_of(message.spec)
    return replace(spec, priority=message.priority) if message.HasField("priority") else spec


def _when(value: int) -> When:
    """A condition of a newer version is not read as another: the end of the job alone does not meet it."""
    return When(value) if value in _WHENS else When.UNSPECIFIED


def _hold(message: pb.Hold) -> Hold:
    return Hold(message.by, message.reason, instant(message, "time") or datetime.fromtimestamp(0, UTC))


def claim_of(message: pb.Claim) -> Claim:
    return Claim(
        nodes=tuple((node.node, tuple(node.gpu_uuids)) for node in message.nodes),
        victims=tuple(message.victims),
        expire_time=instant(message, "expire_time") or datetime.fromtimestamp(0, UTC),
        purpose=ClaimPurpose(message.purpose) if message.purpose in _PURPOSES else ClaimPurpose.UNSPECIFIED,
        start_time=instant(message, "start_time"),
        make_time=instant(message, "make_time"),
        limited_queue=message.limited_queue,
        datasets=tuple(message.datasets),
    )


def _is_known(message: pb.Job) -> bool:
    attempts = [*message.past_attempts, message.attempt]
    return message.state in _STATES and all(task.phase in _PHASES for one in attempts for task in one.tasks)


def _attempt_of(message: pb.Attempt, tasks: Mapping[int, tuple[Task, ...]]) -> Attempt:
    known = tasks.get(message.epoch)
    return Attempt(
        epoch=message.epoch,
        tasks=tuple(map(task_of, message.tasks)) if known is None else known,
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
        number=message.number,
        gpus_by_model=tuple(sorted(message.gpus_by_model.items())),
        step=message.step if message.HasField("end_time") else -1,
        loss=loss_of(message),
        first_step_time=instant(message, "first_step_time"),
        remote_datasets=tuple(message.remote_datasets),
        best_communication_s=message.best_communication_s if message.HasField("best_communication_s") else None,
        best_free_communication_s=(
            message.best_free_communication_s if message.HasField("best_free_communication_s") else None
        ),
        split=_split_of(message.split) if message.HasField("split") else None,
    )


def _split_of(message: pb.AttemptSplit) -> AttemptSplit:
    return AttemptSplit(
        message.tensor, message.pipeline, message.context, message.data, message.micro_batch,
        message.words, message.mesh, message.why, message.virtual_stages, message.first_layers, message.last_layers,
    )  # fmt: skip


def task_of(message: pb.Task) -> Task:
    return Task(
        id=message.id,
        node=message.node,
        gpus=tuple(message.gpu_uuids),
        first_rank=message.first_rank,
        group_rank=message.group_rank,
        phase=TaskPhase(message.phase) if message.phase in _PHASES else TaskPhase.UNSPECIFIED,
        exit_code=message.exit_code,
        message=message.message,
        endpoint=message.endpoint,
        lost=message.lost,
        stuck=message.stuck,
        ending=message.ending,
        unfit=message.unfit,
        share_bytes=message.share_memory_bytes,
        gpu_parts=message.gpu_parts,
        cpu_ranks=message.ranks,
        global_ranks=tuple(message.global_ranks),
        isolation=message.isolation,
    )


def _merge_job(job: Job, message: pb.Job, known: Job | None = None) -> None:
    """Sets what this version knows; the spec never changes, and a decision only when there is a new one. `message` says `known`.

    Raises FailedPrecondition for a job that is not readable: nothing is written over what a newer version knows.
    """
    if not job.readable:
        raise FailedPrecondition(f"the record of {job.name} {UNREADABLE}", reason=ErrorReason.RECORD_UNREADABLE)
    message.name = job.name
    message.state = job.state.value  # type: ignore[assignment]  # a test compares the enums
    message.state_message = job.state_message
    message.epoch = job.epoch
    message.restarts, message.recoveries = job.restarts, job.recoveries
    message.step, message.cost_usd, message.run_s, message.gpu_s = job.step, job.cost_usd, job.run_s, job.gpu_s
    set_loss(message, job.loss)
    message.traceparent = job.traceparent
    message.cancel_requested = job.cancel_requested
    for field, at in (
        ("create_time", job.create_time),
        ("start_time", job.start_time),
        ("end_time", job.end_time),
        ("not_before_time", job.not_before),
        ("state_time", job.state_time),
    ):
        _set_instant(message, field, at)
    message.cause.resource = job.cause.resource
    message.cause.traceparent = job.cause.traceparent
    message.cause.message, message.cause.actor = job.cause.message, job.cause.actor
    if job.decision is not None:
        message.decision.CopyFrom(decision_message(job.decision))
    _merge_claim(job.claim, message)
    _merge_waiting(job, message)
    _merge_attempts(job, message, known)


def _merge_claim(claim: Claim | None, message: pb.Job) -> None:
    message.ClearField("claim")
    if claim is not None:
        nodes = (pb.ClaimedNode(node=node, gpu_uuids=uuids) for node, uuids in claim.nodes)
        message.claim.CopyFrom(
            pb.Claim(
                nodes=nodes,
                victims=claim.victims,
                expire_time=timestamp(claim.expire_time),
                purpose=claim.purpose.value,  # type: ignore[arg-type]  # a test compares the enums
                limited_queue=claim.limited_queue,
                datasets=claim.datasets,
            )
        )
        _set_instant(message.claim, "start_time", claim.start_time)
        _set_instant(message.claim, "make_time", claim.make_time)


def _merge_waiting(job: Job, message: pb.Job) -> None:
    """What keeps it from being placed, and its priority where it was changed."""
    if len(message.awaits) != len(job.awaits):  # they only become fewer
        left = {(one.job, one.uid, one.when) for one in job.awaits}
        kept = [one for one in message.awaits if (one.job, one.uid, _when(one.when)) in left]
        del message.awaits[:]
        message.awaits.extend(kept)
    if job.hold is None:
        message.ClearField("hold")
    else:
        message.hold.by, message.hold.reason = job.hold.by, job.hold.reason
        set_time(message.hold.time, job.hold.time)
    if job.priority is not None:
        message.priority = job.priority


def _merge_attempts(job: Job, message: pb.Job, known: Job | None) -> None:
    """The usual write changes the current attempt only; a new attempt pushes the last one to the past."""
    past = [attempt.epoch for attempt in message.past_attempts]
    if past == [a.epoch for a in job.past_attempts] and job.attempt and message.attempt.epoch == job.attempt.epoch:
        before = {attempt.epoch: attempt for attempt in known.attempts()} if known is not None else {}
        for kept, attempt in zip(message.past_attempts, job.past_attempts, strict=True):
            _merge_attempt(attempt, kept, before.get(attempt.epoch))
        _merge_attempt(job.attempt, message.attempt, before.get(job.attempt.epoch))
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


def _merge_attempt(attempt: Attempt, message: pb.Attempt, known: Attempt | None = None) -> None:
    if attempt is known:
        return
    message.epoch = attempt.epoch
    message.rendezvous = attempt.rendezvous
    message.end_reason, message.incident = attempt.end_reason, attempt.incident
    message.traceparent = attempt.traceparent
    message.restore_checkpoint = attempt.restore_checkpoint
    message.communication_s, message.usd_per_hour = attempt.communication_s, attempt.usd_per_hour
    message.micros_per_hour = micros_of(attempt.usd_per_hour)
    for name in ("best_communication_s", "best_free_communication_s"):
        if (best_s := getattr(attempt, name)) is not None:
            setattr(message, name, best_s)
    message.started, message.number = attempt.started, attempt.number
    if not message.gpus_by_model:
        message.gpus_by_model.update(attempt.gpus_by_model)
    if not message.remote_datasets:
        message.remote_datasets.extend(attempt.remote_datasets)
    if attempt.split is not None and not message.HasField("split"):
        message.split.CopyFrom(pb.AttemptSplit(**asdict(attempt.split)))
    if attempt.end_time is not None:
        message.step = attempt.step
        set_loss(message, attempt.loss)
    for field, at in (
        ("allocate_time", attempt.allocate_time),
        ("run_time", attempt.run_time),
        ("first_step_time", attempt.first_step_time),
        ("end_time", attempt.end_time),
    ):
        _set_instant(message, field, at)
    if known is not None and len(known.tasks) == len(attempt.tasks):
        for position, (task, before) in enumerate(zip(attempt.tasks, known.tasks, strict=True)):
            if task is not before:
                _merge_task(task, message.tasks[position])
        return
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
    message.gpu_uuids[:] = task.gpus
    message.first_rank, message.group_rank = task.first_rank, task.group_rank
    message.phase = task.phase.value  # type: ignore[assignment]
    message.exit_code, message.message = task.exit_code, task.message
    message.endpoint, message.lost = task.endpoint, task.lost
    message.stuck, message.ending, message.unfit = task.stuck, task.ending, task.unfit
    message.share_memory_bytes, message.gpu_parts = task.share_bytes, task.gpu_parts
    message.ranks, message.isolation = task.cpu_ranks, task.isolation
    message.global_ranks[:] = task.global_ranks


def _set_instant(message: Any, field: str, at: datetime | None) -> None:
    if at is None:
        message.ClearField(field)
    else:
        set_time(getattr(message, field), at)


PACKED_FROM_BYTES = 256 * 1024  # gangs of some thousand GPUs, each named by 40 bytes
JOBS: Codec[Job, pb.Job] = Codec(
    pb.Job, job_of, _merge_job, packed_from_bytes=PACKED_FROM_BYTES, merge_over=_merge_job, read_as=_job_as
)


def unreadable_job(entry: Entry, last: StoredJob | None) -> StoredJob:
    """What stands for a record that is no message of this version: the job as last known, and not `readable`."""
    queue, _, id_ = entry.key.removeprefix(keys.JOBS).partition("/")
    message = pb.Job(name=names.job(queue, id_))
    if last is not None:
        message.CopyFrom(last.message)
    message.state_message = f"its record {UNREADABLE}" + ("; shown as last known" if last is not None else "")
    return Stored(replace(job_of(message), state=JobState.UNSPECIFIED), message, entry)


def read_job(entry: Entry, last: StoredJob | None = None) -> StoredJob:
    """The job of any record; see `unreadable_job`."""
    try:
        return JOBS.decode(entry)
    except (DecodeError, ValueError):
        return unreadable_job(entry, last)


def task_message(task: Task) -> pb.Task:
    message = pb.Task()
    _merge_task(task, message)
    return message


def decision_message(decision: SchedulingDecision) -> pb.Decision:
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
    return Queue(
        name=message.name,
        weight=message.weight or 1.0,
        max_gpus=message.max_gpus,
        parent=names.last(message.parent) if message.parent else "",
        guaranteed_gpus=message.guaranteed_gpus,
        lending_limit_gpus=message.lending_limit_gpus if message.HasField("lending_limit_gpus") else None,
        data_quota_bytes=message.data_quota_bytes,
    )


def _merge_queue(queue: Queue, message: pb.Queue) -> None:
    message.name, message.weight, message.max_gpus = queue.name, queue.weight, queue.max_gpus
    message.parent = names.queue(queue.parent) if queue.parent else ""
    message.guaranteed_gpus, message.data_quota_bytes = queue.guaranteed_gpus, queue.data_quota_bytes
    if queue.lending_limit_gpus is None:
        message.ClearField("lending_limit_gpus")
    else:
        message.lending_limit_gpus = queue.lending_limit_gpus


QUEUES: Codec[Queue, pb.Queue] = Codec(pb.Queue, queue_of, _merge_queue)


# agents


def report_of(message: agent_pb2.TaskReport, node: str) -> Report:
    """What the agent of a node says of a task; a phase that this version does not know counts as not reported."""
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
        stuck=message.stuck[:2000],
        ending=message.ending,
        unfit=message.unfit,
        isolation=message.isolation[:200],
        node=node,
    )


def desired_task(stored: StoredJob, task: Task, elsewhere: str = "") -> agent_pb2.DesiredTask:
    """One task as its agent should make it. `elsewhere` is a node of the attempt with another network stack."""
    job, attempt = stored.value, stored.value.attempt
    assert attempt is not None
    message = agent_pb2.DesiredTask(
        task=task_message(task),
        job=job.name,
        epoch=attempt.epoch,
        spec=stored.message.spec,
        world_size=attempt.ranks,  # of a current attempt no task is left out
        group_world_size=len(attempt.tasks),
        rendezvous=attempt.rendezvous,
        start=attempt.started,
        restart_count=job.restarts,
        traceparent=attempt.traceparent,
        restore_checkpoint=attempt.restore_checkpoint,
        checkpoint_location=job.spec.checkpoint_location,
        elsewhere=elsewhere,
        job_uid=job.uid,
        remote_datasets=attempt.remote_datasets,
    )
    if attempt.split is not None and message.spec.environment.get(wish.VARIABLE):
        message.spec.environment[wish.VARIABLE] = attempt.split.mesh
    for volatile in (
        "phase",
        "exit_code",
        "message",
        "endpoint",
        "lost",
        "stuck",
        "ending",
        "unfit",
        "isolation",
    ):  # the agent's own news is not sent back
        message.task.ClearField(volatile)
    return message
