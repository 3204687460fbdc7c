"""What exists and what state it is in: status, nodes, gpus, sites, incidents, and what operators do to nodes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer

from whaleflux.cli import output
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NodeArgument, NoHeaders, Output, Reason, Yes, fleet, node_name, pages


def _nodes(client: Any, retired: bool = False) -> list[Any]:
    from whaleflux.v1 import inventory_pb2

    request = inventory_pb2.ListNodesRequest(page_size=1000, show_retired=retired)
    return pages(client.inventory.ListNodes, request, "nodes")


def _health(client: Any) -> dict[str, Any]:
    from whaleflux.v1 import health_pb2

    listed = pages(client.health.ListNodeHealth, health_pb2.ListNodeHealthRequest(page_size=1000), "node_health")
    return {h.name: h for h in listed}


def _held(client: Any) -> Counter[str]:
    """GPUs that are held, by node."""
    from whaleflux.v1 import scheduler_pb2

    listed = pages(client.scheduler.ListAllocations, scheduler_pb2.ListAllocationsRequest(), "allocations")
    held: Counter[str] = Counter()
    for allocation in listed:
        held[allocation.task.node] += len(allocation.task.gpu_indices)
    return held


def _phase(health: dict[str, Any], name: str) -> str:
    from whaleflux.v1 import health_pb2

    found = health.get(name)
    return output.enum_name(health_pb2.NodePhase, found.phase, "NODE_PHASE_") if found else "UNKNOWN"


def _models(node: Any) -> str:
    counts = Counter(gpu.model for gpu in node.facts.gpus)
    return ", ".join(f"{n} x {model}" for model, n in counts.items()) + (" (simulated)" if node.facts.simulated else "")


def _price(node: Any) -> float:
    return float((node.price if node.HasField("price") else node.facts.price).usd_per_gpu_hour)


def nodes(fmt: Output = Format.table, no_headers: NoHeaders = False, retired: bool = False) -> None:
    """Nodes: state, GPUs, price."""
    from whaleflux.cli.quantities import shown_bytes
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        listed, health, held = _nodes(client, retired), _health(client), _held(client)
    columns = [
        Column("NAME", lambda n: n.name),
        Column("PHASE", lambda n: _phase(health, n.name)),
        Column("INTENT", lambda n: output.enum_name(inventory_pb2.NodeIntent, n.intent, "NODE_INTENT_")),
        Column("GPUS", _models),
        Column("HELD", lambda n: f"{held[n.name]}/{len(n.facts.gpus)}"),
        Column("$/GPU-H", lambda n: f"{_price(n):.2f}"),
        Column("AGE", lambda n: output.age(n.create_time)),
        Column("MEMORY", lambda n: shown_bytes(n.facts.memory_bytes), wide=True),
        Column("LEAF", lambda n: "/".join(filter(None, (n.facts.zone, n.facts.spine, n.facts.leaf))) or "-", wide=True),
        Column("DRIVER", lambda n: n.facts.driver_version, wide=True),
        Column("WHY", lambda n: (health[n.name].message if n.name in health else "") or n.intent_reason, wide=True),
    ]
    output.show(
        listed,
        columns,
        fmt,
        headers=not no_headers,
        empty="no nodes yet; make a token with: whaleflux token create --site NAME",
    )


def gpus(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """What GPUs there are, what is free, what they cost."""
    import json

    from whaleflux.cli.quantities import shown_bytes

    with fleet() as client:
        listed, health, held = _nodes(client), _health(client), _held(client)
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for node in listed:
        site, ready = node.name.split("/")[1], _phase(health, node.name) == "READY" and node.intent in (0, 1)
        for model, count in Counter(gpu.model for gpu in node.facts.gpus).items():
            memory = next(g.memory_bytes for g in node.facts.gpus if g.model == model)
            row = groups.setdefault(
                (model, site),
                {"model": model, "site": site, "memory_bytes": memory, "total": 0, "free": 0, "held": 0,
                 "unavailable": 0, "nodes": 0, "usd_per_gpu_hour": _price(node), "simulated": node.facts.simulated},
            )  # fmt: skip
            taken = min(count, held[node.name])
            row["total"] += count
            row["nodes"] += 1
            row["held"] += taken
            row["free" if ready else "unavailable"] += count - taken
            row["usd_per_gpu_hour"] = min(row["usd_per_gpu_hour"], _price(node))
    rows = [groups[key] for key in sorted(groups)]
    if fmt is Format.json:
        print(json.dumps(rows, indent=2))
        return
    if fmt is Format.name:
        print("\n".join(sorted({row["model"] for row in rows})))
        return
    if not rows:
        output.note("no GPUs yet; make a token with: whaleflux token create --site NAME")
        return
    headers = ["MODEL", "SITE", "MEMORY", "TOTAL", "FREE", "HELD", "UNAVAILABLE", "NODES", "$/GPU-H", ""]
    cells = [
        [r["model"], r["site"], shown_bytes(r["memory_bytes"]), *(str(r[k]) for k in ("total", "free", "held", "unavailable", "nodes")),
         f"{r['usd_per_gpu_hour']:.2f}", "simulated" if r["simulated"] else ""] for r in rows
    ]  # fmt: skip
    output.table([] if no_headers else headers, cells)


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
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
    all_: bool = typer.Option(False, "-a", "--all", help="Ended ones too."),
) -> None:
    """What went wrong, and what was done about it."""
    from whaleflux.v1 import health_pb2

    with fleet() as client:
        listed = pages(client.health.ListIncidents, health_pb2.ListIncidentsRequest(show_ended=all_), "incidents")
    columns = [
        Column("NAME", lambda i: i.name),
        Column("KIND", lambda i: output.enum_name(health_pb2.IncidentKind, i.kind, "INCIDENT_KIND_")),
        Column("NODES", lambda i: ", ".join(i.nodes)),
        Column("JOBS", lambda i: ", ".join(i.jobs)),
        Column("AGE", lambda i: output.age(i.start_time)),
        Column("WHAT", lambda i: i.message),
        Column("ACTION", lambda i: i.action, wide=True),
    ]
    output.show(listed, columns, fmt, headers=not no_headers, empty="no open incidents")


def status(fmt: Output = Format.table) -> None:
    """The fleet at a glance: nodes by phase, GPUs, unfinished jobs, models."""
    import json

    from whaleflux.v1 import router_pb2, scheduler_pb2

    with fleet() as client:
        listed, health, held = _nodes(client), _health(client), _held(client)
        jobs = pages(client.scheduler.ListJobs, scheduler_pb2.ListJobsRequest(page_size=1000), "jobs")
        models = pages(client.router.ListModels, router_pb2.ListModelsRequest(), "models")
    total = sum(len(n.facts.gpus) for n in listed)
    summary: dict[str, Any] = {
        "nodes": dict(Counter(_phase(health, n.name) for n in listed)),
        "gpus": {"total": total, "held": sum(held.values())},
        "jobs": dict(Counter(output.enum_name(scheduler_pb2.JobState, j.state, "JOB_STATE_") for j in jobs)),
        "models": {m.name: m.ready_replicas for m in models},
        "simulated": any(n.facts.simulated for n in listed),
    }
    if fmt is Format.json:
        print(json.dumps(summary, indent=2))
        return
    rows = [
        ["nodes", _counted(summary["nodes"]) + (" (simulated ones among them)" if summary["simulated"] else "")],
        ["GPUs", f"{sum(held.values())} of {total} held"],
        ["jobs", _counted(summary["jobs"])],
        ["models", ", ".join(f"{name.split('/')[1]} ({ready} ready)" for name, ready in summary["models"].items()) or "none"],
    ]  # fmt: skip
    output.table([], rows)
    if not listed:
        output.note("next: whaleflux token create --site NAME, then start an agent with it")


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items()) or "none"


def cordon(node: NodeArgument, message: Reason = "") -> None:
    """No new work on a node; running work stays."""
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        name = node_name(client, node)
        client.inventory.CordonNode(inventory_pb2.CordonNodeRequest(name=name, reason=message), timeout=10)
    output.note(f"{name} takes no new work; undo with: whaleflux uncordon {name}")


def uncordon(node: NodeArgument) -> None:
    """Undoes cordon and drain."""
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        name = node_name(client, node)
        client.inventory.UncordonNode(inventory_pb2.UncordonNodeRequest(name=name), timeout=10)
    output.note(f"{name} takes work again")


def drain(node: NodeArgument, message: Reason = "", yes: Yes = False) -> None:
    """No new work on a node; running work is moved elsewhere through its checkpoints.

    \b
      whaleflux drain n7 -m "fan is loud"
      whaleflux drain onprem/n7 -m "kernel update" --yes
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        name = node_name(client, node)
        confirm(f"move all work off {name}?", yes)
        client.inventory.DrainNode(inventory_pb2.DrainNodeRequest(name=name, reason=message), timeout=10)
    output.note(f"{name} is being drained; watch with: whaleflux jobs -w; undo with: whaleflux uncordon {name}")


def retire(node: NodeArgument, message: Reason = "", yes: Yes = False) -> None:
    """Removes a node for good; GPUs that it still holds are given up."""
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        name = node_name(client, node)
        confirm(f"remove {name} for good?", yes)
        client.inventory.RetireNode(inventory_pb2.RetireNodeRequest(name=name, reason=message), timeout=10)
    output.note(f"{name} is retired")


def confirm(question: str, yes: bool) -> None:
    """Asks; refuses where nobody can answer."""
    import sys

    from whaleflux.errors import FieldViolation, Invalid

    if yes:
        return
    if not sys.stdin.isatty():
        raise Invalid(FieldViolation("--yes", "nobody can be asked here (stdin is no terminal); repeat with -y"))
    if not typer.confirm(question, err=True):
        output.note("nothing was changed")
        raise typer.Exit(1)
