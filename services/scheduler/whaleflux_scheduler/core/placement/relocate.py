"""Which placed work to put elsewhere so that a request fits: in the domain that is cheapest to empty, into holes that are free already.

Unlike `preempt`, everybody keeps GPUs: a plan names the place of the request and the new place of each that has to go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from whaleflux.fleet.model import Level
from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest
from whaleflux_scheduler.core.placement.columns import DOMAIN_LEVELS, Floats, Ints
from whaleflux_scheduler.core.placement.supply import Demand, Match, allowed_rows

if TYPE_CHECKING:
    from whaleflux_scheduler.core.placement.engine import Engine

_LEFT = "!left"  # what is free of a mover's old place when the request has taken its part: nobody's before the mover has left
_WORSE = 1.1  # times the communication, or the price, that a mover has now: it gets no place that is worse


@dataclass(frozen=True, slots=True)
class Movable:
    """Placed work that may go elsewhere: `request` finds its new place, and bears its id."""

    request: PlaceRequest
    step_communication_s: float = 0.0  # at its present place
    usd_per_hour: float = 0.0

    @property
    def id(self) -> str:
        return self.request.id


class Movables:
    """Placed work that may go elsewhere, in columns: on which row, how many GPUs it has there, its id, and what its move costs it in all.

    `held` and `cost` are by row of the fleet: GPUs that may leave it, and what it costs to empty it of them.
    """

    def __init__(self, where: Ints, gpus: Floats, ids: Sequence[str], lost_gpu_s: Floats, count: int) -> None:
        self.held: Ints = np.bincount(where, weights=gpus, minlength=count).astype(np.int64)
        self.cost: Floats = np.bincount(where, weights=lost_gpu_s, minlength=count).astype(np.float64)
        self._order: Ints = np.argsort(where, kind="stable")
        self._where, self._rows, self._gpus = where[self._order], where, gpus
        self._ids, self._lost = ids, lost_gpu_s
        self._staying: set[str] = set()

    def on(self, rows: Sequence[int]) -> dict[str, float]:
        """Who is on these rows, with what its move costs."""
        first = np.searchsorted(self._where, rows, side="left")
        last = np.searchsorted(self._where, rows, side="right")
        spans = zip(first.tolist(), last.tolist(), strict=True)
        found = (int(self._order[at]) for lo, hi in spans for at in range(lo, hi))
        return {self._ids[at]: float(self._lost[at]) for at in found if self._ids[at] not in self._staying}

    def stay(self, ids: Iterable[str]) -> None:
        """They may not go elsewhere after all."""
        staying = set(ids)
        self._staying |= staying
        for at in (at for at, id_ in enumerate(self._ids) if id_ in staying):
            self.held[self._rows[at]] -= int(self._gpus[at])
            self.cost[self._rows[at]] -= self._lost[at]


@dataclass(frozen=True, slots=True)
class Relocation:
    """The place of the request, and where those go who are there now."""

    placement: Placement
    moved: tuple[Placement, ...]


class Relocator:
    """Looks for room by moves, within the transaction of its caller. At most `most_moves` move at once, at most `most_tries` sets are tried.

    `movable` says of an id that it may have to move how its new place is found.
    """

    def __init__(
        self,
        engine: Engine,
        movables: Movables,
        movable: Callable[[str], Movable],
        *,
        most_moves: int = 16,
        most_tries: int = 8,
    ) -> None:
        self._engine, self._most_moves, self._most_tries = engine, most_moves, most_tries
        self._movables, self._movable = movables, movable

    def find(self, request: PlaceRequest) -> Relocation | None:
        """The cheapest set of moves after which the request fits; applied in the caller's transaction. None: no set that was tried will do."""
        tried = set[tuple[str, ...]]()
        for _ in range(self._most_tries):
            ids = next((ids for ids in self._sets(request) if ids not in tried), None)
            if ids is None:
                return None
            tried.add(ids)
            with self._engine.transaction() as trial:
                found = self._try(request, ids)
                if found is not None:
                    trial.commit()
                    return found
        return None

    def _try(self, request: PlaceRequest, ids: Sequence[str]) -> Relocation | None:
        engine = self._engine
        before = {id_: engine.placements[id_] for id_ in ids}
        for id_ in ids:
            engine.release(id_)
        placement = engine.fits(request)
        if placement is None:
            return None
        engine.apply(placement)
        moving = [id_ for id_ in ids if not self._stays(before[id_], placement)]
        if not moving or len(moving) > self._most_moves:
            return None
        moved = self._all_elsewhere({id_: before[id_].gpus for id_ in moving})
        return Relocation(placement, tuple(moved)) if moved else None

    def _all_elsewhere(self, gpus: Mapping[str, int]) -> list[Placement]:
        """New places for all of them, the largest first; none when one has none, and then it is taken to stay where it is."""
        found: list[Placement] = []
        for id_ in sorted(gpus, key=lambda id_: (-gpus[id_], id_)):
            place = self._elsewhere(self._movable(id_))
            if place is None:
                as_large = (other for other in gpus if gpus[other] >= gpus[id_])
                self._movables.stay(as_large if not found else (id_,))
                return []
            found.append(place)
        return found

    def _stays(self, before: Placement, placement: Placement) -> bool:
        """Puts it back where the request needs none of its GPUs; else keeps what is left of its place from others."""
        taken = {(part.node, gpu) for part in placement.nodes for gpu in part.gpus}
        if any((part.node, gpu) in taken for part in before.nodes for gpu in part.gpus):
            set_aside(self._engine, before, placement)
            return False
        self._engine.apply(before)
        return True

    def _elsewhere(self, one: Movable) -> Placement | None:
        place = self._engine.fits(one.request)
        if place is None or not no_worse(place, one):
            return None
        self._engine.apply(place)
        return place

    def _sets(self, request: PlaceRequest) -> Iterator[tuple[str, ...]]:
        """Who would have to leave, the cheapest first."""
        cheapest = sorted(self._row_sets(request), key=lambda one: (one[0], one[1]))
        found: dict[tuple[str, ...], float] = {}
        for _, rows in cheapest[: 4 * self._most_tries]:
            leaving = self._movables.on(rows)
            if 0 < len(leaving) <= 2 * self._most_moves:  # some of them may stay
                found[tuple(leaving)] = sum(leaving.values())
        yield from sorted(found, key=lambda ids: (found[ids], ids))[: self._most_tries]

    def _row_sets(self, request: PlaceRequest) -> Iterator[tuple[float, list[int]]]:
        """For each domain that could hold the request, the rows that are cheapest to empty for it, and what that costs."""
        if request.without_gpus or request.group.share:
            return
        columns, level = self._engine.columns, _level(request)
        for option in request.requirement.any_of:
            demand = Demand.of(request.group, request, option)
            now, then = self._yields(request, demand)
            if level >= Level.NODE:
                yield from self._single(np.flatnonzero((now < demand.gpus) & (then >= demand.gpus)))
                continue
            for deeper in (one for one in DOMAIN_LEVELS if one >= level):
                totals = np.add.reduceat(then, columns.lo[deeper])
                for d in np.flatnonzero(totals >= demand.gpus).tolist():
                    span = slice(int(columns.lo[deeper][d]), int(columns.hi[deeper][d]))
                    yield self._cheapest(span, now[span], then[span], demand.gpus)

    def _yields(self, request: PlaceRequest, demand: Demand) -> tuple[Ints, Ints]:
        """By row, how many GPUs the request could take now, and when all that may leave had left."""
        columns = self._engine.columns
        fit = Match.of(columns, demand, None).present[columns.shapes] & columns.open
        if (allowed := allowed_rows(columns, request)) is not None:
            fit = fit & allowed
        chunk = _chunk(request, demand)
        free = np.where(fit, columns.offer, 0).astype(np.int64)
        emptied = np.where(fit, free + self._movables.held, 0)
        if demand.most_per_node:
            free, emptied = np.minimum(free, demand.most_per_node), np.minimum(emptied, demand.most_per_node)
        return free - free % chunk, emptied - emptied % chunk

    def _single(self, rows: Ints) -> Iterator[tuple[float, list[int]]]:
        cost = self._movables.cost[rows]
        cheap = np.argsort(cost, kind="stable")[: 4 * self._most_tries].tolist()
        yield from ((float(cost[at]), [int(rows[at])]) for at in cheap)

    def _cheapest(self, span: slice, now: Ints, then: Ints, gpus: int) -> tuple[float, list[int]]:
        """Rows of the span to empty, the least loss for each GPU first, until there are enough."""
        extra, cost = then - now, self._movables.cost[span]
        gains = np.flatnonzero(extra > 0)
        order = gains[np.argsort(cost[gains] / extra[gains], kind="stable")]
        enough = int(np.searchsorted(np.cumsum(extra[order]), gpus - int(now.sum()))) + 1
        chosen = order[:enough]
        return float(cost[chosen].sum()), (chosen + span.start).tolist()


