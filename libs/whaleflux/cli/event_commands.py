"""What happened: the events that are kept of everything, and as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.filters import Since, since_s
from whaleflux.cli.output import Format
from whaleflux.cli.state import NoHeaders, Output, fleet

if TYPE_CHECKING:
    from whaleflux.sdk.client import Client
    from whaleflux.v1.events_pb2 import Event

Until = Annotated[str, typer.Option("--until", metavar="TIME", help="Before this: 5m, 1h, or 2026-12-01T08:00Z.")]


def events(
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Go on as things happen.")] = False,
    for_: Annotated[
        str, typer.Option("--for", metavar="WHAT", help="job/NAME, node/NAME, model/NAME, ..., or a part of a name.")
    ] = "",
    kind: Annotated[str, typer.Option(help="Of these kinds: job,node,incident,checkpoint,...")] = "",
    what: Annotated[str, typer.Option(help="Only this happening: preempted,running.")] = "",
    since: Since = "",
    until: Until = "",
    number: Annotated[
        int, typer.Option("-n", help="The newest so many, when --since is not given.", min=1, max=10_000)
    ] = 200,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """What happened in the fleet, oldest first, with who asked for it or which rule decided.

    \b
      whaleflux events                                the newest 200
      whaleflux events --for job/llama-70b-sft        all that happened to a job, also one that is deleted
      whaleflux events --for node/n1 --since 2d
      whaleflux events -w -o jsonl | jq .what

    With -w, json is an event a line, as jsonl is: it has no end. Kept for days (setting events_days of inventory). What a job cost is kept for longer: whaleflux history.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli import kept_events
    from whaleflux.v1 import events_pb2

    wanted = events_pb2.EventFilter(
        kinds=_listed(kind), what=[word.upper().replace("-", "_") for word in _listed(what)]
    )
    for field, text in (("since", since), ("until", until)):
        if text:
            getattr(wanted, field).FromNanoseconds(int(since_s(text, f"--{field}") * 1e9))
    with fleet() as client:
        wanted.resource = kept_events.resource_of(client, for_)
        part = "" if wanted.resource else for_
        if since:
            found, last = kept_events.since(client, wanted, part)
        else:
            found, last = kept_events.newest(client, wanted, number, part)
        if not found and wanted.resource:
            check_exists(client, wanted.resource)
        lines = Format.jsonl if watch and fmt is Format.json else fmt  # what has no end is no document
        show(found, lines, headers=not no_headers, empty="" if watch else _nothing(for_))
        if watch:
            try:
                for event in kept_events.follow(client, wanted, last):
                    if part in event.resource:
                        show([event], lines, headers=False)
            except KeyboardInterrupt:
                return


def show(found: list[Event], fmt: Format, *, headers: bool = True, empty: str = "") -> None:
    """One line each, so that lines that come later look the same."""
    from whaleflux.cli import kept_events

    if fmt is Format.table:
        for event in found:
            output.say(kept_events.line(event))
        output.note("" if found else empty)
    else:
        output.show(found, kept_events.columns(), fmt, headers=headers, empty=empty, name=lambda event: event.resource)


def check_exists(client: Client, resource: str) -> None:
    """Raises NotFound for a job, node or model of which there is neither a record nor a history."""
    from whaleflux.v1 import inventory_pb2, router_pb2, scheduler_pb2

    kind = names.collections(resource)[-1]
    if kind == "jobs":
        client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=resource), timeout=10)
    elif kind == "nodes":
        client.inventory.GetNode(inventory_pb2.GetNodeRequest(name=resource), timeout=10)
    elif kind == "models":
        client.router.GetModel(router_pb2.GetModelRequest(name=resource), timeout=10)


def _nothing(of: str) -> str:
    return f"nothing is kept of {of}" if of else "nothing is kept; what happens is shown with: whaleflux events -w"


def _listed(text: str) -> list[str]:
    return [word.strip().lower() for word in text.split(",") if word.strip()]
