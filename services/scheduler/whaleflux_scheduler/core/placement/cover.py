"""Which sub-domains of a domain give how many nodes: the least modelled slowdown, then the fewest, then the least left over.

Tried for each distinct load of uplinks: only sub-domains at most so loaded, largest first, the last one the tightest that holds the
remainder. For one limit that is the fewest sub-domains, and the slowdown grows with both load and number, so the best over all limits
is the least slowdown that any choice of them has. Few loads differ, as they are numbers of flows over lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whaleflux.fleet.links import expected_slowdown
from whaleflux.fleet.model import Level
from whaleflux_scheduler.core.placement.columns import Columns, Floats, Ints

Counts = list[tuple[int, int]]
_LIMITS = 8  # distinct loads looked at, spread over all of them


@dataclass(frozen=True, slots=True)
class Cover:
    """A choice of sub-domains: `key` orders choices, `takes` is (sub-domain, nodes)."""

    key: tuple[float, int, int]
    takes: Counts


@dataclass(frozen=True, slots=True)
class Children:
    """The sub-domains to choose from: numbers `first`, `first` + 1, ... of `level` with `room` nodes each."""

    level: Level
    first: int
    room: Ints
    near: Ints | None = None  # nodes of the previous attempt in each


def cheapest(columns: Columns, children: Children, nodes: int, flows: int) -> Cover | None:
    """The best choice for a gang of `nodes` nodes that sends `flows` flows through every boundary it crosses; None if too small."""
    room = children.room
    candidates = room.nonzero()[0]
    keys = (-room[candidates],) if children.near is None else (-room[candidates], -children.near[candidates])
    order = candidates[np.lexsort(keys)]
    here = order + children.first
    load: Floats = (columns.crossing[children.level][here] + flows - 1) / columns.links[children.level][here]
    best: Cover | None = None
    for limit in _distinct(load):
        takes = largest_first(order[load <= limit], room, nodes, children.first)
        if takes:
            found = _judge(columns, children, takes, flows)
            if best is None or found.key < best.key:
                best = found
    return best


def _judge(columns: Columns, children: Children, takes: Counts, flows: int) -> Cover:
    crossing, links = columns.crossing[children.level], columns.links[children.level]
    load = max((int(crossing[d]) + flows - 1) / float(links[d]) for d, _ in takes)
    slowdown = 1.0
    if len(takes) > 1:
        slowdown = expected_slowdown(round(load, 4), flows * len(takes), columns.fabric.hashed)
    last, take = takes[-1]
    return Cover((round(slowdown, 3), len(takes), int(children.room[last - children.first]) - take), takes)


def _distinct(load: Floats) -> list[float]:
    """Distinct loads, lowest first, at most `_LIMITS` of them and always the highest."""
    values = np.unique(load)
    if len(values) > _LIMITS:
        values = values[np.linspace(0, len(values) - 1, _LIMITS).astype(int)]
    return [float(v) for v in values]


def largest_first(order: Ints, room: Ints, nodes: int, first: int) -> Counts:
    """Fills sub-domains in `order` (largest first); the last is the tightest of the rest that holds what remains."""
    sizes = room[order]
    filled = np.cumsum(sizes)
    if not len(order) or filled[-1] < nodes:
        return []
    last = int(np.searchsorted(filled, nodes))
    takes = [(first + int(c), int(room[c])) for c in order[:last]]
    remainder = nodes - (int(filled[last - 1]) if last else 0)
    rest, fits = order[last:], sizes[last:]
    holding = (fits >= remainder).nonzero()[0]
    tight = rest[holding[int(np.argmin(fits[holding]))]]
    return [*takes, (first + int(tight), remainder)]
