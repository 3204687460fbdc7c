"""What the checkpoint service publishes: each checkpoint's change of state."""

from __future__ import annotations

from datetime import UTC, datetime

from whaleflux.events.publisher import EntryChange, OutgoingEvent
from whaleflux.events.state_events import state_event
from whaleflux.reasons import What
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_checkpoint.convert import state_of


def of_checkpoint(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """COMMITTED, EXPIRED, ..., DELETED; nothing for writes that leave the state as it was."""
    entry = change.new or change.old
    known = pb.Checkpoint.FromString(entry.value) if entry else pb.Checkpoint()
    previous = state_of(pb.Checkpoint.FromString(change.old.value)).value if change.old else ""
    what = state_of(known).value if change.new else What.DELETED
    if what == previous:
        return None
    return state_event(
        change,
        now,
        source="checkpoint",
        resource=known.name,
        what=what,
        previous=previous,
        message=f"step {known.step} of epoch {known.epoch}" + (f": {known.message}" if known.message else ""),
        epoch=known.epoch,
        cause=types_pb2.Cause(resource=known.name.rsplit("/checkpoints/", 1)[0], traceparent=known.traceparent),
        at=_at(known, what),
    )


def _at(checkpoint: pb.Checkpoint, what: str) -> datetime | None:
    """When it came to that, as far as its record says."""
    field = {"WRITING": "create_time", "COMMITTED": "commit_time"}.get(what, "")
    known = bool(field) and checkpoint.HasField(field)
    return getattr(checkpoint, field).ToDatetime(tzinfo=UTC) if known else None
