"""Keeps the streams of a hub and its sites as they should be, and makes a mended link catch up at once.

Left alone, a server asks a source again only 30 to 40 s after the link to it is back. The hub's control plane runs one
`Backbone` (under a leadership when it has several replicas): it looks at every site each second and nudges both ends
of a link that came back. Sites need none of it to go on alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Protocol

from whaleflux.clock import Clock, SystemClock
from whaleflux.errors import Refusal
from whaleflux.events.subjects import HUB
from whaleflux.events.topology import HEARD, Limits, StreamSpec, hub_streams, site_streams
from whaleflux.telemetry import Event, get_logger

log = get_logger(__name__)
CHECK_EVERY_S = 1.0


class Servers(Protocol):
    """What `nats.NatsBus` offers at the hub."""

    async def reaches(self, domain: str) -> bool: ...

    async def apply(self, spec: StreamSpec, *, domain: str | None = None) -> None: ...

    async def nudge(self, spec: StreamSpec, source: str, *, domain: str | None = None) -> None: ...


class Backbone:
    """The streams of the hub and of the sites that have a leaf server of their own."""

    def __init__(
        self,
        servers: Servers,
        sites: Iterable[str] = (),
        *,
        hub_limits: Limits | None = None,
        site_limits: Limits | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._servers = servers
        self._hub_limits, self._site_limits = hub_limits or Limits(), site_limits or Limits()
        self._clock: Clock = clock or SystemClock()
        self._sites: tuple[str, ...] = tuple(sites)
        self._hub_is_right = False
        self.linked: set[str] = set()  # sites whose link stands and has caught up or is about to

    def set_sites(self, sites: Iterable[str]) -> None:
        """Which sites there are now; takes effect at the next look."""
        new = tuple(sites)
        if new != self._sites:
            self._sites, self._hub_is_right = new, False
            self.linked.clear()  # each site hears of the others anew

    async def run(self) -> None:
        """Until cancelled; waits out every outage."""
        while True:
            await self.look()
            await self._clock.sleep(CHECK_EVERY_S)

    async def look(self) -> None:
        """One look at every site; mends what came back."""
        sites = self._sites
        try:
            if not self._hub_is_right:
                for spec in hub_streams(sites, self._hub_limits):
                    await self._servers.apply(spec)
                self._hub_is_right = True
        except Refusal as refusal:
            log.warning(Event.BACKBONE_WAITING, reason=str(refusal))
            return
        answers = await asyncio.gather(*(self._servers.reaches(site) for site in sites))
        up = {site for site, answer in zip(sites, answers, strict=True) if answer}
        for site in self.linked - up:
            log.warning(Event.SITE_CUT_OFF, site=site)
        self.linked &= up
        for site in sorted(up - self.linked):
            await self._link(site, sites)

    async def _link(self, site: str, sites: Sequence[str]) -> None:
        try:
            for spec in site_streams(site, sites, self._site_limits):
                await self._servers.apply(spec, domain=site)
                if spec.name == HEARD:
                    await self._servers.nudge(spec, HUB, domain=site)
            self._hub_is_right = False  # until the nudge is through
            for spec in hub_streams(sites, self._hub_limits):
                await self._servers.nudge(spec, site)
            self._hub_is_right = True
        except Refusal as refusal:  # the next look tries again
            log.warning(Event.BACKBONE_WAITING, site=site, reason=str(refusal))
        else:
            self.linked.add(site)
            log.info(Event.SITE_LINKED, site=site)
