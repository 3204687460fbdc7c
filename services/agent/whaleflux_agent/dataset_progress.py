"""How far a pull is, how fast it may be, and that nobody wants it any more."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field


class Stopped(Exception):
    """Nobody wants it any more; what is there stays for the next pull."""


class Pace:
    """Bytes for each second that all lanes of all pulls have together; 0: as many as come."""

    def __init__(self, bytes_per_s: int = 0) -> None:
        self._bytes_per_s, self._lock, self._free_at_s = bytes_per_s, threading.Lock(), 0.0

    def wait(self, count: int, stop: threading.Event) -> None:
        """Returns when `count` bytes more, which have come, do not make too many; or `stop` is set."""
        if not self._bytes_per_s:
            return
        with self._lock:
            begins_s = max(self._free_at_s, time.monotonic())
            self._free_at_s = begins_s + count / self._bytes_per_s
        stop.wait(max(0.0, begins_s - time.monotonic()))


@dataclass(slots=True)
class Progress:
    """What is known of a pull while it runs; read by others. `here`: bytes that were there before."""

    total_bytes: int = 0
    done_bytes: int = 0
    here_bytes: int = 0
    pulled_bytes: int = 0  # those in vain included
    pulled_s: float = 0.0  # that pulls took
    waits_for: str = ""  # the node that reads it first
    peer_bytes: int = 0  # of chunks that other nodes gave
    copied_bytes: int = 0  # of chunks that other copies here gave
    liars: dict[str, str] = field(default_factory=dict)  # nodes that gave wrong bytes, and which
    failures: dict[str, str] = field(default_factory=dict)  # nodes that did not give what they said that they have
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def cost(self) -> float:
        """Seconds for each byte that was pulled; 0 where none was."""
        return self.pulled_s / self.pulled_bytes if self.pulled_bytes else 0.0

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped
