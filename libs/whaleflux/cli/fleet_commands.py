"""What exists and what state it is in: status, nodes, sites, incidents."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.filters import Since, Sort, contains, enum_words, ordered, since_s, wanted, words
from whaleflux.cli.fleet_reads import (
    Held,
    all_health,
    all_nodes,
    conditions,
    failing,
    free_in_shares,
    gpu_groups,
    held_gpus,
    is_open,
    models_of,
    phase,
    price_of,
    shares_kept,
    shown_phase,
    why,
)
from whaleflux.cli.output import Column, Format
from whaleflux.cli.reservation_commands import under_maintenance
from whaleflux.cli.state import NoHeaders, Output, fleet, pages


def node_lines(node: Any, health: Any, held_by: list[str]) -> list[tuple[str, str]]:
    """What people want to know of a node first; `health` None: it was not judged yet."""
    from whaleflux.quantities import shown_bytes
    from whaleflux.v1 import inventory_pb2, types_pb2

    known = {node.name: health} if health is not None else {}
    failing = [
        c for c in (health.conditions if health is not None else ()) if c.status == types_pb2.CONDITION_STATUS_FALSE
    ]
    intent = output.enum_name(inventory_pb2.NodeIntent, node.intent, "NODE_INTENT_")
    asked = node.last_change
    by = f", {asked.what.lower()} by {asked.actor}" if asked.what == intent else ""
    return [
        ("name", node.name),
        ("phase", phase(known, node.name) + (f": {health.message}" if health is not None and health.message else "")),
        ("intent", intent + (f": {node.intent_reason}" if node.intent_reason else "") + by),
        ("incident", health.incident if health is not None else ""),
        *(("broken", f"{c.type}: {c.reason} {c.message}") for c in failing),
        ("gpus", models_of(node)),
        ("price", f"${price_of(node):.2f} per GPU and hour"),
        ("memory", shown_bytes(node.facts.memory_bytes)),
        ("place", "/".join(filter(None, (node.facts.zone, node.facts.spine, node.facts.leaf)))),
        ("agent", f"{node.facts.agent_version}, driver {node.facts.driver_version}".strip(", ")),
        ("joined", f"{output.age(node.create_time)} ago"),
        *([("isolation", isolation_of(node))] if node.facts.HasField("isolation") else []),
        *(("held by", job) for job in held_by[:16]),
    ]


def isolation_of(node: Any) -> str:
    """How ranks are kept apart there, and what of them is limited; "" where nothing is said."""
    found = node.facts.isolation
    if not found.kind:
        return ""
    if found.kind == "none":
        apart = f"none ({found.reason})"
    else:
        apart = f"a user for each queue ({found.task_uids})" + (", own folders" if found.private_folders else "")
    by = f" ({', '.join(found.limited_by)} by the kernel)" if found.limited_by else ""
    return f"{apart}; limits {found.limits}{by}"


def nodes(
    site: Annotated[str, typer.Option("--site", help="Of this site.")] = "",
    state: Annotated[str, typer.Option("--state", help="In one of these phases: ready,suspect.")] = "",
    gpu: Annotated[str, typer.Option("--gpu", help="With GPUs whose model has this in its name.")] = "",
    sort: Sort = "",
    retired: Annotated[bool, typer.Option("--retired", help="Retired ones too.")] = False,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """Nodes: state, GPUs, price.

    \b
      whaleflux nodes --site onprem --state ready,suspect
      whaleflux nodes --gpu h200 --sort -held
      whaleflux nodes -o wide               with memory, driver, place in the network, and why
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.quantities import shown_bytes
    from whaleflux.v1 import health_pb2, inventory_pb2

    phases = words(state, "--state", enum_words(health_pb2.NodePhase, "NODE_PHASE_"))
    health: dict[str, Any] = {}
    held: Held = defaultdict(Counter)
    kept: dict[str, str] = {}
    columns = [
        Column("NAME", lambda n: n.name),
        Column("PHASE", lambda n: shown_phase(phase(health, n.name), held[n.name]), value=lambda n: phase(health, n.name)),
        Column("INTENT", lambda n: output.enum_name(inventory_pb2.NodeIntent, n.intent, "NODE_INTENT_")),
        Column("CONDITIONS", lambda n: ", ".join(filter(None, (conditions(health, n.name).strip("-"), kept.get(n.name)))) or "-"),
        Column("GPUS", models_of),
        Column("HELD", lambda n: f"{len(held[n.name])}/{len(n.facts.gpus)}", value=lambda n: len(held[n.name])),
        Column("$/GPU-H", lambda n: f"{price_of(n):.2f}" if n.facts.gpus else "-", value=price_of),
        Column("AGE", lambda n: output.age(n.create_time), value=lambda n: output.age_s(n.create_time)),
        Column("MEMORY", lambda n: shown_bytes(n.facts.memory_bytes), wide=True, value=lambda n: int(n.facts.memory_bytes)),
        Column("LEAF", lambda n: "/".join(filter(None, (n.facts.zone, n.facts.spine, n.facts.leaf))) or "-", wide=True),
        Column("DRIVER", lambda n: n.facts.driver_version, wide=True),
        Column("MEMORY LIMITS", lambda n: n.facts.memory_limits, wide=True),
        Column("ISOLATION", lambda n: n.facts.isolation.kind, wide=True),
        Column("GPU SHARES", shares_kept, wide=True),
        Column("WHY", lambda n: why(health, n), wide=True),
    ]  # fmt: skip
    ordered([], columns, sort)  # a wrong word is told before the fleet is asked
    with fleet() as client:
        listed = all_nodes(client, retired)
        health |= all_health(client)
        held |= held_gpus(client)
        kept |= under_maintenance(client)
    matching = [
        n for n in listed
        if wanted(phases, phase(health, n.name)) and (not gpu or contains(gpu, *(g.model for g in n.facts.gpus)))
        and (not site or names.top(n.name) == site.removeprefix("sites/"))
    ]  # fmt: skip
    output.show(
        ordered(matching, columns, sort),
        columns,
        fmt,
        headers=not no_headers,
        empty="no such nodes" if listed else "no nodes yet; make a token with: whaleflux token create --site NAME",
    )


