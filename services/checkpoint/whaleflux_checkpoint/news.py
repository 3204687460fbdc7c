"""What the checkpoint service publishes: each checkpoint's change of state."""

from __future__ import annotations

from datetime import datetime

from whaleflux.events.changes import state_news
from whaleflux.events.publisher import Change, News
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_checkpoint.convert import state_of


def of_checkpoint(change: Change, now: datetime) -> News | None:
    """COMMITTED, EXPIRED, ..., DELETED; nothing for writes that leave the state as it was."""
    entry = change.new or change.old
    known = pb.Checkpoint.FromString(entry.value) if entry else pb.Checkpoint()
    previous = state_of(pb.Checkpoint.FromString(change.old.value)).value if change.old else ""
    what = state_of(known).value if change.new else "DELETED"
    if what == previous:
        return None
    return state_news(
        change,
        now,
        source="checkpoint",
        resource=known.name,
        what=what,
        previous=previous,
        message=f"step {known.step} of epoch {known.epoch}" + (f": {known.message}" if known.message else ""),
        epoch=known.epoch,
        cause=types_pb2.Cause(resource=known.name.rsplit("/checkpoints/", 1)[0], traceparent=known.traceparent),
    )
