"""What inventory publishes: the birth, intent and facts of nodes, and datasets coming, moving and going."""

from __future__ import annotations

from datetime import datetime

from whaleflux.events.changes import state_news
from whaleflux.events.publisher import Change, News
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
    return state_news(
        change,
        now,
        source=SOURCE,
        resource=node.name,
        what=what,
        previous=before,
        kind={"CREATED": "created", "DELETED": "deleted", "CHANGED": "changed"}.get(what, "intent"),
        message=message,
        site=node.name.split("/")[1],
        attributes={"gpus": str(len(node.facts.gpus)), "simulated": str(node.facts.simulated).lower()},
    )


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
    return state_news(change, now, source=SOURCE, resource=dataset.name, what=what, message=message)
