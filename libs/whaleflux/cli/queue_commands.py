"""Queues: lines of jobs in a tree, each with a share of the fleet, a guarantee, limits, and those whom it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output, queue_tree
from whaleflux.cli.output import Column, Format
from whaleflux.cli.reservation_commands import reservations, told
from whaleflux.cli.state import NoHeaders, Output, Yes, confirm, fleet, pages
from whaleflux.cli.strangers import note_strangers

_LIMITS = frozenset({"max_gpus", "parent", "guaranteed_gpus", "lending_limit_gpus"})
_MOST_NAMED = 5

queue = typer.Typer(no_args_is_help=True, help="Queues: make, change, list, delete.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Queue.")]
Weight = Annotated[
    float | None, typer.Option("--weight", min=0.001, max=1e6, help="Share relative to other queues; 1 at first.")
]
MaxGpus = Annotated[
    int | None, typer.Option("--max-gpus", min=0, max=100_000_000, help="Most GPUs held at once; 0: no limit.")
]
MaxPriority = Annotated[
    int | None, typer.Option("--max-priority", min=0, max=1000, help="Highest that users may give; 100 at first.")
]
Parent = Annotated[
    str | None, typer.Option("--parent", metavar="NAME", help='Queue above it, in which its GPUs count, too; "": none.')
]
Guaranteed = Annotated[
    int | None,
    typer.Option("--guaranteed", min=0, max=100_000_000, help="GPUs that it gets whenever its jobs ask for them."),
]
Lend = Annotated[
    str | None,
    typer.Option("--lend", metavar="N", help='Most GPUs of its unused guarantee that others may hold; "all" at first.'),
]
DataQuota = Annotated[
    str | None,
    typer.Option("--data-quota", metavar="SIZE", help='Most data held on nodes, such as "10 TB"; 0: no limit.'),
]
Member = Annotated[
    list[str] | None, typer.Option("--member", metavar="MEMBER", help="users/NAME or groups/NAME whom it is for.")
]


@queue.command("create")
def create(
    name: Name,
    weight: Weight = None,
    max_gpus: MaxGpus = None,
    member: Member = None,
    max_priority: MaxPriority = None,
    parent: Parent = None,
    guaranteed: Guaranteed = None,
    lend: Lend = None,
    data_quota: DataQuota = None,
) -> None:
    """Makes a queue. Without members it is open to all users; with some, it does not exist for others.

    \b
      whaleflux queue create research --weight 3 --max-gpus 64
      whaleflux queue create vision --parent research --guaranteed 16 --lend 8
      whaleflux queue create secret --member groups/red-team --member users/ann --max-priority 300
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2 as pb

    made = pb.Queue(
        weight=weight or 1.0,
        max_gpus=max_gpus or 0,
        members=member or (),
        max_priority=max_priority,
        parent=_full(parent, "--parent") if parent else "",
        guaranteed_gpus=guaranteed or 0,
        lending_limit_gpus=_lent(lend),
        data_quota_bytes=_size(data_quota),
    )
    with fleet() as client:
        request = pb.CreateQueueRequest(queue_id=name, queue=made, request_id=names.ulid())
        made = client.scheduler.CreateQueue(request, timeout=10)
        note_strangers(client, member or ())
    output.note(f"{made.name}: {_limits(made)}; jobs choose it with: queue: {name}")


