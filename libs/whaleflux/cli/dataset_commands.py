"""Datasets: what jobs read, declared by people, cached by agents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.filters import Sort, ordered
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, Yes, confirm, fleet, node_name, pages

datasets = typer.Typer(
    invoke_without_command=True, help="Datasets that jobs read: declare, list, pin to nodes, forget. Alone: list them."
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Dataset.")]


@datasets.callback()
def listed_alone(
    context: typer.Context, sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False
) -> None:
    if context.invoked_subcommand is None:
        list_(sort, fmt, no_headers)


@datasets.command("add")
def add(
    name: Name,
    source: Annotated[
        str,
        typer.Option(
            "--source",
            metavar="PATH|URL",
            help="Absolute path, file://, http(s)://, s3://, gs:// or hf:// that all nodes read.",
        ),
    ],
    size: Annotated[
        str,
        typer.Option(
            "--size", help="Such as 300 GB, until a node has read it; jobs are placed by what they would fetch."
        ),
    ] = "0",
    secret: Annotated[
        str, typer.Option("--secret", metavar="SECRET", help="Shown to the web server as a bearer token; https only.")
    ] = "",
    basic: Annotated[bool, typer.Option("--basic", help="The secret is user:password.")] = False,
    scan: Annotated[
        bool,
        typer.Option(
            "--scan", help="Look at the source from here first: its size is declared, and what is wrong with it said."
        ),
    ] = False,
    hash_: Annotated[
        bool,
        typer.Option(
            "--hash",
            help="Read all of the source from here: its version is known at once, and nodes take from other copies what is the same.",
        ),
    ] = False,
    member: Annotated[
        list[str] | None,
        typer.Option("--member", metavar="MEMBER", help="users/NAME or groups/NAME whom it is for; none: all users."),
    ] = None,
) -> None:
    """Declares a dataset; jobs name it under `data`, and their nodes fetch and keep it.

    \b
      whaleflux datasets add c4-en --source https://data.example/c4-en.tar --size "300 GB"
      whaleflux datasets add imagenet --source /mnt/data/imagenet --size 150GB
      whaleflux datasets add fineweb --source hf://datasets/HuggingFaceFW/fineweb --scan
      whaleflux datasets add weights-2 --source /mnt/models/weights-2 --hash
      whaleflux datasets add gated --source https://data.example/gated.tar --secret data-token
      whaleflux datasets add patients --source /mnt/data/patients --member groups/clinic
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux import quantities
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import inventory_pb2 as pb

    try:
        size_bytes = quantities.size_bytes(size)
    except ValueError as wrong:
        raise InvalidArgument(FieldViolation("--size", str(wrong))) from None
    identifier = names.check_id("NAME", _id(name))
    _check_source(source)
    if scan or hash_:
        if size_bytes or secret:
            option = "--hash" if hash_ else "--scan"
            raise InvalidArgument(
                FieldViolation(option, "finds the size out, as nobody in particular: leave --size and --secret out")
            )
        size_bytes = _scanned(source)
    dataset = pb.Dataset(uri=source, size_bytes=size_bytes, members=member or ())
    if basic and not secret:
        raise InvalidArgument(FieldViolation("--basic", "says what a secret is; name one with --secret"))
    if secret:
        scheme = pb.CREDENTIAL_SCHEME_BASIC if basic else pb.CREDENTIAL_SCHEME_BEARER
        dataset.credentials.CopyFrom(pb.DatasetCredentials(secret=names.secret(secret), scheme=scheme))
    request = pb.CreateDatasetRequest(dataset_id=identifier, dataset=dataset, request_id=names.ulid())
    if hash_:
        request.manifest.CopyFrom(_hashed(source, size_bytes))
    with fleet() as client:
        made = client.inventory.CreateDataset(request, timeout=10)
    output.note(f"{made.name} is declared; jobs use it with: data: dataset:{names.last(made.name)}")


def _check_source(source: str) -> None:
    """Raises InvalidArgument for what no agent reads, before anybody looks at it: passwords are repeated by whoever fails at that."""
    from whaleflux.data import uris
    from whaleflux.errors import FieldViolation, InvalidArgument

    if uris.has_credentials(source):
        raise InvalidArgument(FieldViolation("--source", uris.PASSWORD_INSIDE))
    if not uris.readable_by_agents(source):
        raise InvalidArgument(FieldViolation("--source", uris.WANTED))


