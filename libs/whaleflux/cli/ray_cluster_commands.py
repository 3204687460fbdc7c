"""Ray clusters of the fleet: made of a file, listed, looked at, taken down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output, ray_commands
from whaleflux.cli.files import read
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, Yes, confirm, fleet, pages
from whaleflux.cli.waiting import look

ray = ray_commands.ray
Name = Annotated[str, typer.Argument(metavar="NAME", help="Ray cluster.")]
_BOUNDS = ("priority", "max_gpus", "sites", "gpu_types", "idle")
_FIXED = ("queue", "python", "head_cpu_millicores", "head_memory_bytes", "address")
_LOOK_S = 0.5


@ray.command("up")
def up(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A Ray cluster as YAML, or - for stdin.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the cluster answers.")] = True,
    fmt: Output = Format.table,
) -> None:
    """Makes a Ray cluster that the fleet sizes, or changes the bounds of one: its head and its workers are jobs of a queue.

    \b
      whaleflux ray up ray.yaml --dry-run
      whaleflux ray up ray.yaml
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import InvalidArgument
    from whaleflux.manifests.ray_file import as_in_file, ray_from_yaml

    manifest = ray_from_yaml(read(file)[0])
    with fleet() as client:
        try:
            found, said = _applied(client, manifest, dry_run=dry_run)
        except InvalidArgument as refused:
            raise as_in_file(refused) from None
        if fmt is Format.table:
            output.note(f"{found.name} {said}")
        if wait and not dry_run:
            found = _until_up(client, found.name)
    _show(found, fmt)


def _applied(client: Any, manifest: Any, *, dry_run: bool) -> tuple[Any, str]:
    """The cluster, and what was done."""
    from whaleflux.errors import NotFound
    from whaleflux.v1 import scheduler_pb2 as pb

    name = names.ray_cluster(manifest.cluster_id)
    try:
        known = client.scheduler.GetRayCluster(pb.GetRayClusterRequest(name=name), timeout=10)
    except NotFound:
        request = pb.CreateRayClusterRequest(
            ray_cluster_id=manifest.cluster_id,
            ray_cluster=manifest.cluster,
            validate_only=dry_run,
            request_id=names.ulid(),
        )
        made = client.scheduler.CreateRayCluster(request, timeout=20)
        return made, "could be made" if dry_run else "is made"
    _check_fixed(known, manifest.cluster)
    changed = [path for path in _BOUNDS if getattr(known, path) != getattr(manifest.cluster, path)]
    if not changed:
        return known, "is as the file says"
    wanted = pb.RayCluster()
    wanted.CopyFrom(manifest.cluster)
    wanted.name, wanted.etag = known.name, known.etag
    update = pb.UpdateRayClusterRequest(ray_cluster=wanted, validate_only=dry_run)
    update.update_mask.paths.extend(changed)
    found = client.scheduler.UpdateRayCluster(update, timeout=20)
    return (known, f"would change: {', '.join(changed)}") if dry_run else (found, f"is changed: {', '.join(changed)}")


def _check_fixed(known: Any, wanted: Any) -> None:
    """Raises InvalidArgument for what cannot be changed of a cluster that is there."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.manifests.ray_file import as_written

    again = f"take it down first (whaleflux ray down {names.last(known.name)}), or choose another name"
    wrong = [
        FieldViolation(
            f"ray_cluster.{path}",
            f"never changes, and is {as_written(path, getattr(known, path)) or 'not set'} there; {again}",
        )
        for path in _FIXED
        if getattr(wanted, path) and getattr(known, path) != getattr(wanted, path)
    ]
    if wrong:
        raise InvalidArgument(wrong)


def _until_up(client: Any, name: str) -> Any:
    """The cluster, once it was read. Says each change on stderr; Ctrl-C leaves it as it is."""
    from whaleflux.sdk.resume import FOLLOW_OUTAGE_S, Patience
    from whaleflux.v1 import scheduler_pb2 as pb

    said, patience, request = "", Patience(FOLLOW_OUTAGE_S), pb.GetRayClusterRequest(name=name)
    patience.received()  # it has answered what made the cluster
    while True:
        found = look(lambda: client.scheduler.GetRayCluster(request, timeout=10), patience)
        if found.HasField("status") and not found.status.stale:
            return found
        if found.state == pb.RAY_CLUSTER_STATE_ENDING:
            return found
        if (message := found.status.message) and message != said:
            said = message
            output.note(f"-- {message}")
        time.sleep(_LOOK_S)


@ray.command("ls")
def list_(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Ray clusters of the fleet: where each is reached, what waits in it, which workers it has."""
    from whaleflux.v1 import scheduler_pb2 as pb

    with fleet() as client:
        found: list[Any] = pages(client.scheduler.ListRayClusters, pb.ListRayClustersRequest(), "ray_clusters")
    columns = [
        Column("NAME", lambda c: names.last(c.name)),
        Column("STATE", state_of),
        Column("RAY_ADDRESS", lambda c: c.status.address or "-"),
        Column("WAITS", lambda c: str(c.status.waiting) if _is_read(c) else "?"),
        Column("GPUS", lambda c: f"{c.status.gpus if c.HasField('status') else '?'}/{c.max_gpus}"),
        Column("WORKERS", _workers),
        Column("QUEUE", lambda c: names.last(c.queue)),
        Column("READ", _read_ago),
        Column("WHAT", lambda c: c.status.message or "-", wide=True),
        Column("DASHBOARD", lambda c: c.status.dashboard or "-", wide=True),
        Column("BY", lambda c: c.creator, wide=True),
    ]
    empty = "there is no Ray cluster; make one with: whaleflux ray up FILE"
    output.show(found, columns, fmt, headers=not no_headers, empty=empty)