@queue.command("set")
def set_(
    name: Name,
    weight: Weight = None,
    max_gpus: MaxGpus = None,
    member: Member = None,
    remove_member: Annotated[
        list[str] | None, typer.Option("--remove-member", metavar="MEMBER", help="Whom it is no longer for.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="No members: it is for all users.")] = False,
    max_priority: MaxPriority = None,
    parent: Parent = None,
    guaranteed: Guaranteed = None,
    lend: Lend = None,
    data_quota: DataQuota = None,
) -> None:
    """Changes a queue; effective at once for what waits. What runs goes on, until somebody asks for what they are guaranteed.

    \b
      whaleflux queue set research --max-gpus 128
      whaleflux queue set research --max-gpus 0                 no limit
      whaleflux queue set research --member users/bob           for him too, beside those whom it is for
      whaleflux queue set research --remove-member users/bob
      whaleflux queue set research --max-priority 500
      whaleflux queue set vision --guaranteed 32 --lend all
      whaleflux queue set vision --data-quota "10 TB"           of datasets on nodes, for its jobs and pins
      whaleflux queue set vision --parent ""                    right below the fleet
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import scheduler_pb2 as pb

    given = (
        *(("weight", weight), ("max_gpus", max_gpus), ("max_priority", max_priority)),
        *(("parent", parent), ("guaranteed_gpus", guaranteed), ("lending_limit_gpus", lend)),
        ("data_quota_bytes", data_quota),
    )
    changed = [field for field, value in given if value is not None] + ["members"] * open_
    if not (changed or member or remove_member):
        raise InvalidArgument(FieldViolation("--weight", "nothing to change; see: whaleflux queue set --help"))
    if open_ and (member or remove_member):
        raise InvalidArgument(FieldViolation("--open", "means no members; leave it out to add or remove some"))
    wanted = pb.Queue(
        name=_full(name),
        weight=weight or 0.0,
        max_gpus=max_gpus or 0,
        max_priority=max_priority,
        parent=_full(parent, "--parent") if parent else "",
        guaranteed_gpus=guaranteed or 0,
        lending_limit_gpus=_lent(lend),
        data_quota_bytes=_size(data_quota),
    )
    request = pb.UpdateQueueRequest(queue=wanted, add_members=member or (), remove_members=remove_member or ())
    request.update_mask.paths.extend(changed)
    with fleet() as client:
        made = client.scheduler.UpdateQueue(request, timeout=10)
        note_strangers(client, member or ())
        stuck = [] if _LIMITS.isdisjoint(changed) else queue_tree.stuck(listed_queues(client))
    output.note(f"{made.name}: {_limits(made)}")
    output.note(stuck_words(stuck))


def stuck_words(stuck: Sequence[str]) -> str:
    """What to know about jobs that limits keep from ever starting; "" where there are none."""
    if not stuck:
        return ""
    more = f" and {len(stuck) - _MOST_NAMED} more" if len(stuck) > _MOST_NAMED else ""
    return (
        f"under these limits {', '.join(stuck[:_MOST_NAMED])}{more} can never start: raise the limits, or ask for fewer GPUs; see "
        f"whaleflux explain {stuck[0]}"
    )


@queue.command("show")
def show(name: Name, fmt: Output = Format.table) -> None:
    """One queue: its place in the tree, share, guarantee, limits, whom it is for."""
    from whaleflux.v1 import scheduler_pb2 as pb

    with fleet() as client:
        found = client.scheduler.GetQueue(pb.GetQueueRequest(name=_full(name)), timeout=10)
        row = next((row for row in _rows(client) if row.queue.name == found.name), None)
        kept = [one for one in reservations(client) if one.queue == found.name]
    lines = [
        ("name", found.name),
        ("parent", found.parent or "-"),
        ("weight", f"{found.weight or 1:g}"),
        ("guaranteed gpus", str(row.guaranteed if row else found.guaranteed_gpus)),
        ("lends", _lends(found)),
        ("max gpus", str(found.max_gpus or "no limit")),
        ("holds", f"{row.held} GPUs, {row.borrowed} of them borrowed" if row else "not known"),
        ("data", _data(found)),
        ("fair share", f"{row.share} GPUs beyond its guarantee, by weight" if row else "-"),
        ("reservations", "; ".join(map(told, kept)) or "none"),
        ("can never start", ", ".join(found.use.stuck_jobs) or "none that is known"),
        ("max priority", f"{_max_priority(found)} of users; operators may give any"),
        ("for", ", ".join(found.members) or "all users"),
        ("made", output.age(found.create_time) + " ago"),
    ]
    output.show_one(found, lines, fmt)


@queue.command("rm")
def remove(name: Name, yes: Yes = False) -> None:
    """Deletes a queue without unfinished jobs and without queues below it."""
    from whaleflux.v1 import scheduler_pb2 as pb

    with fleet() as client:
        confirm(f"delete {_full(name)}?", yes)
        client.scheduler.DeleteQueue(pb.DeleteQueueRequest(name=_full(name)), timeout=10)
    output.note(f"{_full(name)} is deleted")


@queue.command("ls")
def list_(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """The tree of queues: what they hold, are guaranteed, borrow, and may hold."""
    queues(fmt, no_headers)


def queues(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """The tree of queues; the same as `whaleflux queue ls`."""
    with fleet() as client:
        listed = {row.queue.name: row for row in _rows(client)}
    columns = [
        Column("NAME", lambda q: "  " * listed[q.name].level + q.name),
        Column("WEIGHT", lambda q: f"{q.weight or 1:g}"),
        Column("HELD", lambda q: str(listed[q.name].held)),
        Column("GUARANTEED", lambda q: str(listed[q.name].guaranteed or "-")),
        Column("BORROWED", lambda q: str(listed[q.name].borrowed if listed[q.name].guaranteed else "-")),
        Column("LENDS", _lends),
        Column("MAX GPUS", lambda q: str(q.max_gpus or "-")),
        Column("FAIR SHARE", lambda q: listed[q.name].share),
        Column("MAX PRIORITY", lambda q: str(_max_priority(q))),
        Column("FOR", lambda q: ", ".join(q.members) or "all users"),
        Column("AGE", lambda q: output.age(q.create_time)),
    ]
    output.show([row.queue for row in listed.values()], columns, fmt, headers=not no_headers)


def _rows(client: Any) -> list[queue_tree.QueueRow]:
    from whaleflux.v1 import scheduler_pb2 as pb

    listed = listed_queues(client)
    held = _held(pages(client.scheduler.ListAllocations, pb.ListAllocationsRequest(), "allocations"))
    return queue_tree.rows(listed, held)


def listed_queues(client: Any) -> list[Any]:
    """All that there are for the caller."""
    from whaleflux.v1 import scheduler_pb2 as pb

    return list(pages(client.scheduler.ListQueues, pb.ListQueuesRequest(), "queues"))


def _held(allocations: list[Any]) -> Counter[str]:
    """GPUs held by queue; those that wait for the end of what cannot be ended too."""
    held: Counter[str] = Counter()
    for allocation in allocations:
        held[names.top(allocation.job)] += len(allocation.task.gpu_uuids)
    return held


def _lent(lend: str | None) -> int | None:
    """The lending limit that was asked for, None for none."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    if lend in (None, "all"):
        return None
    if not (lend.isascii() and lend.isdecimal() and len(lend) < 10):
        raise InvalidArgument(
            FieldViolation("--lend", f'{lend[:20]!r} is no number of GPUs; use 0 to 100000000, or "all"')
        )
    return int(lend)


def _size(text: str | None) -> int:
    """Bytes that were typed; 0 for none."""
    from whaleflux import quantities
    from whaleflux.errors import FieldViolation, InvalidArgument

    try:
        return quantities.size_bytes(text) if text else 0
    except ValueError as wrong:
        raise InvalidArgument(FieldViolation("--data-quota", str(wrong))) from None


def _data(queue: Any) -> str:
    from whaleflux.quantities import shown_bytes

    most = f"at most {shown_bytes(queue.data_quota_bytes)}" if queue.data_quota_bytes else "no limit"
    held = shown_bytes(queue.use.held_data_bytes) if queue.HasField("use") else "not known how much"
    return f"{held} held on nodes, {most}"


def _lends(queue: Any) -> str:
    return f"at most {queue.lending_limit_gpus}" if queue.HasField("lending_limit_gpus") else "all"


def _full(name: str, typed: str = "NAME") -> str:
    return names.queue(names.check_id(typed, name.removeprefix("queues/")))


def _limits(queue: Any) -> str:
    from whaleflux.quantities import shown_bytes

    most = f"at most {queue.max_gpus} GPUs at once" if queue.max_gpus else "no limit of GPUs"
    whom = f"for {', '.join(queue.members)}" if queue.members else "for all users"
    firm = f"{queue.guaranteed_gpus} GPUs guaranteed, " if queue.guaranteed_gpus else ""
    place = f"below {queue.parent}, " if queue.parent else ""
    data = f"at most {shown_bytes(queue.data_quota_bytes)} of data on nodes, " if queue.data_quota_bytes else ""
    return f"{place}weight {queue.weight or 1:g}, {firm}{most}, {data}priority up to {_max_priority(queue)}, {whom}"


def _max_priority(queue: Any) -> int:
    from whaleflux.trust.ownership import DEFAULT_MAX_PRIORITY  # not at start: few commands need it

    return int(queue.max_priority) if queue.HasField("max_priority") else DEFAULT_MAX_PRIORITY
