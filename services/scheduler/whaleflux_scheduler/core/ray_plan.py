"""Which nodes a Ray cluster should get for what waits in it: by price and links, each bundle on a device that has room for it. Pure.

Nodes that are alike are one `Kind`. A node of a kind is filled once, largest items first, and that filling is repeated as often as the
demand has its items, so the work grows with shapes times kinds and not with bundles: each repetition uses up one item at least. Of
all kinds the filling is taken that costs least of what its items would cost at the least anywhere; of equal ones the one with the
faster links where its bundles span devices, then the one that leaves less GPU memory to nobody. That is done once with all kinds, and once
for each kind with everything that fits there laid on it; the cheapest plan that leaves the least unmet counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice

from whaleflux_scheduler.core.ray_demand import Demand, Item, Items, Shape
from whaleflux_scheduler.core.ray_drafts import Bundles, Draft, Known, best
from whaleflux_scheduler.core.ray_kinds import Filling, Kind
from whaleflux_scheduler.core.ray_unmet import POSTPONED, Never

_MOST_ROUNDS = 8  # in which groups that cannot be had are taken out


@dataclass(frozen=True, slots=True)
class Addition:
    """`count` nodes of one filling, with the bundles of each.

    `sources` says how many bundles, or groups that are packed, of each single (False) or gang (True) lie on all of them together.
    """

    filling: Filling
    count: int
    bundles: tuple[tuple[Shape, int], ...]
    sources: tuple[tuple[bool, int, int], ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unmet:
    """Bundles of a single or groups of a gang for which there is nothing; `never`: of no node type, however many there were.

    `postponed`: the time was over before they had their turn.
    """

    of_gang: bool
    source: int
    count: int
    why: str
    never: bool
    postponed: bool = False


@dataclass(frozen=True, slots=True)
class RayPlan:
    """What to add, what nodes that are there or under way hold already, and what cannot be had."""

    additions: tuple[Addition, ...] = ()
    held: tuple[Addition, ...] = ()
    unmet: tuple[Unmet, ...] = ()

    @property
    def usd_per_hour(self) -> float:
        return sum(addition.filling.usd_per_hour * addition.count for addition in self.additions)

    @property
    def gpus(self) -> int:
        return sum(addition.filling.gpus_paid * addition.count for addition in self.additions)

    @property
    def stranded_mib(self) -> float:
        """GPU memory of what is added that no bundle asked for."""
        return sum(
            (part.filling.gpus_paid * part.filling.kind.device_memory_mib - part.filling.memory_used_mib) * part.count
            for part in self.additions
        )

    @property
    def missing(self) -> int:
        return sum(unmet.count for unmet in self.unmet)


def plan(
    demand: Demand,
    kinds: Sequence[Kind],
    ever: Sequence[Kind] = (),
    is_over: Callable[[], bool] = lambda: False,
    first: Set[Shape] = frozenset(),
) -> RayPlan:
    """The nodes to add for a demand. A gang that cannot be had whole gets nothing.

    `ever` are the nodes as they would be if nobody used them: what fits on none of those can never be had. Once `is_over` says so nothing more
    is looked at, and what is left is postponed; the shapes of `first` have their turn before all others.
    """
    items, tiers, nothing = Items(demand, first), dict[Bundles, tuple[frozenset[int], ...]](), list[Unmet]()
    there = [kind for kind in kinds if kind.count > 0]
    for rounds_left in reversed(range(_MOST_ROUNDS)):
        draft = best(Known(items.all(), there, ever or kinds, is_over, tiers))
        broken = _broken_gangs(draft)
        if broken and (draft.cut or not rounds_left):
            nothing += _taken_off(draft, broken)
            break
        nothing += [_unmet(True, at, n, why) for at, (n, why) in broken.items()]
        if not broken:
            break
        items.dropped.update({at: n for at, (n, _) in broken.items()})
    return replace(_as_plan(draft, kinds), unmet=(*_unmet_singles(draft), *nothing))


def _broken_gangs(draft: Draft) -> dict[int, tuple[int, Never]]:
    """Groups of each gang, by its place, that are not whole, with why."""
    groups: dict[int, tuple[int, Never]] = {}
    for at, item in enumerate(draft.items):
        if item.of_gang and draft.left[at]:
            lost = -(-draft.left[at] // item.per_gang)
            if item.source not in groups or lost > groups[item.source][0]:
                groups[item.source] = (lost, draft.why(at))
    return groups


def _taken_off(draft: Draft, broken: Mapping[int, tuple[int, Never]]) -> Iterator[Unmet]:
    """There is no time to lay others in their place: gangs that are not whole are taken off with all their groups."""
    of_them = {at: item for at, item in enumerate(draft.items) if item.of_gang and item.source in broken}
    draft.without(of_them)
    for item in {item.source: item for item in of_them.values()}.values():
        lost, why = broken[item.source]
        groups = item.count // item.per_gang
        yield _unmet(True, item.source, lost, why)
        if groups > lost:
            yield _unmet(True, item.source, groups - lost, POSTPONED)


def _unmet(of_gang: bool, at: int, count: int, why: Never) -> Unmet:
    return Unmet(of_gang, at, count, why.words, why.is_never, why.postponed)


def _unmet_singles(draft: Draft) -> Iterator[Unmet]:
    """Of what belongs to no gang."""
    for at, item in enumerate(draft.items):
        if draft.left[at] and not item.of_gang:
            yield _unmet(False, item.source, draft.left[at], draft.why(at))


def _as_plan(draft: Draft, kinds: Sequence[Kind]) -> RayPlan:
    names = {kind.name: iter(kind.names) for kind in kinds}
    parts = [_addition(draft.items, filling, n, names[filling.kind.name]) for filling, n in draft.laid]
    return RayPlan(
        tuple(part for part in parts if not part.filling.kind.held),
        tuple(part for part in parts if part.filling.kind.held),
    )


def _addition(items: Sequence[Item], filling: Filling, count: int, names: Iterator[str]) -> Addition:
    sources: Counter[tuple[bool, int]] = Counter()
    for at, n in filling.items:
        sources[items[at].of_gang, items[at].source] += n * count
    bundles = tuple((shape, n * many) for at, many in filling.items for shape, n in items[at].bundles)
    return Addition(filling, count, bundles, tuple((*of, n) for of, n in sources.items()), tuple(islice(names, count)))
