"""What a leader does about a wall clock that is wrong: what lasts is counted by the time that passed, whatever the calendar says by then.

While it leads, that is its monotonic clock: when a jump of the wall clock is believed (`core.steady_time`), all that lasts moves with it.
Where it begins to lead, the clocks of its agents tell: records were written by another leader's clock, and nobody's time is long up before most
agents have shown theirs.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection
from datetime import datetime, timedelta

from whaleflux.clock import CLOCK_SKEW, Clock
from whaleflux_scheduler.agent_sessions import AgentSession

JUMP = timedelta(seconds=1)  # what is less is no jump of a clock
LOOK_AFTER_S, LOOK_UNTIL_S = (
    10.0,
    60.0,
)  # of a leadership: how long agents have to connect, and what is waited for the first at most
LOOK_EVERY_S = 1.0


class ClockWatch:
    """Of one leader, from its start on."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last, self._last_s = clock.now(), clock.monotonic()
        self.confirmed = False  # whether durations that other leaders began may be read by this clock

    def look(self) -> tuple[datetime, timedelta]:
        """The time, and by how much the clock has moved since the last look other than time passed; zero: it has not."""
        before, before_s, self._last, self._last_s = (
            self._last,
            self._last_s,
            self._clock.now(),
            self._clock.monotonic(),
        )
        moved = self._last - before - timedelta(seconds=self._last_s - before_s)
        return self._last, moved if abs(moved) > JUMP else timedelta()

    async def confirm(self, connected: Collection[AgentSession]) -> timedelta:
        """By how much the clock is ahead of most agents', once they can be asked; zero: it is right, or nobody is there to say otherwise."""
        begun_s = self._clock.monotonic()
        while not self.confirmed:
            await self._clock.sleep(LOOK_EVERY_S)
            passed_s = self._clock.monotonic() - begun_s
            self.confirmed = passed_s >= (LOOK_AFTER_S if connected else LOOK_UNTIL_S)
        return ahead_of([session.clock_behind for session in connected])


def ahead_of(behind: Collection[timedelta]) -> timedelta:
    """The median of what agents' clocks are behind, where that is more than clocks may differ by."""
    known = [one.total_seconds() for one in behind]
    ahead = timedelta(seconds=statistics.median_low(known)) if known else timedelta()
    return ahead if ahead > CLOCK_SKEW else timedelta()
