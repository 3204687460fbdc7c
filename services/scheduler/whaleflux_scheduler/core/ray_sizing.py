"""How many workers a Ray cluster should have for what waits in it, beside those it has: which to start, which need not be waited for. Pure.

A plan of what is free now says which workers can start; what it leaves unmet and some node could hold gets workers that wait for their
turn, by queue, priority and guarantee, as any job. Workers that wait are planned anew in each look, so that they follow the demand; those that
hold GPUs leave by themselves when they are idle (`whaleflux.ray_cluster.worker`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from whaleflux import names
from whaleflux_scheduler.core import ray_nodes
from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.core.ray_clusters import RayCluster
from whaleflux_scheduler.core.ray_demand import UNIT, Demand, Gang, Shape
from whaleflux_scheduler.core.ray_nodes import GPU_LABEL, RAY_TYPE_LABEL, SITE_LABEL, Cluster, FreeNode, RayNode
from whaleflux_scheduler.core.ray_parts import End, Part, Role, Worker
from whaleflux_scheduler.core.ray_plan import Addition, RayPlan

MOST_WORKERS = 1_000  # of a cluster, those without GPUs included
MOST_APART = 256  # GPUs of workers that are started at once: with more each node is one
SETTLES_S = 5.0  # so long a worker that waits counts as one that comes: it is about to be placed
_OURS = frozenset({GPU_LABEL, SITE_LABEL, RAY_TYPE_LABEL})
Plans = tuple[RayPlan, RayPlan]
Resize = Callable[[Cluster, Sequence[FreeNode]], Plans]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was read: the cluster, jobs of whose nodes it has, and those whose node it had and has no more."""

    cluster: Cluster
    joined: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Sizing:
    """What to do, and what the plans said. `short_gpus` are wanted beyond `max_gpus`."""

    start: tuple[Worker, ...]
    end: tuple[End, ...]
    short_gpus: int
    plans: Plans


def size(
    cluster: RayCluster,
    seen: Seen,
    parts: Iterable[Part],
    free: Sequence[FreeNode],
    now: datetime,
    resize: Resize = ray_nodes.resize,
) -> Sizing:
    """The same again changes nothing, once what it says is done."""
    workers_ = [part for part in parts if part.role is Role.WORKER and not part.ended]
    waiting = [part for part in workers_ if _only_waits(part, now)]
    coming = [p for p in workers_ if p not in waiting and p.job not in seen.joined and p.job not in seen.left]
    nodes = [one for one in free if _may_be_on(cluster, one)]
    asked = replace(seen.cluster, nodes=(*seen.cluster.nodes, *map(under_way, coming)))
    plans = resize(asked, nodes)
    wanted = list(workers(plans))
    if (rest := unmet(asked, plans)) is not None:
        wanted += workers(resize(rest, ray_nodes.emptied(nodes)))
    kept = [part for part in workers_ if part not in waiting]
    room = cluster.max_gpus - sum(part.worker.gpus for part in kept)
    within, short = _within(wanted, room, MOST_WORKERS - len(kept))
    start, end = _matched(within, waiting)
    if any(one.postponed for plan in plans for one in plan.unmet):
        end = []  # it is not known yet whether anything waits for them
    # Ray gives small work the first node that has room: were the large there first, it would lie where large work is to go.
    return Sizing(tuple(sorted(start, key=lambda one: one.gpus)), tuple(end), short, plans)


def _only_waits(part: Part, now: datetime) -> bool:
    return part.state is JobState.QUEUED and (now - part.since).total_seconds() >= SETTLES_S


def _may_be_on(cluster: RayCluster, one: FreeNode) -> bool:
    if cluster.sites and names.last(one.node.site) not in cluster.sites:
        return False
    models = {gpu.model for gpu in one.node.gpus if gpu.offered}
    return not (cluster.gpu_types and models) or bool(models & set(cluster.gpu_types))


def under_way(part: Part) -> RayNode:
    """A worker that comes, as a node of the cluster: what it will hold is not asked for twice."""
    worker = part.worker
    labels = dict(worker.labels) | ({SITE_LABEL: worker.site} if worker.site else {})
    if worker.gpus:
        labels |= {GPU_LABEL: worker.gpu_type, RAY_TYPE_LABEL: worker.gpu_type.partition("-")[0]}
    return RayNode(part.job, worker.total, worker.total, labels, "STARTING")


