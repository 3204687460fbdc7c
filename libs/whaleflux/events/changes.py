"""The event of a state change: the one shape in which every owner's publisher says it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from whaleflux.events.publisher import Change, News
from whaleflux.events.subjects import HUB, Subject, change_id
from whaleflux.v1 import events_pb2, types_pb2


def state_news(
    change: Change,
    now: datetime,
    *,
    source: str,
    resource: str,
    what: str,
    previous: str = "",
    message: str = "",
    kind: str = "",
    site: str = HUB,
    epoch: int = 0,
    cause: types_pb2.Cause | None = None,
    attributes: Mapping[str, str] | None = None,
) -> News:
    """`what` is the new state, "CREATED" or "DELETED"; `kind` the last token of the subject where it differs from that.

    The cause's traceparent, when there is one, goes into the headers, so that consumers continue its trace.
    """
    event = events_pb2.Event(
        id=change_id(change.key, change.revision),
        resource=resource,
        what=what,
        previous=previous,
        revision=change.revision,
        epoch=epoch,
        cause=cause,
        message=message,
        source=source,
        site=site,
        attributes=dict(attributes or {}),
    )
    event.time.FromDatetime(now)
    headers = {"traceparent": cause.traceparent} if cause is not None and cause.traceparent else None
    return News(str(Subject.of(resource, kind or what)), event.SerializeToString(), headers)
