"""Where a request could go: every option on every pool of like nodes, with and without the nodes that suit its data or its price."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from whaleflux.fleet.model import Level
from whaleflux_scheduler.core.placement.api import (
    DatasetFact,
    Goal,
    GpuOption,
    GpuRequirement,
    GroupRequest,
    PlaceRequest,
    Share,
)
from whaleflux_scheduler.core.placement.columns import DOMAIN_LEVELS, Columns
from whaleflux_scheduler.core.placement.cover import Counts
from whaleflux_scheduler.core.placement.fractions import Device, Together, least_stranding_node, place_parts
from whaleflux_scheduler.core.placement.gang import Bounds, even, possible, ragged, splits
from whaleflux_scheduler.core.placement.supply import Bools, Demand, Supply, allowed_rows, node_conditions

Part = tuple[int, int]  # (row, mask of positions)
Datasets = Mapping[str, DatasetFact]


@dataclass(frozen=True, slots=True)
class Group:
    """Where one group of the request goes: whole GPUs as masks, or parts of GPUs as devices."""

    request: GroupRequest
    parts: tuple[Part, ...] = ()
    devices: tuple[Device, ...] = ()
    considered: tuple[Level, int] = (Level.NODE, 0)  # how many domains of which level had room


def feasible(columns: Columns, request: PlaceRequest, datasets: Datasets) -> bool:
    """Whether anything fits at all, for the least work."""
    return any(search.possible() for _, search in searches(columns, request, datasets))


def searches(columns: Columns, request: PlaceRequest, datasets: Datasets) -> Iterator[tuple[GpuOption, Search]]:
    """For each option: pools of like nodes on each set of rows, and all matching nodes together as the last resort."""
    if not columns.count:
        return
    allowed = allowed_rows(columns, request)
    near = frozenset(columns.index[n] for n in request.near_nodes if n in columns.index)
    for option in request.requirement.any_of:
        pools = _pools(columns, request, option)
        for subset in _restrictions(columns, request, datasets, allowed):
            for shapes in pools:
                yield option, Search(columns, request, option, subset, shapes, near)
        if not request.hard_locality and len(pools) > 1:
            yield option, Search(columns, request, option, allowed, None, near, last_resort=True)


def _pools(columns: Columns, request: PlaceRequest, option: GpuOption) -> list[frozenset[int]]:
    """Shapes that a gang may mix: alike in model, ring and network first, then all of one model."""
    key = ("pools", request.requirement, option.model)
    found = columns.matches.get(key)
    if found is None:
        found = columns.keep(key, _find_pools(columns, request, option))
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
    columns: Columns, request: PlaceRequest, datasets: Datasets, allowed: Bools | None
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


def _local_rows(columns: Columns, request: PlaceRequest, datasets: Datasets) -> Bools | None:
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
class Search:
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
        chunk = (outer.size, outer.level) if outer else None
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
            found = next(
                (
                    d
                    for domain in self._share_domains(group, inside)
                    if (d := self._parts_in(group, group.share, domain))
                ),
                None,
            )
            if found:
                yield Group(group, devices=tuple(found))
            return
        supply = Supply(self.columns, Demand.of(group, self.request, self.option), self.allowed, self.shapes)
        if supply.match.shapes:
            row = self._by_mix(supply, inside)
            if row is not None:
                yield Group(group, self._masks(supply, [(row, supply.demand.gpus)]))
                return
            for counts in self._counts(supply, self._bounds(group, inside)):
                yield Group(group, self._masks(supply, counts), considered=supply.considered)

    def _share_domains(self, group: GroupRequest, inside: tuple[Level, int] | None) -> list[tuple[Level, int] | None]:
        """Where a group of parts may be: anywhere allowed, or each domain of the level that must hold it."""
        level = Level(max(group.level or 0, self.request.level or 0))
        if inside or level in (Level.FLEET, *(Level.NODE, Level.ISLAND, Level.GPU)):
            return [inside]
        return [(level, d) for d in range(len(self.columns.lo[level]))]

    def _parts_in(self, group: GroupRequest, share: Share, domain: tuple[Level, int] | None) -> list[Device] | None:
        level = max(group.level or 0, self.request.level or 0)
        whole_node = level >= Level.NODE or group.gpus == group.gpus_per_node or self.request.max_nodes == 1
        spread = -(-group.gpus // self.request.min_nodes) if self.request.min_nodes else group.gpus
        if whole_node and self.request.min_nodes > 1:
            return None
        together = Together.DEVICE if level >= Level.GPU else Together.NODE if whole_node else Together.ANYWHERE
        closer = [Together.NODE] if share.apart and together is Together.ANYWHERE and spread >= group.gpus else []
        allowed = self._narrowed(domain)
        for nearness in (*closer, together):
            found = place_parts(
                self.columns,
                self.request.requirement,
                self.option.model,
                share,
                group.gpus,
                allowed=allowed,
                most_per_node=min(spread, group.gpus_per_node or spread),
                together=nearness,
            )
            if found and len({i for i, _ in found}) <= (self.request.max_nodes or len(found)):
                return found
        return None

    def _by_mix(self, supply: Supply, inside: tuple[Level, int] | None) -> int | None:
        """Single-node work that states its CPU or memory goes where it strands least, once it is known what is asked for."""
        demand, need = supply.demand, supply.demand.need
        states = need.cpu_millicores_per_gpu or need.host_memory_bytes_per_gpu
        alone = demand.gpus <= (demand.most_per_node or demand.gpus) and demand.per_node in (0, demand.gpus)
        if not self.columns.mix or not states or not alone or self.near:
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
        columns.share(i, position, share.compute_milli, share.memory_bytes, sign)
    need = request.requirement
    for i, count in [(i, m.bit_count()) for i, m in group.parts] + [(i, 1) for i, _ in group.devices]:
        columns.host(i, count * need.cpu_millicores_per_gpu, count * need.host_memory_bytes_per_gpu, sign)
