"""What the fleet can give to one request: usable GPUs per node, and how many nodes of each domain give at least so many.

Most requests care only about the kind of GPU, and then the fleet's own aggregates answer (`whole` supply). Requests with conditions
on single nodes (labels, CPU, cached data, excluded nodes, several islands) get a column of their own, aggregated once (`masked`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from whaleflux.fleet.model import Level, Node, PriceKind
from whaleflux_scheduler.core.placement.api import GpuOption, GpuRequirement, GroupRequest, PlaceRequest
from whaleflux_scheduler.core.placement.columns import Columns, Ints
from whaleflux_scheduler.core.placement.shapes import Shape

Bools = NDArray[np.bool_]


def could_use(columns: Columns, i: int, request: PlaceRequest) -> bool:
    """Whether row `i` has a free device of the right kind, or a share of one, with CPU and memory for a rank."""
    need = request.requirement
    if (
        max(0, columns.cpu_free[i]) < need.cpu_millicores_per_gpu
    ):  # what is taken may be more than there is, when facts changed
        return False
    if max(0, columns.host_free[i]) < need.host_memory_bytes_per_gpu:
        return False
    if request.without_gpus:
        return True
    if need.of_node and not node_conditions(columns, need)[i]:
        return False
    free = columns.usable[i] if request.group.share else columns.free_mask(i)
    return any(free & matching_positions(columns.shape(i), need, option.model) for option in need.any_of)


@lru_cache(maxsize=16_384)
def matching_positions(shape: Shape, need: GpuRequirement, model: str) -> int:
    """Mask of the GPU positions of a shape that satisfy model, memory and compute capability.

    A MIG instance is had by those only who ask for its profile, or for its model, which names it.
    """
    return sum(
        1 << i
        for i in range(shape.size)
        if (shape.models[i] == model if model else shape.mig_profiles[i] == need.mig_profile)
        and shape.memory_bytes[i] >= need.min_memory_bytes
        and shape.compute_capability[i] >= need.min_compute_capability
    )


@dataclass(frozen=True, slots=True)
class Demand:
    """What one group asks of each node, after an option was chosen. `gpus` counts devices."""

    gpus: int
    unit: int  # devices come in runs of this many on one node
    island: bool  # ... and each run inside one NVLink island
    model: str
    need: GpuRequirement
    most_per_node: int  # 0: no bound

    @staticmethod
    def of(group: GroupRequest, request: PlaceRequest, option: GpuOption) -> Demand:
        unit, island = 1, False
        for sub in group.subgroups:
            if sub.required and sub.level >= Level.NODE:
                unit, island = max(unit, sub.size), island or sub.level >= Level.ISLAND
        whole = max(group.level or 0, request.level or 0)
        if whole >= Level.NODE:  # a group that must share a node or an island is one run
            unit, island = group.gpus * option.per_unit, island or whole >= Level.ISLAND
        spread = -(-group.gpus // request.min_nodes) if request.min_nodes else 0
        return Demand(
            group.gpus * option.per_unit,
            unit,
            island,
            option.model,
            request.requirement,
            spread * option.per_unit,
        )


@dataclass(frozen=True, slots=True)
class Match:
    """Which shapes satisfy a demand, and whether the aggregates by shape suffice to count them. Depends on shapes alone."""

    positions: tuple[int, ...]  # per shape, mask of suitable GPUs
    shapes: tuple[int, ...]  # those with any
    present: Bools
    every: bool  # all shapes of the fleet
    devices_matter: bool  # which GPUs of a node are free decides how many can be used

    @staticmethod
    def of(columns: Columns, demand: Demand, within: frozenset[int] | None) -> Match:
        key = (demand.need, demand.model, demand.island, within)
        found = columns.matches.get(key)
        if found is None:
            found = columns.keep(key, Match._find(columns.kinds, demand, within))
        return cast("Match", found)

    @staticmethod
    def _find(shapes: list[Shape], demand: Demand, within: frozenset[int] | None) -> Match:
        positions = tuple(
            matching_positions(shape, demand.need, demand.model) if within is None or s in within else 0
            for s, shape in enumerate(shapes)
        )
        present = np.array([bool(p) for p in positions] or [False], dtype=np.bool_)
        matched = tuple(s for s, p in enumerate(positions) if p)
        matter = any(_devices_matter(shapes[s], positions[s], demand) for s in matched)
        return Match(positions, matched, present, len(matched) == len(positions), matter)


def _devices_matter(shape: Shape, positions: int, demand: Demand) -> bool:
    return positions != (1 << shape.size) - 1 or (demand.island and len(shape.wiring.islands) > 1)


class Supply:
    """Usable GPUs for one demand. Reads the live columns, so it is valid until the next change."""

    def __init__(
        self,
        columns: Columns,
        demand: Demand,
        allowed: Bools | None = None,
        shapes: frozenset[int] | None = None,
    ) -> None:
        self.columns, self.demand = columns, demand
        self.match = Match.of(columns, demand, shapes)
        self._column = self._mask_column(allowed) if self._needs_column(allowed) else None
        self._counts: dict[tuple[Level, int], Ints] = {}
        self._fleet: list[int] | None = None
        self.considered: tuple[Level, int] = (
            Level.NODE,
            0,
        )  # how many domains of which level had room, for explanations

    def _needs_column(self, allowed: Bools | None) -> bool:
        need = self.demand.need
        return bool(
            allowed is not None
            or self.match.devices_matter
            or need.cpu_millicores_per_gpu
            or need.host_memory_bytes_per_gpu
            or need.of_node
        )

    def _mask_column(self, allowed: Bools | None) -> Ints:
        columns, need = self.columns, self.demand.need
        fit = self.match.present[columns.shapes]
        if allowed is not None:
            fit &= allowed
        usable = np.where(fit, columns.offer, 0).astype(np.int64)
        if need.cpu_millicores_per_gpu:
            np.minimum(usable, columns.cpu_free // need.cpu_millicores_per_gpu, out=usable)
        if need.host_memory_bytes_per_gpu:
            np.minimum(usable, columns.host_free // need.host_memory_bytes_per_gpu, out=usable)
        np.maximum(usable, 0, out=usable)
        if self.match.devices_matter:
            for i in np.flatnonzero(usable).tolist():
                usable[i] = min(int(usable[i]), self.devices(i))
        if need.of_node:
            usable[~node_conditions(columns, need)] = 0
        return usable

    def flows(self, per_node: int) -> int:
        """NIC flows that a node of the demand's kind sends when it gives `per_node` GPUs."""
        shape = self.columns.kinds[self.match.shapes[0]]
        return max(
            1, math.ceil(shape.network_bytes_per_s * per_node / shape.size / self.columns.fabric.nic_bytes_per_s - 1e-9)
        )

    def candidates(self, i: int) -> int:
        """Mask of the free GPUs of row `i` that satisfy the demand."""
        return self.columns.free_mask(i) & self.match.positions[self.columns.shape_of[i]]

    def devices(self, i: int) -> int:
        """How many GPUs of row `i` the demand can use, given which are free."""
        mask, wiring = self.candidates(i), self.columns.shape(i).wiring
        return (
            wiring.island_units(mask, self.demand.unit) * self.demand.unit if self.demand.island else mask.bit_count()
        )

    def at_least(self, level: Level, count: int) -> Ints:
        """Per domain of `level`: nodes with at least `count` usable GPUs."""
        key = (level, count)
        if key not in self._counts:
            self._counts[key] = self._at_least(level, count)
        return self._counts[key]

    def fleet(self) -> list[int]:
        """Of the whole fleet: nodes with at least k usable GPUs, for k from 0 to one more than any node has."""
        if self._fleet is None:
            columns = self.columns
            if self._column is None and len(self.match.shapes) == 1:
                self._fleet = [*columns.at_least[Level.FLEET][self.match.shapes[0], :, 0].tolist(), 0]
            else:
                self._fleet = [0, *(int(self.at_least(Level.FLEET, k)[0]) for k in range(1, columns.width + 1)), 0]
        return self._fleet

    def _at_least(self, level: Level, count: int) -> Ints:
        columns = self.columns
        if count > columns.width or not columns.count:
            return np.zeros(len(columns.lo[level]), dtype=np.int64)
        if self._column is not None:
            return np.add.reduceat((self._column >= count).astype(np.int64), columns.lo[level])
        table: Ints = columns.at_least[level]
        if len(self.match.shapes) == 1:
            one: Ints = table[self.match.shapes[0], count]
            return one
        several: Ints = table[list(self.match.shapes), count].sum(axis=0, dtype=np.int64)
        return several

    def total(self, level: Level) -> Ints:
        """Per domain (or row, for `NODE`): usable GPUs in whole units, with the bound per node."""
        if level is Level.NODE:
            return self.usable(0, self.columns.count)
        unit, most = self.demand.unit, self.demand.most_per_node or self.columns.width
        steps = range(unit, most + 1, unit)
        total = np.zeros(len(self.columns.lo[level]), dtype=np.int64)
        for step in steps:
            total += self.at_least(level, step) * unit
        return total

    def usable(self, lo: int, hi: int) -> Ints:
        """Usable GPUs of each row in the range."""
        if self._column is not None:
            return self._column[lo:hi]
        offer = self.columns.offer[lo:hi]
        if self.match.every:
            return offer
        return np.where(self.match.present[self.columns.shapes[lo:hi]], offer, 0)


