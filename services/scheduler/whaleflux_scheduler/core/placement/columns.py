"""The fleet in columns: one row per node, one aggregate per domain and level, kept current by deltas.

Rows are sorted by place in the tree, so that every domain of every level is one range of rows. For each level, shape of node and
count k, `at_least[level][shape, k, domain]` is how many schedulable nodes of that shape have at least k wholly free GPUs: a change of
one node touches one entry per level. All state is integers, so undoing a change restores it exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from whaleflux.fleet.links import Fabric
from whaleflux.fleet.model import Level, Node
from whaleflux.fleet.wiring import bits
from whaleflux_scheduler.core.placement.shapes import Shape

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]
DOMAIN_LEVELS: tuple[Level, ...] = (Level.FLEET, Level.SITE, Level.ZONE, Level.SPINE, Level.LEAF)
SHARED_LEVELS: tuple[Level, ...] = (Level.SITE, Level.ZONE, Level.SPINE, Level.LEAF)  # those with uplinks
_MOST_ANSWERS = 4096  # requests differ without end; each answer is at most a few bytes per node
Kept = TypeVar("Kept")


@dataclass(slots=True)
class Row:
    """What the engine is told about a node: inventory's facts and whether new work may go there."""

    node: Node
    shape: Shape
    schedulable: bool = True
    reason: str = ""
    held_bytes: int = 0  # of datasets that stay


def healthy_mask(node: Node) -> int:
    return sum(1 << i for i, gpu in enumerate(node.gpus) if gpu.offered)


def nvme_bytes(row: Row) -> int:
    return sum(d.capacity_bytes for d in row.node.disks if d.nvme)


def cache_bytes(row: Row) -> int:
    """Most that datasets could take: what the agent gives them, else all NVMe; 0: not known, or nothing."""
    return row.node.dataset_cache_bytes or nvme_bytes(row)


def cache_room_bytes(row: Row) -> int:
    """What datasets could still take, less what is held."""
    return max(0, cache_bytes(row) - row.held_bytes)


def place_key(node: Node) -> tuple[str, str, str, str, str]:
    return (node.site, node.zone, node.spine, node.leaf, node.name)


