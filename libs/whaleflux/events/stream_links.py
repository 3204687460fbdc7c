"""Keeps the streams of a hub and its sites as they should be, and makes a mended link catch up at once.

Left alone, a server asks a source again only 30 to 40 s after the link to it is back. The hub's control plane runs one
`StreamLinks` (under a leadership when it has several replicas): it looks at every site each second and nudges the
hub's end of a link that came back. Sites need none of it to go on alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

from whaleflux.clock import Clock, SystemClock
from whaleflux.errors import StatusError
from whaleflux.events.topology import (
    ACCOUNTS,
    SAMPLES,
    TRAIL,
    StreamLimits,
    StreamSpec,
    hub_streams,
    site_api,
    site_streams,
    taken_api,
    taken_stream,
)
from whaleflux.telemetry import Event, get_logger

log = get_logger(__name__)
CHECK_EVERY_S = 1.0
APPLY_EVERY_S = 60.0  # a server that lost its files gets its streams from publishers, who do not know the settings


class Servers(Protocol):
    """What `nats.NatsBus` offers at the hub."""

    async def reaches(self, api: str) -> bool: ...

    async def apply(self, spec: StreamSpec, *, api: str = "") -> None: ...

    async def nudge(self, spec: StreamSpec, *, api: str = "") -> None: ...


class StreamLinks:
    """The streams of the hub and of the sites that have a leaf server of their own."""

    def __init__(
        self,
        servers: Servers,
        sites: Iterable[str] = (),
        *,
        hub_limits: StreamLimits | None = None,
        site_limits: StreamLimits | None = None,
        accounts: StreamLimits = ACCOUNTS,
        trail: StreamLimits = TRAIL,
        samples: StreamLimits = SAMPLES,
        clock: Clock | None = None,
    ) -> None:
        self._servers = servers
        self._hub_limits, self._site_limits = hub_limits or StreamLimits(), site_limits or StreamLimits()
        self._accounts, self._trail, self._samples = accounts, trail, samples
        self._clock: Clock = clock or SystemClock()
        self._applied_s = float("-inf")
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
            await self._clock.sleep(CHECK_EVERY_S if self._sites or not self._hub_is_right else APPLY_EVERY_S)

    async def look(self) -> None:
        """One look at every site; mends what came back."""
        sites = self._sites
        try:
            if not self._hub_is_right or self._clock.monotonic() - self._applied_s >= APPLY_EVERY_S:
                for spec in hub_streams(sites, self._hub_limits, self._accounts, self._trail, self._samples):
                    await self._servers.apply(spec)
                for site in sites:
                    await self._servers.apply(self._taken(site), api=taken_api(site))
                self._hub_is_right, self._applied_s = True, self._clock.monotonic()
        except StatusError as error:
            log.warning(Event.STREAM_LINKS_WAITING, reason=str(error))
            return
        answers = await asyncio.gather(*(self._servers.reaches(site_api(site)) for site in sites))
        up = {site for site, answer in zip(sites, answers, strict=True) if answer}
        for site in self.linked - up:
            log.warning(Event.SITE_CUT_OFF, site=site)
        self.linked &= up
        for site in sorted(up - self.linked):
            await self._link(site)

    async def _link(self, site: str) -> None:
        try:
            for spec in site_streams(site, self._site_limits):
                await self._servers.apply(spec, api=site_api(site))
            self._hub_is_right = False  # until the nudge is through
            await self._servers.nudge(self._taken(site), api=taken_api(site))
            self._hub_is_right = True
        except StatusError as error:  # the next look tries again
            log.warning(Event.STREAM_LINKS_WAITING, site=site, reason=str(error))
        else:
            self.linked.add(site)
            log.info(Event.SITE_LINKED, site=site)

    def _taken(self, site: str) -> StreamSpec:
        return taken_stream(site, self._site_limits)