def sites(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Sites."""
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        listed = pages(client.inventory.ListSites, inventory_pb2.ListSitesRequest(), "sites")
    columns = [Column("NAME", lambda s: s.name), Column("AGE", lambda s: output.age(s.create_time))]
    output.show(
        listed, columns, fmt, headers=not no_headers, empty="no sites yet; the first join token of a site makes it"
    )


def incidents(
    node: Annotated[str, typer.Option("--node", help="That concern a node with this in its name.")] = "",
    job: Annotated[str, typer.Option("--job", help="That concern a job with this in its name.")] = "",
    kind: Annotated[str, typer.Option("--kind", help="Of one of these kinds: node_lost,gpu_fault.")] = "",
    since: Since = "",
    sort: Sort = "",
    all_: Annotated[bool, typer.Option("-a", "--all", help="Ended ones too.")] = False,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Show again at each change.")] = False,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """What went wrong, and what was done about it.

    \b
      whaleflux incidents --node h200-b -a
      whaleflux incidents --since 1d -o csv
      whaleflux incidents -w -o jsonl       each as it opens and changes, a line each

    With -w, json is an incident a line, as jsonl is: it has no end.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli import watching
    from whaleflux.v1 import health_pb2

    kinds = words(kind, "--kind", enum_words(health_pb2.IncidentKind, "INCIDENT_KIND_"))
    ended, oldest_s, columns = all_ or bool(since), since_s(since), _incident_columns()
    ordered([], columns, sort)

    def keeps(one: Any) -> bool:
        return (
            wanted(kinds, output.enum_name(health_pb2.IncidentKind, one.kind, "INCIDENT_KIND_"))
            and contains(node, *one.nodes) and contains(job, *one.jobs)
            and (not one.end_time.seconds or (ended and one.end_time.seconds >= oldest_s))
        )  # fmt: skip

    def draw(found: Sequence[Any]) -> None:
        empty = "no such incidents" if ended else "no open incidents"
        output.show(ordered(found, columns, sort), columns, fmt, headers=not no_headers, empty=empty)

    with fleet() as client:
        if watch:
            watching.watch(
                lambda after: client.health.WatchIncidents(health_pb2.WatchIncidentsRequest(resource_version=after)),
                fmt, lambda found: draw(sorted(found, key=lambda i: -i.start_time.ToNanoseconds())), keeps,
            )  # fmt: skip
            return
        request = health_pb2.ListIncidentsRequest(show_ended=ended, page_size=1000)
        listed = pages(client.health.ListIncidents, request, "incidents")
    draw([one for one in listed if keeps(one)])


def _incident_columns() -> list[Column]:
    from whaleflux.v1 import health_pb2

    return [
        Column("NAME", lambda i: i.name),
        Column("KIND", lambda i: output.enum_name(health_pb2.IncidentKind, i.kind, "INCIDENT_KIND_")),
        Column("NODES", lambda i: ", ".join(i.nodes)),
        Column("JOBS", lambda i: ", ".join(i.jobs)),
        Column("AGE", lambda i: output.age(i.start_time), value=lambda i: output.age_s(i.start_time)),
        Column("WHAT", lambda i: i.message),
        Column("ACTION", lambda i: i.action, wide=True),
    ]


def status(fmt: Output = Format.table) -> None:
    """The fleet at a glance: nodes by phase, GPUs, unfinished jobs, models."""
    from whaleflux.v1 import router_pb2, scheduler_pb2

    with fleet() as client:
        listed, health, held = all_nodes(client), all_health(client), held_gpus(client)
        jobs = pages(client.scheduler.ListJobs, scheduler_pb2.ListJobsRequest(page_size=1000), "jobs")
        models = pages(client.router.ListModels, router_pb2.ListModelsRequest(), "models")
    total = sum(len(n.facts.gpus) for n in listed)
    shares_bytes = sum(free_in_shares(n.facts.gpus, held[n.name], ready=is_open(health, n)) for n in listed)
    free = sum(row["free"] for row in gpu_groups(listed, health, held))
    counts = {"total": total, "held": sum(map(len, held.values())), "free": free, "free_in_shares_bytes": shares_bytes}
    summary: dict[str, Any] = {
        "nodes": dict(Counter(phase(health, n.name) for n in listed)),
        "conditions": dict(Counter(c.reason for n in listed for c in failing(health, n.name))),
        "gpus": counts,
        "jobs": dict(Counter(output.enum_name(scheduler_pb2.JobState, j.state, "JOB_STATE_") for j in jobs)),
        "models": {m.name: m.ready_replicas for m in models},
        "simulated": any(n.facts.simulated for n in listed),
    }
    if fmt.is_json:
        output.say_json(summary, fmt)
        return
    rows = [
        ["nodes", _counted(summary["nodes"]) + (" (simulated ones among them)" if summary["simulated"] else "")],
        ["not well", _counted(summary["conditions"]) + " (see: whaleflux nodes -o wide)"],
        ["GPUs", f"{summary['gpus']['held']} of {total} held, {free} free" + _and_shares(shares_bytes)],
        ["jobs", _counted(summary["jobs"])],
        ["models", ", ".join(f"{names.top(name)} ({ready} ready)" for name, ready in summary["models"].items()) or "none"],
    ]  # fmt: skip
    output.table([], [row for row in rows if row[0] != "not well" or summary["conditions"]])
    if not listed:
        output.note("next: whaleflux token create --site NAME, then start an agent with it")


def _and_shares(free_bytes: int) -> str:
    from whaleflux.quantities import shown_bytes

    return f", {shown_bytes(free_bytes)} free in shares" if free_bytes else ""


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items()) or "none"
