"""Which nodes a Ray cluster should get for what waits in it: by price and links, each bundle on a device that has room for it. Pure.

Nodes that are alike are one `Kind`. A node of a kind is filled once, largest items first, and that filling is repeated as often as the
demand has its items, so the work grows with shapes times kinds and not with bundles: each repetition uses up one item at least. Of
all kinds the filling is taken that costs least of what its items would cost at the least anywhere; of equal ones the one with the
faster links where its bundles span devices, then the one that leaves less GPU memory to nobody. That is done once with all kinds, and once
for each kind with everything that fits there laid on it; the cheapest plan that leaves the least unmet counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter

from whaleflux_scheduler.core.ray_demand import UNIT, Demand, Item, Items, LabelRule, Shape
from whaleflux_scheduler.core.ray_room import Devices, Room
from whaleflux_scheduler.core.ray_unmet import Never, never

_LEAST_USD = 1e-9  # what is free still counts, so that more of it is better
_CPU_USD = 1e-6  # of a node's CPUs, against its GPUs: CPU work goes where no GPU is touched
_MOST_ROUNDS = 8  # in which groups that cannot be had are taken out


@dataclass(frozen=True, slots=True)
class Kind:
    """Nodes that are alike: `count` of them can be had, or are there already (`held`).

    Those that are there come first and cost nothing more; their price says which work they are too good for. `devices` is what each has left, `device_memory_mib` the memory of one of its devices. Of a node whose `parts` can be had only
    the devices that are used are paid for. `names` are the nodes, in the order in which they are taken.
    """

    name: str
    model: str = ""
    devices: tuple[Devices, ...] = ()
    device_memory_mib: int = 0
    cpu: int = 0  # ten-thousandths
    memory: int = 0  # ten-thousandths of a byte
    custom: tuple[tuple[str, int], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    count: int = 1
    usd_per_gpu_hour: float = 0.0
    link_bytes_per_s: float = 0.0
    parts: bool = True
    held: bool = False
    names: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        return sum(group.number for group in self.devices)

    @property
    def full(self) -> int:
        """Memory of an unused device, in ten-thousandths of a MiB."""
        return self.device_memory_mib * UNIT

    def room(self) -> Room:
        return Room(self.full, list(self.devices), self.cpu, self.memory, dict(self.custom))


def whole_devices(gpus: int, memory_mib: int) -> tuple[Devices, ...]:
    """Devices that nobody uses."""
    return (Devices(UNIT, memory_mib * UNIT, gpus),) if gpus else ()


@dataclass(frozen=True, slots=True)
class Filling:
    """One node of a kind, filled: how many of each item, by the item's place; devices used; US dollars per hour for the node."""

    kind: Kind
    items: tuple[tuple[int, int], ...]
    gpus: int
    usd_per_hour: float  # of a held one what it would cost
    memory_used_mib: float  # that bundles asked for
    value_usd: float  # what its items would cost at the least

    @property
    def by_price(self) -> tuple[bool, float, float, float]:
        """Smaller is better."""
        ratio = round(self.usd_per_hour / self.value_usd, 9)
        return not self.kind.held, ratio, -self.kind.link_bytes_per_s, 1 - self.memory_share

    @property
    def by_memory(self) -> tuple[bool, float, float, float]:
        """Smaller is better."""
        return not self.kind.held, round(1 - self.memory_share, 9), *self.by_price[1:3]

    @property
    def memory_share(self) -> float:
        """Of the GPU memory that is paid for, what bundles asked for."""
        return self.memory_used_mib / max(1.0, self.gpus_paid * self.kind.device_memory_mib)

    @property
    def gpus_paid(self) -> int:
        return self.gpus if self.kind.parts else self.kind.gpus


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
    """Bundles of a single or groups of a gang for which there is nothing; `never`: of no node type, however many there were."""

    of_gang: bool
    source: int
    count: int
    why: str
    never: bool


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


def plan(demand: Demand, kinds: Sequence[Kind], ever: Sequence[Kind] = ()) -> RayPlan:
    """The nodes to add for a demand. A gang that cannot be had whole gets nothing.

    `ever` are the nodes as they would be if nobody used them: what fits on none of those can never be had.
    """
    items = Items(demand)
    nothing: list[Unmet] = []
    for _ in range(_MOST_ROUNDS):
        found = _best(items.all(), kinds, ever or kinds)
        broken = _broken_gangs(found)
        nothing += [Unmet(True, at, n, why, is_never) for (at, why, is_never), n in broken.items()]
        if not broken:
            break
        for (at, _, _), n in broken.items():
            items.dropped[at] += n
    return replace(found.as_plan(kinds), unmet=(*found.unmet_singles(), *nothing))