def node_conditions(columns: Columns, need: GpuRequirement) -> Bools:
    """Labels, NVMe and how it is paid for, facts of the node itself: which rows fit. Kept until nodes change."""
    key = (need.labels, need.nvme, need.no_spot)
    found = columns.matches.get(key)
    if found is None:
        fitting = [node_fits(row.node, need) for row in columns.rows]
        found = columns.keep(key, np.array(fitting, dtype=np.bool_))
    return cast("Bools", found)


def conditions_of(need: GpuRequirement) -> str:
    """What is asked of the node itself, in words."""
    labels = [f"label {key}={value}" for key, value in need.labels]
    return ", ".join([*labels, *["NVMe"] * need.nvme, *["a price that is not spot"] * need.no_spot])


def node_fits(node: Node, need: GpuRequirement) -> bool:
    """Whether it has what is asked of the node itself."""
    if need.nvme and not any(d.nvme for d in node.disks):
        return False
    if need.no_spot and node.price.kind is PriceKind.SPOT:
        return False
    return all(label in node.labels for label in need.labels)


def allowed_rows(columns: Columns, request: PlaceRequest, only: Callable[[int], bool] | None = None) -> Bools | None:
    """The rows that the request's own lists leave, or None when it leaves all."""
    if not (request.sites or request.exclude_nodes or only):
        return None
    allowed = np.ones(columns.count, dtype=np.bool_)
    if request.sites:
        first = columns.lo[Level.SITE]  # one row of each site
        inside = np.array([columns.rows[i].node.site in request.sites for i in first.tolist()], dtype=np.bool_)
        allowed &= inside[columns.domains[Level.SITE]]
    for name in request.exclude_nodes:
        if name in columns.index:
            allowed[columns.index[name]] = False
    if only:
        allowed &= np.array([only(i) for i in range(columns.count)], dtype=np.bool_)
    return allowed
