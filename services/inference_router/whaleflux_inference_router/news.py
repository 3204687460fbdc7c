"""What the router publishes: models coming, changing and going, and each replica's change of state."""

from __future__ import annotations

from datetime import datetime

from whaleflux.events.changes import state_news
from whaleflux.events.publisher import Change, News
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router.convert import state_of

SOURCE = "inference_router"


def of_model(change: Change, now: datetime) -> News:
    entry = change.new or change.old
    name = pb.Model.FromString(entry.value).name if entry else ""
    what = "DELETED" if change.new is None else "CREATED" if change.old is None else "CHANGED"
    return state_news(change, now, source=SOURCE, resource=name, what=what)


def of_replica(change: Change, now: datetime) -> News | None:
    """The new state; nothing for writes that leave it as it was."""
    entry = change.new or change.old
    replica = pb.Replica.FromString(entry.value) if entry else pb.Replica()
    previous = state_of(pb.Replica.FromString(change.old.value)).value if change.old else ""
    what = state_of(replica).value if change.new else "GONE"
    if what == previous:
        return None
    attributes = {"address": replica.address, "node": replica.node, "gpu_model": replica.gpu_model}
    return state_news(
        change,
        now,
        source=SOURCE,
        resource=replica.name,
        what=what,
        previous=previous,
        message=replica.message,
        attributes={key: value for key, value in attributes.items() if value},
    )
