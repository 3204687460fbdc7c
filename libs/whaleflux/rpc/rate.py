"""How many calls one caller may begin per second: a token bucket each, the idle ones forgotten."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

MAX_CALLERS = 65_536


@lru_cache(maxsize=4096)
def sender(address: str) -> str:
    """Whose an address is, as far as rates go: of IPv6 its /64, of which one subscriber has all addresses (RFC 6177)."""
    if ":" not in address:
        return address
    try:
        ip = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float


class Rate:
    """Pure: time is handed in. Callers beyond `max_callers` push out the one that was idle longest."""

    def __init__(self, per_s: float, burst: float, max_callers: int = MAX_CALLERS) -> None:
        self._per_s, self._burst, self._max_callers = per_s, burst, max_callers
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        """How many callers are remembered."""
        return len(self._buckets)

    def wait_s(self, caller: Hashable, now_s: float, cost: float = 1.0) -> float:
        """Takes `cost` tokens and returns 0, or takes none and returns the seconds until there will be as many."""
        bucket = self._buckets.get(caller)
        if bucket is None:
            bucket = self._buckets[caller] = _Bucket(self._burst, now_s)
            if len(self._buckets) > self._max_callers:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(caller)
            bucket.tokens = min(self._burst, bucket.tokens + (now_s - bucket.at_s) * self._per_s)
            bucket.at_s = now_s
        if bucket.tokens >= cost:
            bucket.tokens -= cost
            return 0.0
        return (cost - bucket.tokens) / self._per_s
