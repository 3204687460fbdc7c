"""Ray clusters: what waits in one, and which nodes of the fleet it should get for that."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.output import Format
from whaleflux.cli.state import Output, Yes, fleet

ray = typer.Typer(no_args_is_help=True, help="Ray clusters: what waits in them, and nodes for it.")

_MOST_FILE_BYTES = 32 << 20
_SHOWN = 3
_MIB = {"gpu_memory"}


@ray.callback()
def _group() -> None:
    """So that it stays a group of commands."""


@ray.command("explain")
def explain(
    file: Annotated[
        str,
        typer.Argument(metavar="[FILE]", help="A demand as `-o json` shows it, instead of a cluster; `-` reads stdin."),
    ] = "",
    address: Annotated[
        str, typer.Option("--address", help="HOST:PORT of the cluster's GCS (of ray start --head --port).")
    ] = "",
    python: Annotated[str, typer.Option("--python", help="An interpreter that has the cluster's Ray.")] = "",
    fmt: Output = Format.table,
) -> None:
    """What waits in a Ray cluster, which nodes it should get for that and why, and what can never be had. Changes nothing.

    \b
      whaleflux ray explain --address 10.0.0.5:6379
      whaleflux ray explain --address 10.0.0.5:6379 --python ~/ray/bin/python -o json
      whaleflux ray explain demand.json
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import scheduler_pb2 as pb

    if fmt is not Format.table and not fmt.is_json:
        raise InvalidArgument(FieldViolation("-o", f"{fmt.value} is not made of a plan; use table or json"))
    if bool(file) == bool(address):
        raise InvalidArgument(FieldViolation("--address", "give the cluster's HOST:PORT, or a FILE with its demand"))
    demand = _demand(file, address, python)
    with fleet() as client:
        found = client.scheduler.PlanRay(pb.PlanRayRequest(demand=demand), timeout=30)
    if fmt.is_json:
        output.say_json({"demand": output.as_json(demand), "plan": output.as_json(found)}, fmt)
    else:
        _show(demand, found)


def _demand(file: str, address: str, python: str) -> Any:
    """As a RayDemand; of the document that this command prints as JSON, its demand."""
    from google.protobuf import json_format

    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.ray_cluster import reading
    from whaleflux.v1 import scheduler_pb2 as pb

    given = _read(file) if file else reading.read_once(address, python)
    content = given.get("demand", given)
    try:
        return json_format.ParseDict(content, pb.RayDemand(), ignore_unknown_fields=bool(address))
    except json_format.ParseError as error:
        raise InvalidArgument(FieldViolation(file or "--address", f"is no demand of a Ray cluster: {error}")) from None


def _read(file: str) -> Mapping[str, Any]:
    import json

    from whaleflux.errors import FieldViolation, InvalidArgument

    try:
        if file == "-":
            text = sys.stdin.read(_MOST_FILE_BYTES)
        else:
            with Path(file).open(encoding="utf-8") as lines:
                text = lines.read(_MOST_FILE_BYTES)
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidArgument(FieldViolation(file, f"cannot be read as JSON: {error}")) from None
    if not isinstance(content, dict):
        raise InvalidArgument(
            FieldViolation(file, "is no JSON object; give what `whaleflux ray explain -o json` prints")
        )
    return content