@ray.command("show")
def show(name: Name, fmt: Output = Format.table) -> None:
    """One Ray cluster: where it is reached, its jobs, what waits and why."""
    from whaleflux.v1 import scheduler_pb2 as pb

    with fleet() as client:
        found = client.scheduler.GetRayCluster(pb.GetRayClusterRequest(name=_full(name)), timeout=10)
    _show(found, fmt)


@ray.command("down")
def down(
    name: Name,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until nothing is left.")] = True,
    yes: Yes = False,
) -> None:
    """Takes a Ray cluster down: its workers drain with their notice (30 s), then its head ends, then its record goes."""
    from whaleflux.v1 import scheduler_pb2 as pb

    full = _full(name)
    with fleet() as client:
        confirm(f"take {full} down, with what runs in it?", yes)
        client.scheduler.DeleteRayCluster(pb.DeleteRayClusterRequest(name=full), timeout=10)
        for line in _until_gone(client, full) if wait else ():
            output.note(line)
    output.note(f"{full} is gone" if wait else f"{full} is being taken down")


def _until_gone(client: Any, name: str) -> Iterator[str]:
    """What is left, each time that it changes."""
    from whaleflux.errors import NotFound
    from whaleflux.sdk.resume import FOLLOW_OUTAGE_S, Patience
    from whaleflux.v1 import scheduler_pb2 as pb

    said, patience, request = "", Patience(FOLLOW_OUTAGE_S), pb.GetRayClusterRequest(name=name)
    patience.received()  # it has answered what took the cluster down
    while True:
        try:
            found = look(lambda: client.scheduler.GetRayCluster(request, timeout=10), patience)
        except NotFound:
            return
        left = ", ".join(names.last(part.job) for part in found.status.parts[:5])
        if left and left != said:
            said = left
            yield f"-- {len(found.status.parts)} jobs are left: {left}"
        time.sleep(_LOOK_S)


def state_of(cluster: Any) -> str:
    """UP, ENDING; STARTING while nothing was heard of one that is to be up, UNKNOWN when nothing is any more, ? where nobody says."""
    from whaleflux.v1 import scheduler_pb2 as pb

    if cluster.state == pb.RAY_CLUSTER_STATE_UP and not _is_read(cluster):
        if not cluster.HasField("status"):
            return "?"
        return "UNKNOWN" if cluster.status.HasField("reading_age_s") else "STARTING"
    return output.enum_name(pb.RayClusterState, cluster.state, "RAY_CLUSTER_STATE_")


def _is_read(cluster: Any) -> bool:
    """Whether what its status says is of now. One that was just made, or is another's, comes without."""
    return bool(cluster.HasField("status") and not cluster.status.stale)


def _workers(cluster: Any) -> str:
    from whaleflux.v1 import scheduler_pb2 as pb

    if not cluster.HasField("status"):
        return "?"
    return str(sum(part.role == pb.RAY_ROLE_WORKER for part in cluster.status.parts))


def _read_ago(cluster: Any) -> str:
    age = cluster.status
    return f"{age.reading_age_s:.0f}s ago" if age.HasField("reading_age_s") else "never"


def _show(found: Any, fmt: Format) -> None:
    status = found.status
    waits = str(status.waiting) if _is_read(found) else "not known"
    has = f"{status.gpus} of at most" if found.HasField("status") else "not known, at most"
    lines = [
        ("name", found.name),
        ("state", state_of(found)),
        ("RAY_ADDRESS", status.address or "-"),
        ("dashboard", f"http://{status.dashboard}" if status.dashboard else "-"),
        ("waits", f"{waits} (read {_read_ago(found)})"),
        ("workers", f"{has} {found.max_gpus} GPUs, {status.nodes if _is_read(found) else '?'} nodes in the cluster"),
        ("now", status.message or "-"),
        ("jobs of", f"{found.queue}, priority {found.priority}, by {found.creator}"),
        ("only", ", ".join([*found.gpu_types, *found.sites]) or "any GPUs, any site"),
        ("workers leave", f"idle for {found.idle.ToSeconds()} s"),
        ("python", found.python),
    ]
    output.show_one(found, lines, fmt)
    if fmt is not Format.table:
        return
    if status.parts:
        output.say("")
        output.table(("JOB", "ROLE", "STATE", "GPUS", "NOW"), [_part(part) for part in status.parts])
    if status.unmet:
        output.say(
            "", f"{len(status.unmet)} shapes are not to be had; see: whaleflux ray explain {names.last(found.name)}"
        )


def _part(part: Any) -> tuple[str, ...]:
    from whaleflux.v1 import scheduler_pb2 as pb

    role = output.enum_name(pb.RayRole, part.role, "RAY_ROLE_").lower()
    gpus = f"{part.gpus} {part.gpu_type}" if part.gpus else "-"
    return names.last(part.job), role, output.enum_name(pb.JobState, part.state, "JOB_STATE_"), gpus, part.message


def _full(name: str) -> str:
    return names.ray_cluster(name.removeprefix("rayClusters/"))
