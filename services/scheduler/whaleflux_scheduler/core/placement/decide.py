"""One decision: which places are considered, what each costs, and which one the request prefers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from whaleflux.fleet.links import HOP_S, all_reduce_s
from whaleflux.fleet.model import Level, LinkKind
from whaleflux_scheduler.core.placement.api import (
    Alternative,
    Cost,
    DatasetFact,
    Goal,
    GpuOption,
    GpuRequirement,
    GroupRequest,
    NodeAssignment,
    Placement,
    PlaceRequest,
)
from whaleflux_scheduler.core.placement.columns import DOMAIN_LEVELS, Columns, nvme_bytes
from whaleflux_scheduler.core.placement.comm import Estimate, estimate
from whaleflux_scheduler.core.placement.cover import Counts
from whaleflux_scheduler.core.placement.fractions import Device, least_stranding_node, place_parts
from whaleflux_scheduler.core.placement.gang import Bounds, even, possible, ragged, splits
from whaleflux_scheduler.core.placement.supply import Bools, Demand, Supply, allowed_rows, node_conditions

Part = tuple[int, int]  # (row, mask of positions)
_UNKNOWN_RUN_S = 3600.0  # what a run is taken to last when the request does not say
_EQUAL = 0.005  # costs this close are equal; the next criterion decides


@dataclass(frozen=True, slots=True)
class Group:
    """Where one group of the request goes: whole GPUs as masks, or parts of GPUs as devices."""

    request: GroupRequest
    parts: tuple[Part, ...] = ()
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A feasible place and what it costs."""

    option: GpuOption
    groups: tuple[Group, ...]
    estimate: Estimate
    cost: Cost
    value: tuple[float, float]  # what the GPUs taken are worth to others: lower is taken first

    @property
    def rows(self) -> list[int]:
        return [i for g in self.groups for i in ([i for i, _ in g.parts] or [i for i, _ in g.devices])]


def decide(columns: Columns, request: PlaceRequest, datasets: Mapping[str, DatasetFact]) -> Placement | None:
    """The preferred placement, or None when nothing fits."""
    found = list(candidates(columns, request, datasets))
    if not found:
        return None
    ordered = rank(request, found)
    return assemble(columns, request, ordered[0], ordered[1:])


def feasible(columns: Columns, request: PlaceRequest, datasets: Mapping[str, DatasetFact]) -> bool:
    """Whether anything fits at all, for the least work."""
    return any(place.possible() for _, place in _searches(columns, request, datasets))


def candidates(columns: Columns, request: PlaceRequest, datasets: Mapping[str, DatasetFact]) -> Iterator[Candidate]:
    """Every option on every pool of like nodes, with and without the data's nodes, and by price where price decides."""
    found: set[GpuOption] = set()
    for option, place in _searches(columns, request, datasets):
        if place.last_resort and option in found:
            continue
        for groups in place.all_groups():
            found.add(option)
            yield price(columns, request, option, groups, datasets)


def _searches(
    columns: Columns, request: PlaceRequest, datasets: Mapping[str, DatasetFact]
) -> Iterator[tuple[GpuOption, _Place]]:
    """For each option: pools of like nodes on each set of rows, and all matching nodes together as the last resort."""
    if not columns.count:
        return
    allowed = allowed_rows(columns, request)
    near = frozenset(columns.index[n] for n in request.near_nodes if n in columns.index)
    for option in request.requirement.any_of:
        pools = _pools(columns, request, option)
        for subset in _restrictions(columns, request, datasets, allowed):
            for shapes in pools:
                yield option, _Place(columns, request, option, subset, shapes, near)
        if not request.hard_locality and len(pools) > 1:
            yield option, _Place(columns, request, option, allowed, None, near, last_resort=True)


def _pools(columns: Columns, request: PlaceRequest, option: GpuOption) -> list[frozenset[int]]:
    """Shapes that a gang may mix: alike in model, ring and network first, then all of one model."""
    key = ("pools", request.requirement, option.model)
    found = columns.matches.get(key)
    if found is None:
        found = columns.matches[key] = _find_pools(columns, request, option)
    return cast("list[frozenset[int]]", found)


