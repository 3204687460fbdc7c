"""Which GPUs a reservation keeps: of one type and close together, those first that nobody has, and others in place of those that are lost. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from whaleflux.fleet.model import Gpu, Node
from whaleflux_scheduler.core.reservations import ANY_TYPE, NOTHING, Gpus, Reservation


@dataclass(frozen=True, slots=True)
class Fleet:
    """What GPUs may be chosen from: nodes that take work, and what it costs to take a GPU (0: it is idle)."""

    nodes: Mapping[str, Node]
    open: Collection[str]
    cost: Callable[[str], int] = lambda _: 0


def replan(kept: Reservation, others: Iterable[Reservation], fleet: Fleet) -> Reservation:
    """With other GPUs in place of those that are lost, as far as there are any; those that are there stay its own."""
    taken = taken_by(kept, others)
    there = {
        node: tuple(uuid for uuid in uuids if uuid not in taken and is_there(kept, fleet, node, uuid))
        for node, uuids in kept.held
        if node not in taken
    }
    own = {node: uuids for node, uuids in there.items() if uuids}
    lacks = kept.gpus - sum(map(len, own.values()))
    if lacks < 0:  # it keeps fewer than before: its last ones go
        own = _first(own, kept.gpus)
    elif lacks:
        taken |= {uuid for uuids in own.values() for uuid in uuids}
        for node, uuids in choose(kept, lacks, taken, fleet, own).items():
            own[node] = (*own.get(node, ()), *uuids)
    held = tuple(own.items())
    return replace(kept, held=held, short=kept.gpus - sum(len(uuids) for _, uuids in held))


def taken_by(asked: Reservation, others: Iterable[Reservation]) -> set[str]:
    """GPUs, and whole nodes by name, that other reservations keep at some time within its window."""
    taken = set[str]()
    for other in others:
        if other.over or other.name == asked.name or not other.overlaps(asked):
            continue
        taken.update(other.nodes if other.maintenance else (uuid for _, uuids in other.held for uuid in uuids))
    return taken


def choose(
    asked: Reservation, gpus: int, taken: Collection[str], fleet: Fleet, own: Gpus = NOTHING
) -> dict[str, tuple[str, ...]]:
    """That many GPUs close together and near its `own`, those first that nobody has; fewer when there are no more.

    Of one type, that of its own; of several where any will do and no type has enough. Then in the smallest domain of the network that
    has enough, then on as few nodes as possible.
    """
    there = {
        name: free
        for name in fleet.open
        if name in fleet.nodes and name not in taken
        if (free := [gpu for gpu in usable(asked, fleet.nodes[name]) if gpu.uuid not in taken])
    }
    own_types = {gpu.model for name, uuids in own.items() for gpu in fleet.nodes[name].gpus if gpu.uuid in uuids}
    several = asked.gpu_type == ANY_TYPE or len(own_types) > 1
    offers = _offers(there, gpus, own_types if asked.gpu_type != ANY_TYPE else (), several=several)
    best = min((_closest(offer, gpus, fleet, own) for offer in offers), key=lambda found: found[0], default=None)
    return best[1] if best is not None else {}


def _offers(
    offered: Mapping[str, list[Gpu]], gpus: int, types: Collection[str], *, several: bool
) -> list[dict[str, list[Gpu]]]:
    """Those of one type that are enough, else of all where `several` will do, else of the type with most. `types`: only of these; none: of any."""
    by_type: dict[str, dict[str, list[Gpu]]] = {}
    for name, there in offered.items():
        for gpu in there:
            if not types or gpu.model in types:
                by_type.setdefault(gpu.model, {}).setdefault(name, []).append(gpu)
    in_order = [by_type[model] for model in sorted(by_type)]
    enough = [offer for offer in in_order if _count(offer) >= gpus]
    if enough or not several:
        return enough or sorted(in_order, key=_count)[-1:]
    return [{name: [gpu for gpu in there if gpu.model in by_type] for name, there in offered.items()}]


def _count(offer: Mapping[str, list[Gpu]]) -> int:
    return sum(map(len, offer.values()))


def _closest(
    offer: Mapping[str, list[Gpu]], gpus: int, fleet: Fleet, near: Collection[str]
) -> tuple[tuple[int, ...], dict[str, tuple[str, ...]]]:
    """In the smallest domain with enough, with how good that is: the less the better."""
    for level in range(len(_domains(next(iter(fleet.nodes.values())))) if fleet.nodes else 0):
        domains: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in offer:
            domains[_domains(fleet.nodes[name])[level]].append(name)
        found = [
            _fill({name: offer[name] for name in members}, gpus, fleet.cost, near)
            for _, members in sorted(domains.items())
            if sum(len(offer[name]) for name in members) >= gpus
        ]
        if found:
            cost, taken = min(found, key=lambda one: one[0])
            return (level, *cost), taken
    cost, taken = _fill(offer, gpus, fleet.cost, near)
    return (99, *cost), taken


def _domains(node: Node) -> tuple[tuple[str, ...], ...]:
    """From the node to the fleet."""
    site, zone, spine, leaf = node.site, node.zone, node.spine, node.leaf
    return (node.name,), (site, zone, spine, leaf), (site, zone, spine), (site, zone), (site,), ()


def _fill(
    offer: Mapping[str, list[Gpu]], gpus: int, cost: Callable[[str], int], near: Collection[str]
) -> tuple[tuple[int, int], dict[str, tuple[str, ...]]]:
    """Nodes with most idle GPUs first; the last part where it leaves least behind. Returns (cost, nodes) and what is taken."""
    in_order = {name: sorted(free, key=lambda gpu: (cost(gpu.uuid), gpu.index)) for name, free in offer.items()}
    dear = {name: sum(cost(gpu.uuid) for gpu in free) for name, free in offer.items()}
    left, taken, spent = gpus, dict[str, tuple[str, ...]](), 0
    waiting = sorted(offer, key=lambda name: (name not in near, dear[name], -len(offer[name]), name))
    while left and waiting:
        name = next((one for one in waiting if len(offer[one]) <= left), None)
        if name is None:  # each has more than is needed
            name = min(waiting, key=lambda one: (sum(cost(g.uuid) for g in in_order[one][:left]), len(offer[one]), one))
        waiting.remove(name)
        part = in_order[name][:left]
        taken[name] = tuple(gpu.uuid for gpu in part)
        left, spent = left - len(part), spent + sum(cost(gpu.uuid) for gpu in part)
    return (spent, len(taken)), taken


def usable(asked: Reservation, node: Node) -> list[Gpu]:
    """GPUs of the node that would do: whole ones, or MIG instances where their type is asked for by name."""
    if asked.nodes and node.name not in asked.nodes:
        return []
    wanted = asked.gpu_type
    types = (wanted,) if wanted not in ("", ANY_TYPE) else ()
    return [g for g in node.gpus if g.offered and g.uuid and (g.model in types if types else not g.parent_uuid)]


def is_there(kept: Reservation, fleet: Fleet, node: str, uuid: str) -> bool:
    """Whether a GPU is as it was when it was chosen, and its node takes work."""
    known = fleet.nodes.get(node)
    return known is not None and node in fleet.open and any(g.uuid == uuid for g in usable(kept, known))


def _first(gpus: Mapping[str, tuple[str, ...]], most: int) -> dict[str, tuple[str, ...]]:
    """So many of them, the first ones."""
    kept = {}
    for node, uuids in gpus.items():
        if part := uuids[:most]:
            kept[node] = part
        most -= len(part)
    return kept
