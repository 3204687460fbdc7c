"""Ray clusters: what waits in one, and which nodes of the fleet it should get for that. Those of the fleet: `ray_cluster_commands`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.output import Format
from whaleflux.cli.state import Output, fleet

ray = typer.Typer(no_args_is_help=True, help="Ray clusters that the fleet sizes by what waits in them.")

_MOST_FILE_BYTES = 32 << 20
_SHOWN = 3
_MIB = {"gpu_memory"}


@ray.callback()
def _group() -> None:
    """So that it stays a group of commands."""


@ray.command("explain")
def explain(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[NAME|FILE]",
            help="A cluster of the fleet, or a file with a demand as `-o json` shows it; `-` reads stdin.",
        ),
    ] = "",
    address: Annotated[
        str, typer.Option("--address", help="HOST:PORT of the cluster's GCS (of ray start --head --port).")
    ] = "",
    python: Annotated[str, typer.Option("--python", help="An interpreter that has the cluster's Ray.")] = "",
    fmt: Output = Format.table,
) -> None:
    """What waits in a Ray cluster, which nodes it should get for that and why, and what can never be had. Changes nothing.

    \b
      whaleflux ray explain research
      whaleflux ray explain --address 10.0.0.5:6379 --python ~/ray/bin/python -o json
      whaleflux ray explain demand.json
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import scheduler_pb2 as pb

    if fmt is not Format.table and not fmt.is_json:
        raise InvalidArgument(FieldViolation("-o", f"{fmt.value} is not made of a plan; use table or json"))
    if bool(what) == bool(address):
        known = "give the name of a cluster (whaleflux ray ls), a FILE with a demand, or the HOST:PORT of any cluster"
        raise InvalidArgument(FieldViolation("--address", known))
    cluster = _is_cluster(what)
    given = None if cluster else _demand(what, address, python)
    with fleet() as client:
        demand = _demand_of(client, what) if given is None else given
        found = client.scheduler.PlanRay(pb.PlanRayRequest(demand=demand), timeout=30)
    if fmt.is_json:
        output.say_json({"demand": output.as_json(demand), "plan": output.as_json(found)}, fmt)
    else:
        _show(demand, found)


def _is_cluster(what: str) -> bool:
    """Whether a name is meant, and no file."""
    return names.ID_PATTERN.fullmatch(what.removeprefix("rayClusters/")) is not None and not Path(what).exists()


def _demand_of(client: Any, name: str) -> Any:
    """What waits in a cluster of the fleet, as it was read last. Raises Unavailable where that is not known."""
    from whaleflux.errors import Unavailable
    from whaleflux.reasons import ErrorReason
    from whaleflux.v1 import scheduler_pb2 as pb

    full = names.ray_cluster(name.removeprefix("rayClusters/"))
    found = client.scheduler.GetRayCluster(pb.GetRayClusterRequest(name=full), timeout=10)
    if not found.status.HasField("demand"):
        why = found.status.message or "it was not read yet"
        raise Unavailable(f"what waits in {full} is not known: {why}", reason=ErrorReason.RAY_UNREACHABLE)
    if found.status.stale:
        output.note(f"this was read {found.status.reading_age_s:.0f} s ago: {found.status.message}")
    return found.status.demand


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
    except (json_format.ParseError, TypeError, ValueError, AttributeError, RecursionError) as error:
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
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(FieldViolation(file, f"cannot be read as JSON: {error}")) from None
    if not isinstance(content, dict):
        raise InvalidArgument(
            FieldViolation(file, "is no JSON object; give what `whaleflux ray explain -o json` prints")
        )
    return content


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
