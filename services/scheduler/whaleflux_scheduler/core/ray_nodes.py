"""Nodes of the fleet and of a Ray cluster as kinds of which a plan for its demand is made. Pure.

Nodes with the same GPUs, as many of them free, the same price, links and labels are one kind. What processors and memory they have left is
rounded down to a power of two where work is on them, so that kinds stay few; labels count only where the demand names them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from whaleflux import names
from whaleflux.fleet.model import Node
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.ray_demand import UNIT, Demand, LabelRule, Shape, is_custom
from whaleflux_scheduler.core.ray_kinds import Kind, whole_devices
from whaleflux_scheduler.core.ray_plan import Addition, RayPlan, plan
from whaleflux_scheduler.core.ray_room import left_of

GPU_LABEL, SITE_LABEL, RAY_TYPE_LABEL = "whaleflux/gpu", "whaleflux/site", "ray.io/accelerator-type"
_MIB = 1 << 20
_MOST_KINDS = 64
_TYPE = "accelerator_type:"
_ALIVE = frozenset({"IDLE", "RUNNING", "STARTING", ""})


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node of the cluster: what it has in all and what is free, by Ray's names; `starting` of one that is under way."""

    id: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str]
    status: str = "IDLE"


@dataclass(frozen=True, slots=True)
class FreeNode:
    """What a node of the fleet offers: whole GPUs of one model, millicores and bytes that nobody asked for."""

    node: Node
    gpus: int
    cpu_millicores: int
    memory_bytes: int


def free_nodes(engine: Engine) -> list[FreeNode]:
    """The nodes that take work, with what is free on each."""
    columns = engine.columns
    return [
        FreeNode(row.node, columns.offered[i], int(columns.cpu_free[i]), int(columns.host_free[i]))
        for i, row in enumerate(columns.rows)
        if row.schedulable
    ]


def emptied(nodes: Iterable[FreeNode]) -> list[FreeNode]:
    """The same if nobody used them."""
    return [
        FreeNode(one.node, sum(gpu.offered for gpu in one.node.gpus), one.node.cpu_millicores, one.node.memory_bytes)
        for one in nodes
    ]


def kinds_of(nodes: Iterable[FreeNode], label_keys: Collection[str]) -> list[Kind]:
    """Nodes that are alike together, those with the most GPUs first where there are too many kinds."""
    alike: dict[Kind, list[str]] = defaultdict(list)
    for one in nodes:
        alike[_kind(one, label_keys)].append(one.node.name)
    largest = sorted(alike.items(), key=lambda item: (-item[0].gpus * len(item[1]), item[1]))[:_MOST_KINDS]
    return [
        replace(kind, name=f"kind {at}", count=len(found), names=tuple(sorted(found)))
        for at, (kind, found) in enumerate(largest)
    ]


def _kind(one: FreeNode, label_keys: Collection[str]) -> Kind:
    node = one.node
    gpu = next((gpu for gpu in node.gpus if gpu.offered), None)
    memory_mib = gpu.memory_bytes // _MIB if gpu is not None else 0
    model = gpu.model if gpu is not None else ""
    labels = dict(node.labels) | {SITE_LABEL: names.last(node.site)}
    labels |= {GPU_LABEL: model, RAY_TYPE_LABEL: model.partition("-")[0]} if model else {}
    links = [link.bandwidth_bytes_per_s for link in node.links]
    return Kind(
        "",
        model=model,
        devices=whole_devices(one.gpus, memory_mib),
        device_memory_mib=memory_mib,
        cpu=_rounded(one.cpu_millicores, node.cpu_millicores) * UNIT // 1000,
        memory=_rounded(one.memory_bytes, node.memory_bytes) * UNIT,
        labels=tuple(sorted((key, value) for key, value in labels.items() if key in label_keys)),
        usd_per_gpu_hour=node.price.usd_per_gpu_hour * (gpu.part_of_gpu if gpu is not None else 1.0),
        link_bytes_per_s=min(links, default=0.0),
    )


def _rounded(free: int, total: int) -> int:
    """Down to a power of two, but for what is free as a whole."""
    return free if free == total or free <= 0 else 1 << (free.bit_length() - 1)


