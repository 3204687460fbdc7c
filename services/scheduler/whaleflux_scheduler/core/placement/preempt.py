"""Which placed work to stop so that a request fits: least priority first, then least work lost, then as few as possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from whaleflux_scheduler.core.placement.api import Limit, Placement, PlaceRequest, PreemptionPlan, Victim

if TYPE_CHECKING:
    from whaleflux_scheduler.core.placement.engine import Engine


def plan(
    engine: Engine, request: PlaceRequest, victims: Sequence[Victim], limit: Limit | None = None
) -> PreemptionPlan | None:
    """The plan, or None when even stopping every victim that is reclaimed or of lower priority makes no room, or not enough under the limit.

    Victims are stopped in order until the request fits. Those outside the place found are spared at once, the others one by one, most
    valuable first, whenever the request still fits without their room. One transaction, always rolled back, moves one victim at a
    time: nothing is recounted.
    """
    with engine.transaction():
        return _Plan(engine, request, victims, limit).find()


class _Plan:
    def __init__(self, engine: Engine, request: PlaceRequest, victims: Sequence[Victim], limit: Limit | None) -> None:
        self.engine, self.request, self.limit = engine, request, limit
        lower = (v for v in victims if v.reclaimed or v.priority < request.priority)
        known = [v for v in lower if v.id in engine.placements]
        self.order = sorted(known, key=lambda v: (v.priority, not v.reclaimed, v.lost_gpu_s, v.id))
        self.placed: dict[str, Placement] = {v.id: engine.placements[v.id] for v in self.order}

    def stop(self, victims: Sequence[Victim]) -> None:
        for victim in victims:
            self.engine.release(victim.id)
            if self.limit is not None:
                self.limit.leaves(victim.id)

    def spare(self, victims: Sequence[Victim]) -> None:
        for victim in victims:
            self.engine.apply(self.placed[victim.id])
            if self.limit is not None:
                self.limit.stays(victim.id)

    def within(self) -> bool:
        """Whether the limit lets it take what it asks for, without those that are stopped."""
        return self.limit is None or self.limit.enough()

    def find(self) -> PreemptionPlan | None:
        if self.limit is not None and not self._any():
            return None
        stopped = self._shortest_run()
        placement = None if stopped is None else self.engine.fits(self.request)
        if stopped is None or placement is None:
            return None
        outside = self._outside(stopped, placement)  # the placement holds without their room
        needed = self._spare_but_for_the_limit(outside)
        stopped = [v for v in stopped if v not in outside]
        for victim in reversed(list(stopped)):
            self.spare([victim])
            found = self.engine.fits(self.request) if self.within() else None
            if found is not None:
                placement = found
                stopped.remove(victim)
            else:
                self.stop([victim])
        if needed:
            chosen = {v.id for v in (*stopped, *needed)}
            stopped = [v for v in self.order if v.id in chosen]
        return PreemptionPlan(tuple(v.id for v in stopped), placement, sum(v.lost_gpu_s for v in stopped))

    def _any(self) -> bool:
        """Whether it would fit if all had left. Under a limit it mostly does not: then none is stopped and spared one by one."""
        with self.engine.transaction():  # never committed
            self.engine.release_all([victim.id for victim in self.order])
            return self.engine.feasible(self.request)

    def _spare_but_for_the_limit(self, outside: Sequence[Victim]) -> list[Victim]:
        """Who of those outside the place has to go nevertheless, since the limit counts them too; the most valuable are spared first."""
        needed = list[Victim]()
        for victim in reversed(outside):
            self.spare([victim])
            if not self.within():
                self.stop([victim])
                needed.append(victim)
        return needed

    def _outside(self, stopped: list[Victim], placement: Placement) -> list[Victim]:
        """Nobody outside the place that was found needs to go."""
        inside = set(placement.node_names)
        return [v for v in stopped if not any(a.node in inside for a in self.placed[v.id].nodes)]

    def _enough(self) -> bool:
        return self.within() and self.engine.feasible(self.request)

    def _shortest_run(self) -> list[Victim] | None:
        """The shortest prefix of the order that makes room, left stopped: by doubling, then by bisection of the last step."""
        low = high = 0
        while not self._enough():
            if high == len(self.order):
                return None
            low, high = high, min(len(self.order), 2 * high + 1)
            self.stop(self.order[low:high])
        at = high
        while low + 1 < high:  # `high` is enough, `low` is not, `at` are stopped
            middle = (low + high) // 2
            self.spare(self.order[middle:at])
            self.stop(self.order[at:middle])
            at = middle
            if self._enough():
                high = middle
            else:
                low = middle
        self.stop(self.order[at:high])
        return self.order[:high]
