"""How many calls one caller may begin per second: a token bucket each, the idle ones forgotten."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

MAX_CALLERS = 65_536


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float


class Rate:
    """Pure: time is handed in. Callers beyond `max_callers` push out the one that was idle longest."""

    def __init__(self, per_s: float, burst: float, max_callers: int = MAX_CALLERS) -> None:
        self._per_s, self._burst, self._max_callers = per_s, burst, max_callers
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()

    def wait_s(self, caller: Hashable, now_s: float) -> float:
        """Takes one token and returns 0, or takes none and returns the seconds until there will be one."""
        bucket = self._buckets.get(caller)
        if bucket is None:
            bucket = self._buckets[caller] = _Bucket(self._burst, now_s)
            if len(self._buckets) > self._max_callers:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(caller)
            bucket.tokens = min(self._burst, bucket.tokens + (now_s - bucket.at_s) * self._per_s)
            bucket.at_s = now_s
        if bucket.tokens >= 1:
            bucket.tokens -= 1
            return 0.0
        return (1 - bucket.tokens) / self._per_s