@ray.command("grow")
def grow(
    address: Annotated[str, typer.Option("--address", help="HOST:PORT of the cluster's GCS, as workers reach it.")],
    python: Annotated[str, typer.Option("--python", help="An interpreter here that has the cluster's Ray.")] = "",
    worker_python: Annotated[
        str, typer.Option("--worker-python", help="The interpreter on the nodes that has the cluster's Ray.")
    ] = "python3",
    queue: Annotated[str, typer.Option("--queue", help="Queue of the workers' jobs.")] = "default",
    priority: Annotated[int, typer.Option("--priority", min=0, max=1000, help="Of the workers' jobs.")] = 0,
    max_gpus: Annotated[int, typer.Option("--max-gpus", min=0, max=100_000, help="GPUs of all its workers.")] = 64,
    idle: Annotated[str, typer.Option("--idle", help="A worker leaves after it was idle so long.")] = "60 s",
    follow: Annotated[bool, typer.Option("--follow", help="Look again each second, until Ctrl-C.")] = False,
    yes: Yes = False,
    fmt: Output = Format.table,
) -> None:
    """Gives a Ray cluster what `explain` says, once or as demand comes: each worker is a job, and leaves by itself when it is idle.

    \b
      whaleflux ray grow --address 10.0.0.5:6379 --worker-python /opt/ray/bin/python
      whaleflux ray grow --address 10.0.0.5:6379 --queue research --max-gpus 16 --follow --yes
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli import ray_growing
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.quantities import seconds
    from whaleflux.ray_cluster.growth import Growth

    try:
        idle_s = seconds(idle)
    except ValueError as error:
        raise InvalidArgument(FieldViolation("--idle", f"is {idle!r}, and {error}")) from None
    how = Growth(address, queue, worker_python, idle_s, max_gpus=max_gpus, priority=priority)
    ray_growing.run(how, python, ray_growing.Wish(follow, yes, fmt))


# what is shown


def _show(demand: Any, plan: Any) -> None:
    waits = [(_words(one), str(one.count), "") for one in demand.bundles]
    waits += [(_gang_words(one), str(one.count), "group") for one in demand.gangs]
    waits += [(_words(one), str(one.count), "to hold in all") for one in demand.constraints]
    if not waits:
        output.say("nothing waits in this Ray cluster")
    else:
        output.table(("WAITS", "COUNT", ""), waits)
    held = sum(bundle.count * max(1, len(one.nodes)) for one in plan.held for bundle in one.bundles)
    if held:
        output.say("", f"{held} of these find room on nodes that are there or under way")
    if plan.additions:
        output.say("", f"nodes to add: {plan.gpus} GPUs, ${plan.usd_per_hour:.2f} per hour")
        output.table(
            ("NODES", "GPUS EACH", "TYPE", "$/HOUR", "FOR EACH", "WHERE", "WHY"),
            [_addition(one) for one in plan.additions],
        )
    if plan.unmet:
        output.say("", "not to be had:")
        output.table(("WAITS", "COUNT", "EVER", "WHY"), [_unmet(one) for one in plan.unmet])
    elif waits and not plan.additions:
        output.say("", "no node has to be added")


def _addition(one: Any) -> Sequence[str]:
    return (
        str(one.count),
        str(one.gpus),
        one.gpu_type or "-",
        f"{one.usd_per_hour:.2f}",
        _listed(f"{bundle.count} x {_words(bundle)}" for bundle in one.bundles),
        _listed(map(names.last, one.nodes)),
        one.why,
    )


def _unmet(one: Any) -> Sequence[str]:
    words = _words(one.bundle)
    when = "never" if one.never else "not yet looked at" if one.postponed else "later"
    return f"a group with {words}" if one.gang else words, str(one.count), when, one.why


def _words(bundle: Any) -> str:
    """{CPU: 2, gpu_memory: 60 GiB} where whaleflux/gpu in (H200)."""
    parts = [f"{name}: {_amount(name, value)}" for name, value in sorted(bundle.resources.items())]
    rules = [f"{r.key} {'not ' * r.excludes}in ({', '.join(r.values)})" for s in bundle.selectors[:1] for r in s.rules]
    return f"{{{', '.join(parts)}}}" + (f" where {' and '.join(rules)}" if rules else "")


def _gang_words(gang: Any) -> str:
    from whaleflux.v1 import scheduler_pb2 as pb

    strategy = pb.RayStrategy.Name(gang.strategy).removeprefix("RAY_STRATEGY_")
    return f"{strategy}: {_listed(f'{one.count} x {_words(one)}' for one in gang.bundles)}"


def _amount(name: str, value: float) -> str:
    from whaleflux.quantities import shown_bytes

    if name in _MIB or name == "memory":
        return shown_bytes(value * (2**20 if name in _MIB else 1))
    return f"{value:g}"


def _listed(words: Iterable[str]) -> str:
    found = list(words)
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
