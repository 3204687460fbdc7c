"""What inventory publishes: the birth, intent and facts of nodes, and datasets coming, moving and going."""

from __future__ import annotations

from datetime import datetime

from whaleflux.events.publisher import Change, News
from whaleflux.events.subjects import HUB, Subject, change_id
from whaleflux.v1 import events_pb2
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import convert

SOURCE = "inventory"


def of_node(change: Change, now: datetime) -> News:
    """CREATED, DELETED, the new intent, or CHANGED."""
    new = pb.Node.FromString(change.new.value) if change.new else None
    old = pb.Node.FromString(change.old.value) if change.old else None
    node = new or old or pb.Node()
    before = convert.intent_of(old).value if old else ""
    if new is None:
        what, message = "DELETED", f"{node.name} is forgotten"
    elif old is None:
        what, message = "CREATED", f"{node.name} joined with {len(node.facts.gpus)} GPU(s)"
    elif (after := convert.intent_of(new).value) != before:
        what, message = after, f"{node.name} is {after}" + (f": {new.intent_reason}" if new.intent_reason else "")
    else:
        what, message = "CHANGED", f"{node.name} reports other facts, or its labels or price were set"
    site = node.name.split("/")[1]
    event = _event(change, now, resource=node.name, what=what, previous=before, message=message, site=site)
    event.attributes["gpus"] = str(len(node.facts.gpus))
    event.attributes["simulated"] = str(node.facts.simulated).lower()
    kind = {"CREATED": "created", "DELETED": "deleted", "CHANGED": "changed"}.get(what, "intent")
    return News(str(Subject.of(node.name, kind)), event.SerializeToString())


def of_dataset(change: Change, now: datetime) -> News:
    """CREATED, DELETED, or COPIES when a node's copy came or went."""
    entry = change.new or change.old
    dataset = pb.Dataset.FromString(entry.value) if entry else pb.Dataset()
    if change.new is None:
        what, message = "DELETED", f"{dataset.name} is forgotten"
    elif change.old is None:
        what, message = "CREATED", f"{dataset.name} is declared, {dataset.size_bytes} bytes"
    else:
        what, message = "COPIES", f"{dataset.name} is cached on {len(dataset.copies)} node(s)"
    event = _event(change, now, resource=dataset.name, what=what, previous="", message=message, site=HUB)
    return News(str(Subject.of(dataset.name, what.lower())), event.SerializeToString())


def _event(
    change: Change, now: datetime, *, resource: str, what: str, previous: str, message: str, site: str
) -> events_pb2.Event:
    event = events_pb2.Event(
        id=change_id(change.key, change.revision),
        resource=resource,
        what=what,
        previous=previous,
        revision=change.revision,
        message=message,
        source=SOURCE,
        site=site,
    )
    event.time.FromDatetime(now)
    return event
