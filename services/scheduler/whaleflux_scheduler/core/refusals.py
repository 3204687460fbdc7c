"""Why a class of requests was refused: in full while there is time to work that out, else in a few words that cost nothing."""

from __future__ import annotations

from dataclasses import replace

from whaleflux_scheduler.core.known_fleet import KnownFleet
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.pending import RequestClass
from whaleflux_scheduler.core.placement.api import NoPlacement
from whaleflux_scheduler.core.stopwatch import Stopwatch

EXPLAIN_S = 0.005  # of one step that is bounded in time, at most


class Refusals:
    """See the module. One answer does for a whole class until the fleet changes."""

    def __init__(self, fleet: KnownFleet) -> None:
        self._fleet = fleet
        self._watch: Stopwatch | None = None
        self._from_s = 0.0

    def begin(self, watch: Stopwatch) -> None:
        """From now on there is time to explain."""
        self._watch, self._from_s = watch, watch.passed_s

    def of(self, kind: RequestClass, job: Job) -> NoPlacement:
        """Why `job`, of that class, does not fit."""
        if kind.why is not None and kind.why_at == self._fleet.room_version:
            return kind.why
        if self._watch is None or self._watch.passed_s - self._from_s >= EXPLAIN_S:
            return self.short(kind, job)
        kind.why, kind.why_at = self._explain(kind, job), self._fleet.room_version
        return kind.why

    def _explain(self, kind: RequestClass, job: Job) -> NoPlacement:
        with self._fleet.holdings.without(job.name):
            return self._fleet.engine.explain(replace(kind.request, id=job.name))

    def short(self, kind: RequestClass, job: Job) -> NoPlacement:
        """What is asked for beside what is free, which need not be of the right kind."""
        free = self._fleet.engine.free_gpus()
        models = " or ".join(dict.fromkeys(option.model for option in kind.request.requirement.any_of if option.model))
        of = f" of {models}" if models else ""
        asked = (
            f"{kind.request.units} GPUs{of} are asked for"
            if job.spec.gpus
            else f"{kind.request.units} ranks ask for room"
        )
        return NoPlacement(
            job.name, (), f"{asked}, {free} GPUs are free in all", "", True, kind.request.units, free, free
        )
