"""Where members of a reservation may go: an engine of its GPUs alone, made anew when something of them changed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from whaleflux_scheduler.core.holdings import claim_id
from whaleflux_scheduler.core.known_fleet import KnownFleet
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.reservations import Reservation

SOON_S = 300.0  # no member starts on what the next reservation needs so soon


class OwnEngines:
    """See the module. `all_`: reservations by name, kept current by who decides about them."""

    def __init__(self, fleet: KnownFleet, all_: Mapping[str, Reservation]) -> None:
        self._fleet, self._all = fleet, all_
        self._soon = frozenset[str]()  # reservations that begin within minutes
        self._small: dict[str, tuple[object, Engine]] = {}  # a reservation's own GPUs, and of when that is

    def of(self, one: Reservation, job: Job) -> Engine:
        """Its GPUs for a job that may use them, with what is held of them: by then nothing else is to be had there."""
        now, needed = (self._fleet.version, self._soon), self._small.get(one.name)
        if needed is None or needed[0] != now or self._fleet.holdings.holds(job.name):
            needed = self._small[one.name] = now, self._made(one, job.name)
        return needed[1]

    def look(self, now: datetime) -> None:
        """Which reservations begin within minutes, from now on."""
        soon = now + timedelta(seconds=SOON_S)
        self._soon = frozenset(name for name, one in self._all.items() if now < one.start <= soon)

    def forget(self, name: str) -> None:
        """The reservation is gone."""
        self._small.pop(name, None)

    def _made(self, one: Reservation, member: str) -> Engine:
        engine, devices = Engine(), self._fleet.holdings.devices
        next_ = [self._all[name] for name in self._soon if name != one.name]
        taken = {node for other in next_ if other.maintenance for node in other.nodes}
        taken |= {uuid for other in next_ for _, uuids in other.held for uuid in uuids}
        for name, uuids in one.held:
            if (node := devices.nodes.get(name)) is None or name not in devices.open or name in taken:
                continue
            offered, _ = devices.offered(node)
            own = set(uuids) - taken
            gpus = (replace(gpu, healthy=gpu.healthy and gpu.uuid in own) for gpu in offered.gpus)
            engine.upsert_node(replace(offered, gpus=tuple(gpus)))
        free_of = {claim_id(one.name), member, claim_id(member)}
        for id_ in sorted({id_ for name, _ in one.held for id_ in self._placements_on(name)} - free_of):
            placement = self._fleet.engine.placements[id_]
            if parts := tuple(part for part in placement.nodes if part.node in engine.nodes):
                engine.apply(replace(placement, nodes=parts))
        for dataset in self._fleet.engine.datasets:
            engine.upsert_dataset(dataset)
        return engine

    def _placements_on(self, node: str) -> Iterator[str]:
        """What the engine has there."""
        for job in self._fleet.holdings.jobs_on(node):
            yield from (id_ for id_ in (job, claim_id(job)) if id_ in self._fleet.engine.placements)
