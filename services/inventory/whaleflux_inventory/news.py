"""What inventory publishes: the birth, intent and facts of nodes; datasets, sites and join tokens coming, changing and going."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TypeVar

from google.protobuf.message import Message

from whaleflux import names
from whaleflux.events.publisher import EntryChange, OutgoingEvent
from whaleflux.events.state_events import asked_for, state_event
from whaleflux.reasons import What
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_inventory import convert

SOURCE = "inventory"


def of_node(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, DELETED, the new intent, or CHANGED."""
    new, old = _both(change, pb.Node)
    node = new or old or pb.Node()
    before, asked = convert.intent_of(old).value if old else "", asked_for(old, new)
    what: str
    if new is None:
        what, message = What.DELETED, f"{node.name} is forgotten"
    elif old is None:
        what, message = What.CREATED, f"{node.name} joined with {len(node.facts.gpus)} GPU(s)"
    elif (after := convert.intent_of(new).value) != before:
        what, message = after, f"{node.name} is {after}" + (f": {new.intent_reason}" if new.intent_reason else "")
    else:
        told = asked.reason if asked is not None else ""
        what, message = What.CHANGED, told or f"{node.name} reports other facts, or its labels or price were set"
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=node.name,
        what=what,
        previous=before,
        kind=what.lower() if isinstance(what, What) else "intent",
        message=message,
        site=names.top(node.name),
        attributes={"gpus": str(len(node.facts.gpus)), "simulated": str(node.facts.simulated).lower()},
        asked=asked,
    )


def of_dataset(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, DELETED, CHANGED when pins were, or COPIES when a node's copy came or went."""
    new, old = _both(change, pb.Dataset)
    dataset = new or old or pb.Dataset()
    if new is None:
        what, message = What.DELETED, f"{dataset.name} is forgotten"
    elif old is None:
        what, message = What.CREATED, f"{dataset.name} is declared, {dataset.size_bytes} bytes"
    elif new.last_change.what == What.DELETED:
        return None  # about to go
    elif new.last_change != old.last_change:
        what, message = What.CHANGED, new.last_change.reason
    else:
        what, message = What.COPIES, f"{dataset.name} is cached on {len(dataset.copies)} node(s)"
    whose = {"owner": dataset.owner, "members": ",".join(dataset.members)}
    return _told(change, now, dataset.name, what, message, asked_for(old, new), whose)


def of_site(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED."""
    new, old = _both(change, pb.Site)
    if new is None or old is not None:
        return None
    return _told(change, now, new.name, What.CREATED, new.display_name, asked_for(old, new))


def of_join_token(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, USED, DELETED; nothing of the secret."""
    record, before = _both(change, pb.JoinTokenRecord)
    new, old = record.token if record else None, before.token if before else None
    token = new or old or pb.JoinToken()
    asked = asked_for(old, new)
    if new is None:
        return _told(change, now, token.name, What.DELETED, "revoked" if asked else "it has ended", asked)
    if old is None:
        return _told(change, now, token.name, What.CREATED, f"admits one node to {token.site}", asked)
    if token.used_by and not old.used_by:
        return _told(
            change, now, token.name, What.USED, f"by {token.used_by}", types_pb2.Change(actor=f"{SOURCE}/joining")
        )
    return None


M = TypeVar("M", bound=Message)


def _both(change: EntryChange, kind: type[M]) -> tuple[M | None, M | None]:
    """The record after and before the change."""
    new = kind.FromString(change.new.value) if change.new else None
    return new, kind.FromString(change.old.value) if change.old else None


def _told(
    change: EntryChange,
    now: datetime,
    name: str,
    what: str,
    message: str,
    asked: types_pb2.Change | None,
    attributes: Mapping[str, str] | None = None,
) -> OutgoingEvent:
    return state_event(
        change, now, source=SOURCE, resource=name, what=what, message=message, asked=asked, attributes=attributes
    )
