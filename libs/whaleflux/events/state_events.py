"""The event of a state change: the one shape in which every owner's publisher says it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from whaleflux.events.publisher import EntryChange, OutgoingEvent
from whaleflux.events.subjects import HUB, Subject
from whaleflux.reasons import What
from whaleflux.v1 import events_pb2, types_pb2


def state_event(
    change: EntryChange,
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
    at: datetime | None = None,
    asked: types_pb2.Change | None = None,
) -> OutgoingEvent:
    """`what` is the new state, "CREATED" or "DELETED"; `kind` the last token of the subject where it differs from that.

    `at`: when it happened, as the record says; None: when it was asked for, or now. `asked`: who asked for it (`asked_for`), unless
    the cause says that already. The cause's traceparent, when there is one, goes into the headers, so that consumers
    continue its trace.
    """
    said = types_pb2.Cause()
    if cause is not None:
        said.CopyFrom(cause)
    if asked is not None:
        said.actor, said.message = said.actor or asked.actor, said.message or asked.reason
    said.actor = said.actor or source
    event = events_pb2.Event(
        id=change.id,
        resource=resource,
        what=what,
        previous=previous,
        revision=change.revision,
        epoch=epoch,
        cause=said,
        message=message,
        source=source,
        site=site,
        attributes={key: value for key, value in (attributes or {}).items() if value},
    )
    event.publish_time.FromDatetime(now)
    if at is not None:
        event.time.FromDatetime(at)
    elif asked is not None and asked.HasField("time"):
        event.time.CopyFrom(asked.time)
    else:
        event.time.CopyFrom(event.publish_time)
    headers = {"traceparent": said.traceparent} if said.traceparent else None
    return OutgoingEvent(str(Subject.of(resource, kind or what)), event.SerializeToString(), headers)


def asked_for(old: Any, new: Any) -> types_pb2.Change | None:
    """Who asked for this change of a record that has `last_change`; None: nobody did, a rule of its owner decided."""
    if new is None:
        deleted = old is not None and old.last_change.what == What.DELETED
        return old.last_change if deleted else None
    if not new.HasField("last_change") or (old is not None and old.last_change == new.last_change):
        return None
    change: types_pb2.Change = new.last_change
    return change