@dataclass(slots=True)
class _Draft:
    """A plan in the making: what is left of each item, how many nodes of each kind, what was laid where."""

    items: list[Item]
    left: list[int]
    nodes: dict[str, int]
    laid: list[tuple[Filling, int]] = field(default_factory=list)
    reasons: dict[int, Never] = field(default_factory=dict)

    @property
    def rank(self) -> tuple[int, float, float]:
        """Smaller is better."""
        paid = [(filling, n) for filling, n in self.laid if not filling.kind.held]
        usd = sum(filling.usd_per_hour * n for filling, n in paid)
        stranded = sum((f.gpus_paid * f.kind.device_memory_mib - f.memory_used_mib) * n for f, n in paid)
        return sum(self.left), round(usd, 6), stranded

    def as_plan(self, kinds: Sequence[Kind]) -> RayPlan:
        names = {kind.name: iter(kind.names) for kind in kinds}
        parts = [self._addition(filling, n, names[filling.kind.name]) for filling, n in self.laid]
        return RayPlan(
            tuple(part for part in parts if not part.filling.kind.held),
            tuple(part for part in parts if part.filling.kind.held),
        )

    def _addition(self, filling: Filling, count: int, names: Iterable[str]) -> Addition:
        sources: Counter[tuple[bool, int]] = Counter()
        for at, n in filling.items:
            sources[self.items[at].of_gang, self.items[at].source] += n * count
        taken = tuple(name for name, _ in zip(names, range(count), strict=False))
        bundles = tuple((shape, n * many) for at, many in filling.items for shape, n in self.items[at].bundles)
        return Addition(filling, count, bundles, tuple((*source, n) for source, n in sources.items()), taken)

    def unmet_singles(self) -> list[Unmet]:
        """Of what belongs to no gang."""
        found = []
        for at, item in enumerate(self.items):
            if self.left[at] and not item.of_gang:
                why = self.reasons.get(at) or Never("", is_never=False)
                found.append(Unmet(False, item.source, self.left[at], why.words or NO_MORE, why.is_never))
        return found


NO_MORE = "no more nodes that it fits on are free"


