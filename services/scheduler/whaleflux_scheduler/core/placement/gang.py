"""Where a gang fits best: the smallest domain, then inside it the nodes that keep the rest of the fleet whole.

A split says how many GPUs each node gives (`Split(nodes, per_node, short)`: of `nodes`, `short` give one unit less). For each split the
deepest domain that holds it wins; inside, fewest sub-domains, least shared uplinks first, and the last one as full as possible.
The final tie key everywhere is the row number, which is the order of place and name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from whaleflux.fleet.links import expected_slowdown
from whaleflux.fleet.model import Level
from whaleflux_scheduler.core.placement.columns import DOMAIN_LEVELS, SHARED_LEVELS, Ints
from whaleflux_scheduler.core.placement.supply import Supply

Counts = list[tuple[int, int]]  # (row, GPUs), in the order of rows


@dataclass(frozen=True, slots=True)
class Split:
    """`nodes` nodes give `per_node` GPUs each, except `short` of them, which give one unit less."""

    nodes: int
    per_node: int
    short: int = 0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the request allows: the widest level that may hold the gang, and how many nodes it may take."""

    widest: Level = Level.FLEET
    min_nodes: int = 0
    max_nodes: int = 0
    inside: tuple[Level, int] | None = None  # only within this domain
    slice: tuple[int, Level] | None = None  # runs of so many GPUs must lie in one domain of the level
    near: frozenset[int] = frozenset()


