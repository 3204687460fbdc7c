"""Events as they are kept: whose, from when, and how one is shown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.output import Column
from whaleflux.cli.state import job_name, node_name

if TYPE_CHECKING:
    from whaleflux.sdk.client import Client
    from whaleflux.v1.events_pb2 import Event, EventFilter

MOST = 10_000  # that are read at once; narrow it by time for more
_PAGE = 500
# fmt: off
_FULL = ("queues/", "sites/", "models/", "incidents/", "datasets/", "joinTokens/", "apiKeys/", "reservations/", "rayClusters/")
_TYPES = ("job", "node", "model", "replica", "incident", "checkpoint", "queue", "reservation", "dataset", "site", "raycluster")
# fmt: on
_COLLECTIONS = {f"{kind}s" for kind in _TYPES} | {"joinTokens", "apiKeys"}


def resource_of(client: Client, wanted: str) -> str:
    """The full name behind TYPE/NAME; "" for what is only a part of a name: without a slash, or with a collection ("jobs/llama") in it.

    Raises InvalidArgument for a type that there is not, and for a node that no site has.
    """
    from whaleflux.errors import FieldViolation, InvalidArgument

    kind, slash, name = wanted.partition("/")
    if wanted.startswith(_FULL):
        return wanted
    if not slash:
        return ""
    owner, _, item = name.rpartition("/")
    match kind:
        case "job":
            return job_name(name)
        case "node":
            return node_name(client, name)
        case "replica":
            return names.replica(owner, item)
        case "checkpoint":
            queue, job = names.split(job_name(owner), "queues", "jobs")
            return names.join(("queues", queue), ("jobs", job), ("checkpoints", item))
        case "raycluster":
            return names.ray_cluster(name)
        case "model" | "queue" | "reservation" | "incident" | "dataset" | "site":
            return names.join((f"{kind}s", name))
    if _COLLECTIONS.isdisjoint(wanted.split("/")):
        known = f"TYPE is one of {', '.join(_TYPES)}, or give a full name, or a part of one without a slash"
        raise InvalidArgument(FieldViolation("--for", f"{wanted[:100]!r} is no TYPE/NAME; {known}"))
    return ""


def newest(client: Client, wanted: EventFilter, most: int, part: str = "") -> tuple[list[Event], int]:
    """The newest `most` events, oldest first, whose resource's name has `part` in it, and where a watch goes on."""
    return _read(client, wanted, most, part, oldest_first=False)


def since(client: Client, wanted: EventFilter, part: str = "") -> tuple[list[Event], int]:
    """All from the filter's beginning on, oldest first, and where a watch goes on; says so when there are more than MOST."""
    found, last = _read(client, wanted, MOST, part, oldest_first=True)
    if len(found) == MOST:
        output.note(f"these are the first {MOST}; narrow it with --since, --until or --for")
    return found, last


def _read(client: Client, wanted: EventFilter, most: int, part: str, *, oldest_first: bool) -> tuple[list[Event], int]:
    from whaleflux.v1 import events_pb2

    request = events_pb2.ListEventsRequest(filter=wanted, oldest_first=oldest_first, page_size=min(most, _PAGE))
    found: list[Event] = []
    while True:
        answer = client.events.ListEvents(request, timeout=20)
        found += [event for event in answer.events if part in event.resource]
        if not answer.next_page_token or len(found) >= most:
            break
        request.page_token = answer.next_page_token
    once = {event.id: event for event in found[:most]}
    return sorted(once.values(), key=lambda event: (event.time.ToNanoseconds(), event.sequence)), answer.last_sequence


def follow(client: Client, wanted: EventFilter, after: int) -> Iterator[Event]:
    """Events behind `after` as they come, each once; waits out a control plane that is away for a while."""
    from whaleflux.errors import StatusError
    from whaleflux.sdk.resume import FOLLOW_OUTAGE_S, Patience
    from whaleflux.v1 import events_pb2

    patience = Patience(FOLLOW_OUTAGE_S)
    while True:
        request = events_pb2.WatchEventsRequest(filter=wanted, after_sequence=after)
        pause_s = 0.2
        try:
            for answer in client.events.WatchEvents(request):
                patience.received()
                if answer.event.sequence > after:
                    after = answer.event.sequence
                    yield answer.event
        except StatusError as error:
            if (longer_s := patience.pause_s(error, time.monotonic())) is None:
                raise
            pause_s = longer_s
        time.sleep(pause_s)


def columns() -> list[Column]:
    """Of an event; times are local for people and Unix seconds for programs."""
    return [
        Column("TIME", lambda e: shown_time(e.time), value=lambda e: e.time.ToNanoseconds() / 1e9),
        Column("WHAT", lambda e: e.what),
        Column("RESOURCE", lambda e: e.resource),
        Column("MESSAGE", message_of),
        Column("BY", lambda e: e.cause.actor),
        Column("WAS", lambda e: e.previous, wide=True),
        Column("CAUSE", lambda e: e.cause.resource, wide=True),
        Column("ATTEMPT", lambda e: e.attributes.get("attempt", ""), wide=True),
        Column("NODES", lambda e: e.attributes.get("nodes", ""), wide=True),
        Column("SOURCE", lambda e: e.source, wide=True),
    ]


def line(event: Any, *, name: bool = True) -> str:
    """One event on a line."""
    by = f"({event.cause.actor})" if event.cause.actor else ""
    parts = [f"{event.what:<12}", event.resource if name else "", message_of(event), by]
    return "  ".join([shown_time(event.time), *filter(None, parts)])


def message_of(event: Any) -> str:
    """What happened, and why where that is another sentence."""
    why = event.cause.message
    return f"{event.message}: {why}" if why and why not in event.message and event.message else event.message or why


def shown_time(stamp: Any) -> str:
    """The local time of a Timestamp; with the day when it was not today's."""
    at_s = stamp.seconds + stamp.nanos / 1e9
    today = time.localtime(at_s)[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", time.localtime(at_s))