@contextmanager
def _looking() -> Iterator[None]:
    """In the block somebody looks at a source from here. Raises InvalidArgument for what agents could not pull."""
    from whaleflux.data.manifest import ManifestWrong
    from whaleflux.data.sources import SourceFailed
    from whaleflux.errors import FieldViolation, InvalidArgument

    try:
        yield
    except (SourceFailed, ManifestWrong, OSError) as wrong:
        why = f"{wrong} (as seen from here; declare it without --scan and --hash where nodes see more)"
        raise InvalidArgument(FieldViolation("--source", why)) from None


def _hashed(source: str, size_bytes: int) -> Any:
    """Its manifest, all of it read from here."""
    from whaleflux.cli.copying import Progress
    from whaleflux.data import hashing, sources

    progress = Progress(size_bytes)
    with _looking():
        found = hashing.hashed(sources.open_source(source), progress.add)
    progress.clear()
    output.note(f"all of it was read; its version is {found.digest[:16]}")
    return found.to_proto()


def _scanned(source: str) -> int:
    """Bytes that are there."""
    from whaleflux.data import manifest, sources
    from whaleflux.quantities import shown_bytes

    with _looking():
        found = manifest.draft((one.path, one.size_bytes) for one in sources.open_source(source).scan())
    output.note(f"{len(found.files)} file{'s' * (len(found.files) != 1)}, {shown_bytes(found.size_bytes)}")
    return found.size_bytes


