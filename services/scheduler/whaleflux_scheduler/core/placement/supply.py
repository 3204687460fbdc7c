"""What the fleet can give to one request: usable GPUs per node, and how many nodes of each domain give at least so many.

Most requests care only about the kind of GPU, and then the fleet's own aggregates answer (`whole` supply). Requests with conditions
on single nodes (labels, CPU, cached data, excluded nodes, several islands) get a column of their own, aggregated once (`masked`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from whaleflux.fleet.model import Level
from whaleflux_scheduler.core.placement.api import GpuOption, GpuRequirement, GroupRequest, PlaceRequest
from whaleflux_scheduler.core.placement.columns import Columns, Ints, Shape

Bools = NDArray[np.bool_]


def matching_positions(shape: Shape, need: GpuRequirement, model: str) -> int:
    """Mask of the GPU positions of a shape that satisfy model, memory and compute capability."""
    if shape.network_bytes_per_s < need.min_network_bytes_per_s:
        return 0
    return sum(
        1 << i
        for i in range(shape.size)
        if (not model or shape.models[i] == model)
        and shape.memory_bytes[i] >= need.min_memory_bytes
        and shape.compute_capability[i] >= need.min_compute_capability
    )


@dataclass(frozen=True, slots=True)
class Demand:
    """What one group asks of each node, after an option was chosen. `gpus` counts devices."""

    gpus: int
    per_node: int  # exactly so many on each node; 0: free
    unit: int  # devices come in runs of this many on one node
    island: bool  # ... and each run inside one NVLink island
    model: str
    need: GpuRequirement
    most_per_node: int  # 0: no bound

    @staticmethod
    def of(group: GroupRequest, request: PlaceRequest, option: GpuOption) -> Demand:
        inner = [s for s in group.subgroups if s.required and s.level >= Level.NODE]
        unit = max((s.size for s in inner), default=1)
        whole = max(group.level or 0, request.level or 0)  # a group that must share a node or an island is one run
        if whole >= Level.NODE:
            unit = group.gpus * option.per_unit
        spread = -(-group.gpus // request.min_nodes) if request.min_nodes else 0
        return Demand(
            group.gpus * option.per_unit,
            group.gpus_per_node * option.per_unit,
            unit,
            whole >= Level.ISLAND or any(s.level >= Level.ISLAND for s in inner),
            option.model,
            request.requirement,
            spread * option.per_unit,
        )


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
        self.positions = [
            matching_positions(s, demand.need, demand.model) if shapes is None or at in shapes else 0
            for at, s in enumerate(columns.book.shapes)
        ]
        self.matched = [s for s, mask in enumerate(self.positions) if mask]
        self._column = self._mask_column(allowed) if self._needs_column(allowed) else None
        self._counts: dict[tuple[Level, int], Ints] = {}
        present = np.zeros(len(self.positions), dtype=np.bool_)
        present[self.matched] = True
        self._present = present

    def _needs_column(self, allowed: Bools | None) -> bool:
        need, shapes = self.demand.need, self.columns.book.shapes
        return bool(
            allowed is not None
            or need.cpu_millicores_per_gpu
            or need.host_memory_bytes_per_gpu
            or need.labels
            or need.nvme
            or any(self.positions[s] != (1 << shapes[s].size) - 1 for s in self.matched)
            or any(
                need.min_interconnect_bytes_per_s > shapes[s].wiring.ring_bytes_per_s(self.positions[s])
                for s in self.matched
            )
            or (self.demand.island and any(len(shapes[s].wiring.islands) > 1 for s in self.matched))
        )

    def _mask_column(self, allowed: Bools | None) -> Ints:
        columns, need = self.columns, self.demand.need
        ok = np.zeros(len(self.positions) or 1, dtype=np.bool_)
        ok[self.matched] = True
        fit = ok[columns.shapes] if columns.count else ok[:0]
        if allowed is not None:
            fit &= allowed
        usable = np.where(fit, columns.offer, 0).astype(np.int64)
        if need.cpu_millicores_per_gpu:
            np.minimum(usable, columns.cpu_free // need.cpu_millicores_per_gpu, out=usable)
        if need.host_memory_bytes_per_gpu:
            np.minimum(usable, columns.host_free // need.host_memory_bytes_per_gpu, out=usable)
        np.maximum(usable, 0, out=usable)
        if self._device_matters():
            for i in np.flatnonzero(usable):
                usable[i] = min(int(usable[i]), self.devices(int(i)))
        if need.labels or need.nvme:
            for i in np.flatnonzero(usable):
                if not node_conditions(columns, int(i), need):
                    usable[i] = 0
        return usable

    def _device_matters(self) -> bool:
        """Whether which GPUs of a node are free decides how many can be used."""
        shapes, need = self.columns.book.shapes, self.demand.need
        return any(
            self.positions[s] != (1 << shapes[s].size) - 1
            or (self.demand.island and len(shapes[s].wiring.islands) > 1)
            or need.min_interconnect_bytes_per_s > shapes[s].wiring.ring_bytes_per_s(self.positions[s])
            for s in self.matched
        )

    def candidates(self, i: int) -> int:
        """Mask of the free GPUs of row `i` that satisfy the demand."""
        return self.columns.free_mask(i) & self.positions[self.columns.shape_of[i]]

    def devices(self, i: int) -> int:
        """How many GPUs of row `i` the demand can use, given which are free."""
        mask, wiring = self.candidates(i), self.columns.shape(i).wiring
        count = wiring.widest(mask, self.demand.need.min_interconnect_bytes_per_s)
        if self.demand.island:
            count = min(count, wiring.island_units(mask, self.demand.unit) * self.demand.unit)
        return count

    def at_least(self, level: Level, count: int) -> Ints:
        """Per domain of `level`: nodes with at least `count` usable GPUs."""
        key = (level, count)
        if key not in self._counts:
            self._counts[key] = self._at_least(level, count)
        return self._counts[key]

    def _at_least(self, level: Level, count: int) -> Ints:
        columns = self.columns
        if count > columns.width or not columns.count:
            return np.zeros(len(columns.lo[level]), dtype=np.int64)
        if self._column is not None:
            return np.add.reduceat((self._column >= count).astype(np.int64), columns.lo[level])
        table: Ints = columns.at_least[level]
        if len(self.matched) == 1:
            one: Ints = table[self.matched[0], count]
            return one
        several: Ints = table[self.matched, count].sum(axis=0, dtype=np.int64)
        return several

    def total(self, level: Level) -> Ints:
        """Per domain: usable GPUs in whole units, with the bound per node."""
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
        if len(self.matched) == len(self.positions):
            return offer
        return np.where(self._present[self.columns.shapes[lo:hi]], offer, 0)


def node_conditions(columns: Columns, i: int, need: GpuRequirement) -> bool:
    """Labels and NVMe: facts of the node itself."""
    node = columns.rows[i].node
    if need.nvme and not any(d.nvme for d in node.disks):
        return False
    return all(label in node.labels for label in need.labels)


def allowed_rows(columns: Columns, request: PlaceRequest, only: Callable[[int], bool] | None = None) -> Bools | None:
    """The rows that the request's own lists leave, or None when it leaves all."""
    if not (request.sites or request.exclude_nodes or only):
        return None
    allowed = np.ones(columns.count, dtype=np.bool_)
    if request.sites:
        inside = [r.node.site in request.sites for r in columns.rows]
        allowed &= np.array(inside, dtype=np.bool_)
    for name in request.exclude_nodes:
        if name in columns.index:
            allowed[columns.index[name]] = False
    if only:
        allowed &= np.array([only(i) for i in range(columns.count)], dtype=np.bool_)
    return allowed
