"""What is told of promised starts: that a job has one, or an earlier or later one, and that it is off."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from whaleflux.events.publisher import EntryChange, OutgoingEvent
from whaleflux.events.state_events import state_event
from whaleflux.events.subjects import HUB
from whaleflux.reasons import What
from whaleflux.v1 import events_pb2, types_pb2
from whaleflux.v1 import scheduler_pb2 as pb


def of_promise(change: EntryChange, now: datetime, old: pb.Job | None, new: pb.Job | None) -> OutgoingEvent | None:
    """PROMISED or PROMISE_LOST, while the job waits. That it started says its change of state."""
    if old is None or new is None or new.state != pb.JOB_STATE_QUEUED:
        return None
    before, start = _promised(old), _promised(new)
    if before == start:
        return None
    what = What.PROMISED if start else What.PROMISE_LOST
    event = state_event(
        change,
        now,
        source="scheduler",
        resource=new.name,
        what=what,
        message=f"starts at {start} at the latest" if start else f"it was promised to start at {before}",
        site=HUB,
        epoch=new.epoch,
        cause=types_pb2.Cause(traceparent=new.traceparent, actor="scheduler/promises"),
        attributes={"uid": new.uid, "submitter": new.submitter, "start": start, "start_before": before},
    )
    told = events_pb2.Event.FromString(event.data)
    told.id = f"{change.id}-promise"  # a change of state is told under the change's own
    return replace(event, data=told.SerializeToString(), id=told.id)


def _promised(job: pb.Job) -> str:
    """When it starts at the latest, in UTC; "": it was not promised anything."""
    if not job.HasField("claim") or job.claim.purpose != pb.CLAIM_PURPOSE_RESERVATION:
        return ""
    return job.claim.start_time.ToDatetime().isoformat(timespec="seconds") + "Z"