def _find_pools(columns: Columns, request: PlaceRequest, option: GpuOption) -> list[frozenset[int]]:
    alike: dict[tuple[str, float, float], set[int]] = {}
    models: dict[str, set[int]] = {}
    probe = Demand.of(GroupRequest(), request, option)
    supply = Supply(columns, probe)
    for s in supply.match.shapes:
        shape = columns.kinds[s]
        model = shape.models[(supply.match.positions[s] & -supply.match.positions[s]).bit_length() - 1]
        ring = shape.wiring.ring_bytes_per_s(supply.match.positions[s])
        alike.setdefault((model, ring, shape.network_bytes_per_s), set()).add(s)
        models.setdefault(model, set()).add(s)
    pools = [frozenset(p) for _, p in sorted(alike.items(), reverse=True)]
    return pools + [frozenset(m) for _, m in sorted(models.items()) if frozenset(m) not in pools]


def _restrictions(
    columns: Columns, request: PlaceRequest, datasets: Mapping[str, DatasetFact], allowed: Bools | None
) -> Iterator[Bools | None]:
    """Row sets to try: nodes that hold the data, nodes that could keep it, nodes up to each price when price matters, all nodes.

    Work without data tries nodes without NVMe first while there are datasets that could use them.
    """
    local = _local_rows(columns, request, datasets)
    if local is not None:
        yield local if allowed is None else local & allowed
        if request.hard_locality:
            return
        size = sum(datasets[d].size_bytes for d in request.datasets if d in datasets)
        keeps = columns.cache_room() >= max(size, 1)
        yield keeps if allowed is None else keeps & allowed
    elif datasets:
        plain = ~node_conditions(columns, GpuRequirement(nvme=True))
        if plain.any() and not plain.all() and not request.requirement.nvme:
            yield plain if allowed is None else plain & allowed
    if request.preference.goal is not Goal.CLOSEST:
        price = np.array([r.node.price.usd_per_gpu_hour for r in columns.rows])
        for limit in np.unique(price)[:-1][:8]:
            cheap = price <= limit
            yield cheap if allowed is None else cheap & allowed
    yield allowed


def _local_rows(columns: Columns, request: PlaceRequest, datasets: Mapping[str, DatasetFact]) -> Bools | None:
    if not request.datasets:
        return None
    rows = np.ones(columns.count, dtype=np.bool_)
    for name in request.datasets:
        here = np.zeros(columns.count, dtype=np.bool_)
        if name in datasets:
            here[[columns.index[n] for n in datasets[name].cached_on if n in columns.index]] = True
        rows &= here
    return rows


