"""The leader's clock: wall time as far as it is believed (`core.steady_time`), so that no deadline, cost or start is decided by a jump."""

from __future__ import annotations

from datetime import datetime, timedelta

from whaleflux.clock import Clock
from whaleflux_scheduler.core.steady_time import SteadyTime


class SteadyClock:
    """Lives as long as its leadership: the first look is believed."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._steady = clock, SteadyTime()

    def now(self) -> datetime:
        """UTC. It goes on through a jump, until that has held for a while; then it jumps too, ahead or back."""
        wall = self._clock.now()
        ahead_s = self._steady.ahead_s(wall, self._clock.monotonic())
        return wall - timedelta(seconds=ahead_s) if ahead_s else wall

    def monotonic(self) -> float:
        return self._clock.monotonic()

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
