"""Inventory's messages <-> its core."""

from __future__ import annotations

import hashlib
from datetime import UTC

from google.protobuf.message import Message

from whaleflux import convert
from whaleflux.fleet import Node
from whaleflux.rpc.etags import etag_of
from whaleflux.store.api import Entry
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory.core.facts import Presence
from whaleflux_inventory.core.intents import Intent
from whaleflux_inventory.core.tokens import Token

_INTENTS: dict[pb.NodeIntent, Intent] = {
    pb.NODE_INTENT_UNSPECIFIED: Intent.ACTIVE,
    pb.NODE_INTENT_ACTIVE: Intent.ACTIVE,
    pb.NODE_INTENT_CORDONED: Intent.CORDONED,
    pb.NODE_INTENT_DRAINING: Intent.DRAINING,
    pb.NODE_INTENT_RETIRED: Intent.RETIRED,
}
_INTENT_NUMBERS = {intent: number for number, intent in _INTENTS.items()}


def site_of(entry: Entry) -> pb.Site:
    """A stored site with its etag."""
    site = pb.Site.FromString(entry.value)
    site.etag = etag_of(entry)
    return site


def node_of(entry: Entry) -> pb.Node:
    """A stored node with its etag."""
    node = pb.Node.FromString(entry.value)
    node.etag = etag_of(entry)
    return node


def dataset_of(entry: Entry) -> pb.Dataset:
    """A stored dataset with its etag."""
    dataset = pb.Dataset.FromString(entry.value)
    dataset.etag = etag_of(entry)
    return dataset


def shown_token(entry: Entry) -> pb.JoinToken:
    """A stored token without anything secret."""
    return pb.JoinTokenRecord.FromString(entry.value).token


def token_of(record: pb.JoinTokenRecord) -> Token:
    """The core's view of a stored token."""
    expires = record.token.expire_time.ToDatetime(tzinfo=UTC)
    token = record.token
    return Token(token.site, record.secret_sha256, expires, token.used_by, record.key_sha256, token.node)


def intent_of(node: pb.Node) -> Intent:
    """The operator's intent; a number from a newer version counts as ACTIVE."""
    return _INTENTS.get(node.intent, Intent.ACTIVE)


def intent_number(intent: Intent) -> pb.NodeIntent:
    """The contract's number of an intent."""
    return _INTENT_NUMBERS[intent]


def facts_of(request: pb.RegisterNodeRequest) -> Node:
    """The registering node as the domain sees it, before the operator's overrides."""
    return convert.node_from_proto(pb.Node(name=request.name, facts=request.facts))


def presence_of(request: pb.RegisterNodeRequest) -> Presence:
    """What the registration says besides the node itself."""
    facts = request.facts
    return Presence(
        boot_id=request.boot_id,
        address=facts.address,
        host_address=facts.host_address,
        driver_version=facts.driver_version,
        agent_version=facts.agent_version,
        runtimes=tuple(facts.runtimes),
        conditions=tuple((c.type, c.reason, c.message) for c in facts.conditions),
    )


def fingerprint(request_id: str, *parts: Message | str) -> str:
    """Identifies a create request by its id and content; "" without an id (then nothing is idempotent)."""
    if not request_id:
        return ""
    digest = hashlib.sha256(request_id.encode())
    for part in parts:
        data = part.encode() if isinstance(part, str) else part.SerializeToString(deterministic=True)
        digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()
