"""What the scheduler publishes: each job's change of state, and queues coming and going."""

from __future__ import annotations

from datetime import datetime

from whaleflux.events.changes import state_news
from whaleflux.events.publisher import Change, News
from whaleflux.events.subjects import HUB
from whaleflux.store import keys
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1 import types_pb2

SOURCE = "scheduler"


def of_change(change: Change, now: datetime) -> News | None:
    """Events of jobs and queues; nothing for writes that leave a job's state as it was."""
    return of_queue(change, now) if change.key.startswith(keys.QUEUES) else of_job(change, now)


def of_job(change: Change, now: datetime) -> News | None:
    """QUEUED, STARTING, RUNNING, RECOVERING, ..., DELETED."""
    new = pb.Job.FromString(change.new.value) if change.new else None
    old = pb.Job.FromString(change.old.value) if change.old else None
    job = new or old or pb.Job()
    previous = _state(old) if old else ""
    what = _state(new) if new else "DELETED"
    if what == previous:
        return None
    parent = job.cause.traceparent or job.traceparent
    cause = types_pb2.Cause(resource=job.cause.resource, traceparent=parent, message=job.cause.message)
    nodes = ",".join(dict.fromkeys(task.node for task in job.attempt.tasks))
    attributes = {"gpus": str(job.spec.gpus), "cost_usd": f"{job.cost_usd:.4f}", "nodes": nodes[:4000]}
    return state_news(
        change,
        now,
        source=SOURCE,
        resource=job.name,
        what=what,
        previous=previous,
        message=job.state_message,
        site=_site(job),
        epoch=job.epoch,
        cause=cause,
        attributes=attributes,
    )


def of_queue(change: Change, now: datetime) -> News | None:
    """CREATED or DELETED."""
    entry = change.new or change.old
    if entry is None or (change.old is not None and change.new is not None):
        return None
    queue = pb.Queue.FromString(entry.value)
    what = "CREATED" if change.new else "DELETED"
    limit = f", at most {queue.max_gpus} GPUs" if queue.max_gpus else ""
    return state_news(
        change, now, source=SOURCE, resource=queue.name, what=what, message=f"weight {queue.weight:g}{limit}"
    )


def _state(job: pb.Job) -> str:
    return pb.JobState.Name(job.state).removeprefix("JOB_STATE_")


def _site(job: pb.Job) -> str:
    """The one site of the attempt, "hub" for none or several."""
    sites = {task.node.split("/")[1] for task in job.attempt.tasks}
    return sites.pop() if len(sites) == 1 else HUB
