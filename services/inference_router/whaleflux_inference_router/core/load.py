"""What is under way at each replica: added by decisions, released by the front door's records or by time. No I/O.

Records can be lost without a word, so a decision that hears nothing is released after `FORGET_S`: this is feedback for
routing, never accounting.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from whaleflux_inference_router.core.policy import HALF_LIFE_S, Load

FORGET_S = 600.0
MAX_OPEN = 100_000
_SMOOTH = 0.2


@dataclass(frozen=True, slots=True)
class Ended:
    """How a request ended, as far as the front door tells. `address` is where the answer came from, "" for nowhere."""

    decision_id: str
    address: str
    first_byte_s: float | None
    completed: bool


class LoadBook:
    """One per router process. Addresses stand for replicas in records, names in decisions."""

    def __init__(self) -> None:
        self._loads: dict[str, Load] = {}
        self._open: OrderedDict[str, tuple[float, str]] = OrderedDict()  # decision -> (time, replica), oldest first
        self._uses = 0
        self.first_byte_s: dict[str, float] = {}

    @property
    def loads(self) -> dict[str, Load]:
        """By replica name; read it, do not change it."""
        return self._loads

    @property
    def open_count(self) -> int:
        """Requests that no record has ended yet."""
        return len(self._open)

    def open(self, decision_id: str, replica: str, now_s: float) -> None:
        """A request was sent to `replica`."""
        self._expire(now_s)
        self._uses += 1
        self._open[decision_id] = (now_s, replica)
        load = self._loads.get(replica, Load())
        self._loads[replica] = replace(load, in_flight=load.in_flight + 1, last_used=self._uses)

    def close(self, ended: Ended) -> None:
        """The request is over, however it ended; a second record of it changes nothing."""
        found = self._open.pop(ended.decision_id, None)
        if found is None:
            return
        self._release(found[1])
        if ended.completed and ended.first_byte_s is not None:
            before = self.first_byte_s.get(found[1], ended.first_byte_s)
            self.first_byte_s[found[1]] = before + _SMOOTH * (ended.first_byte_s - before)

    def fail(self, replica: str, now_s: float) -> None:
        """The replica refused or dropped a request before its answer began."""
        load = self._loads.get(replica, Load())
        left = load.failures * 0.5 ** ((now_s - load.failures_at_s) / HALF_LIFE_S)
        self._loads[replica] = replace(load, failures=left + 1, failures_at_s=now_s)

    def keep_only(self, replicas: set[str]) -> None:
        """Forgets replicas that exist no more."""
        for name in self._loads.keys() - replicas:
            del self._loads[name]
            self.first_byte_s.pop(name, None)

    def _expire(self, now_s: float) -> None:
        while self._open:
            decision_id, (at_s, replica) = next(iter(self._open.items()))
            if now_s - at_s < FORGET_S and len(self._open) < MAX_OPEN:
                return
            del self._open[decision_id]
            self._release(replica)

    def _release(self, replica: str) -> None:
        load = self._loads.get(replica)
        if load is not None:
            self._loads[replica] = replace(load, in_flight=max(0, load.in_flight - 1))
