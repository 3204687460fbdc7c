"""What is under way at each replica: added by decisions, released by the front door's records or by time. No I/O.

Records can be lost without a word, so a decision that hears nothing is released after `FORGET_S`: this is feedback for
routing, never accounting.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import NamedTuple

from whaleflux_inference_router.core.fatal_requests import FatalRequests
from whaleflux_inference_router.core.outcomes import End, Outcome, Outcomes
from whaleflux_inference_router.core.ranking import HALF_LIFE_S, Load

FORGET_S = 600.0
MAX_OPEN = 100_000
MAX_FINGERPRINTS = 20_000
_SMOOTH = 0.2


@dataclass(frozen=True, slots=True)
class Ended:
    """How a request ended, as far as the front door tells. `address` is where the answer came from, "" for nowhere."""

    decision_id: str
    address: str
    first_byte_s: float | None
    completed: bool
    succeeded: bool = False  # with a 2xx of an engine


class _Open(NamedTuple):
    """A request that was sent and has not ended, as far as records tell."""

    at_s: float
    replica: str


class LoadTracker:
    """One per router process. Addresses stand for replicas in records, names in decisions."""

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._found: set[str] | None = None  # replicas that were there before this process
        self._loads: dict[str, Load] = {}
        self._open: OrderedDict[str, _Open] = OrderedDict()  # by decision, oldest first
        self._fingerprints: OrderedDict[str, bytes] = OrderedDict()  # by decision: records of attempts may come last
        self.fatal_requests, self.outcomes = FatalRequests(), Outcomes()
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

    def may_be_busy(self, replica: str, now_s: float) -> bool:
        """Whether requests may be under way: a process that has just started knows nothing of those sent before it to replicas that it found."""
        load = self._loads.get(replica)
        is_unknown = replica in (self._found or ()) and now_s - self._started_s < FORGET_S
        return is_unknown or (load is not None and load.in_flight > 0)

    def sent_to(self, decision_id: str) -> str:
        """The replica that a request was sent to first; "" for one that has ended, or that another router sent."""
        found = self._open.get(decision_id)
        return found.replica if found else ""

    def ages_s(self, replicas: set[str], now_s: float) -> list[float]:
        """For how long each request to these replicas is under way."""
        return [now_s - one.at_s for one in self._open.values() if one.replica in replicas]

    def open(self, decision_id: str, replica: str, now_s: float, fingerprint: bytes = b"") -> None:
        """A request was sent to `replica`."""
        self._expire(now_s)
        self._uses += 1
        self._open[decision_id] = _Open(now_s, replica)
        self._fingerprints[decision_id] = fingerprint
        if len(self._fingerprints) > MAX_FINGERPRINTS:
            self._fingerprints.popitem(last=False)
        load = self._loads.get(replica, Load())
        self._loads[replica] = replace(load, in_flight=load.in_flight + 1, last_used=self._uses)

    def close(self, ended: Ended) -> None:
        """The request is over, however it ended; a second record of it changes nothing."""
        found = self._open.pop(ended.decision_id, None)
        if found is None:
            return
        self._release(found.replica)
        if ended.completed and ended.succeeded:
            self.fatal_requests.answered(self._fingerprints.get(ended.decision_id, b""))
        if ended.completed and ended.first_byte_s is not None:
            before = self.first_byte_s.get(found.replica, ended.first_byte_s)
            self.first_byte_s[found.replica] = before + _SMOOTH * (ended.first_byte_s - before)

    def fail(self, replica: str, now_s: float) -> None:
        """The replica refused or dropped a request before its answer began."""
        load = self._loads.get(replica, Load())
        left = load.failures * 0.5 ** ((now_s - load.failures_at_s) / HALF_LIFE_S)
        self._loads[replica] = replace(load, failures=left + 1, failures_at_s=now_s)
        self.outcomes.add(replica, Outcome(now_s, End.FAILED))

    def engine_ended(self, decision_id: str, replica: str, now_s: float) -> None:
        """The engine of `replica` cut an attempt of this request that had begun."""
        if fingerprint := self._fingerprints.get(decision_id):
            self.fatal_requests.engine_ended(fingerprint, replica, now_s)

    def keep_only(self, replicas: set[str]) -> None:
        """Forgets replicas that exist no more. The first call names those that were there before this process."""
        self._found = replicas if self._found is None else self._found & replicas
        self.outcomes.keep_only(replicas)
        for name in self._loads.keys() - replicas:
            del self._loads[name]
            self.first_byte_s.pop(name, None)

    def _expire(self, now_s: float) -> None:
        while self._open:
            decision_id, oldest = next(iter(self._open.items()))
            if now_s - oldest.at_s < FORGET_S and len(self._open) < MAX_OPEN:
                return
            del self._open[decision_id]
            self._release(oldest.replica)

    def _release(self, replica: str) -> None:
        load = self._loads.get(replica)
        if load is not None:
            self._loads[replica] = replace(load, in_flight=max(0, load.in_flight - 1))
