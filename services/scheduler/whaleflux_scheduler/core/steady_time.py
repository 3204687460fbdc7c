"""Wall time as far as it is believed: what begins and ends by the calendar does not begin or end by a clock that jumped. Pure."""

from __future__ import annotations

from datetime import datetime

SLEW_S = 10.0  # what is no jump: clocks are set right in small steps
BELIEVED_AFTER_S = 300.0  # a jump that has held so long was right: the clock was wrong before, or the machine slept


class SteadyTime:
    """Of one leader, from its first look on."""

    def __init__(self) -> None:
        self._wall: datetime | None = None
        self._at_s = self._since_s = 0.0
        self._doubted = False

    def ahead_s(self, wall: datetime, monotonic_s: float) -> float:
        """By how much the wall clock is ahead of the time that is believed, in seconds; 0 when it is believed."""
        if self._wall is None:
            self._wall, self._at_s = wall, monotonic_s
        jump_s = (wall - self._wall).total_seconds() - (monotonic_s - self._at_s)
        if abs(jump_s) > SLEW_S:
            if not self._doubted:
                self._doubted, self._since_s = True, monotonic_s
            if monotonic_s - self._since_s < BELIEVED_AFTER_S:
                return jump_s
        self._wall, self._at_s, self._doubted = wall, monotonic_s, False
        return 0.0
