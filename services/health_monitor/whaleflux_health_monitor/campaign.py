"""Stands for election, and gives servicers the current leadership or the error that sends callers to the leader."""

from __future__ import annotations

from whaleflux import telemetry
from whaleflux.errors import Unavailable
from whaleflux.retry import Backoff
from whaleflux.store.election import Leader, lead, leader_of
from whaleflux.telemetry import Event
from whaleflux_health_monitor.leader_session import NAME, Dependencies, LeaderSession, not_leader

_RETRY = Backoff()
_log = telemetry.get_logger("whaleflux.health_monitor")


class Campaign:
    """Campaigns for ever; `session` is set while this replica leads."""

    def __init__(self, dependencies: Dependencies, identity: str) -> None:
        self._dependencies, self._identity = dependencies, identity
        self.session: LeaderSession | None = None

    async def run(self) -> None:
        """The loop to run beside the server."""
        await lead(self._dependencies.store, NAME, self._identity, self._work)

    async def _work(self, leader: Leader) -> None:
        try:
            self.session = await self._begun(leader)
            await self.session.run()
        finally:
            self.session = None

    async def _begun(self, leader: Leader) -> LeaderSession:
        failures = 0
        while True:  # until the leadership is lost, which cancels
            try:
                return await LeaderSession.begin(self._dependencies, leader)
            except Unavailable as outage:
                _log.warning(Event.STORE_UNREACHABLE, reason=outage.message)
                failures += 1
                await self._dependencies.clock.sleep(_RETRY.pause_s(failures))

    async def current(self) -> LeaderSession:
        """The current session; refuses with NOT_LEADER, naming the leader if it is known, on every other replica."""
        if self.session is None:
            raise not_leader(await leader_of(self._dependencies.store, NAME))
        return self.session
