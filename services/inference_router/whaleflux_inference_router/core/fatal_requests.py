"""Requests that ended the engine working on them. No I/O.

An engine that crashes on a request takes everything with it that it was answering. So a request that has begun is sent a
second time at most once, and one whose attempts keep ending engines is refused for a while, whoever sends it again (client
libraries repeat what failed with a 5xx by themselves).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

ALONE_AFTER = 2  # engines ended: from now on one try only
REFUSED_AFTER = 3  # engines ended: not sent any more
REMEMBERED_S = 600.0
MAX_REMEMBERED = 10_000
_HASHED_BYTES = 64 << 10


def fingerprint(body: bytes) -> bytes:
    """The same for the same body; of a large one its size, beginning and end."""
    digest = hashlib.blake2b(len(body).to_bytes(8, "big"), digest_size=16)
    digest.update(body[:_HASHED_BYTES])
    digest.update(body[-_HASHED_BYTES:])
    return digest.digest()


class FatalRequests:
    """Which engines each request ended lately; bounded, oldest forgotten first.

    Engines are counted, not attempts: an engine that dies cuts every copy of a popular request that it was answering. And a
    request that was answered is no danger, whatever happened to engines that worked on it before.
    """

    def __init__(self) -> None:
        self._ended: OrderedDict[bytes, tuple[float, frozenset[str]]] = OrderedDict()  # fingerprint -> (last, replicas)

    def engines_ended(self, request: bytes, now_s: float) -> int:
        """Engines that ended while they worked on `request` (a fingerprint), within `REMEMBERED_S`."""
        at_s, replicas = self._ended.get(request, (0.0, frozenset[str]()))
        return len(replicas) if now_s - at_s < REMEMBERED_S else 0

    def engine_ended(self, request: bytes, replica: str, now_s: float) -> None:
        """An attempt that had begun was cut by its engine."""
        at_s, replicas = self._ended.pop(request, (now_s, frozenset[str]()))
        kept = replicas if now_s - at_s < REMEMBERED_S else frozenset[str]()
        self._ended[request] = (now_s, kept | {replica})
        if len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)

    def answered(self, request: bytes) -> None:
        """An engine survived it."""
        self._ended.pop(request, None)
