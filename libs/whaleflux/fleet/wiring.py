"""What the links inside one node are worth: islands, and the best subset of GPUs by bit mask.

Nodes that are wired alike share one `Wiring`, so each table is computed once per kind of node and lookups are by mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations

from whaleflux.fleet.links import DEFAULT_BYTES_PER_S
from whaleflux.fleet.model import LinkKind, Node

_EXACT_UP_TO = 8  # GPUs; larger nodes use the spanning-tree bound, which equals the ring on switched wiring
_THROUGH_HOST = DEFAULT_BYTES_PER_S[LinkKind.PCIE_HOST]
Matrix = tuple[tuple[float, ...], ...]


@lru_cache(maxsize=65536)
def bits(mask: int) -> tuple[int, ...]:
    """Positions of the set bits, lowest first."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return tuple(found)


def mask_of(positions: Iterable[int]) -> int:
    mask = 0
    for position in positions:
        mask |= 1 << position
    return mask


class Wiring:
    """Bandwidth between the GPUs of one kind of node. Positions are places in `Node.gpus`, not driver indices."""

    def __init__(self, matrix: Matrix, kinds: tuple[tuple[LinkKind, ...], ...]) -> None:
        self.matrix, self.kinds = matrix, kinds
        self.size = len(matrix)
        self.islands = _islands(kinds)
        values = {matrix[i][j] for i in range(self.size) for j in range(self.size) if i != j}
        self.uniform = len(values) <= 1
        self._pair = next(iter(values), math.inf)
        self._ring: dict[int, float] = {}
        self._choice: dict[tuple[int, int, int], int] = {}
        self._order: dict[tuple[int, int], tuple[int, ...]] = {}
        self._island_units: dict[tuple[int, int], int] = {}

    def ring_bytes_per_s(self, mask: int) -> float:
        """The slowest link of the best ring through these GPUs; infinite for fewer than two."""
        if mask & (mask - 1) == 0:
            return math.inf
        if self.uniform:
            return self._pair
        if mask not in self._ring:
            members = bits(mask)
            exact = len(members) <= _EXACT_UP_TO
            self._ring[mask] = _best_ring(self.matrix, members) if exact else _best_tree(self.matrix, members)
        return self._ring[mask]

    def slowest_kind(self, mask: int) -> LinkKind:
        """The kind of link that bounds the best ring through these GPUs."""
        members, bound = bits(mask), self.ring_bytes_per_s(mask)
        pairs = [(self.matrix[a][b], self.kinds[a][b]) for a, b in combinations(members, 2)]
        return min((p for p in pairs if p[0] >= bound), key=lambda p: p[0], default=(0.0, LinkKind.NVLINK))[1]

    def island_units(self, mask: int, size: int) -> int:
        """How many runs of `size` GPUs fit, each inside one NVLink island."""
        key = (mask, size)
        if key not in self._island_units:
            self._island_units[key] = sum((mask & island).bit_count() // size for island in self.islands)
        return self._island_units[key]

    def choose(self, free: int, count: int, unit: int = 1) -> int:
        """The best `count` of the free GPUs: fastest ring, then whole runs of `unit` per island, then leaving the best rest."""
        if free.bit_count() == count:
            return free
        if self.uniform:
            return mask_of(bits(free)[:count])
        key = (free, count, unit)
        if key not in self._choice:
            self._choice[key] = self._choose(free, count, unit)
        return self._choice[key]

    def _choose(self, free: int, count: int, unit: int) -> int:
        members = bits(free)
        if math.comb(len(members), count) > 20_000:
            return self._choose_by_islands(free, count)

        def worth(mask: int) -> tuple[float, int, float, int, float]:
            rest = free & ~mask
            split = sum(1 for i in self.islands if 0 < (mask & i).bit_count() < (free & i).bit_count())
            units = self.island_units(mask, unit) if unit > 1 else 0
            return (self.ring_bytes_per_s(mask), units, -split, self._largest_island(rest), self._sum(mask))

        return max((mask_of(c) for c in combinations(members, count)), key=worth)  # first of equals: lowest positions

    def _choose_by_islands(self, free: int, count: int) -> int:
        parts = sorted((free & island for island in self.islands), key=lambda m: (m.bit_count(), m))
        whole = next((m for m in parts if m.bit_count() >= count), None)
        ordered = bits(whole) if whole else tuple(b for m in reversed(parts) for b in bits(m))
        return mask_of(ordered[:count])

    def _largest_island(self, mask: int) -> int:
        return max(((mask & island).bit_count() for island in self.islands), default=0)

    def _sum(self, mask: int) -> float:
        return sum(self.matrix[a][b] for a, b in combinations(bits(mask), 2))

    def rank_order(self, mask: int, unit: int = 1) -> tuple[int, ...]:
        """The GPUs so that each run of `unit` consecutive ones is as tightly linked as can be."""
        if self.uniform or unit >= mask.bit_count() or unit <= 1:
            return self._ring_order(mask)
        key = (mask, unit)
        if key not in self._order:
            order: list[int] = []
            rest = mask
            while rest:
                taken = self.choose(rest, min(unit, rest.bit_count()), unit)
                order += self._ring_order(taken)
                rest &= ~taken
            self._order[key] = tuple(order)
        return self._order[key]

    def _ring_order(self, mask: int) -> tuple[int, ...]:
        """Neighbours in rank are neighbours by link: start low, always go to the fastest link not yet visited."""
        members = bits(mask)
        if self.uniform or len(members) < 3:
            return members
        order, rest = [members[0]], list(members[1:])
        while rest:
            here = order[-1]
            nearest = max(rest, key=lambda g: (self.matrix[here][g], -g))
            order.append(nearest)
            rest.remove(nearest)
        return tuple(order)


def _islands(kinds: tuple[tuple[LinkKind, ...], ...]) -> tuple[int, ...]:
    """Connected components over NVLink, as masks, lowest GPU first; a GPU without NVLink is its own island."""
    left, found = set(range(len(kinds))), []
    while left:
        grown, edge = 0, [min(left)]
        while edge:
            here = edge.pop()
            if here in left:
                left.remove(here)
                grown |= 1 << here
                edge += [g for g in left if kinds[here][g] is LinkKind.NVLINK]
        found.append(grown)
    return tuple(found)


def _best_ring(matrix: Matrix, members: tuple[int, ...]) -> float:
    """Largest possible slowest link of a closed tour (Held-Karp with min instead of sum)."""
    if len(members) == 2:
        return matrix[members[0]][members[1]]
    first, others = members[0], members[1:]
    best: dict[tuple[int, int], float] = {(1 << i, i): matrix[first][o] for i, o in enumerate(others)}
    for visited in range(1, 1 << len(others)):
        for last in bits(visited):
            if visited == 1 << last:
                continue
            before = visited & ~(1 << last)
            best[visited, last] = max(min(best[before, p], matrix[others[p]][others[last]]) for p in bits(before))
    full = (1 << len(others)) - 1
    return max(min(best[full, last], matrix[others[last]][first]) for last in range(len(others)))


def _best_tree(matrix: Matrix, members: tuple[int, ...]) -> float:
    """Slowest edge of the maximum spanning tree (Prim): no ring can be faster."""
    reach = {m: matrix[members[0]][m] for m in members[1:]}
    bound = math.inf
    while reach:
        nearest = max(reach, key=lambda m: (reach[m], -m))
        bound = min(bound, reach.pop(nearest))
        reach = {m: max(speed, matrix[nearest][m]) for m, speed in reach.items()}
    return bound


def wiring_of(node: Node) -> Wiring:
    """Reads the link matrix; pairs that no link connects talk through host memory."""
    place = {gpu.index: position for position, gpu in enumerate(node.gpus)}
    size = len(node.gpus)
    speed = [[_THROUGH_HOST] * size for _ in range(size)]
    kinds = [[LinkKind.PCIE_HOST] * size for _ in range(size)]
    for link in node.links:
        if link.a in place and link.b in place:
            a, b = place[link.a], place[link.b]
            bandwidth = link.bandwidth_bytes_per_s or DEFAULT_BYTES_PER_S[link.kind]
            speed[a][b] = speed[b][a] = bandwidth
            kinds[a][b] = kinds[b][a] = link.kind
    return Wiring(tuple(map(tuple, speed)), tuple(map(tuple, kinds)))