def workers(plans: Iterable[RayPlan]) -> Iterator[Worker]:
    """What each node to add is given, in as many workers as can leave one by one: a worker leaves only when nothing runs on it.

    Each task or actor of whole GPUs has its own, as long as there are few (`MOST_APART`); of GPUs whose memory bundles share each is one, since Ray adds memory
    up over a node, and of one GPU the sum is what that GPU has. What a placement group has on a node stays together, and so does work without GPUs.
    """
    additions = [part for plan in plans for part in plan.additions]
    apart = sum(part.count * part.filling.gpus_paid for part in additions) <= MOST_APART
    for part in additions:
        given = list(_of_node(part, apart=apart))
        for at in range(part.count):
            site = names.top(part.names[at]) if at < len(part.names) else ""
            yield from (replace(one, site=site) for one in given)


def _of_node(part: Addition, *, apart: bool) -> Iterator[Worker]:
    """On one node of an addition."""
    in_groups = any(of_gang for of_gang, _, _ in part.sources)
    whole = [(shape, n) for shape, n in part.bundles if shape.devices and apart and not in_groups]
    rest = [bundle for bundle in part.bundles if bundle not in whole]
    gpus = part.filling.gpus_paid - sum(shape.devices * n for shape, n in whole)
    for shape, n in whole:
        beside = [] if gpus else rest  # work without GPUs
        yield _worker(part, shape.devices, 1, [(shape, 1), *beside])
        yield from [_worker(part, shape.devices, 1, [(shape, 1)])] * (n - 1)
        rest = rest if gpus else []
    if gpus or not whole:
        alone = gpus > 1 and any(_shares_memory(s) for s, _ in rest) and all(s.gpu <= UNIT for s, _ in rest)
        yield from [_worker(part, 1 if alone else gpus, gpus if alone else 1, rest)] * (gpus if alone else 1)


def _worker(part: Addition, gpus: int, others: int, bundles: Sequence[tuple[Shape, int]]) -> Worker:
    """One of so many alike that hold the bundles together: any of them may get all of their processors and memory."""
    kind = part.filling.kind
    cpus = max(1, math.ceil(sum(shape.cpu * n for shape, n in bundles) / UNIT))
    memory = math.ceil(sum(shape.memory * n for shape, n in bundles) / UNIT)
    return Worker(
        gpus=gpus,
        gpu_type=kind.model if gpus else "",
        gpu_memory_mib=kind.device_memory_mib if gpus else 0,
        cpus=cpus,
        cpus_held=max(1, cpus // others),
        memory_bytes=memory,
        memory_bytes_held=-(-memory // others),
        labels=tuple((key, value) for key, value in kind.labels if key not in _OURS),
    )


def _shares_memory(shape: Shape) -> bool:
    return shape.gpu < UNIT and shape.gpu_memory > 0


def unmet(cluster: Cluster, plans: Plans) -> Cluster | None:
    """What the plans leave unmet for now, as a demand of its own; None: nothing. What can never be had is left out, and what had no turn."""
    waits, should_hold = plans
    singles, gangs = list[tuple[Shape, int]](), list[Gang]()
    for one in waits.unmet:
        if one.never or one.postponed:
            continue
        if one.of_gang:
            gangs.append(replace(cluster.demand.gangs[one.source], count=one.count))
        else:
            singles.append((cluster.demand.singles[one.source][0], one.count))
    singles += [
        (cluster.constraints[one.source][0], one.count) for one in should_hold.unmet if not (one.never or one.postponed)
    ]
    return Cluster(Demand(tuple(singles), tuple(gangs))) if singles or gangs else None


def _within(wanted: Iterable[Worker], room_gpus: int, room_workers: int) -> tuple[list[Worker], int]:
    """Those for which there is room, and how many GPUs the others would have."""
    found, short = list[Worker](), 0
    for one in wanted:
        if one.gpus > room_gpus or len(found) >= room_workers:
            short += one.gpus
            continue
        room_gpus -= one.gpus
        found.append(one)
    return found, short


def _matched(wanted: Iterable[Worker], waiting: Iterable[Part]) -> tuple[list[Worker], list[End]]:
    """Whom nobody waits for yet, and who waits for nothing any more."""
    left = Counter(wanted)
    end = list[End]()
    for part in waiting:
        if left[part.worker] > 0:
            left[part.worker] -= 1
        else:
            end.append(End(part.job, "nothing waits for it any more"))
    return list(left.elements()), end
