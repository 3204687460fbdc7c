"""Reservations: GPUs that are kept for a queue's jobs from one time to another, and nodes under maintenance."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, Yes, confirm, fleet, node_name, pages
from whaleflux.cli.strangers import note_strangers

reservation = typer.Typer(
    no_args_is_help=True, help="Reservations: GPUs kept for jobs that come, and nodes under maintenance."
)

_SHORTEST, _LONGEST = timedelta(minutes=1), timedelta(days=366)
_FAR = timedelta(days=100_000)  # further ahead than any that is taken, and a time that can be written

Name = Annotated[str, typer.Argument(metavar="NAME", help="Reservation.")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, max=20_000, help="How many GPUs to keep.")]
Start = Annotated[
    str,
    typer.Option("--start", metavar="TIME", help="When it begins: +2h, or 2026-12-24T08:00Z (UTC without an offset)."),
]
End = Annotated[str, typer.Option("--end", metavar="TIME", help="When it is over, as --start.")]
For = Annotated[str, typer.Option("--for", metavar="TIME", help="How long it lasts: 8h, 3d; instead of --end.")]
Nodes = Annotated[str, typer.Option("--nodes", metavar="N,N", help="Only GPUs of these nodes: n1,onprem/n2.")]
Member = Annotated[
    list[str] | None,
    typer.Option(
        "--member", metavar="MEMBER", help="Of the queue's jobs, those of users/NAME or groups/NAME; may be repeated."
    ),
]
Reason = Annotated[str, typer.Option("--message", "-m", help="What it is for.")]


@reservation.command("create")
def create(
    name: Name,
    gpus: Gpus = None,
    gpu_type: Annotated[
        str,
        typer.Option(
            "--gpu-type",
            metavar="TYPE",
            help="Only GPUs of this type; any: of several types. At first all are of one type.",
        ),
    ] = "",
    queue: Annotated[
        str, typer.Option("--queue", metavar="QUEUE", help="Whose jobs may use it; default at first.")
    ] = "",
    start: Start = "+0s",
    end: End = "",
    for_: For = "",
    nodes: Nodes = "",
    member: Member = None,
    maintenance: Annotated[
        bool, typer.Option("--maintenance", help="Keep the nodes free of all work; they come back by themselves.")
    ] = False,
    message: Reason = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which GPUs would be kept.")] = False,
    fmt: Output = Format.table,
) -> None:
    """Keeps GPUs for a queue's jobs from one time to another, or nodes free for maintenance. Refused where that cannot be kept.

    \b
      whaleflux reservation create launch --gpus 64 --queue research --start 2026-12-24T08:00Z --for 3d
      whaleflux reservation create demo --gpus 8 --gpu-type H200 --start +2h --for 1h --member users/ann
      whaleflux reservation create kernel --maintenance --nodes n1,n2 --start +1d --for 2h -m "kernel update"
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2 as pb

    if not maintenance:
        queue = queue or names.last(names.DEFAULT_QUEUE)
    asked = pb.Reservation(
        gpus=gpus or 0,
        gpu_type=gpu_type,
        queue=_queue(queue),
        members=member or (),
        maintenance=maintenance,
        reason=message,
    )
    _set_times(asked, datetime.now(UTC), start, end, for_)
    with fleet() as client:
        asked.nodes.extend(_nodes(client, nodes))
        request = pb.CreateReservationRequest(
            reservation_id=name, reservation=asked, validate_only=dry_run, request_id=names.ulid()
        )
        made = client.scheduler.CreateReservation(request, timeout=30)
        note_strangers(client, member or ())
    if fmt is not Format.table:
        output.show_one(made, [], fmt)
        return
    output.note(f"{made.name}{' would keep' if dry_run else ''}: {_what(made)}, {_when(made)}")
    if made.held:
        output.note(f"on {_places(made.held)}")
    if not maintenance and not dry_run:
        output.note(f"jobs use it with: reservation: {name}")


