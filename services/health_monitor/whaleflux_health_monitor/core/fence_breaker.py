"""How many nodes may be fenced within a few minutes before a person decides."""

from __future__ import annotations

import math
from collections import deque

from whaleflux_health_monitor.core.timing import Timing


class FenceBreaker:
    """Bounds how much of the fleet may be fenced within a window; a node that came back does not count."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._fenced: deque[tuple[float, str]] = deque()

    def admits(self, fleet_size: int, now_s: float) -> bool:
        """Whether one more node may be fenced now."""
        while self._fenced and now_s - self._fenced[0][0] > self._timing.breaker_window_s:
            self._fenced.popleft()
        limit = max(self._timing.breaker_least, math.ceil(self._timing.breaker_share * fleet_size))
        return len(self._fenced) < limit

    def fenced(self, node: str, now_s: float) -> None:
        """Counts one."""
        self._fenced.append((now_s, node))
        self._fenced = deque(sorted(self._fenced))  # a new leader counts its predecessors' fences in any order

    def came_back(self, node: str) -> None:
        """Its fencing did no lasting harm."""
        self._fenced = deque((at, name) for at, name in self._fenced if name != node)
