"""Where a request could go: every option on every pool of like nodes, with and without the nodes that suit its data or its price."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from whaleflux.fleet.model import Level
from whaleflux_scheduler.core.placement.api import (
    Goal,
    GpuOption,
    GpuRequirement,
    GroupRequest,
    PlaceRequest,
    Share,
)
from whaleflux_scheduler.core.placement.columns import Columns, Floats, Ints, cache_bytes
from whaleflux_scheduler.core.placement.cover import Counts
from whaleflux_scheduler.core.placement.datasets import Datasets
from whaleflux_scheduler.core.placement.fractions import Device, Together, place_parts
from whaleflux_scheduler.core.placement.gang import Bounds, even, possible, ragged, splits
from whaleflux_scheduler.core.placement.supply import Bools, Demand, Supply, allowed_rows, node_conditions

Part = tuple[int, int]  # (row, mask of positions)
_MOST_PRICES, _MOST_PRICES_OF_CLOSEST = (
    8,
    3,
)  # of a pool, that are tried apart: where price decides, and where it settles ties


@dataclass(frozen=True, slots=True)
class Group:
    """Where one group of the request goes: whole GPUs as masks, or parts of GPUs as devices."""

    request: GroupRequest
    parts: tuple[Part, ...] = ()
    devices: tuple[Device, ...] = ()
    considered: tuple[Level, int] = (Level.NODE, 0)  # how many domains of which level had room


def feasible(columns: Columns, request: PlaceRequest, datasets: Datasets) -> bool:
    """Whether anything fits at all, for the least work."""
    return any(search.possible() for _, search in searches(columns, request, datasets, by_price=False))


def searches(
    columns: Columns, request: PlaceRequest, datasets: Datasets, *, by_price: bool = True
) -> Iterator[tuple[GpuOption, Search]]:
    """For each option: pools of like nodes on each set of rows, and all matching nodes together as the last resort.

    `by_price`: also on the cheaper nodes of a pool alone, where something fits only if it does on all of them.
    """
    if not columns.count:
        return
    allowed = allowed_rows(columns, request)
    near = frozenset(columns.index[n] for n in request.near_nodes if n in columns.index)
    for option in request.requirement.any_of:
        pools = _pools(columns, request, option)
        for subset in _restrictions(columns, request, datasets, allowed):
            for shapes in pools:
                for cheap in _cheaper(columns, request, shapes) if by_price and subset is allowed else ():
                    rows = cheap if allowed is None else cheap & allowed
                    yield option, Search(columns, request, option, rows, shapes, near)
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
    """Row sets to try: nodes that hold the data, those to which it comes, those that could keep it, all nodes.

    Work without data tries nodes without NVMe first while there are datasets that could use them.
    """
    local = _local_rows(columns, request, datasets)
    if local is not None:
        yield local if allowed is None else local & allowed
        if request.hard_locality:
            return
        coming = _coming_rows(columns, request, datasets)
        if coming is not None:
            yield coming if allowed is None else coming & allowed
        keeps = room_for(columns, request, datasets) >= max(_size(request, datasets), 1)
        yield keeps if allowed is None else keeps & allowed
    elif datasets:
        plain = ~node_conditions(columns, GpuRequirement(nvme=True))
        if plain.any() and not plain.all() and not request.requirement.nvme:
            yield plain if allowed is None else plain & allowed
    yield allowed


def _cheaper(columns: Columns, request: PlaceRequest, shapes: frozenset[int]) -> Iterator[Bools]:
    """Rows up to each price of a pool but the highest, where all of it is; of many prices a few, the lowest among them."""
    limits = _prices(columns, shapes)[:-1]
    most = _MOST_PRICES_OF_CLOSEST if request.preference.goal is Goal.CLOSEST else _MOST_PRICES
    if len(limits) > most:
        limits = limits[np.linspace(0, len(limits) - 1, most).astype(int)]
    for limit in limits:
        yield columns.usd_per_gpu_hour <= limit


def _prices(columns: Columns, shapes: frozenset[int]) -> Floats:
    """Distinct prices of the nodes of these shapes, lowest first."""
    key = ("prices", shapes)
    found = columns.matches.get(key)
    if found is None:
        here = np.isin(columns.shapes, list(shapes))
        found = columns.keep(key, np.unique(columns.usd_per_gpu_hour[here]))
    return cast("Floats", found)


def room_for(columns: Columns, request: PlaceRequest, datasets: Datasets) -> Ints:
    """Bytes per row that the request's data could take: what is free, and what is taken for that data already."""
    room = columns.cache_room()
    for fact in (datasets[d] for d in request.datasets if d in datasets):
        room[[columns.index[n] for n in datasets.book.nodes_of(fact.name) if n in columns.index]] += fact.size_bytes
    return room