@datasets.command("ls")
def list_(sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Datasets and where they are cached."""
    from whaleflux.v1 import inventory_pb2 as pb

    with fleet() as client:
        listed: list[Any] = pages(client.inventory.ListDatasets, pb.ListDatasetsRequest(), "datasets")
    columns = [
        Column("NAME", lambda d: d.name),
        Column("SIZE", _size),
        Column("COPIES", lambda d: str(sum(_state(copy) == "READY" for copy in d.copies))),
        Column("AGE", lambda d: output.age(d.create_time)),
        Column("FROM", lambda d: d.uri),
        Column("VERSION", lambda d: d.manifest_digest[:16] or "-", wide=True),
        Column("OWNER", lambda d: d.owner or "-", wide=True),
        Column("FOR", lambda d: ", ".join(d.members) or "all users", wide=True),
    ]
    empty = "no datasets; declare one with: whaleflux datasets add NAME --source PATH"
    output.show(ordered(listed, columns, sort), columns, fmt, headers=not no_headers, empty=empty)


@datasets.command("show")
def show(name: Name, fmt: Output = Format.table) -> None:
    """One dataset, and the nodes that hold a copy."""
    from whaleflux.quantities import shown_bytes
    from whaleflux.v1 import inventory_pb2 as pb

    with fleet() as client:
        found = client.inventory.GetDataset(pb.GetDatasetRequest(name=_full(name)), timeout=10)
    copies = [f"{c.node} ({_state(c)}, {shown_bytes(c.present_bytes)})" for c in found.copies]
    files = f"{found.file_count} files, as {found.manifest_author} found it" if found.file_count else ""
    lines = [
        ("name", found.name),
        ("from", found.uri),
        ("secret", names.last(found.credentials.secret)),
        ("size", _size(found)),
        ("version", found.manifest_digest or "not known before a node has read all of it"),
        ("files", files),
        ("pinned to", ", ".join(_pin(pin) for pin in found.pins)),
        ("declared", output.age(found.create_time) + " ago" + (f" by {found.owner}" if found.owner else "")),
        ("for", ", ".join(found.members) or "all users"),
        ("copies", ", ".join(copies) or "none yet: the first job that names it fetches it"),
    ]
    output.show_one(found, lines, fmt)


@datasets.command("where")
def where(name: Name, sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Which nodes hold a dataset, pull it, or cannot, and why."""
    from whaleflux.quantities import shown_bytes
    from whaleflux.v1 import inventory_pb2 as pb

    with fleet() as client:
        found = client.inventory.GetDataset(pb.GetDatasetRequest(name=_full(name)), timeout=10)
    columns = [
        Column("NODE", lambda c: c.node),
        Column("STATE", _state),
        Column("PRESENT", lambda c: shown_bytes(c.present_bytes)),
        Column("PINNED", lambda c: "yes" if c.pinned else "no"),
        Column("WHY", lambda c: c.message or "-"),
        Column("VERSION", lambda c: c.manifest_digest[:16] or "-", wide=True),
    ]
    empty = f"no node holds {found.name}; the first job that names it has it pulled"
    copies = ordered(list(found.copies), columns, sort)
    output.show(copies, columns, fmt, headers=not no_headers, empty=empty, name=lambda c: str(c.node))


@datasets.command("pin")
def pin(
    name: Name,
    node: Annotated[
        list[str] | None, typer.Option("--node", metavar="NODE", help="A node that is to hold it; several times.")
    ] = None,
    copies: Annotated[
        int | None,
        typer.Option("--copies", min=1, max=256, help="On how many nodes, chosen by room; 1 where no node is named."),
    ] = None,
    for_: Annotated[
        str, typer.Option("--for", metavar="TIME", help="Such as 7 d; without: until it is unpinned.")
    ] = "",
    queue: Annotated[
        str, typer.Option("--queue", metavar="NAME", help="Whose data quota counts it; without: default.")
    ] = "",
) -> None:
    """Has nodes hold a dataset also while no job needs it; refused where it does not fit.

    \b
      whaleflux datasets pin c4-en --copies 2 --for "7 d"
      whaleflux datasets pin c4-en --node onprem/gpu-7 --queue research
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux import quantities
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import inventory_pb2 as pb

    request = pb.PinDatasetRequest(name=_full(name), copies=copies or (0 if node else 1))
    if queue:
        request.queue = names.queue(names.check_id("--queue", queue.removeprefix("queues/")))
    if for_:
        try:
            request.ttl.FromMilliseconds(int(quantities.seconds(for_) * 1000))
        except ValueError as wrong:
            raise InvalidArgument(FieldViolation("--for", str(wrong))) from None
    with fleet() as client:
        request.nodes.extend(node_name(client, one) for one in node or ())
        pinned = client.inventory.PinDataset(request, timeout=10)
    output.note(
        f"{pinned.name} is pinned to {', '.join(p.node for p in pinned.pins)}; see: whaleflux datasets where {_id(name)}"
    )


@datasets.command("unpin")
def unpin(
    name: Name,
    node: Annotated[
        list[str] | None, typer.Option("--node", metavar="NODE", help="Of this node alone; several times.")
    ] = None,
) -> None:
    """Takes pins away; copies stay until their room is needed."""
    from whaleflux.v1 import inventory_pb2 as pb

    with fleet() as client:
        nodes = [node_name(client, one) for one in node or ()]
        left = client.inventory.UnpinDataset(pb.UnpinDatasetRequest(name=_full(name), nodes=nodes), timeout=10)
    output.note(f"{left.name} is pinned to {', '.join(p.node for p in left.pins) or 'no node any more'}")


@datasets.command("rm")
def remove(name: Name, yes: Yes = False) -> None:
    """Forgets a dataset; nodes delete their copies when no job uses them, the original stays."""
    from whaleflux.v1 import inventory_pb2 as pb

    with fleet() as client:
        confirm(f"forget {_full(name)}?", yes)
        client.inventory.DeleteDataset(pb.DeleteDatasetRequest(name=_full(name)), timeout=10)
    output.note(f"{_full(name)} is forgotten")


def _pin(pin: Any) -> str:
    ends = f" until {pin.expire_time.ToJsonString()}" if pin.HasField("expire_time") else ""
    return f"{pin.node}{ends} by {pin.author}" + (f" for {pin.queue}" if pin.queue else "")


def _state(copy: Any) -> str:
    from whaleflux.v1 import inventory_pb2 as pb

    state = pb.DatasetCopyState.Name(copy.state) if copy.state in pb.DatasetCopyState.values() else str(copy.state)
    return "READY" if copy.state == pb.DATASET_COPY_STATE_UNSPECIFIED else state.removeprefix("DATASET_COPY_STATE_")


def _size(dataset: Any) -> str:
    from whaleflux.quantities import shown_bytes

    return shown_bytes(dataset.size_bytes) if dataset.size_bytes else "not known"


def _id(name: str) -> str:
    return name.removeprefix("dataset:").removeprefix("datasets/")


def _full(name: str) -> str:
    return names.dataset(_id(name))