@reservation.command("update")
def update(
    name: Name,
    gpus: Gpus = None,
    start: Start = "",
    end: End = "",
    for_: For = "",
    nodes: Nodes = "",
    member: Member = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="What it is for.")] = None,
) -> None:
    """Changes a reservation: its end at any time, its start until it has begun. What it keeps already it keeps first.

    \b
      whaleflux reservation update launch --for 5d
      whaleflux reservation update launch --gpus 96
      whaleflux reservation update kernel --start +2d --for 2h
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import scheduler_pb2 as pb

    given = (
        *(("gpus", gpus), ("start_time", start or None), ("end_time", (end or for_) or None)),
        *(("nodes", nodes or None), ("members", member), ("reason", message)),
    )
    paths = [path for path, value in given if value is not None]
    if not paths:
        raise InvalidArgument(FieldViolation("--gpus", "nothing to change; see: whaleflux reservation update --help"))
    with fleet() as client:
        known = client.scheduler.GetReservation(pb.GetReservationRequest(name=_full(name)), timeout=10)
        wanted = pb.Reservation(
            name=known.name, etag=known.etag, gpus=gpus or 0, members=member or (), reason=message or ""
        )
        wanted.start_time.CopyFrom(known.start_time)
        wanted.nodes.extend(_nodes(client, nodes))
        begins = known.start_time.ToDatetime(tzinfo=UTC)
        if start or end or for_:
            _set_times(wanted, datetime.now(UTC), start, end, for_, begins=begins, whole=bool(end or for_))
        request = pb.UpdateReservationRequest(reservation=wanted)
        request.update_mask.paths.extend(paths)
        made = client.scheduler.UpdateReservation(request, timeout=30)
        note_strangers(client, member or ())
    output.note(f"{made.name}: {_what(made)}, {_when(made)}")


@reservation.command("show")
def show(name: Name, fmt: Output = Format.table) -> None:
    """One reservation: its time, whose it is, its GPUs, what it lacks, and who was asked to leave for it."""
    from whaleflux.v1 import scheduler_pb2 as pb

    with fleet() as client:
        found = client.scheduler.GetReservation(pb.GetReservationRequest(name=_full(name)), timeout=10)
    lines = [
        ("name", found.name),
        ("state", state_of(found)),
        ("time", _when(found)),
        ("keeps", _what(found)),
        ("for", _whom(found)),
        ("on", _places(found.held) if found.held else ", ".join(found.nodes) or "-"),
        (
            "short",
            f"{found.short_gpus} GPUs: nodes were lost, and no others are free in its time"
            if found.short_gpus
            else "no",
        ),
        ("asked to leave", ", ".join(found.victims) or "nobody"),
        ("what for", found.reason or "-"),
        ("made", f"{output.age(found.create_time)} ago by {found.creator or '-'}"),
    ]
    output.show_one(found, lines, fmt)


@reservation.command("ls")
def list_(
    all_: Annotated[bool, typer.Option("--all", "-a", help="Ended ones too.")] = False,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """Reservations and maintenance, the first to begin first."""
    with fleet() as client:
        listed = reservations(client, ended=all_)
    columns = [
        Column("NAME", lambda r: r.name),
        Column("STATE", state_of),
        Column("START", lambda r: _at(r.start_time)),
        Column("END", lambda r: _at(r.end_time)),
        Column("KEEPS", _what),
        Column("SHORT", lambda r: str(r.short_gpus or "-")),
        Column("FOR", _whom),
        Column("NODES", lambda r: _places(r.held) if r.held else ", ".join(map(names.last, r.nodes)), wide=True),
        Column("WHAT FOR", lambda r: r.reason or "-", wide=True),
    ]
    none = "nothing is reserved; see: whaleflux reservation create --help"
    output.show(listed, columns, fmt, headers=not no_headers, empty=none)


@reservation.command("rm")
def remove(name: Name, yes: Yes = False) -> None:
    """Gives a reservation up: its GPUs are everybody's at once. Jobs on them go on, those that wait for it wait as others do."""
    from whaleflux.v1 import scheduler_pb2 as pb

    with fleet() as client:
        confirm(f"give up {_full(name)}?", yes)
        client.scheduler.DeleteReservation(pb.DeleteReservationRequest(name=_full(name)), timeout=10)
    output.note(f"{_full(name)} is deleted")


def reservations(client: Any, *, ended: bool = False) -> list[Any]:
    """All that are there for the caller, the first to begin first."""
    from whaleflux.v1 import scheduler_pb2 as pb

    request = pb.ListReservationsRequest(page_size=1000, show_ended=ended)
    listed = pages(client.scheduler.ListReservations, request, "reservations")
    return sorted(listed, key=lambda one: (one.start_time.ToNanoseconds(), one.name))


