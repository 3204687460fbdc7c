"""Where a gang fits best: the smallest domain, then inside it the nodes that keep the rest of the fleet whole.

A split says how many GPUs each node gives (`Split(nodes, per_node, short)`: of `nodes`, `short` give one unit less). For each split the
deepest domain that holds it wins; inside, fewest sub-domains, least shared uplinks first, and the last one as full as possible.
The final tie key everywhere is the row number, which is the order of place and name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from whaleflux.fleet.model import Level
from whaleflux_scheduler.core.placement.columns import DOMAIN_LEVELS, Ints
from whaleflux_scheduler.core.placement.cover import Children, Counts, cheapest
from whaleflux_scheduler.core.placement.supply import Supply


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
    slice: tuple[int, Level] | None = None  # runs of so many GPUs must lie in one domain of the level
    near: frozenset[int] = frozenset()


def splits(supply: Supply, bounds: Bounds, most: int = 6) -> Iterator[Split]:
    """Even splits of the demand over nodes, fewest nodes first."""
    demand = supply.demand
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
    counts = supply.fleet()
    largest = len(counts) - 1
    while largest and not counts[largest]:
        largest -= 1
    return largest


def even(supply: Supply, split: Split, bounds: Bounds) -> Iterator[Counts]:
    """The best places for an even split, deepest domain first; the caller stops when it has seen enough."""
    if split.nodes == 1:
        row = single(supply, split.per_node, bounds)
        if row is not None:
            yield [(row, split.per_node)]
        return
    tried: set[tuple[int, int]] = set()
    for level in reversed(DOMAIN_LEVELS):
        if level < bounds.widest:
            return
        for d in _fitting(supply, level, split, bounds):
            rows = (int(supply.columns.lo[level][d]), int(supply.columns.hi[level][d]))
            if rows in tried:  # a spine with one leaf and the like
                continue
            tried.add(rows)
            nodes = _spread(supply, level, d, split.per_node, split.nodes, bounds=bounds)
            if nodes is not None:
                yield _shorten(nodes, split, supply.demand.unit)
                break


def possible(supply: Supply, bounds: Bounds) -> bool:
    """Whether any place exists, from the aggregates alone where they tell."""
    for split in splits(supply, bounds):
        if split.nodes == 1:
            if single(supply, split.per_node, bounds) is not None:
                return True
            continue
        levels = DOMAIN_LEVELS if bounds.slice else (bounds.widest,)  # what fits somewhere inside fits the whole
        if any(level >= bounds.widest and _fits(supply, level, split, bounds) for level in levels):
            return True
    return not bounds.slice and next(ragged(supply, bounds), None) is not None


def _fits(supply: Supply, level: Level, split: Split, bounds: Bounds) -> bool:
    """Whether a domain of the level has enough nodes."""
    return bool((_fitting_nodes(supply, level, split.per_node, bounds) >= split.nodes).any())


def _shorten(nodes: list[int], split: Split, unit: int) -> Counts:
    nodes.sort()
    full = len(nodes) - split.short
    return [(i, split.per_node - (unit if at >= full else 0)) for at, i in enumerate(nodes)]


def single(supply: Supply, count: int, bounds: Bounds) -> int | None:
    """The fullest node that still has `count` GPUs, in the leaf with the least room: whole nodes and leaves stay whole."""
    columns = supply.columns
    counts = supply.fleet()
    if count < len(counts):
        supply.considered = (Level.NODE, counts[count])
    for exactly in range(count, columns.width + 1):
        if counts[exactly] == counts[exactly + 1]:
            continue
        here = supply.at_least(Level.LEAF, exactly) - supply.at_least(Level.LEAF, exactly + 1)
        leaves: Ints = here.nonzero()[0]
        if not len(leaves):
            continue
        leaf = int(leaves[0]) if len(leaves) == 1 else _tightest(supply, leaves, bounds)
        lo, hi = int(columns.lo[Level.LEAF][leaf]), int(columns.hi[Level.LEAF][leaf])
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


def _fitting(supply: Supply, level: Level, split: Split, bounds: Bounds) -> list[int]:
    """Domains with enough nodes, best first: near ones, then the least slowdown inside, then the least room to spare."""
    nodes = _fitting_nodes(supply, level, split.per_node, bounds)
    fitting = (nodes >= split.nodes).nonzero()[0]
    if len(fitting):
        supply.considered = (level, len(fitting))
    if len(fitting) < 2:
        return [int(d) for d in fitting]
    if bounds.near:
        ids = supply.columns.domain[level]
        met = np.bincount([ids[i] for i in bounds.near], minlength=len(nodes))[fitting]
        fitting = fitting[met == met.max()]
    anything = supply.at_least(level, 1)[fitting]
    key = nodes[fitting].astype(np.int64) * (supply.columns.count + 1) + anything
    if level is Level.LEAF:
        return [int(fitting[int(np.argmin(key))])]
    order = fitting[np.argsort(key, kind="stable")]
    return [
        d
        for _, d in sorted((_inside_key(supply, level, d, split, bounds), d) for d in _few(supply, level, order, split))
    ]


def _few(supply: Supply, level: Level, domains: Ints, split: Split, most: int = 3) -> list[int]:
    """The tightest of these domains, and those with most room behind uplinks that nobody uses."""
    if len(domains) <= 2 * most:
        return [int(d) for d in domains]
    columns = supply.columns
    quiet = np.where(columns.crossing[Level.LEAF] == 0, supply.at_least(Level.LEAF, split.per_node), 0)
    owner = columns.domains[level][columns.lo[Level.LEAF]]
    room = np.bincount(owner, weights=quiet, minlength=len(columns.lo[level]))[domains]
    quietest = domains[np.argsort(-room, kind="stable")[:most]]
    return list(dict.fromkeys([int(d) for d in domains[:most]] + [int(d) for d in quietest]))


def _inside_key(supply: Supply, level: Level, d: int, split: Split, bounds: Bounds) -> tuple[float, int, int]:
    if level < Level.SITE:
        return (0.0, 0, 0)
    cover = cheapest(
        supply.columns, _leaves(supply, level, d, split.per_node, bounds), split.nodes, supply.flows(split.per_node)
    )
    return cover.key if cover else (float("inf"), 0, 0)


def _leaves(supply: Supply, level: Level, d: int, per_node: int, bounds: Bounds) -> Children:
    """All leaves of a domain, whatever lies between."""
    columns = supply.columns
    ids = columns.domain[Level.LEAF]
    first, last = ids[int(columns.lo[level][d])], ids[int(columns.hi[level][d]) - 1] + 1
    return _children(supply, Level.LEAF, first, last, per_node, bounds=bounds)


def _children(supply: Supply, level: Level, first: int, last: int, per_node: int, *, bounds: Bounds) -> Children:
    room = _fitting_nodes(supply, level, per_node, bounds)[first:last]
    if not bounds.near:
        return Children(level, first, room)
    ids = supply.columns.domain[level]
    inside = [ids[i] - first for i in bounds.near if first <= ids[i] < last]
    return Children(level, first, room, np.bincount(inside, minlength=len(room)))


def _spread(supply: Supply, level: Level, d: int, per_node: int, nodes: int, *, bounds: Bounds) -> list[int] | None:
    """Chooses `nodes` nodes of domain `d`: its leaves at once, or level by level where slices or sites have to be kept together."""
    if level is Level.LEAF:
        return _rows(supply, d, per_node, nodes, bounds)
    step_by_step = level is Level.FLEET or (bounds.slice is not None and level < bounds.slice[1] < Level.LEAF)
    if step_by_step:
        below = Level(level + 1)
        first, last = supply.columns.children(level, d)
        children = _children(supply, below, first, last, per_node, bounds=bounds)
    else:
        below, children = Level.LEAF, _leaves(supply, level, d, per_node, bounds)
    cover = cheapest(supply.columns, children, nodes, supply.flows(per_node))
    found: list[int] = []
    for child, take in cover.takes if cover else []:
        inner = _spread(supply, below, child, per_node, take, bounds=bounds)
        if inner is None:
            return None
        found += inner
    return found or None


def _rows(supply: Supply, leaf: int, per_node: int, nodes: int, bounds: Bounds) -> list[int] | None:
    """Of the nodes of a leaf that still have `per_node` GPUs near ones first, then the cheapest, then the fullest."""
    lo, hi = int(supply.columns.lo[Level.LEAF][leaf]), int(supply.columns.hi[Level.LEAF][leaf])
    usable = supply.usable(lo, hi)
    rows = (usable >= per_node).nonzero()[0]
    if len(rows) < nodes:
        return None
    if len(rows) > nodes:
        far = np.array([lo + int(r) not in bounds.near for r in rows] if bounds.near else [False] * len(rows))
        rows = rows[np.lexsort((usable[rows], supply.columns.usd_per_gpu_hour[lo + rows], far))[:nodes]]
    return [lo + int(r) for r in rows]


def ragged(supply: Supply, bounds: Bounds) -> Iterator[Counts]:
    """When no even split fits: whatever nodes have, largest first, in the deepest domain with enough in total."""
    demand = supply.demand
    if not (supply.total(bounds.widest) >= demand.gpus).any():
        return
    for level in reversed(DOMAIN_LEVELS):
        if level < bounds.widest:
            return
        total = supply.total(level)
        fitting = (total >= demand.gpus).nonzero()[0]
        for d in fitting[np.argsort(total[fitting], kind="stable")][:4]:
            counts = _collect(supply, level, int(d), bounds)
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
