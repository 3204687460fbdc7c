"""Waiting for cheaper GPUs: a job that is to be cheapest by a deadline does not start on dear ones while cheaper ones come free in time. Pure.

It waits as long as it could still start on the dear ones and end by its deadline, with a tenth of its time to spare; when the cheaper ones are
not in sight any more, it starts at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from whaleflux.manifests.job_fields import Goal, Spec
from whaleflux_scheduler.core.availability import Start
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest
from whaleflux_scheduler.core.request import of_model

AGAIN_S = 60.0  # the shortest time between two looks at one job
MARGIN_S = 300.0  # between the end that is expected and the deadline, at least
LONGER = 1.1  # times as long as expected it may run, and still end by its deadline
SAVES = 0.05  # of its cost, at least: for less it does not wait

Soonest = Callable[[Job, PlaceRequest, datetime, float], Start | None]
"""The earliest start of a request that is not after some second since the epoch."""


@dataclass(frozen=True, slots=True)
class Waits:
    """A job waits for GPUs of `model`, expected at `start`, which cost `usd` in all instead of `dear_usd`; not beyond `until`."""

    model: str
    start: datetime
    usd: float
    dear_model: str
    dear_usd: float
    until: datetime
    look: datetime  # when to work that out again


def may_wait(spec: Spec) -> bool:
    """Whether the job could ever wait for cheaper GPUs than those that are free."""
    return spec.goal is Goal.CHEAPEST and spec.deadline is not None and len(spec.gpu_choices) > 1


def latest_start(job: Job, placement: Placement) -> datetime | None:
    """When it has to start there at the latest to keep its deadline; None: it has none, or its work is not known."""
    run_s = placement.cost.run_s
    if job.spec.deadline is None or run_s is None:
        return None
    return job.spec.deadline - timedelta(seconds=min(LONGER * run_s + placement.cost.fetch_s + MARGIN_S, 1e9))


class Patience:
    """Who waits so, and for what."""

    def __init__(self, soonest: Soonest) -> None:
        self._soonest, self._waits = soonest, dict[str, Waits]()

    def of(self, name: str) -> Waits | None:
        """What the job waits for."""
        return self._waits.get(name)

    @property
    def next_look(self) -> float:
        """Seconds since the epoch; infinite: nobody waits."""
        if not self._waits:
            return math.inf
        return min(waits.look.timestamp() for waits in self._waits.values())

    def due(self, now: datetime) -> list[str]:
        """Who is to be looked at again."""
        return [name for name, waits in self._waits.items() if waits.look <= now]

    def forget(self, name: str) -> bool:
        """It does not wait for cheaper ones any more; False: it did not."""
        return self._waits.pop(name, None) is not None

    def waits(self, job: Job, request: PlaceRequest, placement: Placement, now: datetime) -> Waits | None:
        """What it waits for though it could start there now; None: it starts. `request` has the wish of the moment."""
        known = self._waits.get(job.name)
        if known is not None and now < known.look and (placement.cost.total_usd or 0.0) > known.usd / (1 - SAVES):
            return known
        found = self.cheaper(job, request, placement, now)
        self.forget(job.name)
        if found is not None:
            self._waits[job.name] = found
        return found

    def cheaper(self, job: Job, request: PlaceRequest, placement: Placement, now: datetime) -> Waits | None:
        """Other GPUs that come free in time, and cost it less than this place; the cheapest."""
        until, dear = latest_start(job, placement), placement.cost.total_usd
        if not may_wait(job.spec) or until is None or not dear or until <= now + timedelta(seconds=AGAIN_S):
            return None
        named = replace(request, id=job.name)
        models = dict.fromkeys(option.model for option in request.requirement.any_of)
        starts = (
            start
            for model in models
            if model != placement.option.model
            and (start := self._soonest(job, of_model(named, model), now, until.timestamp())) is not None
        )
        found = [start for start in starts if _saves(job, start, dear)]
        best = min(found, key=lambda start: start.placement.cost.total_usd or math.inf, default=None)
        return None if best is None else _waits(best, placement, until, now)


def _saves(job: Job, start: Start, dear_usd: float) -> bool:
    usd, latest = start.placement.cost.total_usd, latest_start(job, start.placement)
    return usd is not None and usd <= (1 - SAVES) * dear_usd and latest is not None and start.at_s <= latest.timestamp()


def _waits(start: Start, dear: Placement, until: datetime, now: datetime) -> Waits:
    at = datetime.fromtimestamp(start.at_s, UTC)
    look = now + max(timedelta(seconds=AGAIN_S), (at - now) / 10)
    usd, dear_usd = start.placement.cost.total_usd or 0.0, dear.cost.total_usd or 0.0
    return Waits(start.placement.option.model, at, usd, dear.option.model, dear_usd, until, min(look, until))
