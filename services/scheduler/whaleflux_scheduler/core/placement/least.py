"""How little a gang could communicate: the least of all places that the placement engine looks at, on the fleet without work.

It does not change while the nodes do not, so that each kind of gang is asked about once.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import replace

from whaleflux_scheduler.core.placement.api import Goal, Placement, PlaceRequest, Preference
from whaleflux_scheduler.core.placement.columns import Columns
from whaleflux_scheduler.core.placement.datasets import Datasets
from whaleflux_scheduler.core.placement.decide import candidates

_KEPT = 1000  # kinds of gangs


class LeastCommunication:
    """Remembers answers for one state of the nodes."""

    def __init__(self) -> None:
        self._of: weakref.ref[Columns] | None = None
        self._known: OrderedDict[PlaceRequest, float | None] = OrderedDict()

    def of(self, request: PlaceRequest, empty: Columns, datasets: Datasets) -> float | None:
        """Seconds of a step on `empty`; None where it does not fit."""
        if self._of is None or self._of() is not empty:
            self._of = weakref.ref(empty)
            self._known.clear()
        asked = _kind(request)
        if asked not in self._known:
            costs = [one.cost.step_communication_s for one in candidates(empty, asked, datasets)]
            self._known[asked] = min(costs, default=None)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return self._known[asked]


def kind_of(request: PlaceRequest, placement: Placement) -> PlaceRequest:
    """The request for as many GPUs as were placed: an elastic gang may have got another number than it asked for first."""
    units = placement.gpus // placement.option.per_unit
    return request if units == request.units else replace(request, group=replace(request.group, gpus=units))


def least_free_s(
    placement: Placement, sought: Goal, request: PlaceRequest, columns: Columns, datasets: Datasets
) -> float:
    """The least of the places that are free, of which this one is taken. Who sought the closest has looked at them."""
    costs = [placement.cost, *(other.cost for other in placement.alternatives)]
    if sought is not Goal.CLOSEST:
        costs += [one.cost for one in candidates(columns, replace(request, preference=Preference()), datasets)]
    return min(cost.step_communication_s for cost in costs)


def _kind(request: PlaceRequest) -> PlaceRequest:
    """What of a request decides how little it may communicate: not whose it is, where it was, or what it may cost."""
    return replace(
        request,
        id="any",
        near_nodes=(),
        exclude_nodes=(),
        datasets=(),
        hard_locality=False,
        priority=0,
        preference=Preference(),
        reservation="",
    )