def state_of(one: Any) -> str:
    """SCHEDULED, ACTIVE, ENDED."""
    from whaleflux.v1 import scheduler_pb2 as pb

    return output.enum_name(pb.ReservationState, one.state, "RESERVATION_STATE_")


def told(one: Any) -> str:
    """In a few words, for other lists."""
    return f"{names.last(one.name)}: {_what(one)}, {_when(one)}"


def under_maintenance(client: Any) -> dict[str, str]:
    """Nodes that are, or will be, kept free of work, with the first such time."""
    found: dict[str, str] = {}
    for one in reservations(client):
        for node in one.nodes if one.maintenance else ():
            found.setdefault(node, f"MAINTENANCE {_at(one.start_time)} to {_at(one.end_time)}")
    return found


def _set_times(
    asked: Any, now: datetime, start: str, end: str, for_: str, *, begins: datetime | None = None, whole: bool = True
) -> None:
    """`begins`: when it begins unless `start` says otherwise; `whole`: an end is needed."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    if bool(end) + bool(for_) != 1 and whole:
        fix = "say when it is over: --end TIME, or --for TIME and how long it lasts"
        raise InvalidArgument(
            FieldViolation("--end", "is said twice: by --end TIME, or by --for TIME; leave one out" if end else fix)
        )
    first = _instant("--start", start, now) if start else begins or now
    asked.start_time.FromDatetime(first)
    if end:
        asked.end_time.FromDatetime(_instant("--end", end, now))
    elif for_:
        asked.end_time.FromDatetime(first + _lasts(for_))


def _lasts(text: str) -> timedelta:
    from whaleflux.errors import FieldViolation, InvalidArgument

    span = _span("--for", text)
    if not _SHORTEST <= span <= _LONGEST:
        raise InvalidArgument(FieldViolation("--for", f"{text[:40]!r} is not between 1 min and 366 d; use such a time"))
    return span


def _instant(flag: str, text: str, now: datetime) -> datetime:
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.quantities import instant

    if text.startswith("+"):
        return now + min(_span(flag, text[1:]), _FAR)
    try:
        return instant(text)
    except ValueError as wrong:
        raise InvalidArgument(FieldViolation(flag, f"{text[:40]!r} {wrong}, or +2h from now")) from None


def _span(flag: str, text: str) -> timedelta:
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.quantities import seconds

    try:
        return timedelta(seconds=seconds(text))
    except ValueError as wrong:
        raise InvalidArgument(FieldViolation(flag, f"{text[:40]!r} {wrong}")) from None
    except OverflowError:
        raise InvalidArgument(FieldViolation(flag, f"{text[:40]!r} is too long; use at most 366 d")) from None


def _nodes(client: Any, given: str) -> list[str]:
    return [node_name(client, name.strip()) for name in given.split(",") if name.strip()]


def _queue(name: str) -> str:
    return names.queue(names.check_id("--queue", name.removeprefix("queues/"))) if name else ""


def _full(name: str) -> str:
    return names.reservation(name.removeprefix("reservations/"))


def _at(stamp: Any) -> str:
    return str(stamp.ToDatetime(tzinfo=UTC).strftime("%Y-%m-%dT%H:%MZ"))


def _when(one: Any) -> str:
    return f"{_at(one.start_time)} to {_at(one.end_time)}"


def _what(one: Any) -> str:
    if one.maintenance:
        return f"{len(one.nodes)} node{'s' * (len(one.nodes) != 1)} free of work"
    kind = one.gpu_type if one.gpu_type not in ("", "any") else "GPU" + "s" * (one.gpus != 1)
    return f"{one.gpus} {kind}"


def _whom(one: Any) -> str:
    if one.maintenance:
        return "maintenance"
    some = f", {', '.join(one.members[:3])}" + " and more" * (len(one.members) > 3) if one.members else ""
    return f"{one.queue}{some}"


def _places(held: Iterable[Any]) -> str:
    shown = [f"{names.last(part.node)} ({len(part.gpu_uuids)})" for part in held]
    return ", ".join(shown[:8]) + f" and {len(shown) - 8} more" * (len(shown) > 8)
