"""What is told of moves: that one was ordered, that the job runs where it was to go, or that nothing came of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from whaleflux import names
from whaleflux.events.publisher import EntryChange, OutgoingEvent
from whaleflux.events.state_events import state_event
from whaleflux.events.subjects import HUB
from whaleflux.reasons import What
from whaleflux.v1 import events_pb2, types_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.going_on import MOVED_HERE
from whaleflux_scheduler.core.observed import EndReason

_MOVED = f"{EndReason.MOVED}: "


def of_move(change: EntryChange, now: datetime, old: pb.Job | None, new: pb.Job | None) -> OutgoingEvent | None:
    """MOVE_ORDERED, MOVED or MOVE_UNDONE, beside the event of the state itself."""
    found = _what(old, new) if old is not None and new is not None else None
    if found is None or new is None:
        return None
    what, message = found
    event = state_event(
        change,
        now,
        source="scheduler",
        resource=new.name,
        what=what,
        message=message,
        site=_site(new),
        epoch=new.epoch,
        cause=types_pb2.Cause(traceparent=new.attempt.traceparent, message=_why(new), actor="scheduler/rebalance"),
        attributes={"uid": new.uid, "submitter": new.submitter, "from": _nodes(new), "to": _claimed(new)},
    )
    told = events_pb2.Event.FromString(event.data)
    told.id = f"{change.id}-move"  # the change of state is told under the change's own
    return replace(event, data=told.SerializeToString(), id=told.id)


def _what(old: pb.Job, new: pb.Job) -> tuple[What, str] | None:
    running = pb.JOB_STATE_RUNNING
    if old.state == new.state == running and old.claim.purpose != new.claim.purpose:
        if new.claim.purpose == pb.CLAIM_PURPOSE_MOVE:
            return What.MOVE_ORDERED, new.cause.message
        if old.claim.purpose == pb.CLAIM_PURPOSE_MOVE:
            return What.MOVE_UNDONE, "its new place was lost, or not free in time: it runs on where it is"
    if old.state != running and new.state == running:
        return _runs_again(new, _last_end(new))
    return None


def _last_end(job: pb.Job) -> str:
    """How the last attempt before this one ended, of those that ran: a new place may have refused it in between."""
    return next((past.end_reason for past in reversed(job.past_attempts) if past.HasField("run_time")), "")


def _runs_again(new: pb.Job, ended: str) -> tuple[What, str] | None:
    if not ended.startswith(_MOVED):
        return None
    if MOVED_HERE in new.decision.reasons:
        return What.MOVED, f"runs on {_nodes(new)}; {ended.removeprefix(_MOVED)}"
    return What.MOVE_UNDONE, f"its new place was lost: it runs on {_nodes(new)}"


def _why(job: pb.Job) -> str:
    return job.cause.message if job.HasField("claim") else _last_end(job).removeprefix(_MOVED)


def _nodes(job: pb.Job) -> str:
    return ",".join(dict.fromkeys(task.node for task in job.attempt.tasks))[:1000]


def _claimed(job: pb.Job) -> str:
    return ",".join(claimed.node for claimed in job.claim.nodes)[:1000]


def _site(job: pb.Job) -> str:
    sites = {names.top(task.node) for task in job.attempt.tasks}
    return sites.pop() if len(sites) == 1 else HUB
