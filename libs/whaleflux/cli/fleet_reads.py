"""Nodes, their health and who holds their GPUs, as several commands read them, and what is counted from that."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.state import pages

Held = dict[str, Counter[str]]


def all_nodes(client: Any, retired: bool = False) -> list[Any]:
    from whaleflux.v1 import inventory_pb2

    request = inventory_pb2.ListNodesRequest(page_size=1000, show_retired=retired)
    return pages(client.inventory.ListNodes, request, "nodes")


def all_health(client: Any) -> dict[str, Any]:
    from whaleflux.v1 import health_pb2

    listed = pages(client.health.ListNodeHealth, health_pb2.ListNodeHealthRequest(page_size=1000), "node_health")
    return {h.name: h for h in listed}


def held_gpus(client: Any) -> Held:
    """By node and UUID, also of GPUs that the node does not report now: bytes held in shares, 0 of a GPU that is held whole."""
    from whaleflux.v1 import scheduler_pb2

    listed = pages(client.scheduler.ListAllocations, scheduler_pb2.ListAllocationsRequest(), "allocations")
    held: Held = defaultdict(Counter)
    for allocation in listed:
        for uuid in allocation.task.gpu_uuids:
            held[allocation.task.node][uuid] += allocation.task.share_memory_bytes
    return held


def held_and_free(gpus: Collection[Any], held: Collection[str], *, ready: bool) -> tuple[int, int]:
    """How many of these GPUs of a node are held, by UUID, and how many can be had."""
    taken = sum(gpu.uuid in held for gpu in gpus)
    return taken, sum(gpu.healthy and gpu.uuid not in held for gpu in gpus) if ready else 0


def free_in_shares(gpus: Collection[Any], held: Mapping[str, int], *, ready: bool) -> int:
    """Bytes that are free on GPUs of which others hold shares."""
    return sum(max(0, g.memory_bytes - held[g.uuid]) for g in gpus if ready and g.healthy and held.get(g.uuid))


def phase(health: dict[str, Any], name: str) -> str:
    from whaleflux.v1 import health_pb2

    found = health.get(name)
    return output.enum_name(health_pb2.NodePhase, found.phase, "NODE_PHASE_") if found else "UNKNOWN"


def is_open(health: dict[str, Any], node: Any) -> bool:
    """Whether it takes new work."""
    return phase(health, node.name) == "READY" and node.intent in (0, 1)


def shown_phase(phase: str, held: Collection[str]) -> str:
    """A draining node on which nothing runs any more says so: it may be taken away."""
    return f"{phase}, empty" if phase == "DRAINING" and not held else phase


def failing(health: dict[str, Any], name: str) -> list[Any]:
    """Conditions of a node that do not hold."""
    from whaleflux.v1 import types_pb2

    listed = health[name].conditions if name in health else ()
    return [condition for condition in listed if condition.status == types_pb2.CONDITION_STATUS_FALSE]


def conditions(health: dict[str, Any], name: str) -> str:
    """Reasons of what does not hold: "NO_DRIVER", "GPU_LOST"."""
    return ", ".join(condition.reason for condition in failing(health, name)) or "-"


def why(health: dict[str, Any], node: Any) -> str:
    """What does not hold and what to do about it, in words; else why it is in its phase."""
    messages = [condition.message for condition in failing(health, node.name) if condition.message]
    said = health[node.name].message if node.name in health else ""
    return "; ".join(messages) or said or str(node.intent_reason)


def models_of(node: Any) -> str:
    counts = Counter(gpu.model for gpu in node.facts.gpus)
    if not counts:
        return "none"
    return ", ".join(f"{n} x {model}" for model, n in counts.items()) + (" (simulated)" if node.facts.simulated else "")


def shares_kept(node: Any) -> str:
    """Who keeps a share of a GPU apart from its neighbours: nobody, but the agent looks."""
    return "-" if not node.facts.gpus else "played" if node.facts.simulated else "watched"


def price_of(node: Any) -> float:
    return float((node.price if node.HasField("price") else node.facts.price).usd_per_gpu_hour)


def gpu_groups(listed: Collection[Any], health: dict[str, Any], held: Held) -> list[dict[str, Any]]:
    """One row for each model and site."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for node in listed:
        site, ready = names.top(node.name), is_open(health, node)
        for model in dict.fromkeys(gpu.model for gpu in node.facts.gpus):
            alike = [gpu for gpu in node.facts.gpus if gpu.model == model]
            memory, price = alike[0].memory_bytes, price_of(node) * _part_of_gpu(alike[0])
            row = groups.setdefault(
                (model, site),
                {"model": model, "site": site, "memory_bytes": memory, "total": 0, "free": 0, "held": 0,
                 "free_in_shares_bytes": 0, "unavailable": 0, "nodes": 0, "usd_per_gpu_hour": price,
                 "most_usd_per_gpu_hour": price,
                 "simulated": node.facts.simulated},
            )  # fmt: skip
            taken, free = held_and_free(alike, held[node.name], ready=ready)
            row["total"] += len(alike)
            row["nodes"] += 1
            row["held"] += taken
            row["free"] += free
            row["free_in_shares_bytes"] += free_in_shares(alike, held[node.name], ready=ready)
            row["unavailable"] += len(alike) - taken - free
            row["usd_per_gpu_hour"] = min(row["usd_per_gpu_hour"], price)
            row["most_usd_per_gpu_hour"] = max(row["most_usd_per_gpu_hour"], price)
    return [groups[key] for key in sorted(groups)]


def _part_of_gpu(gpu: Any) -> float:
    """A MIG instance costs the part of its GPU's price that its memory is of the GPU's."""
    return float(gpu.memory_bytes / gpu.parent_memory_bytes) if gpu.parent_memory_bytes else 1.0
