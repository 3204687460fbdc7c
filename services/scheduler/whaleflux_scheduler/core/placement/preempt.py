"""Which placed work to stop so that a request fits: least priority first, then least work lost, then as few as possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest, PreemptionPlan, Victim

if TYPE_CHECKING:
    from whaleflux_scheduler.core.placement.engine import Engine


def plan(engine: Engine, request: PlaceRequest, victims: Sequence[Victim]) -> PreemptionPlan | None:
    """The plan, or None when even stopping every victim of lower priority makes no room.

    The shortest sufficient run of victims in order is found by bisection; then each, most valuable first, is spared if the request
    still fits without its room. All inside one transaction that is always rolled back.
    """
    order = _order(engine, request, victims)
    with engine.transaction():
        needed = _shortest_run(engine, request, order)
        if needed is None:
            return None
        run = order[:needed]
        placement = _without(engine, request, run)
        if placement is None:
            return None
        return _reprieve(engine, request, run, placement)


def _order(engine: Engine, request: PlaceRequest, victims: Sequence[Victim]) -> list[Victim]:
    known = [v for v in victims if v.priority < request.priority and v.id in engine.placements]
    return sorted(known, key=lambda v: (v.priority, v.lost_gpu_s, v.id))


def _shortest_run(engine: Engine, request: PlaceRequest, order: list[Victim]) -> int | None:
    """How many victims, in order, make room. More room never hurts, so bisection is exact."""
    low, high = 0, len(order)
    if _without(engine, request, order) is None:
        return None
    while low < high:
        middle = (low + high) // 2
        if _without(engine, request, order[:middle]) is not None:
            high = middle
        else:
            low = middle + 1
    return low


def _without(engine: Engine, request: PlaceRequest, stopped: Sequence[Victim]) -> Placement | None:
    with engine.transaction():
        for victim in stopped:
            engine.release(victim.id)
        return engine.fits(request)


def _reprieve(engine: Engine, request: PlaceRequest, run: list[Victim], placement: Placement) -> PreemptionPlan:
    """Victims outside the chosen place are spared at once; the rest one by one, most valuable first."""
    inside = set(placement.node_names)
    stopped = [v for v in run if any(a.node in inside for a in engine.placements[v.id].nodes)]
    for victim in reversed(list(stopped)):
        fewer = [v for v in stopped if v is not victim]
        found = _without(engine, request, fewer)
        if found is not None:
            stopped, placement = fewer, found
    return PreemptionPlan(tuple(v.id for v in stopped), placement, sum(v.lost_gpu_s for v in stopped))
