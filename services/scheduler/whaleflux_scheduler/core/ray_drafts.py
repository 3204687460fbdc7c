"""Drafts of a plan for a Ray cluster: items laid on nodes by one rule or another, and the best of them. Pure.

What the cluster holds is used first, once for all drafts, the smallest devices before larger ones and fuller nodes before emptier ones, so that
these can leave. Then fillings of the fleet's kinds are taken one after another. When the time is over a draft ends as it is: what is
left then was not looked at, which is something else than not to be had.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter

from whaleflux_scheduler.core.ray_demand import UNIT, Item, LabelRule, Shape
from whaleflux_scheduler.core.ray_kinds import Filling, Kind
from whaleflux_scheduler.core.ray_unmet import NO_MORE, POSTPONED, Never, never

_LEAST_USD = 1e-9  # what is free still counts, so that more of it is better
_CPU_USD = 1e-6  # of a node's CPUs, against its GPUs: CPU work goes where no GPU is touched
_MOST_CLASSES = 6
_FEWEST_DRAFTS, _MOST_DRAFTED = 2, 240  # items of all drafts together: the answer is wanted at once
_NEAR = 0.002  # a draft that costs so little more than the least is not compared with others
_BY_PRICE, _BY_MEMORY = attrgetter("by_price"), attrgetter("by_memory")

Bundles = tuple[tuple[Shape, int], ...]  # that lie together


@dataclass(slots=True)
class Draft:
    """A plan in the making: what is left of each item, how many nodes of each kind, what was laid where; `cut` off by the time."""

    items: list[Item]
    left: list[int]
    nodes: dict[str, int]
    laid: list[tuple[Filling, int]] = field(default_factory=list)
    reasons: dict[int, Never] = field(default_factory=dict)
    cut: bool = False

    @property
    def rank(self) -> tuple[int, float, float]:
        """Smaller is better."""
        paid = [(filling, n) for filling, n in self.laid if not filling.kind.held]
        usd = sum(filling.usd_per_hour * n for filling, n in paid)
        stranded = sum((f.gpus_paid * f.kind.device_memory_mib - f.memory_used_mib) * n for f, n in paid)
        return sum(self.left), round(usd, 6), stranded

    def why(self, at: int) -> Never:
        """Why there is nothing for what is left of an item."""
        return self.reasons.get(at) or (POSTPONED if self.cut else NO_MORE)

    def lay(self, filling: Filling) -> None:
        """As often as there are items and nodes for it."""
        name = filling.kind.name
        times = min(self.nodes[name], *(self.left[at] // many for at, many in filling.items))
        for at, many in filling.items:
            self.left[at] -= many * times
        self.nodes[name] -= times
        self.laid.append((filling, times))

    def without(self, gone: Collection[int]) -> None:
        """Takes these items off again, and the nodes that nothing else lies on."""
        kept = [(rest, n) for filling, n in self.laid if (rest := self._rest(filling, gone)) is not None]
        self.laid[:] = kept
        for at in gone:
            self.left[at] = self.items[at].count

    def _rest(self, filling: Filling, gone: Collection[int]) -> Filling | None:
        rest = tuple((at, many) for at, many in filling.items if at not in gone)
        if len(rest) == len(filling.items) or not rest:
            return filling if rest else None
        kind, room = filling.kind, filling.kind.room()
        fits = all(room.put(self.items[at], many) == many for at, many in rest)
        gpus = kind.gpus - room.unused if fits else filling.gpus
        used = sum(_memory_mib(_asked(self.items[at]), kind) * many for at, many in rest)
        return replace(filling, items=rest, gpus=gpus, usd_per_hour=_usd(kind, gpus), memory_used_mib=used)


class Known:
    """What is worked out once for all drafts: where each item may lie, what it costs at the least, and what lies on nodes that are there.

    `is_over` says whether no more time is left. `tiers` are known already of items that were looked at before, by their bundles.
    """

    def __init__(
        self,
        items: list[Item],
        kinds: Sequence[Kind],
        ever: Sequence[Kind],
        is_over: Callable[[], bool],
        tiers: dict[Bundles, tuple[frozenset[int], ...]],
    ) -> None:
        self.items, self.kinds, self._ever, self.is_over = items, kinds, ever, is_over
        self.reasons: dict[int, Never] = {}
        self.usd = [_LEAST_USD] * len(items)
        self.least_memory, self.devices = [*map(_least_memory, items)], [*map(_devices, items)]
        self._asked = [*map(_asked, items)]
        self._labels = [dict(kind.labels) for kind in kinds]
        self.tiers = [self._known_tiers(at, tiers) for at in range(len(items))]
        self.dearest = sorted(range(len(items)), key=self._least_price)  # the dearest last
        there = (n for n, kind in enumerate(kinds) if kind.held)
        self.held = sorted(there, key=lambda n: (kinds[n].gpus > 0, kinds[n].full, kinds[n].gpus, kinds[n].name))
        self.base = Draft(items, [item.count for item in items], {kind.name: kind.count for kind in kinds})
        self.base.reasons = self.reasons
        self.use_held(self.base, self.tiers, [0] * len(items))

    def _least_price(self, at: int) -> tuple[float, int]:
        """Of a GPU on which it fits; of equal ones the largest is the dearest."""
        kinds = [self.kinds[n] for n in frozenset[int]().union(*self.tiers[at])]
        return min((kind.usd_per_gpu_hour for kind in kinds if not kind.held), default=0.0), -at

    def _known_tiers(self, at: int, known: dict[Bundles, tuple[frozenset[int], ...]]) -> tuple[frozenset[int], ...]:
        key = self.items[at].bundles
        if key not in known and self.is_over():
            self.reasons[at] = POSTPONED
            return ()
        if key not in known:
            known[key] = tuple(self._tiers_of(at))
        found = known[key]
        if not found:
            item = self.items[at]
            fits = any(_fits(item, kind, wish) for wish in item.shape.selectors or ((),) for kind in self._ever)
            self.reasons[at] = NO_MORE if fits else never(item, self._ever)
        fleet = [self.kinds[n] for n in frozenset[int]().union(*found) if not self.kinds[n].held]
        costs = [_least_usd(self.items[at], kind) for kind in fleet]
        self.usd[at] = max(_LEAST_USD, min(costs, default=0.0))
        return found

    def _tiers_of(self, at: int) -> Iterator[frozenset[int]]:
        """Sets of kinds on which an item may lie: of its first wish that can be had, then of the others."""
        item = self.items[at]
        fits = [n for n, kind in enumerate(self.kinds) if _has_type(item, kind) and _has_room(item, kind)]
        for wish in item.shape.selectors or ((),):
            rules = _rules(item, wish)
            allowed = [n for n in fits if all(rule.allows(self._labels[n]) for rule in rules)] if rules else fits
            if not item.needs_gpu and any(not self.kinds[n].gpus for n in allowed):
                yield frozenset(n for n in allowed if not self.kinds[n].gpus or self.kinds[n].held)
            if allowed:
                yield frozenset(allowed)

    def least_usd(self, left: Sequence[int]) -> float:
        """What all but `left` and what nodes that are there hold costs at the least."""
        return sum(usd * (before - now) for usd, before, now in zip(self.usd, self.base.left, left, strict=True))

    def use_held(self, draft: Draft, tiers: Sequence[Sequence[frozenset[int]]], tier: Sequence[int]) -> None:
        """Lays what fits on nodes that are there."""
        for n in self.held:
            may = [at for at, left in enumerate(draft.left) if left and tiers[at] and n in tiers[at][tier[at]]]
            while may and draft.nodes[self.kinds[n].name]:
                draft.cut = draft.cut or self.is_over()
                filling = None if draft.cut else self.fill(n, may, draft.left)
                if filling is None:
                    break
                draft.lay(filling)
            if draft.cut:
                return

    def fill(self, n: int, items: list[int], left: Sequence[int]) -> Filling | None:
        """A node of the n-th kind with what fits of these items, which are freed of those that are used up."""
        kind, found = self.kinds[n], list[tuple[int, int]]()
        room = kind.room()
        freest, unused = room.freest, room.unused
        items[:] = [at for at in items if left[at]]
        for at in items:
            may = self.least_memory[at] <= freest and self.devices[at] <= unused
            if may and (many := room.put(self.items[at], left[at])):
                found.append((at, many))
                freest, unused = room.freest, room.unused
        if not found:
            return None
        gpus, value = kind.gpus - room.unused, sum(self.usd[at] * many for at, many in found)
        used = sum(_memory_mib(self._asked[at], kind) * many for at, many in found)
        return Filling(kind, tuple(found), gpus, _usd(kind, gpus), used, value)


def best(known: Known) -> Draft:
    """The best of several drafts; one that costs what everything costs at the least needs no other beside it."""
    found: Draft | None = None
    for drafting in islice(_draftings(known), max(_FEWEST_DRAFTS, _MOST_DRAFTED // max(1, len(known.items)))):
        draft = drafting.drafted()
        found = draft if found is None else min(found, draft, key=lambda one: one.rank)
        if known.is_over() or found.rank[1] <= known.least_usd(found.left) * (1 + _NEAR):
            break
    assert found is not None
    return found


def _draftings(known: Known) -> Iterator[_Drafting]:
    """Those that win most often first."""
    for by_memory in (False, True):
        for dearest_first in (True, False):
            yield _Drafting(known, dearest_first=dearest_first, by_memory=by_memory)
    classes = sorted({_class_of(kind) for kind in known.kinds if not kind.held})
    for one in classes if 1 < len(classes) <= _MOST_CLASSES else ():
        yield _Drafting(known, frozenset(n for n, k in enumerate(known.kinds) if not k.held and _class_of(k) == one))


def _class_of(kind: Kind) -> tuple[str, int, float]:
    return kind.model, kind.device_memory_mib, kind.usd_per_gpu_hour


class _Drafting:
    """`alone`: kinds on which everything is laid that fits there, as long as there are some.

    `dearest_first`: nodes are taken for that item first which has none but dear ones, so that others fill what they leave. `by_memory`: of
    all fillings the one that leaves least memory to nobody.
    """

    def __init__(
        self,
        known: Known,
        alone: frozenset[int] = frozenset(),
        *,
        dearest_first: bool = False,
        by_memory: bool = False,
    ) -> None:
        self._known, self._items, base = known, known.items, known.base
        self._best = _BY_MEMORY if by_memory else _BY_PRICE
        self._draft = replace(base, left=base.left[:], nodes=dict(base.nodes), laid=base.laid[:])
        held = frozenset(known.held)
        self._tiers = [list(_first(tiers, alone, held)) for tiers in known.tiers] if alone else known.tiers
        self._tier = [0] * len(self._items)
        self._dearest = known.dearest[:] if dearest_first else []
        self._kinds = [n for n, kind in enumerate(known.kinds) if not kind.held]
        self._of_kind: dict[int, list[int]] = {}
        self._fillings: dict[int, Filling | None] = {}

    def drafted(self) -> Draft:
        """Everything laid that can be, as far as there is time."""
        self._spread_out()
        while not self._draft.cut:
            filling = self._next()
            if filling is not None:
                self._draft.lay(filling)
            elif not self._widen():
                break
            self._draft.cut = self._known.is_over()
        return self._draft

    def _spread_out(self) -> None:
        """Which items each kind may take now."""
        self._of_kind = {
            n: [at for at, tiers in enumerate(self._tiers) if tiers and n in tiers[self._tier[at]]] for n in self._kinds
        }
        self._fillings.clear()

    def _widen(self) -> bool:
        """The next wish of what is left; False when there is none."""
        more = [at for at, left in enumerate(self._draft.left) if left and self._tier[at] + 1 < len(self._tiers[at])]
        for at in more:
            self._tier[at] += 1
        if more:
            self._known.use_held(self._draft, self._tiers, self._tier)
            self._spread_out()
        return bool(more)

    def _next(self) -> Filling | None:
        """The best filling of all kinds that have nodes."""
        nodes, kinds = self._draft.nodes, self._known.kinds
        fillings = [filling for n in self._kinds if nodes[kinds[n].name] and (filling := self._filling(n)) is not None]
        while self._dearest and not self._draft.left[self._dearest[-1]]:
            self._dearest.pop()
        if self._dearest:
            dearest = self._dearest[-1]
            fillings = [one for one in fillings if any(at == dearest for at, _ in one.items)] or fillings
        return min(fillings, key=self._best, default=None)

    def _filling(self, n: int) -> Filling | None:
        """Kept as long as there is enough left of each of its items: what did not fit then does not fit now."""
        known = self._fillings.get(n)
        left = self._draft.left
        if n not in self._fillings or (known is not None and any(left[at] < many for at, many in known.items)):
            self._fillings[n] = known = self._known.fill(n, self._of_kind[n], left)
        return known


def _first(tiers: Iterable[frozenset[int]], alone: frozenset[int], held: frozenset[int]) -> Iterator[frozenset[int]]:
    """Each set of kinds, with what of it is `alone` before it."""
    for tier in tiers:
        if tier & alone:
            yield tier & (alone | held)
        yield tier


# one item and one kind


def _fits(item: Item, kind: Kind, wish: Sequence[LabelRule]) -> bool:
    """Whether one of it can lie on a node of the kind."""
    labels = dict(kind.labels)
    return _has_type(item, kind) and all(rule.allows(labels) for rule in _rules(item, wish)) and _has_room(item, kind)


def _has_type(item: Item, kind: Kind) -> bool:
    types = {shape.accelerator for shape, _ in item.bundles if shape.accelerator}
    return not types or types <= {kind.model, kind.model.partition("-")[0]}


def _rules(item: Item, wish: Sequence[LabelRule]) -> list[LabelRule]:
    """Of several bundles that lie together the first wish of each counts."""
    return [*wish, *(rule for shape, _ in item.bundles[1:] for rule in (shape.selectors or ((),))[0])]


def _has_room(item: Item, kind: Kind) -> bool:
    if _least_memory(item) > max((group.memory for group in kind.devices), default=-1) or _devices(item) > kind.unused:
        return False
    return bool(kind.room().put(item if item.spread < 0 else replace(item, spread=-1), 1))


def _usd(kind: Kind, gpus: int) -> float:
    """Of a node of which so many GPUs are used, per hour."""
    return (gpus if kind.parts else kind.gpus) * kind.usd_per_gpu_hour + _CPU_USD * (not gpus)


def _least_usd(item: Item, kind: Kind) -> float:
    """What the item costs of a node of the kind at the least, were the rest of it used as well."""
    return sum(_part(shape, kind) * n for shape, n in item.bundles) * kind.usd_per_gpu_hour


def _part(shape: Shape, kind: Kind) -> float:
    """Devices that it takes, parts of one counted as such."""
    if shape.devices or not shape.needs_gpu:
        return float(shape.devices)
    return max(shape.gpu / UNIT, shape.gpu_memory / kind.full)


def _memory_mib(asked: tuple[float, float], kind: Kind) -> float:
    """GPU memory that an item asks for; without a word of it, as much as its part of the devices has."""
    said, unsaid = asked
    return said + unsaid * kind.device_memory_mib


def _asked(item: Item) -> tuple[float, float]:
    """MiB of GPU memory, and devices for which it does not say how much."""
    said = sum(shape.gpu_memory * n for shape, n in item.bundles) / UNIT
    return said, sum(shape.gpu * n for shape, n in item.bundles if not shape.gpu_memory) / UNIT


def _least_memory(item: Item) -> int:
    """What one device has to have left at the least; -1 of work without GPUs."""
    return max(shape.memory_per_device if shape.needs_gpu else -1 for shape, _ in item.bundles)


def _devices(item: Item) -> int:
    """Whole devices that one of it takes."""
    return sum(shape.devices * n for shape, n in item.bundles)