def set_aside(engine: Engine, before: Placement, placement: Placement) -> None:
    """Keeps from others what is free of a mover's old place beside the new placement: it is not free before the mover has left."""
    taken = {(part.node, gpu) for part in placement.nodes for gpu in part.gpus}
    kept = ((part, tuple(gpu for gpu in part.gpus if (part.node, gpu) not in taken)) for part in before.nodes)
    if left := tuple(replace(part, gpus=gpus) for part, gpus in kept if gpus):
        engine.apply(replace(before, id=before.id + _LEFT, nodes=left))


def no_worse(place: Placement, one: Movable) -> bool:
    """Whether the place is about as close and as cheap as the one that it has."""
    cost = place.cost
    closer = not one.step_communication_s or cost.step_communication_s <= _WORSE * one.step_communication_s
    return closer and (not one.usd_per_hour or cost.usd_per_hour <= _WORSE * one.usd_per_hour)


def _level(request: PlaceRequest) -> Level:
    level = max(request.level or Level.FLEET, request.group.level or Level.FLEET)
    return Level.NODE if request.max_nodes == 1 else Level(level)


def _chunk(request: PlaceRequest, demand: Demand) -> int:
    """Of a node the request takes multiples of it."""
    least = -(-demand.gpus // request.max_nodes) if request.max_nodes else 1
    return max(demand.unit, -(-least // demand.unit) * demand.unit)
