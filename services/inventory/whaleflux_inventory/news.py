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
from whaleflux.store import keys
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


def of_offer(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, DELETED, and CHANGED when it refused a machine, or gives some again."""
    new, old = _both(change, pb.Offer)
    offer, asked = new or old or pb.Offer(), asked_for(old, new)
    if new is None:
        what, message = What.DELETED, f"{offer.name} is forgotten"
    elif old is None:
        what, message = What.CREATED, f"{offer.gpus} {offer.gpu_type} of {offer.provider} in {offer.site}"
    elif new.refusals > old.refusals:
        what, message = What.CHANGED, f"{offer.name} refused a machine: {new.refusal}"
    elif old.refusals and not new.refusals:
        what, message = What.CHANGED, f"{offer.name} gives machines again"
    else:
        return None
    return _told(change, now, offer.name, what, message, asked)


def of_lease(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """Its new state, CHANGED when it is to end or a stray machine of it was found, DELETED."""
    new, old = _both(change, pb.Lease)
    over = change.key.startswith(keys.LEASES_OVER)
    if new is None and not over:  # it is put away: its new record says what became of it
        return None
    lease = new or old or pb.Lease()
    asked = None if over and old is None else asked_for(old, new)
    before = _state(old) if old else ""
    what: str
    if new is None:
        what, message = What.DELETED, f"{lease.name} was over for long"
    elif _state(new) != before:
        what, message = _state(new), _of_state(new)
    elif list(new.strays) != list(old.strays if old else ()):
        what = What.CHANGED
        message = f"{lease.name}: {new.strays[-1]} carries its tag and is not its machine; it is ended"
    elif old is not None and new.end_reason != old.end_reason:
        what, message = What.CHANGED, f"{lease.name} is to end: {new.end_reason}"
    else:
        return None
    attributes = {"queue": lease.queue, "offer": lease.offer.name, "node": lease.node, "machine": lease.provider_id}
    attributes |= {"simulated": str(lease.offer.provider == "simulated").lower()}
    return state_event(
        change, now, source=SOURCE, resource=lease.name, what=what, previous=before, message=message, asked=asked,
        attributes=attributes,
    )  # fmt: skip


def _state(lease: pb.Lease) -> str:
    known = lease.state in pb.LeaseState.values()
    return pb.LeaseState.Name(lease.state).removeprefix("LEASE_STATE_") if known else str(lease.state)


def _of_state(lease: pb.Lease) -> str:
    """The state with what matters in it, for people."""
    offer, hours = names.last(lease.offer.name), f"{lease.offer.usd_per_hour:.2f} USD/h"
    if lease.state == pb.LEASE_STATE_GONE:
        return f"{lease.name} is over: {lease.end_reason}; {lease.spent_usd + lease.stray_usd:.2f} USD"
    if lease.state in (pb.LEASE_STATE_DRAINING, pb.LEASE_STATE_RELEASING):
        return f"{lease.name}: {lease.end_reason}"
    return f"{lease.name}: {lease.offer.gpus} {lease.offer.gpu_type} by offer {offer}, {hours}, attempt {lease.attempt}"


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
