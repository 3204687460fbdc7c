"""Which rank runs on which GPU: the map whose step is fastest, found by laying dimensions along the tree and exchanging GPUs.

cluster = Cluster.of(hosts)                                       # cluster.py: the GPUs that a job has
found = best_map(cluster, Split.of(plan), lambda groups: step_time(shape, machine, plan, how, groups=groups).total_s)
found.gpus[rank]                                                  # where that rank runs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.planning.arrays import Array
from whaleflux.planning.cluster import Cluster, Ints
from whaleflux.planning.group_links import Split, groups_of
from whaleflux.planning.rank_layouts import dimensions, lay, orders
from whaleflux.planning.step import Groups

Price = Callable[[Groups], Array]
"""What maps cost by their groups, of all of them at once: less is better."""

# A search looks at so many maps at once and in all; small ones, which cost less to price, at more. So many rounds without a gain end it.
_AT_ONCE, _ROUND_RANKS, _LOOKED_AT, _SMALL, _LOOKED_AT_SMALL, _PATIENCE = 96, 16_384, 500, 32, 2400, 3
_IMPROVED_UP_TO = 2048  # ranks; maps of more are only laid
_OTHER_STARTS = 4  # orders that small searches start from
_EQUAL = 1e-9


@dataclass(frozen=True, slots=True)
class RankMap:
    """`gpus`: of each rank the GPU's number in the cluster. `order`: how its dimensions were laid, innermost first; `cost` is its price.

    `improved`: exchanges beyond that order made it cheaper. `looked_at`: how many maps were priced.
    """

    gpus: Ints
    order: tuple[str, ...]
    cost: float
    improved: bool
    looked_at: int

    @property
    def is_given_order(self) -> bool:
        """Whether ranks lie on GPUs in the order of the tree."""
        return bool((self.gpus[1:] > self.gpus[:-1]).all())


def best_map(cluster: Cluster, split: Split, price: Price, seed: int = 0) -> RankMap:
    """The cheapest map that was found. The same input gives the same map.

    Raises InvalidArgument where the split has another number of ranks than the cluster has GPUs, or experts do not divide it.
    """
    check(cluster, split)
    tried = orders(split)
    tried = [tried[0], *tried]  # ranks as GPUs come, and each order
    laid = np.unique(
        np.array([np.arange(split.ranks), *(lay(cluster, split, order) for order in tried[1:])]),
        axis=0,
        return_index=True,
    )
    maps, which = laid[0][np.argsort(laid[1])], np.sort(laid[1])
    costs = priced(cluster, split, price, maps)
    search = _Search(cluster, split, price, np.random.default_rng(seed))
    cheapest = np.argsort(costs, kind="stable")
    best = int(cheapest[0])
    gpus, cost, looked_at = search.improve(maps[cheapest], costs[cheapest])
    improved = cost < costs[best] * (1 - _EQUAL)
    return RankMap(gpus, tried[int(which[best])], cost, improved, len(maps) + looked_at)


def check(cluster: Cluster, split: Split) -> None:
    """Raises InvalidArgument for a split that this cluster cannot have."""
    if split.ranks != cluster.gpus:
        sizes = " x ".join(f"{name} {size}" for name, size in dimensions(split).items()) or "1"
        text = f"{sizes} are {split.ranks} ranks, and there are {cluster.gpus} GPUs; make the product of all sizes that number"
        raise InvalidArgument(FieldViolation("parallel", text))
    for name, size in (("ep", split.ep), ("replicas", split.replicas)):
        if size < 1 or split.data % size:
            text = f"{name} {size} must divide dp x cp = {split.data}; take one of its divisors"
            raise InvalidArgument(FieldViolation(f"parallel.{name}", text))


def priced(cluster: Cluster, split: Split, price: Price, maps: Ints) -> Array:
    """What each of `maps` (count, ranks) costs."""
    return np.broadcast_to(np.asarray(price(groups_of(cluster, split, maps)), dtype=np.float64), (len(maps),))


@dataclass(frozen=True, slots=True)
class _Search:
    """Bounded local improvement: rounds of exchanges, each round priced at once, the best of a round is taken."""

    cluster: Cluster
    split: Split
    price: Price
    random: np.random.Generator

    def improve(self, starts: Ints, costs: Array) -> tuple[Ints, float, int]:
        """(map, cost, how many were priced), from the cheapest of `starts`, which come first; small ones also from others, and from any map."""
        ranks = starts.shape[1]
        at_once = max(8, min(_AT_ONCE, _ROUND_RANKS // ranks))
        small, looked_at = ranks <= _SMALL, 0
        most = _LOOKED_AT_SMALL if small else _LOOKED_AT if ranks <= _IMPROVED_UP_TO else 0
        best, least = starts[0], float(costs[0])
        for start, cost in self._starts(starts, costs, small=small):
            gpus, cost, priced_here = self._climb(start, cost, at_once, most - looked_at)
            looked_at += priced_here
            if cost < least * (1 - _EQUAL):
                best, least = gpus, cost
            if looked_at + at_once > most:
                break
        return best, least, looked_at

    def _starts(self, starts: Ints, costs: Array, *, small: bool) -> Iterator[tuple[Ints, float]]:
        yield starts[0], float(costs[0])
        if small and starts.shape[1] > 2:
            yield from zip(starts[1:_OTHER_STARTS], costs[1:_OTHER_STARTS].tolist(), strict=True)
            while True:
                yield self.random.permutation(starts.shape[1]), np.inf

    def _climb(self, gpus: Ints, cost: float, at_once: int, most: int) -> tuple[Ints, float, int]:
        """Sideways too, since the slowest of several groups hides what others gain; what is kept is the first map of the least cost."""
        idle, looked_at, kept = 0, 0, gpus
        while looked_at + at_once <= most and idle < max(_PATIENCE, 2 * _AT_ONCE // at_once) and len(gpus) > 2:
            neighbours = np.array([self._exchanged(gpus) for _ in range(at_once)])
            costs = priced(self.cluster, self.split, self.price, neighbours)
            looked_at += at_once
            best = int(np.argmin(costs))
            idle += 1
            if costs[best] < cost * (1 - _EQUAL):
                idle, kept, cost = 0, neighbours[best], float(costs[best])
            if costs[best] <= cost * (1 + _EQUAL):
                gpus = neighbours[best]
        return kept, cost, looked_at

    def _exchanged(self, gpus: Ints) -> Ints:
        """One rank with another, one tensor-parallel group with another, or one stage with another; once, or twice at once."""
        made = gpus.copy()
        for kind in self.random.integers(4, size=self.random.integers(1, 3)):
            sizes = (1, 1, self.split.tp, self.split.tp * self.split.data)
            size = sizes[kind] if sizes[kind] < len(gpus) else 1
            one, other = self.random.choice(len(gpus) // size, 2, replace=False)
            rows = made.reshape(-1, size)
            rows[[one, other]] = rows[[other, one]]
        return made