def held_of(nodes: Iterable[RayNode], label_keys: Collection[str], *, in_all: bool = False) -> list[Kind]:
    """The cluster's nodes as room that costs nothing more, those that are alike together; `in_all`: as if nothing ran on them."""
    alike: dict[Kind, list[str]] = defaultdict(list)
    for node in nodes:
        if node.status in _ALIVE:
            alike[_held(node, node.total if in_all else node.free, label_keys)].append(node.id)
    return [
        replace(kind, name=f"held {at}", count=len(ids), names=tuple(ids))
        for at, (kind, ids) in enumerate(alike.items())
    ]


def _held(node: RayNode, free: Mapping[str, float], label_keys: Collection[str]) -> Kind:
    memory_mib = _device_memory_mib(node)
    model = next((name.removeprefix(_TYPE) for name in node.total if name.startswith(_TYPE)), "")
    custom = {name: round(n * UNIT) for name, n in free.items() if is_custom(name)}
    return Kind(
        "",
        model=node.labels.get(GPU_LABEL, model),
        devices=left_of(node.total, free, memory_mib),
        device_memory_mib=memory_mib,
        cpu=round(free.get("CPU", 0) * UNIT),
        memory=round(free.get("memory", 0) * UNIT),
        custom=tuple(sorted(custom.items())),
        labels=tuple(sorted((key, value) for key, value in node.labels.items() if key in label_keys)),
        held=True,
    )


def _device_memory_mib(node: RayNode) -> int:
    """What it says itself; of a node that was started without `gpu_memory` none: Ray gives it no work that asks for some."""
    gpus = int(node.total.get("GPU", 0))
    return int(node.total.get("gpu_memory", 0) // gpus) if gpus else 0


def label_keys(demand: Demand, constraints: Iterable[tuple[Shape, int]] = ()) -> set[str]:
    """Labels that anything of it names."""
    shapes = [shape for shape, _ in (*demand.singles, *constraints)]
    shapes += [shape for gang in demand.gangs for shape, _ in gang.bundles]
    rules: Iterable[LabelRule] = (rule for shape in shapes for wish in shape.selectors for rule in wish)
    return {rule.key for rule in rules}


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a Ray cluster asks for, what it should hold in all, and its nodes. `first`: shapes that the last plan had no time for."""

    demand: Demand
    constraints: tuple[tuple[Shape, int], ...] = ()
    nodes: tuple[RayNode, ...] = ()
    first: frozenset[Shape] = frozenset()


def resize(
    cluster: Cluster, nodes: Sequence[FreeNode], is_over: Callable[[], bool] = lambda: False
) -> tuple[RayPlan, RayPlan]:
    """What to add for what waits, and what more so that the cluster holds what it should in all, until `is_over`."""
    keys = label_keys(cluster.demand, cluster.constraints)
    kinds, ever = kinds_of(nodes, keys), kinds_of(emptied(nodes), keys)
    waits = plan(cluster.demand, [*held_of(cluster.nodes, keys), *kinds], ever, is_over, cluster.first)
    if not cluster.constraints:
        return waits, RayPlan()
    added = [_as_held(part, at) for at, part in enumerate(waits.additions)]
    left = [_without(kind, waits.additions) for kind in kinds]
    held = held_of(cluster.nodes, keys, in_all=True)
    return waits, plan(Demand(cluster.constraints), [*held, *added, *left], ever, is_over, cluster.first)


def _as_held(part: Addition, at: int) -> Kind:
    kind = part.filling.kind
    return replace(
        kind,
        name=f"added {at}",
        devices=whole_devices(part.filling.gpus_paid, kind.device_memory_mib),
        count=part.count,
        names=part.names,
        held=True,
    )


def _without(kind: Kind, additions: Iterable[Addition]) -> Kind:
    """What of a kind is left when these are taken; a node of which a part is taken is left out."""
    taken = {name for part in additions for name in part.names}
    left = tuple(name for name in kind.names if name not in taken)
    return replace(kind, count=len(left), names=left)
