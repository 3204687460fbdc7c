"""What the scheduler publishes: each job's change of state, queues coming and going, and reservations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

from whaleflux import names
from whaleflux.convert import enum_name
from whaleflux.events.publisher import EntryChange, OutgoingEvent
from whaleflux.events.state_events import asked_for, state_event
from whaleflux.events.subjects import HUB
from whaleflux.quantities import shown_bytes
from whaleflux.reasons import What
from whaleflux.store import keys
from whaleflux.v1 import events_pb2, types_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import accounts, convert, move_news, promise_news, ray_records, reservation_records

SOURCE = "scheduler"


def of_change(change: EntryChange, now: datetime) -> Iterable[OutgoingEvent]:
    """Events of jobs and queues, nothing for writes that leave a job's state as it was; and what is over of a job, for accounting."""
    if change.key.startswith(keys.QUEUES):
        told = of_queue(change, now)
        return () if told is None else (told,)
    if change.key.startswith(keys.RESERVATIONS):
        told = reservation_records.of_change(change, now)
        return () if told is None else (told,)
    if change.key.startswith(keys.RAY_CLUSTERS):
        told = ray_records.of_change(change, now)
        return () if told is None else (told,)
    new = convert.JOBS.read(change.new.value) if change.new else None
    old = convert.JOBS.read(change.old.value) if change.old else None
    events = (
        of_job(change, now, old, new),
        of_resize(change, now, old, new),
        move_news.of_move(change, now, old, new),
        promise_news.of_promise(change, now, old, new),
    )
    return (*(event for event in events if event is not None), *accounts.of_change(old, new))


def of_resize(change: EntryChange, now: datetime, old: pb.Job | None, new: pb.Job | None) -> OutgoingEvent | None:
    """RESIZED when an elastic job runs again with another number of GPUs; why stands in the message."""
    if (
        old is None
        or new is None
        or new.state != pb.JOB_STATE_RUNNING
        or old.state == new.state
        or not new.past_attempts
    ):
        return None
    last, end = new.past_attempts[-1], "resized: "
    before, after = (sum(len(task.gpu_uuids) for task in attempt.tasks) for attempt in (last, new.attempt))
    if not last.end_reason.startswith(end) or before == after:
        return None
    why = last.end_reason.removeprefix(end)
    event = state_event(
        change,
        now,
        source=SOURCE,
        resource=new.name,
        what=What.RESIZED,
        message=f"runs with {after} GPUs instead of {before}: {why}",
        site=_site(new),
        epoch=new.epoch,
        cause=types_pb2.Cause(traceparent=new.attempt.traceparent, message=why, actor=f"{SOURCE}/resized"),
        attributes=_facts(new) | {"gpus_before": str(before)},
    )
    told = events_pb2.Event.FromString(event.data)
    told.id = f"{change.id}-resized"  # the change of state is told under the change's own
    return replace(event, data=told.SerializeToString(), id=told.id)


def of_job(change: EntryChange, now: datetime, old: pb.Job | None, new: pb.Job | None) -> OutgoingEvent | None:
    """The new state (QUEUED, STARTING, RUNNING, ...), or DELETED.

    In the same state: what somebody asked for, and LOSS_NOT_FINITE when a job that goes on first reports NaN or infinity.
    """
    job = new or old or pb.Job()
    previous, asked = _state(old) if old else "", asked_for(old, new)
    what, message = _state(new) if new else What.DELETED, job.state_message
    at = convert.instant(job, "state_time") if new else None
    if old is not None and at == convert.instant(old, "state_time"):
        at = None  # an older version wrote it, or nothing of the state changed
    if new is None:
        message = f"its record is deleted; it was {previous}"
    elif old is None and new.state == pb.JOB_STATE_QUEUED:
        message = message or f"submitted, for {new.spec.gpus} GPU{'s' * (new.spec.gpus != 1)}"
    elif what == previous and asked is not None and asked.what != What.DELETED:
        what, message = asked.what or What.CHANGED, asked.reason
    elif what == previous:
        if not _loss_not_finite(job) or (old and _loss_not_finite(old)):
            return None
        what, message = What.LOSS_NOT_FINITE, f"the loss is {job.loss} at step {job.step}"
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=job.name,
        what=what,
        previous=previous,
        message=message,
        site=_site(job),
        epoch=job.epoch,
        cause=_cause(job, what, asked, old),
        attributes=_facts(job),
        at=at,
        asked=asked,
    )