def _broken_gangs(draft: _Draft) -> dict[tuple[int, str, bool], int]:
    """Groups of each gang that are not whole, with why."""
    groups: dict[int, tuple[int, Never]] = {}
    for at, item in enumerate(draft.items):
        if item.of_gang and draft.left[at]:
            lost = -(-draft.left[at] // item.per_gang)
            why = draft.reasons.get(at) or Never(NO_MORE, is_never=False)
            known = groups.get(item.source)
            if known is None or lost > known[0]:
                groups[item.source] = (lost, why)
    return {(at, why.words, why.is_never): n for at, (n, why) in groups.items()}


def _best(items: list[Item], kinds: Sequence[Kind], ever: Sequence[Kind]) -> _Draft:
    """The best of several drafts; one that costs what everything costs at the least needs no other beside it."""
    known = _Known(items, [kind for kind in kinds if kind.count > 0], ever)
    best: _Draft | None = None
    for drafting in islice(_draftings(known), max(_FEWEST_DRAFTS, _MOST_DRAFTED // max(1, len(items)))):
        draft = drafting.drafted()
        best = draft if best is None else min(best, draft, key=lambda one: one.rank)
        if best.rank[1] <= known.least_usd(best.left) * (1 + _NEAR):
            break
    assert best is not None
    return best


def _draftings(known: _Known) -> Iterator[_Drafting]:
    """Those that win most often first."""
    for by_memory in (False, True):
        for dearest_first in (True, False):
            yield _Drafting(known, dearest_first=dearest_first, by_memory=by_memory)
    classes = sorted({_class_of(kind) for kind in known.kinds if not kind.held})
    for one in classes if 1 < len(classes) <= _MOST_CLASSES else ():
        yield _Drafting(known, frozenset(n for n, k in enumerate(known.kinds) if not k.held and _class_of(k) == one))


def _class_of(kind: Kind) -> tuple[str, int, float]:
    return kind.model, kind.device_memory_mib, kind.usd_per_gpu_hour


class _Known:
    """What is worked out once for all drafts: where each item may lie, and what it costs at the least."""

    def __init__(self, items: list[Item], kinds: list[Kind], ever: Sequence[Kind]) -> None:
        self.items, self.kinds, self._ever = items, kinds, ever
        self.reasons: dict[int, Never] = {}
        self.usd = [_LEAST_USD] * len(items)
        self.least_memory, self.asked = [*map(_least_memory, items)], [*map(_asked, items)]
        self.tiers = [self._tiers_of(at) for at in range(len(items))]
        self.dearest = sorted(range(len(items)), key=self._least_price)  # the dearest last

    def _least_price(self, at: int) -> tuple[float, int]:
        """Of a GPU on which it fits; of equal ones the largest is the dearest."""
        kinds = frozenset[int]().union(*self.tiers[at])
        return min((self.kinds[n].usd_per_gpu_hour for n in kinds), default=0.0), -at

    def _tiers_of(self, at: int) -> list[frozenset[int]]:
        """Sets of kinds on which an item may lie: of its first wish that can be had, then of the others."""
        item, found = self.items[at], list[frozenset[int]]()
        for wish in item.shape.selectors or ((),):
            allowed = [n for n, kind in enumerate(self.kinds) if _fits(item, kind, wish)]
            if not item.needs_gpu and any(not self.kinds[n].gpus for n in allowed):
                found.append(frozenset(n for n in allowed if not self.kinds[n].gpus or self.kinds[n].held))
            if allowed:
                found.append(frozenset(allowed))
        if not found:
            fits = any(_fits(item, kind, wish) for wish in item.shape.selectors or ((),) for kind in self._ever)
            self.reasons[at] = Never(NO_MORE, is_never=False) if fits else never(item, self._ever)
        costs = [_least_usd(item, self.kinds[n]) for n in frozenset[int]().union(*found)]
        self.usd[at] = max(_LEAST_USD, min(costs, default=0.0))
        return found

    def least_usd(self, left: Sequence[int]) -> float:
        """What all but `left` cost at the least."""
        return sum(self.usd[at] * (item.count - left[at]) for at, item in enumerate(self.items))


_MOST_CLASSES = 6
_FEWEST_DRAFTS, _MOST_DRAFTED = 2, 240  # items of all drafts together: the answer is wanted at once
_NEAR = 0.002  # a draft that costs so little more than the least is not compared with others


_BY_PRICE, _BY_MEMORY = attrgetter("by_price"), attrgetter("by_memory")


class _Drafting:
    """`alone`: kinds on which everything is laid that fits there, as long as there are some.

    `dearest_first`: nodes are taken for that item first which has none but dear ones, so that others fill what they leave. `by_memory`: of
    all fillings the one that leaves least memory to nobody.
    """

    def __init__(
        self,
        known: _Known,
        alone: frozenset[int] = frozenset(),
        *,
        dearest_first: bool = False,
        by_memory: bool = False,
    ) -> None:
        self._by_memory = by_memory
        self._kinds, self._items, self._usd = known.kinds, known.items, known.usd
        self._least_memory, self._asked = known.least_memory, known.asked
        left, nodes = [item.count for item in self._items], {kind.name: kind.count for kind in self._kinds}
        self._draft = _Draft(self._items, left, nodes, reasons=known.reasons)
        held = frozenset(n for n, kind in enumerate(self._kinds) if kind.held)
        self._tiers = [list(_first(tiers, alone, held)) for tiers in known.tiers] if alone else known.tiers
        self._tier = [0] * len(self._items)
        self._dearest = known.dearest[:] if dearest_first else []
        self._of_kind: list[list[int]] = []
        self._fillings: dict[int, Filling | None] = {}

    def drafted(self) -> _Draft:
        """Everything laid that can be."""
        self._spread_out()
        while True:
            best = self._next()
            if best is not None:
                self._lay(*best)
            elif not self._widen():
                return self._draft

    def _spread_out(self) -> None:
        """Which items each kind may take now."""
        self._of_kind = [
            [at for at, tiers in enumerate(self._tiers) if tiers and n in tiers[self._tier[at]]]
            for n in range(len(self._kinds))
        ]
        self._fillings.clear()

    def _widen(self) -> bool:
        """The next wish of what is left; False when there is none."""
        more = [at for at, left in enumerate(self._draft.left) if left and self._tier[at] + 1 < len(self._tiers[at])]
        for at in more:
            self._tier[at] += 1
        if more:
            self._spread_out()
        return bool(more)

    def _next(self) -> tuple[int, Filling] | None:
        """The best filling of all kinds that have nodes."""
        fillings = [
            (n, filling)
            for n, kind in enumerate(self._kinds)
            if self._draft.nodes[kind.name] and (filling := self._filling(n)) is not None
        ]
        while self._dearest and not self._draft.left[self._dearest[-1]]:
            self._dearest.pop()
        if self._dearest:
            dearest = self._dearest[-1]
            for_it = [one for one in fillings if one[1].kind.held or any(at == dearest for at, _ in one[1].items)]
            fillings = for_it or fillings
        best = _BY_MEMORY if self._by_memory else _BY_PRICE
        return min(fillings, key=lambda one: best(one[1]), default=None)

    def _filling(self, n: int) -> Filling | None:
        """Kept as long as there is enough left of each of its items: what did not fit then does not fit now."""
        known = self._fillings.get(n)
        left = self._draft.left
        if n not in self._fillings or (known is not None and any(left[at] < many for at, many in known.items)):
            self._fillings[n] = known = self._fill(self._kinds[n], self._of_kind[n])
        return known

    def _fill(self, kind: Kind, items: list[int]) -> Filling | None:
        room, left, found = kind.room(), self._draft.left, list[tuple[int, int]]()
        freest = room.freest
        items[:] = [at for at in items if left[at]]
        for at in items:
            if self._least_memory[at] <= freest and (many := room.put(self._items[at], left[at])):
                found.append((at, many))
                freest = room.freest
        if not found:
            return None
        gpus = kind.gpus - room.unused
        paid = gpus if kind.parts else kind.gpus
        usd = paid * kind.usd_per_gpu_hour + _CPU_USD * (not gpus)
        used = sum(self._memory_mib(at, kind) * many for at, many in found)
        return Filling(kind, tuple(found), gpus, usd, used, sum(self._usd[at] * many for at, many in found))

    def _memory_mib(self, at: int, kind: Kind) -> float:
        """GPU memory that an item asks for; without a word of it, as much as its part of the devices has."""
        said, unsaid = self._asked[at]
        return said + unsaid * kind.device_memory_mib

    def _lay(self, n: int, filling: Filling) -> None:
        """As often as there are items and nodes for it."""
        kind, left = filling.kind, self._draft.left
        times = min(self._draft.nodes[kind.name], *(left[at] // many for at, many in filling.items))
        for at, many in filling.items:
            left[at] -= many * times
        self._draft.nodes[kind.name] -= times
        self._draft.laid.append((filling, times))


def _first(tiers: list[frozenset[int]], alone: frozenset[int], held: frozenset[int]) -> Iterator[frozenset[int]]:
    """Each set of kinds, with what of it is `alone` before it."""
    for tier in tiers:
        if tier & alone:
            yield tier & (alone | held)
        yield tier


def _fits(item: Item, kind: Kind, wish: Sequence[LabelRule]) -> bool:
    """Whether one of it can lie on a node of the kind."""
    return _allowed(item, kind, wish) and bool(
        kind.room().put(item if item.spread < 0 else replace(item, spread=-1), 1)
    )


def _allowed(item: Item, kind: Kind, wish: Sequence[LabelRule]) -> bool:
    """By accelerator type and labels; of several bundles that lie together the first wish of each counts."""
    types = {shape.accelerator for shape, _ in item.bundles} - {""}
    if not types <= {kind.model, kind.model.partition("-")[0]}:
        return False
    labels = dict(kind.labels)
    rules = [*wish, *(rule for shape, _ in item.bundles[1:] for rule in (shape.selectors or ((),))[0])]
    return all(rule.allows(labels) for rule in rules)


def _least_usd(item: Item, kind: Kind) -> float:
    """What the item costs of a node of the kind at the least, were the rest of it used as well."""
    return sum(_part(shape, kind) * n for shape, n in item.bundles) * kind.usd_per_gpu_hour


def _part(shape: Shape, kind: Kind) -> float:
    """Devices that it takes, parts of one counted as such."""
    if shape.devices or not shape.needs_gpu:
        return float(shape.devices)
    return max(shape.gpu / UNIT, shape.gpu_memory / kind.full)


def _asked(item: Item) -> tuple[float, float]:
    """MiB of GPU memory, and devices for which it does not say how much."""
    said = sum(shape.gpu_memory * n for shape, n in item.bundles) / UNIT
    return said, sum(shape.gpu * n for shape, n in item.bundles if not shape.gpu_memory) / UNIT


def _least_memory(item: Item) -> int:
    """What one device has to have left at the least; -1 of work without GPUs."""
    return max(shape.memory_per_device if shape.needs_gpu else -1 for shape, _ in item.bundles)