@dataclass(frozen=True, slots=True)
class _Place:
    """The search for one option on one set of nodes."""

    columns: Columns
    request: PlaceRequest
    option: GpuOption
    allowed: Bools | None
    shapes: frozenset[int] | None
    near: frozenset[int]
    last_resort: bool = False

    def possible(self) -> bool:
        if len(self.request.groups) > 1 or self.request.groups[0].share:
            return next(self.all_groups(), None) is not None
        group = self.request.groups[0]
        supply = Supply(self.columns, Demand.of(group, self.request, self.option), self.allowed, self.shapes)
        return bool(supply.match.shapes) and possible(supply, self._bounds(group, None))

    def all_groups(self) -> Iterator[tuple[Group, ...]]:
        if len(self.request.groups) == 1:
            group = self.request.groups[0]
            for found in self._one(group, None):
                yield (found,)
            return
        together = self._together()
        if together:
            yield together

    def _bounds(self, group: GroupRequest, inside: tuple[Level, int] | None) -> Bounds:
        own = max(group.level or 0, self.request.level or 0)
        widest = Level(min(own, Level.LEAF))
        outer = next((s for s in group.subgroups if s.required and s.level < Level.NODE), None)
        chunk = (outer.size * self.option.per_unit, outer.level) if outer else None
        alone = len(self.request.groups) == 1
        return Bounds(
            widest,
            self.request.min_nodes if alone else 0,
            self.request.max_nodes if alone else 0,
            inside,
            chunk,
            self.near,
        )

    def _one(self, group: GroupRequest, inside: tuple[Level, int] | None) -> Iterator[Group]:
        if group.share:
            devices = place_parts(
                self.columns,
                self.request.requirement,
                self.option.model,
                group.share,
                group.gpus,
                allowed=self._narrowed(inside),
                one_node=(group.level or 0) >= Level.NODE or group.gpus == group.gpus_per_node,
            )
            if devices:
                yield Group(group, devices=tuple(devices))
            return
        supply = Supply(self.columns, Demand.of(group, self.request, self.option), self.allowed, self.shapes)
        if supply.match.shapes:
            row = self._by_table(supply, inside)
            if row is not None:
                yield Group(group, self._masks(supply, [(row, supply.demand.gpus)]))
                return
            for counts in self._counts(supply, self._bounds(group, inside)):
                yield Group(group, self._masks(supply, counts))

    def _by_table(self, supply: Supply, inside: tuple[Level, int] | None) -> int | None:
        """Single-node work that states its CPU or memory goes where it strands least, once that was learned."""
        demand, need = supply.demand, supply.demand.need
        states = need.cpu_millicores_per_gpu or need.host_memory_bytes_per_gpu
        alone = demand.gpus <= (demand.most_per_node or demand.gpus) and demand.per_node in (0, demand.gpus)
        if self.columns.idle_table is None or not states or not alone or self.near:
            return None
        return least_stranding_node(supply, demand.gpus, Bounds(inside=inside))

    def _counts(self, supply: Supply, bounds: Bounds) -> Iterator[Counts]:
        """Each even split that is tight in its domain: wider domains only while uplinks are shared, wider splits only where closer."""
        deepest: Level | None = None
        for split in splits(supply, bounds):
            limit = bounds if deepest is None else replace(bounds, widest=Level(deepest + 1))
            for counts in even(supply, split, limit):
                yield counts
                level = self.columns.smallest_domain(i for i, _ in counts)[0]
                deepest = level if deepest is None else max(level, deepest)
                if level >= Level.LEAF:
                    return
        if deepest is None and not bounds.slice:
            yield from ragged(supply, bounds)

    def _narrowed(self, inside: tuple[Level, int] | None) -> Bools | None:
        rows = np.zeros(self.columns.count, dtype=np.bool_)
        if inside:
            rows[int(self.columns.lo[inside[0]][inside[1]]) : int(self.columns.hi[inside[0]][inside[1]])] = True
        else:
            rows[:] = True
        if self.allowed is not None:
            rows &= self.allowed
        if self.shapes is not None:
            rows &= np.isin(self.columns.shapes, list(self.shapes))
        return rows

    def _masks(self, supply: Supply, counts: Counts) -> tuple[Part, ...]:
        unit = supply.demand.unit
        columns = self.columns
        return tuple((i, columns.shape(i).wiring.choose(supply.candidates(i), count, unit)) for i, count in counts)

    def _together(self) -> tuple[Group, ...] | None:
        """Several groups: the deepest domain in which all find room, one after the other, largest first."""
        widest = self.request.level or Level.FLEET
        need = self.request.units * self.option.per_unit
        everything = Supply(
            self.columns, Demand.of(GroupRequest(), self.request, self.option), self.allowed, self.shapes
        )
        for level in (Level.NODE, *reversed(DOMAIN_LEVELS)):
            if level < min(widest, Level.NODE):
                return None
            room = everything.total(level)
            fitting = (
                np.flatnonzero(room >= need) if not any(g.share for g in self.request.groups) else np.arange(len(room))
            )
            for d in fitting[np.argsort(room[fitting], kind="stable")][:8]:
                found = self._all_inside((level, int(d)))
                if found:
                    return found
        return None

    def _all_inside(self, inside: tuple[Level, int]) -> tuple[Group, ...] | None:
        """Each group takes its GPUs for real while the next ones look, and all are given back at the end."""
        found: dict[int, Group] = {}
        try:
            for at in sorted(range(len(self.request.groups)), key=lambda g: -self.request.groups[g].gpus):
                group = next(self._one(self.request.groups[at], inside), None)
                if group is None:
                    return None
                found[at] = group
                occupy(self.columns, group, self.request, 1)
        finally:
            for group in found.values():
                occupy(self.columns, group, self.request, -1)
        nodes = {i for g in found.values() for i, _ in g.parts + g.devices}
        if len(nodes) < self.request.min_nodes or (self.request.max_nodes and len(nodes) > self.request.max_nodes):
            return None
        return tuple(found[at] for at in range(len(self.request.groups)))