def splits(supply: Supply, bounds: Bounds, most: int = 6) -> Iterator[Split]:
    """Even splits of the demand over nodes, fewest nodes first."""
    demand = supply.demand
    if demand.per_node:
        nodes = demand.gpus // demand.per_node
        if bounds.min_nodes <= nodes <= (bounds.max_nodes or nodes) and demand.per_node % demand.unit == 0:
            yield Split(nodes, demand.per_node)
        return
    largest = _largest_node(supply)
    if demand.most_per_node:
        largest = min(largest, demand.most_per_node)
    largest -= largest % demand.unit
    if not largest:
        return
    units = demand.gpus // demand.unit
    fewest = max(-(-demand.gpus // largest), bounds.min_nodes)
    seen = set()
    for nodes in range(fewest, min(units, fewest * 8, bounds.max_nodes or units) + 1):
        per_node = -(-units // nodes)
        if per_node not in seen:
            seen.add(per_node)
            yield Split(nodes, per_node * demand.unit, nodes * per_node - units)
        if len(seen) == most:
            return


def _largest_node(supply: Supply) -> int:
    return next((k for k in range(supply.columns.width, 0, -1) if supply.at_least(Level.FLEET, k)[0]), 0)


def even(supply: Supply, split: Split, bounds: Bounds) -> Iterator[Counts]:
    """The best places for an even split, deepest domain first; the caller stops when it has seen enough."""
    if split.nodes == 1:
        row = single(supply, split.per_node, bounds)
        if row is not None:
            yield [(row, split.per_node)]
        return
    for level in reversed(DOMAIN_LEVELS):
        if level < bounds.widest:
            return
        d = _best_domain(supply, level, split, bounds)
        if d is not None:
            nodes = _spread(supply, level, d, split.per_node, split.nodes, bounds=bounds)
            if nodes is not None:
                yield _shorten(nodes, split, supply.demand.unit)


def possible(supply: Supply, bounds: Bounds) -> bool:
    """Whether any place exists, from the aggregates alone where they tell."""
    for split in splits(supply, bounds):
        if split.nodes == 1:
            if single(supply, split.per_node, bounds) is not None:
                return True
            continue
        for level in DOMAIN_LEVELS:
            if level >= bounds.widest and _best_domain(supply, level, split, bounds) is not None:
                return True
    return not bounds.slice and next(ragged(supply, bounds), None) is not None


def _shorten(nodes: list[int], split: Split, unit: int) -> Counts:
    nodes.sort()
    full = len(nodes) - split.short
    return [(i, split.per_node - (unit if at >= full else 0)) for at, i in enumerate(nodes)]


def single(supply: Supply, count: int, bounds: Bounds) -> int | None:
    """The fullest node that still has `count` GPUs, in the leaf with the least room: whole nodes and leaves stay whole."""
    columns = supply.columns
    lo_row, hi_row = _range(supply, bounds)
    for exactly in range(count, columns.width + 1):
        if supply.at_least(Level.FLEET, exactly)[0] == supply.at_least(Level.FLEET, exactly + 1)[0]:
            continue
        here = supply.at_least(Level.LEAF, exactly) - supply.at_least(Level.LEAF, exactly + 1)
        leaves: Ints = here.nonzero()[0]
        if bounds.inside:
            inside = (columns.hi[Level.LEAF][leaves] > lo_row) & (columns.lo[Level.LEAF][leaves] < hi_row)
            leaves = leaves[inside]
        if not len(leaves):
            continue
        leaf = int(leaves[0]) if len(leaves) == 1 else _tightest(supply, leaves, bounds)
        lo = max(int(columns.lo[Level.LEAF][leaf]), lo_row)
        hi = min(int(columns.hi[Level.LEAF][leaf]), hi_row)
        rows = (supply.usable(lo, hi) == exactly).nonzero()[0]
        if len(rows):
            found = [lo + int(r) for r in rows]
            return min(found, key=lambda i: (i not in bounds.near, i)) if bounds.near else found[0]
    return None


def _tightest(supply: Supply, leaves: Ints, bounds: Bounds) -> int:
    """Of these leaves the one with fewest nodes that have anything to give; near ones first."""
    if bounds.near:
        near = {supply.columns.domain[Level.LEAF][i] for i in bounds.near}
        close = [int(d) for d in leaves if int(d) in near]
        leaves = np.array(close) if close else leaves
    room = supply.at_least(Level.LEAF, supply.columns.width)[leaves] * 4096 + supply.at_least(Level.LEAF, 1)[leaves]
    return int(leaves[int(np.argmin(room))])


def _range(supply: Supply, bounds: Bounds) -> tuple[int, int]:
    if not bounds.inside:
        return 0, supply.columns.count
    level, d = bounds.inside
    return int(supply.columns.lo[level][d]), int(supply.columns.hi[level][d])


def _domains_inside(supply: Supply, level: Level, bounds: Bounds) -> tuple[int, int]:
    """The range of domains of `level` that lie in the allowed one."""
    lo, hi = _range(supply, bounds)
    ids = supply.columns.domain[level]
    return (ids[lo], ids[hi - 1] + 1) if hi > lo else (0, 0)


def _fitting_nodes(supply: Supply, level: Level, per_node: int, bounds: Bounds) -> Ints:
    """Per domain: nodes that can give `per_node`, rounded down to whole slices at the slice's level."""
    nodes = supply.at_least(level, per_node)
    if not bounds.slice or level > bounds.slice[1]:
        return nodes
    size, at = bounds.slice
    chunk = max(1, size // per_node)
    if level == at:
        return nodes // chunk * chunk
    whole = supply.at_least(at, per_node) // chunk * chunk
    owner = np.array(supply.columns.domain[level])[supply.columns.lo[at]]
    total: Ints = np.bincount(owner, weights=whole, minlength=len(nodes)).astype(np.int64)
    return total


def _best_domain(supply: Supply, level: Level, split: Split, bounds: Bounds) -> int | None:
    """The domain with enough nodes and least room to spare; near ones first."""
    first, last = _domains_inside(supply, level, bounds)
    if bounds.inside and level < bounds.inside[0]:
        return None
    nodes = _fitting_nodes(supply, level, split.per_node, bounds)[first:last]
    fitting = (nodes >= split.nodes).nonzero()[0]
    if not len(fitting):
        return None
    if len(fitting) == 1:
        return first + int(fitting[0])
    if bounds.near:
        ids = supply.columns.domain[level]
        met = np.bincount([ids[i] for i in bounds.near], minlength=last)[first:last][fitting]
        fitting = fitting[met == met.max()]
    anything = supply.at_least(level, 1)[first:last][fitting]
    key = nodes[fitting].astype(np.int64) * (supply.columns.count + 1) + anything
    return first + int(fitting[int(np.argmin(key))])


def _spread(supply: Supply, level: Level, d: int, per_node: int, nodes: int, *, bounds: Bounds) -> list[int] | None:
    """Chooses `nodes` nodes of domain `d`: sub-domains first, level by level, then rows."""
    if level is Level.LEAF:
        return _rows(supply, d, per_node, nodes, bounds)
    first, last = supply.columns.children(level, d)
    below = Level(level + 1)
    room = _fitting_nodes(supply, below, per_node, bounds)[first:last]
    found: list[int] = []
    flows = max(1, per_node)
    for child, take in _cover(supply, below, first, room=room, nodes=nodes, flows=flows, bounds=bounds):
        inner = _spread(supply, below, child, per_node, take, bounds=bounds)
        if inner is None:
            return None
        found += inner
    return found


def _rows(supply: Supply, leaf: int, per_node: int, nodes: int, bounds: Bounds) -> list[int] | None:
    """The fullest nodes of a leaf that still have `per_node` GPUs."""
    lo, hi = int(supply.columns.lo[Level.LEAF][leaf]), int(supply.columns.hi[Level.LEAF][leaf])
    usable = supply.usable(lo, hi)
    rows = (usable >= per_node).nonzero()[0]
    if len(rows) < nodes:
        return None
    if len(rows) > nodes:
        key = usable[rows].astype(np.int64)
        if bounds.near:
            key += np.array([0 if lo + int(r) in bounds.near else 100 for r in rows])
        rows = rows[np.argsort(key, kind="stable")[:nodes]]
    return [lo + int(r) for r in rows]


def _cover(supply: Supply, level: Level, first: int, *, room: Ints, nodes: int, flows: int, bounds: Bounds) -> Counts:
    """Which sub-domains give how many nodes: the least modelled slowdown, then fewest of them, then least left over.

    Tried for each distinct load of uplinks: only sub-domains at most so loaded, largest first, the last one the tightest that holds
    the remainder. Few loads differ, as they are numbers of flows over lines.
    """
    candidates = np.flatnonzero(room)
    if bounds.near:
        ids = supply.columns.domain[level]
        near = np.bincount(
            [ids[i] - first for i in bounds.near if 0 <= ids[i] - first < len(room)], minlength=len(room)
        )
    else:
        near = None
    order = candidates[np.lexsort((-room[candidates],) if near is None else (-room[candidates], -near[candidates]))]
    if level not in SHARED_LEVELS:
        return _largest_first(order, room, nodes, first)
    crossing, links = supply.columns.crossing[level], supply.columns.links[level]
    load = np.array([(crossing[first + int(c)] + flows - 1) / links[first + int(c)] for c in order])
    best: tuple[tuple[float, int, int], Counts] | None = None
    for limit in _distinct(load):
        chosen = _largest_first(order[load <= limit], room, nodes, first)
        if not chosen:
            continue
        loads = [(crossing[c] + flows - 1) / links[c] for c, _ in chosen]
        slowdown = expected_slowdown(round(max(loads), 4), flows * len(chosen), supply.columns.fabric.hashed)
        spare = int(room[chosen[-1][0] - first]) - chosen[-1][1]
        key = (round(slowdown, 3), len(chosen), spare)
        if best is None or key < best[0]:
            best = (key, chosen)
    return best[1] if best else []


def _distinct(load: Ints, most: int = 8) -> list[float]:
    """The distinct loads, lowest first; at most `most` of them, always including the highest."""
    values = np.unique(load)
    if len(values) > most:
        values = values[np.linspace(0, len(values) - 1, most).astype(int)]
    return [float(v) for v in values]


def _largest_first(order: Ints, room: Ints, nodes: int, first: int) -> Counts:
    """Fills sub-domains in `order` (largest first); the last is the tightest of the rest that holds what remains."""
    sizes = room[order]
    filled = np.cumsum(sizes)
    if not len(order) or filled[-1] < nodes:
        return []
    last = int(np.searchsorted(filled, nodes))
    chosen = [(first + int(c), int(room[c])) for c in order[:last]]
    remainder = nodes - sum(take for _, take in chosen)
    rest, fits = order[last:], sizes[last:]
    holding = (fits >= remainder).nonzero()[0]
    tight = rest[holding[int(np.argmin(fits[holding]))]]
    return [*chosen, (first + int(tight), remainder)]


def ragged(supply: Supply, bounds: Bounds) -> Iterator[Counts]:
    """When no even split fits: whatever nodes have, largest first, in the deepest domain with enough in total."""
    demand = supply.demand
    if demand.per_node:
        return
    for level in reversed(DOMAIN_LEVELS):
        if level < bounds.widest or (bounds.inside and level < bounds.inside[0]):
            return
        first, last = _domains_inside(supply, level, bounds)
        total = supply.total(level)[first:last]
        fitting = (total >= demand.gpus).nonzero()[0]
        for d in fitting[np.argsort(total[fitting], kind="stable")][:4]:
            counts = _collect(supply, level, first + int(d), bounds)
            if counts is not None:
                yield counts
                break


def _collect(supply: Supply, level: Level, d: int, bounds: Bounds) -> Counts | None:
    demand, columns = supply.demand, supply.columns
    lo, hi = int(columns.lo[level][d]), int(columns.hi[level][d])
    give = np.minimum(supply.usable(lo, hi), demand.most_per_node or columns.width).astype(np.int64)
    give -= give % demand.unit
    order = np.argsort(-give, kind="stable")
    counts, left = [], demand.gpus
    for r in order:
        take = min(int(give[r]), left)
        take -= take % demand.unit
        if take <= 0 or left == 0:
            break
        counts.append((lo + int(r), take))
        left -= take
    nodes = len(counts)
    if left or nodes < bounds.min_nodes or (bounds.max_nodes and nodes > bounds.max_nodes):
        return None
    return sorted(counts)