def _cause(job: pb.Job, what: str, asked: types_pb2.Change | None, old: pb.Job | None) -> types_pb2.Cause:
    """What led to a state; who deleted or changed the record stands elsewhere, and the trace goes on."""
    parent = job.cause.traceparent or job.traceparent
    if what != _state(job):
        pruned = what == What.DELETED and asked is None
        return types_pb2.Cause(traceparent=parent, actor=f"{SOURCE}/pruning" if pruned else "")
    told = (
        old is not None and old.cause.message == job.cause.message
    )  # by the event before: what follows has its own words
    message = "" if told else job.cause.message
    return types_pb2.Cause(resource=job.cause.resource, traceparent=parent, message=message, actor=job.cause.actor)


def _facts(job: pb.Job) -> dict[str, str]:
    attempt = job.attempt
    exits = [task.exit_code for task in attempt.tasks if task.phase == pb.TASK_PHASE_EXITED and task.exit_code]
    return {
        "uid": job.uid,
        "submitter": job.submitter,
        "gpus": str(_gpus(job)),
        "cost_usd": f"{job.cost_usd:.4f}",
        "nodes": ",".join(dict.fromkeys(task.node for task in attempt.tasks))[:4000],
        "attempt": str(attempt.number or ""),
        "end_reason": attempt.end_reason.partition(":")[0],
        "exit_code": str(exits[0]) if exits else "",
        "incident": attempt.incident,
        "preempts": ",".join(job.decision.preempts)[:1000] if job.state == pb.JOB_STATE_STARTING else "",
    }


def _gpus(job: pb.Job) -> int:
    """What it has, where that is not one number; else what it asks for."""
    if (
        job.spec.elastic.min
        and job.state not in (pb.JOB_STATE_QUEUED, pb.JOB_STATE_UNSPECIFIED)
        and job.HasField("attempt")
    ):
        return sum(len(task.gpu_uuids) for task in job.attempt.tasks)
    return job.spec.gpus


def of_queue(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, DELETED, or CHANGED when somebody asked for it."""
    entry = change.new or change.old
    if entry is None:
        return None
    queue = pb.Queue.FromString(entry.value)
    what = What.DELETED if change.new is None else What.CREATED if change.old is None else What.CHANGED
    if what == What.CHANGED and queue.last_change.what == What.DELETED:
        return None  # about to go
    old = pb.Queue.FromString(change.old.value) if change.old else None
    limit = f", {queue.guaranteed_gpus} GPUs guaranteed" if queue.guaranteed_gpus else ""
    limit += f", at most {queue.max_gpus} GPUs" if queue.max_gpus else ""
    limit += f", at most {shown_bytes(queue.data_quota_bytes)} of data on nodes" if queue.data_quota_bytes else ""
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=queue.name,
        what=what,
        message=f"weight {queue.weight:g}{limit}",
        at=convert.instant(queue, "create_time") if what == What.CREATED else None,
        asked=asked_for(old, queue if change.new else None),
    )


def _loss_not_finite(job: pb.Job) -> bool:
    return job.HasField("loss") and not math.isfinite(job.loss)


def _state(job: pb.Job) -> str:
    return enum_name(pb.JobState, job.state, "JOB_STATE_")


def _site(job: pb.Job) -> str:
    """The one site of the attempt, "hub" for none or several."""
    sites = {names.top(task.node) for task in job.attempt.tasks}
    return sites.pop() if len(sites) == 1 else HUB
