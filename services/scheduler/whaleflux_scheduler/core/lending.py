"""GPUs that are kept for later, for promised starts and reservations, and who may use them until then: whoever is over in time. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime

from whaleflux_scheduler.core.estimates import Estimates, safe_s
from whaleflux_scheduler.core.holdings import claim_id
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.placement.api import Placement
from whaleflux_scheduler.core.placement.engine import Engine

MARGIN_S = 15.0  # between when the last one has left and the start: what agents and the store need
_NEVER_OVER = 99  # the class of what lasts without end


class Lending:
    """`starts`: by claimant, when its GPUs are needed, seconds since the epoch; kept current by those who keep them."""

    def __init__(self, engine: Engine, estimates: Estimates, *starts: Mapping[str, float]) -> None:
        self._engine, self._estimates, self._starts = engine, estimates, starts
        self._counted: dict[
            str, tuple[Placement, int]
        ] = {}  # what the engine keeps for each, and how many GPUs that is

    def lasts(self, job: Job) -> int:
        """A class of jobs that are over equally soon, by factors of 1.4: one answer does for those that ask for the same."""
        lasts_s = safe_s(self._estimates, job)
        return _NEVER_OVER if lasts_s == math.inf else int(2 * math.log2(max(1.0, lasts_s)))

    def behind(self, job: Job, now: datetime) -> list[str]:
        """Claimants that the job does not delay: it has left before their time comes."""
        if not any(self._starts):
            return []
        over_s = now.timestamp() + safe_s(self._estimates, job) + MARGIN_S
        return [name for name in self._from(over_s) if name != job.name]

    def lent(self, lasts: int, now: datetime) -> int:
        """GPUs that nobody holds, kept for claimants that the soonest over of such a class of jobs does not delay."""
        if lasts == _NEVER_OVER or not any(self._starts):
            return 0
        return self.covered(self._from(now.timestamp() + _soonest_s(lasts) + MARGIN_S))

    def _from(self, at_s: float) -> list[str]:
        return [name for starts in self._starts for name, start_s in starts.items() if at_s <= start_s]

    def covered(self, claimants: Iterable[str] | None = None) -> int:
        """GPUs that nobody holds and that are kept for these, by default for all."""
        return sum(map(self._covered, self._from(-math.inf) if claimants is None else claimants))

    def _covered(self, name: str) -> int:
        placement = self._engine.placements.get(claim_id(name))
        if placement is None:
            self._counted.pop(name, None)
            return 0
        known = self._counted.get(name)
        if known is None or known[0] is not placement:
            known = self._counted[name] = placement, placement.gpus
        return known[1]


def _soonest_s(lasts: int) -> float:
    """Seconds in which the soonest over of the class has left."""
    return math.pow(2.0, lasts / 2) if lasts > 0 else 0.0