def _size(request: PlaceRequest, datasets: Datasets) -> int:
    return sum(datasets[d].size_bytes for d in request.datasets if d in datasets)


def _local_rows(columns: Columns, request: PlaceRequest, datasets: Datasets) -> Bools | None:
    """Nodes that have all of its data; of those that have it by chance only such as can keep it, where nothing else will do."""
    if not request.datasets:
        return None
    rows = np.ones(columns.count, dtype=np.bool_)
    for name in request.datasets:
        rows &= _on(columns, datasets[name].cached_on if name in datasets else ())
    return rows & stays(columns, request, datasets) if request.hard_locality else rows


def stays(columns: Columns, request: PlaceRequest, datasets: Datasets) -> Bools:
    """Nodes where all of its data has room beside what others hold; of nodes that do not say how much there is nothing is known."""
    has_room = room_for(columns, request, datasets) >= _size(request, datasets)
    return has_room | np.array([cache_bytes(row) == 0 for row in columns.rows], dtype=np.bool_)


def _coming_rows(columns: Columns, request: PlaceRequest, datasets: Datasets) -> Bools | None:
    """Nodes that have its data or are about to: others there read it, or it is pinned; None: there are no more than have it."""
    rows, more = np.ones(columns.count, dtype=np.bool_), False
    for name in request.datasets:
        whole, taken = datasets[name].cached_on if name in datasets else (), datasets.book.nodes_of(name)
        more = more or not set(taken) <= set(whole)
        rows &= _on(columns, {*whole, *taken})
    return rows if more else None


def _on(columns: Columns, nodes: Collection[str]) -> Bools:
    here = np.zeros(columns.count, dtype=np.bool_)
    here[[columns.index[n] for n in nodes if n in columns.index]] = True
    return here


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
        group = self.request.group
        if group.share:
            return next(self.all_groups(), None) is not None
        supply = Supply(self.columns, Demand.of(group, self.request, self.option), self.allowed, self.shapes)
        return bool(supply.match.shapes) and possible(supply, self._bounds(group))

    def all_groups(self) -> Iterator[Group]:
        """Each place that is worth a price."""
        group = self.request.group
        if group.share:
            found = (parts for domain in self._share_domains() if (parts := self._parts_in(group, group.share, domain)))
            if devices := next(found, None):
                yield Group(group, devices=tuple(devices))
            return
        supply = Supply(self.columns, Demand.of(group, self.request, self.option), self.allowed, self.shapes)
        for counts in self._counts(supply, self._bounds(group)) if supply.match.shapes else ():
            yield Group(group, self._masks(supply, counts), considered=supply.considered)

    def _bounds(self, group: GroupRequest) -> Bounds:
        own = max(group.level or 0, self.request.level or 0)
        widest = Level(min(own, Level.LEAF))
        outer = next((s for s in group.subgroups if s.required and s.level < Level.NODE), None)
        chunk = (outer.size, outer.level) if outer else None
        return Bounds(widest, self.request.min_nodes, self.request.max_nodes, chunk, self.near)

    def _share_domains(self) -> list[tuple[Level, int] | None]:
        """Where parts may be: anywhere allowed, or each domain of the level that must hold them."""
        level = Level(max(self.request.group.level or 0, self.request.level or 0))
        if level in (Level.FLEET, Level.NODE, Level.ISLAND, Level.GPU):
            return [None]
        return [(level, d) for d in range(len(self.columns.lo[level]))]

    def _parts_in(self, group: GroupRequest, share: Share, domain: tuple[Level, int] | None) -> list[Device] | None:
        level = max(group.level or 0, self.request.level or 0)
        whole_node = level >= Level.NODE or self.request.max_nodes == 1
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
                most_per_node=spread,
                together=nearness,
            )
            if found and len({i for i, _ in found}) <= (self.request.max_nodes or len(found)):
                return found
        return None

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