class Columns:
    """Built from rows, then changed only by `take`, `give`, `set_schedulable`, `refresh` and `cross`."""

    def __init__(self, rows: Mapping[str, Row], fabric: Fabric) -> None:
        ordered = sorted(rows.values(), key=lambda r: place_key(r.node))
        self.rows: list[Row] = ordered
        self.fabric = fabric
        self.names = [r.node.name for r in ordered]
        self._node_of = [r.node for r in ordered]  # the facts that these columns were made from
        self.index = {name: i for i, name in enumerate(self.names)}
        self.count = len(ordered)
        numbers: dict[
            int, int
        ] = {}  # by identity; numbered in the order of rows, so that equal fleets give equal columns
        self.shape_of = [numbers.setdefault(id(r.shape), len(numbers)) for r in ordered]
        self.kinds = list({id(r.shape): r.shape for r in ordered}.values())
        self.shapes = np.array(self.shape_of, dtype=np.int32)
        self.width = max((len(r.node.gpus) for r in ordered), default=0)
        # Answers that depend on shapes alone, kept by those who ask (supply, decide).
        self.matches: dict[object, Any] = {}
        self._domain_names: dict[tuple[Level, int], str] = {}
        self._build_tree()
        self._build_devices()
        self._build_links()

    # -- construction ---------------------------------------------------------------------------------------------------------

    def _build_tree(self) -> None:
        self.domain: dict[Level, list[int]] = {}
        self.domains: dict[Level, Ints] = {}
        self.lo: dict[Level, Ints] = {Level.NODE: np.arange(self.count)}
        self.hi: dict[Level, Ints] = {Level.NODE: np.arange(1, self.count + 1)}
        places = [place_key(r.node) for r in self.rows]
        for depth, level in enumerate(DOMAIN_LEVELS):
            differs = [a[:depth] != b[:depth] for a, b in pairwise(places)]
            ids = np.cumsum(np.array([False, *differs][: self.count], dtype=np.int64))
            starts = np.flatnonzero(np.array([True, *differs][: self.count], dtype=np.bool_))
            self.domains[level] = ids
            self.domain[level] = ids.tolist()
            self.lo[level] = starts
            self.hi[level] = np.append(starts[1:], self.count) if self.count else starts

    def _build_devices(self) -> None:
        self.usable = [healthy_mask(r.node) for r in self.rows]  # free or not
        self.usable_masks = np.array(self.usable, dtype=np.uint64)
        self.taken = [0] * self.count  # held by someone, wholly or in part
        self.offered = [0] * self.count  # wholly free GPUs that new work may use
        self.offer = np.zeros(self.count, dtype=np.int16)
        self.free = 0  # of all rows together
        self.open = np.array([r.schedulable for r in self.rows], dtype=np.bool_)
        self.cpu_free = np.array([r.node.cpu_millicores for r in self.rows], dtype=np.int64)
        self.host_free = np.array([r.node.memory_bytes for r in self.rows], dtype=np.int64)
        self.usd_per_gpu_hour = np.array([r.node.price.usd_per_gpu_hour for r in self.rows], dtype=np.float64)
        # Accounts of every device, healthy or not; `healthy` says where new work may go.
        self.memory_free = np.zeros((self.count, self.width), dtype=np.int64)
        self.healthy = np.zeros((self.count, self.width), dtype=np.bool_)
        self.holders: dict[tuple[int, int], int] = {}  # of parts of a GPU, by row and position
        shapes, kinds = len(self.kinds), self.width + 1
        self.at_least: dict[Level, NDArray[np.int32]] = {}
        self._trees: list[tuple[Level, NDArray[np.int32], list[int]]] = []  # one of levels that have the same domains
        for level in DOMAIN_LEVELS:
            alike = next((table for at, table, _ in self._trees if np.array_equal(self.lo[at], self.lo[level])), None)
            table = np.zeros((shapes, kinds, len(self.lo[level])), dtype=np.int32) if alike is None else alike
            self.at_least[level] = table
            if alike is None:
                self._trees.append((level, table, self.domain[level]))
        self.whole_memory = np.zeros((shapes or 1, self.width), dtype=np.int64)  # bytes per device, by shape
        for s, shape in enumerate(self.kinds):
            self.whole_memory[s, : shape.size] = shape.memory_bytes
        for i, row in enumerate(self.rows):
            size = len(row.node.gpus)
            self.memory_free[i] = self.whole_memory[self.shape_of[i]]
            if self.usable[i] == (1 << size) - 1:  # nearly every node
                self.healthy[i, :size] = True
            else:
                self.healthy[i, :size] = [gpu.offered for gpu in row.node.gpus]
        self._refresh_many(np.arange(self.count))

    def _build_links(self) -> None:
        """Uplinks of each domain in lines of `fabric.nic_bytes_per_s`, and the flows that placed gangs send through them."""
        nic = self.fabric.nic_bytes_per_s  # a node with a slower network still has one line of its own
        network = np.array([max(nic, r.node.network_bytes_per_s) for r in self.rows], dtype=np.float64)
        self.links: dict[Level, Floats] = {}
        self.crossing: dict[Level, Ints] = {}
        for level in SHARED_LEVELS:
            total = np.add.reduceat(network, self.lo[level]) if self.count else network
            if level is Level.SITE:
                lines = np.full(len(total), self.fabric.site_bytes_per_s / nic)
            else:
                lines = total / (nic * self.fabric.oversubscription(level))
            self.links[level] = np.maximum(lines, 1e-3)
            self.crossing[level] = np.zeros(len(total), dtype=np.int64)

    def keep(self, key: object, answer: Kept) -> Kept:
        """Remembers an answer that holds until nodes change; all are forgotten when there are too many."""
        if len(self.matches) >= _MOST_ANSWERS:
            self.matches.clear()
        self.matches[key] = answer
        return answer

    # -- changes --------------------------------------------------------------------------------------------------------------

    def free_mask(self, i: int) -> int:
        """Wholly free, healthy GPUs of row `i`, whether or not new work may go there."""
        return self.usable[i] & ~self.taken[i]

    def take(self, i: int, mask: int) -> None:
        """The GPUs of `mask` become wholly used; the caller has checked that they are free."""
        self.taken[i] |= mask
        self._devices(i, mask, free=False)
        self.refresh(i)

    def give(self, i: int, mask: int) -> None:
        """The GPUs of `mask` become wholly free again."""
        self.taken[i] &= ~mask
        self._devices(i, mask, free=True)
        self.refresh(i)

    def _devices(self, i: int, mask: int, *, free: bool) -> None:
        positions = bits(mask)
        if len(positions) == 1:
            at = positions[0]
            self.memory_free[i, at] = self.whole_memory[self.shape_of[i], at] if free else 0
        elif positions:
            chosen = list(positions)
            self.memory_free[i, chosen] = self.whole_memory[self.shape_of[i], chosen] if free else 0

    def take_whole(self, rows: list[int], sign: int) -> None:
        """All GPUs of nodes that are wholly usable are taken (+1) or given back (-1): one pass for a large gang."""
        for i in rows:
            self.taken[i] = self.usable[i] if sign > 0 else 0
        at = np.array(rows)
        free = self.whole_memory[self.shapes[at]] if sign < 0 else 0
        self.memory_free[at] = free
        self._refresh_many(at)

    def change_whole(self, masks: Mapping[int, int], *, free: bool) -> None:
        """The GPUs of each row's mask become wholly free, or wholly used: one pass for many jobs."""
        if not masks:
            return
        for i, mask in masks.items():
            self.taken[i] = self.taken[i] & ~mask if free else self.taken[i] | mask
        at = np.fromiter(masks, dtype=np.int64, count=len(masks))
        wide = np.array(list(masks.values()), dtype=np.uint64)[:, None] >> np.arange(self.width, dtype=np.uint64)
        chosen = (wide & np.uint64(1)).astype(np.bool_)
        self.memory_free[at] = np.where(chosen, self.whole_memory[self.shapes[at]] if free else 0, self.memory_free[at])
        self._refresh_many(at)

    def share(self, i: int, position: int, memory_bytes: int, sign: int) -> None:
        """Part of one GPU is taken (`sign` +1) or given back (-1); the last holder to leave makes it whole again."""
        key = (i, position)
        holders = self.holders[key] = self.holders.get(key, 0) + sign
        self.memory_free[i, position] -= sign * memory_bytes
        if holders:
            self.taken[i] |= 1 << position
        else:
            del self.holders[key]
            self.taken[i] &= ~(1 << position)
        self.refresh(i)

    def host(self, i: int, cpu_millicores: int, memory_bytes: int, sign: int) -> None:
        """CPU and host memory of the node are taken (+1) or given back (-1)."""
        self.cpu_free[i] -= sign * cpu_millicores
        self.host_free[i] -= sign * memory_bytes

    def cache_room(self) -> Ints:
        """Bytes per row that datasets could take."""
        return np.array([cache_room_bytes(r) for r in self.rows])

    def set_schedulable(self, i: int, schedulable: bool, reason: str) -> None:
        self.rows[i].schedulable, self.rows[i].reason = schedulable, reason
        self.open[i] = schedulable
        self.refresh(i)

    def replace_facts(self, i: int, node: Node) -> None:
        """Other facts of the same hardware: health, price, labels, disks, CPU, memory."""
        before, row = self._node_of[i], self.rows[i]
        row.node = self._node_of[i] = node
        self.usable[i] = usable = healthy_mask(node)
        self.usable_masks[i] = usable
        self.healthy[i, : len(node.gpus)] = [gpu.offered for gpu in node.gpus]
        self.cpu_free[i] += node.cpu_millicores - before.cpu_millicores
        self.host_free[i] += node.memory_bytes - before.memory_bytes
        self.usd_per_gpu_hour[i] = node.price.usd_per_gpu_hour
        if (before.labels, before.disks, before.price) != (node.labels, node.disks, node.price):
            self.matches.clear()
        self.refresh(i)

    def refresh(self, i: int) -> None:
        """Recomputes what row `i` offers and carries the difference up the tree: one entry per level."""
        new = (self.usable[i] & ~self.taken[i]).bit_count() if self.rows[i].schedulable else 0
        old = self.offered[i]
        if new == old:
            return
        self.offered[i] = new
        self.offer[i] = new
        self.free += new - old
        shape = self.shape_of[i]
        low, high, step = (old + 1, new + 1, 1) if new > old else (new + 1, old + 1, -1)
        for _, table, domain in self._trees:
            table[shape, low:high, domain[i]] += step

    def _refresh_many(self, rows: Ints) -> None:
        """`refresh` of many rows in one pass per level."""
        listed = rows.tolist()
        old = np.array([self.offered[i] for i in listed], dtype=np.int64)
        for i in listed:
            self.offered[i] = (self.usable[i] & ~self.taken[i]).bit_count() if self.rows[i].schedulable else 0
        new = np.array([self.offered[i] for i in listed], dtype=np.int64)
        self.offer[rows] = new
        self.free += int(new.sum() - old.sum())
        counts = np.arange(self.width + 1)
        change = (counts <= new[:, None]).astype(np.int32) - (counts <= old[:, None])
        change[:, 0] = 0
        for level, table, _ in self._trees:
            shape, domain = self.shapes[rows].astype(np.int64), self.domains[level][rows]
            key = shape * (len(self.lo[level]) + 1) + domain
            order = np.argsort(key, kind="stable")
            key = key[order]
            starts = np.flatnonzero(np.append(True, key[1:] != key[:-1])) if len(key) else order
            if len(starts):
                first = order[starts]
                table[shape[first], :, domain[first]] += np.add.reduceat(change[order], starts, axis=0)

    def cross(self, rows: Iterable[int], flows: int, sign: int) -> None:
        """A gang on `rows` starts (+1) or stops (-1) sending `flows` through the uplinks of every domain that does not hold all of it."""
        rows = list(rows)
        for level in SHARED_LEVELS:
            domain = self.domain[level]
            touched = {domain[i] for i in rows}
            if len(touched) > 1:
                self.crossing[level][list(touched)] += sign * flows

    # -- reading --------------------------------------------------------------------------------------------------------------

    def shape(self, i: int) -> Shape:
        return self.rows[i].shape

    def most_free(self, rows: list[int], model: str, level: Level) -> int:
        """The most wholly free GPUs in any one domain of `level` that holds one of the rows: on nodes with that model, "": on all."""
        kinds = [s for s, shape in enumerate(self.kinds) if not model or model in shape.model_names]
        if level >= Level.NODE:
            return max((self.offered[i] for i in rows if self.shape_of[i] in kinds), default=0)
        table, domain = self.at_least[level], self.domain[level]
        return max((int(table[kinds, 1:, d].sum()) for d in {domain[i] for i in rows}), default=0)

    def children(self, level: Level, d: int) -> tuple[int, int]:
        """The range of next-level domains inside domain `d`; below a leaf, the range of its rows."""
        lo, hi = int(self.lo[level][d]), int(self.hi[level][d])
        if level is Level.LEAF:
            return lo, hi
        below = self.domain[Level(level + 1)]
        return below[lo], below[hi - 1] + 1

    def domain_name(self, level: Level, d: int) -> str:
        """For people: "site onprem, leaf sw-3"; "" parts are left out."""
        if level >= Level.NODE:
            return self.names[d]
        known = self._domain_names.get((level, d))
        if known is None:
            known = self._domain_names[level, d] = self._name_domain(level, d)
        return known

    def _name_domain(self, level: Level, d: int) -> str:
        node = self.rows[int(self.lo[level][d])].node
        parts = (("site", node.site), ("zone", node.zone), ("spine", node.spine), ("leaf", node.leaf))
        shown = [f"{kind} {name}" for kind, name in parts[: int(level)] if name]
        return ", ".join(shown) or "the fleet"

    def smallest_domain(self, rows: Iterable[int]) -> tuple[Level, int]:
        """The deepest domain that holds all of `rows` (at least one)."""
        members = list(rows)
        low, high = min(members), max(members)
        if low == high:
            return Level.NODE, low
        for level in reversed(DOMAIN_LEVELS):
            if self.domain[level][low] == self.domain[level][high]:
                return level, self.domain[level][low]
        return Level.FLEET, 0

    def digest(self) -> str:
        """Changes when anything does that a decision could depend on; equal after a rollback."""
        seal = hashlib.sha256()
        for row in self.rows:
            seal.update(repr((row.node, row.schedulable)).encode())
        seal.update(repr((self.usable, self.taken, self.offered)).encode())
        seal.update(repr(sorted(self.holders.items())).encode())
        for array in (self.offer, self.cpu_free, self.host_free, self.memory_free):
            seal.update(array.tobytes())
        for level in DOMAIN_LEVELS:
            seal.update(self.at_least[level].tobytes())
        for level in SHARED_LEVELS:
            seal.update(self.links[level].tobytes() + self.crossing[level].tobytes())
        return seal.hexdigest()