def occupy(columns: Columns, group: Group, request: PlaceRequest, sign: int) -> None:
    """Takes (+1) or gives back (-1) what a group found, for the time of one search."""
    for i, mask in group.parts:
        (columns.take if sign > 0 else columns.give)(i, mask)
    for i, position in group.devices:
        share = group.request.share
        assert share is not None
        if share.mig_profile:
            columns.partition(i, position, share.mig_profile, sign)
        else:
            columns.share(i, position, share.compute_milli, share.memory_bytes, sign)
    need = request.requirement
    for i, count in [(i, m.bit_count()) for i, m in group.parts] + [(i, 1) for i, _ in group.devices]:
        columns.host(i, count * need.cpu_millicores_per_gpu, count * need.host_memory_bytes_per_gpu, sign)


def price(
    columns: Columns,
    request: PlaceRequest,
    option: GpuOption,
    groups: tuple[Group, ...],
    datasets: Mapping[str, DatasetFact],
) -> Candidate:
    """What the place costs in time and money."""
    merged: dict[int, int] = {}
    usd = 0.0
    for group in groups:
        for i, mask in group.parts:
            merged[i] = merged.get(i, 0) | mask
            usd += columns.rows[i].node.price.usd_per_gpu_hour * mask.bit_count()
        for i, position in group.devices:
            merged[i] = merged.get(i, 0) | 1 << position
            usd += columns.rows[i].node.price.usd_per_gpu_hour * _part_of(columns, i, position, group)
    parts = sorted(merged.items())
    found = estimate(columns, parts, request.comm, inner_size(request) * option.per_unit)
    fetch_s = max(_fetch_s(columns, i, request, datasets) for i, _ in parts) if request.datasets else 0.0
    run_s = _run_s(columns, request, option, parts, found)
    total = usd * (run_s + fetch_s) / 3600 if run_s is not None else None
    first = columns.shape(parts[0][0])
    return Candidate(option, groups, found, Cost(found.step_s, fetch_s, usd, run_s, total), first.value)


def inner_size(request: PlaceRequest) -> int:
    """Ranks of the largest subgroup that lives inside a node; 1 when there is none."""
    size = 1
    for group in request.groups:
        for sub in group.subgroups:
            if sub.level >= Level.NODE:
                size = max(size, sub.size)
    return size


def _part_of(columns: Columns, i: int, position: int, group: Group) -> float:
    """The larger of the memory and the compute share: what nobody else can use any more."""
    share, gpu = group.request.share, columns.rows[i].node.gpus[position]
    assert share is not None
    if share.mig_profile:
        return 1 / max(1, len(gpu.mig_profiles))
    return max(share.compute_milli / 1000, share.memory_bytes / gpu.memory_bytes if gpu.memory_bytes else 0.0)


