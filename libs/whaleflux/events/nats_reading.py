"""Reading what a JetStream stream keeps: one short-lived consumer per question, which keeps no position.

A consumer with filters reads by the server's index of subjects, so that one resource's history costs what it holds, not
what the stream holds. `no_wait` makes the server say at once that there is no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as Inbox
from nats.js.api import AckPolicy, ConsumerConfig

from whaleflux import names
from whaleflux.errors import StatusError
from whaleflux.events.api import READ_TIMEOUT_S, Excerpt, Start, StoredEvent

if TYPE_CHECKING:
    from whaleflux.events.nats import NatsBus

BATCH = 250
BATCH_BYTES = 8 << 20
FORGOTTEN_S = 30.0  # a consumer that we could not delete
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


async def read(bus: NatsBus, stream: str, filters: Sequence[str], start: Start, limit: int) -> Excerpt:
    """See `Bus.read`."""
    from whaleflux.events.nats import beginning

    js = bus.jetstream()
    config = ConsumerConfig(
        name=f"read-{names.ulid()}",
        filter_subjects=list(filters),
        ack_policy=AckPolicy.NONE,
        inactive_threshold=FORGOTTEN_S,
        mem_storage=True,
        num_replicas=1,
        **beginning(start),
    )
    consumer, kept = await asyncio.gather(
        bus.call(js.add_consumer(stream, config), READ_TIMEOUT_S),
        bus.call(js.stream_info(stream), READ_TIMEOUT_S),
    )
    try:
        matching = consumer.num_pending or 0
        events = await _fetch(bus, stream, str(config.name), min(limit, matching))
    finally:
        with contextlib.suppress(StatusError):
            await bus.call(js.delete_consumer(stream, str(config.name)), READ_TIMEOUT_S)
    return Excerpt(tuple(events), matching, kept.state.first_seq, kept.state.last_seq)


async def _fetch(bus: NatsBus, stream: str, consumer: str, wanted: int) -> list[StoredEvent]:
    """The next `wanted` events, or fewer when the stream dropped some meanwhile."""
    if not wanted:
        return []
    inbox = bus.client.new_inbox()
    arrivals = await bus.call(bus.client.subscribe(f"{inbox}.*"))
    found: list[StoredEvent] = []
    try:
        while len(found) < wanted:
            batch = min(BATCH, wanted - len(found))
            reply = f"{inbox}.{len(found)}"
            asked = json.dumps({"batch": batch, "no_wait": True, "max_bytes": BATCH_BYTES}).encode()
            await bus.call(bus.client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}", asked, reply=reply))
            more = await _batch(bus, arrivals, reply, batch)
            if not more:
                break
            found += more
    finally:
        with contextlib.suppress(StatusError):
            await bus.call(arrivals.unsubscribe())
    return found


async def _batch(bus: NatsBus, arrivals: Inbox, reply: str, batch: int) -> list[StoredEvent]:
    """What one request brings; the server's words on an earlier one may come in between."""
    found: list[StoredEvent] = []
    while len(found) < batch:
        message = await bus.call(arrivals.next_msg(READ_TIMEOUT_S), READ_TIMEOUT_S + 1)
        if not (message.headers or {}).get("Status"):
            found.append(_stored(message))
        elif message.subject == reply:  # no more, or this batch has as many bytes as it may
            break
    return found


def _stored(message: Msg) -> StoredEvent:
    headers = message.headers or {}
    return StoredEvent(
        sequence=message.metadata.sequence.stream,
        subject=message.subject,
        data=message.data,
        id=headers.get("Nats-Msg-Id", ""),
        headers={name: value for name, value in headers.items() if not name.startswith("Nats-")},
        timestamp=taken_at(message.reply),
    )


def taken_at(reply: str) -> datetime:
    """When the stream took the event, rounded down, so that a consumer that starts at this instant gets it.

    The acknowledgement's subject tells: $JS.ACK.<stream>.<consumer>.<...>.<ns>.<pending>, in newer servers with domain
    and account in front. The client's own reading goes through a float and may round up.
    """
    tokens = reply.split(".")
    return _EPOCH + timedelta(microseconds=int(tokens[7 if len(tokens) == 9 else 9]) // 1000)
