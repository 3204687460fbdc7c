"""A job as one caller may read it: what is private of others' is left out, and what their texts say of jobs that are not there for the caller.

Of a job that is seen and not read, what stays is named here, so that a field that is new is private until somebody says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from google.protobuf.message import Message

from whaleflux.trust.sight import OTHERS_JOB, Sight
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.planned_sizes import PLANNED_ANEW, SIZES

_SPEC = frozenset(
    {
        "gpus", "nodes", "gpu", "placement", "priority", "on_partition", "deadline_time", "budget_usd", "kind", "cpu_millicores_per_rank",
        "memory_bytes_per_rank", "stop_grace", "sites", "launch_once", "array", "time_limit", "expected", "ranks", "goal", "elastic", "reservation",
    }
)  # fmt: skip
_JOB = frozenset(
    {
        "name", "spec", "state", "epoch", "attempt", "restarts", "recoveries", "decision", "create_time", "start_time", "end_time", "step",
        "cost_usd", "cost_micros", "past_attempts", "submitter", "not_before_time", "uid", "run_s", "latest_end_time", "priority", "state_time", "gpu_s",
        "step_time", "etag", "state_message", "cause", "hold", "last_change", "cancel_requested",
    }
)  # fmt: skip
_ATTEMPT = frozenset(
    {
        "epoch", "tasks", "allocate_time", "run_time", "end_time", "end_reason", "incident", "communication_s", "usd_per_hour", "started",
        "number", "gpus_by_model", "step",
        "first_step_time", "best_communication_s", "best_free_communication_s", "micros_per_hour",
    }
)  # fmt: skip
_TASK = frozenset(
    {
        "id", "node", "gpu_uuids", "first_rank", "group_rank", "phase", "exit_code", "lost", "ending", "unfit", "share_memory_bytes",
        "gpu_parts", "ranks", "global_ranks",
    }
)  # fmt: skip
PUBLIC = {
    "JobSpec": _SPEC,
    "Job": _JOB,
    "Attempt": _ATTEMPT,
    "Task": _TASK,
}  # by message: what others than its team read

_WAITS_HELD = re.compile(r"^(waits: held by [^:]*):.*", re.DOTALL)
_QUOTING = frozenset({pb.DECISION_KIND_INTERRUPTED, pb.DECISION_KIND_ENDED, pb.DECISION_KIND_HELD})


def shown(job: pb.Job, sight: Sight, queue: str) -> pb.Job:
    """The job, which is the caller's to see, as it may be read; changes `job` itself."""
    if sight.everything:
        return job
    if not sight.reads(queue, job.submitter):
        _only_public(job)
    _without_others(job, sight)
    return job


def shown_task(task: pb.Task) -> pb.Task:
    """The part on a node of a job that is not the caller's to read; changes `task` itself."""
    _keep(task, _TASK)
    return task


def shown_decision(decision: pb.Decision, sight: Sight, own: str) -> pb.Decision:
    """Why a job waits or runs where it does, without others' names; changes `decision` itself."""
    if sight.everything:
        return decision
    decision.summary = sight.cleaned(decision.summary, own)
    decision.smallest_change = sight.cleaned(decision.smallest_change, own)
    for texts in (decision.reasons, decision.ahead, decision.preempts):
        texts[:] = [sight.cleaned(text, own) for text in texts]
    return decision


def without_data(decision: pb.Decision) -> pb.Decision:
    """Without what says which data the job reads and how it splits its model, for those whose it is not; changes `decision` itself."""
    decision.reasons[:] = [
        text for text in decision.reasons if "datasets/" not in text and not text.startswith((PLANNED_ANEW, SIZES))
    ]
    return decision


def shown_history(
    decisions: Iterable[pb.JobDecision], sight: Sight, own: str, *, reads: bool
) -> Iterator[pb.JobDecision]:
    """What was decided, without others' names; why an attempt ended may quote what its program printed, which is not for all."""
    for one in decisions:
        if not reads:
            one.message = "" if one.kind in _QUOTING else _without_why(one.message)
        one.message = sight.cleaned(one.message, own)
        yield one


def shown_account(record: pb.AccountRecord, sight: Sight, queue: str) -> pb.AccountRecord:
    """What a job was and cost; changes `record` itself. Why it ended may quote what its program printed."""
    if not sight.reads(queue, record.submitter):
        record.end_reason = _kind_of_end(record.end_reason) if record.attempt else ""
        record.ClearField("loss")
    else:
        record.end_reason = sight.cleaned(record.end_reason, record.job)
    return record


def _only_public(job: pb.Job) -> None:
    waits = job.state == pb.JOB_STATE_QUEUED and job.state_message.startswith(job.decision.summary)
    _keep(job, _JOB)
    _keep(job.spec, _SPEC)
    for attempt in (*job.past_attempts, *([job.attempt] if job.HasField("attempt") else ())):
        _keep(attempt, _ATTEMPT)
        attempt.end_reason = _kind_of_end(attempt.end_reason)
        for task in attempt.tasks:
            _keep(task, _TASK)
    if job.HasField("decision"):
        without_data(job.decision)
    if job.HasField("hold"):
        job.decision.summary = _without_why(job.decision.summary)
    job.state_message = job.decision.summary if waits else ""
    _keep(job.cause, frozenset({"actor"}))
    _keep(job.hold, frozenset({"by", "time"}))
    _keep(job.last_change, frozenset({"actor", "what", "time"}))


def _without_others(job: pb.Job, sight: Sight) -> None:
    own = job.name
    job.state_message = sight.cleaned(job.state_message, own)
    if job.HasField("decision"):
        shown_decision(job.decision, sight, own)
    if job.HasField("claim"):
        job.claim.victims[:] = sight.known(job.claim.victims)
    if job.HasField("cause"):
        job.cause.message = sight.cleaned(job.cause.message, own)
        job.cause.resource = sight.cleaned(job.cause.resource, own)
    for attempt in (*job.past_attempts, *([job.attempt] if job.HasField("attempt") else ())):
        attempt.end_reason = sight.cleaned(attempt.end_reason, own)
    for awaited in job.awaits:
        if not sight.sees_named(awaited.job):
            awaited.job = OTHERS_JOB


def _without_why(text: str) -> str:
    """Of a job that is held, who holds it, without the words of why."""
    return text.partition(": ")[0] if text.startswith("held by ") else _WAITS_HELD.sub(r"\1", text)


def _kind_of_end(reason: str) -> str:
    """PREEMPTED, EXIT, ...: what follows it may be the program's own words."""
    return reason.partition(":")[0]


def _keep(message: Message, fields: frozenset[str]) -> None:
    for field, _ in message.ListFields():
        if field.name not in fields:
            message.ClearField(field.name)