def _fetch_s(columns: Columns, i: int, request: PlaceRequest, datasets: Mapping[str, DatasetFact]) -> float:
    """Seconds of reading from afar: once where the node can keep the data, each time where it cannot, nothing where it has it."""
    name, row = columns.names[i], columns.rows[i]
    network = row.node.network_bytes_per_s
    missing = [datasets[d] for d in request.datasets if d in datasets and name not in datasets[d].cached_on]
    room = nvme_bytes(row) if row.cache_room_bytes is None else row.cache_room_bytes
    times = 1.0 if sum(d.size_bytes for d in missing) <= room else max(1.0, request.data_reads)
    return times * sum(d.size_bytes / min(d.origin_bytes_per_s, network or d.origin_bytes_per_s) for d in missing)


def _run_s(
    columns: Columns, request: PlaceRequest, option: GpuOption, parts: list[Part], found: Estimate
) -> float | None:
    work = request.preference.work_gpu_s
    if not work:
        return None
    ideal = ideal_step_s(columns, request, parts)
    slower = found.step_s / ideal - 1 if ideal else 0.0
    return work / (request.units * option.throughput) * (1 + request.preference.comm_fraction * max(0.0, slower))


def ideal_step_s(columns: Columns, request: PlaceRequest, parts: list[Part]) -> float:
    """Communication on the same GPUs if no link were shared or split: whole nodes, their full network."""
    ranks = sum(m.bit_count() for _, m in parts)
    shape = columns.shape(parts[0][0])
    bus = shape.wiring.ring_bytes_per_s((1 << shape.size) - 1)
    if ranks > shape.size and shape.network_bytes_per_s:
        bus = min(bus, shape.network_bytes_per_s)
    return all_reduce_s(request.comm.all_reduce_bytes, ranks, bus, HOP_S[LinkKind.NVLINK], 2 * (ranks - 1))


def rank(request: PlaceRequest, found: list[Candidate]) -> list[Candidate]:
    """Best first by the request's goal. Sorting is stable, so equal candidates keep the order in which they were looked at."""
    goal, wish = request.preference.goal, request.preference
    if goal is Goal.CHEAPEST and wish.work_gpu_s:
        late = wish.deadline_s if wish.deadline_s is not None else float("inf")
        return sorted(found, key=lambda c: ((t := _time(c)) > late, t if t > late else 0.0, c.cost.total_usd or 0.0, t))
    if goal is Goal.CHEAPEST:
        return sorted(found, key=lambda c: (c.cost.usd_per_hour / c.option.throughput, c.cost.step_communication_s))
    if goal is Goal.FASTEST:
        budget = wish.budget_usd if wish.budget_usd is not None else float("inf")
        return sorted(
            found, key=lambda c: ((u := c.cost.total_usd or 0.0) > budget, u if u > budget else 0.0, _time(c))
        )
    if len(found) == 1:
        return found
    return _closest(request, found)


def _time(candidate: Candidate) -> float:
    return (candidate.cost.run_s or 0.0) + candidate.cost.fetch_s


def _closest(request: PlaceRequest, found: list[Candidate]) -> list[Candidate]:
    """Least time lost to communication and fetching; near-equal ones by price, then by what they leave to others."""
    fastest = min((c.cost.step_communication_s for c in found if c.cost.step_communication_s), default=0.0)
    speed = max(c.option.throughput for c in found)

    def lost(c: Candidate) -> float:
        run = c.cost.run_s or _UNKNOWN_RUN_S
        slower = c.cost.step_communication_s / fastest - 1 if fastest else 0.0
        return run * (request.preference.comm_fraction * slower + speed / c.option.throughput - 1) + c.cost.fetch_s

    least = min(map(lost, found))
    slack = _EQUAL * _UNKNOWN_RUN_S * request.preference.comm_fraction

    def key(c: Candidate) -> tuple[object, ...]:
        over = max(0.0, lost(c) - least)
        return (0.0 if over <= slack else over, c.cost.usd_per_hour, c.value)

    return sorted(found, key=key)


def assemble(columns: Columns, request: PlaceRequest, best: Candidate, others: list[Candidate]) -> Placement:
    nodes: list[NodeAssignment] = []
    rank_at = 0
    for group in best.groups:
        made = _assignments(columns, request, group, rank_at)
        nodes += made
        rank_at += sum(len(a.ranks) for a in made)
    return Placement(
        request.id,
        tuple(nodes),
        best.option,
        best.cost,
        best.estimate.bottleneck,
        reasons(columns, request, best),
        tuple(_alternative(columns, best, other) for other in others[:3]),
    )


def _assignments(columns: Columns, request: PlaceRequest, group: Group, rank_at: int) -> list[NodeAssignment]:
    need, made = request.requirement, []
    size = inner_size(request)
    per_node: dict[int, list[int]] = {}
    for i, mask in group.parts:
        per_node[i] = list(columns.shape(i).wiring.rank_order(mask, size))
    for i, position in group.devices:
        per_node.setdefault(i, []).append(position)
    for i, positions in per_node.items():
        indices = columns.shape(i).indices
        ranks = tuple(range(rank_at, rank_at + len(positions)))
        rank_at += len(positions)
        made.append(
            NodeAssignment(
                columns.names[i],
                tuple([indices[p] for p in positions]),
                group.request.name,
                ranks,
                group.request.share,
                need.cpu_millicores_per_gpu * len(positions),
                need.host_memory_bytes_per_gpu * len(positions),
            )
        )
    return made


def reasons(columns: Columns, request: PlaceRequest, best: Candidate) -> tuple[str, ...]:
    """Why here, for people: what was taken, how close it is, what bounds it, what it costs."""
    rows = best.rows
    level, d = columns.smallest_domain(rows)
    count = sum(m.bit_count() for g in best.groups for _, m in g.parts) + sum(len(g.devices) for g in best.groups)
    shape, nodes = columns.shape(rows[0]), len(set(rows))
    model = best.option.model or shape.models[0]
    lines = [f"{count} x {model} on {nodes} node{'s' * (nodes > 1)}, {where(columns, level, d)}"]
    link = best.estimate.bottleneck
    if link.bandwidth_bytes_per_s:
        lines.append(f"collectives at {link.bandwidth_bytes_per_s / 1e9:.3g} GB/s, bound by {link.link.value}")
    if best.cost.fetch_s:
        lines.append(f"fetches its data in {best.cost.fetch_s:.0f} s")
    elif request.datasets:
        lines.append("all data is local")
    if best.cost.usd_per_hour:
        lines.append(f"${best.cost.usd_per_hour:.2f} per hour")
    late = request.preference.deadline_s
    if late is not None and best.cost.run_s is not None and best.cost.run_s + best.cost.fetch_s > late:
        lines.append(
            f"misses its deadline by {best.cost.run_s + best.cost.fetch_s - late:.0f} s; nothing faster is free"
        )
    return tuple(lines)


def where(columns: Columns, level: Level, d: int) -> str:
    if level < Level.NODE:
        return columns.domain_name(level, d)
    leaf = columns.domain_name(Level.LEAF, columns.domain[Level.LEAF][d])
    return f"{columns.names[d]} ({leaf})"


def _alternative(columns: Columns, best: Candidate, other: Candidate) -> Alternative:
    level, d = columns.smallest_domain(other.rows)
    model = other.option.model or columns.shape(other.rows[0]).models[0]
    ours, theirs = best.cost, other.cost
    why = []
    if ours.step_communication_s and theirs.step_communication_s > ours.step_communication_s * (1 + _EQUAL):
        why.append(f"{theirs.step_communication_s / ours.step_communication_s:.2g}x the communication")
    if theirs.fetch_s > ours.fetch_s + 1:
        why.append(f"{theirs.fetch_s - ours.fetch_s:.0f} s more to fetch data")
    if theirs.usd_per_hour > ours.usd_per_hour:
        why.append(f"${theirs.usd_per_hour - ours.usd_per_hour:.2f} more per hour")
    return Alternative(f"{model}, {where(columns, level, d)}", theirs, ", ".join(why) or "no better")
