"""How the last requests of each replica went, and whether one version does worse than another. No I/O.

From the front door's records, as far as they come: a hint that may lead back to the engine of before, never an account.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

KEPT = 500  # outcomes of each replica
LEAST_FAILED, MORE_FAILED = 3, 0.05  # a version is worse with so many failed tries, and so much more of them
LEAST_TIMED, SLOWER, SLOWER_S = 20, 1.5, 0.05  # or with a p99 so much higher: times, and seconds on top
LEAST_SLOW = 3  # of few tries the third slowest stands for the p99: one that was slow by chance leads nowhere


class Outcome(NamedTuple):
    """One try: when it ended (monotonic), and the time to its first byte; None: it failed."""

    at_s: float
    first_byte_s: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """The tries of a version."""

    tries: int = 0
    failed: int = 0
    first_byte_p99_s: float | None = None  # None: too few

    @property
    def failed_share(self) -> float:
        return self.failed / self.tries if self.tries else 0.0


class Outcomes:
    """By replica name."""

    def __init__(self) -> None:
        self._of: dict[str, deque[Outcome]] = {}

    def add(self, replica: str, at_s: float, first_byte_s: float | None) -> None:
        """`first_byte_s` None: the try failed."""
        self._of.setdefault(replica, deque(maxlen=KEPT)).append(Outcome(at_s, first_byte_s))

    def sample(self, replicas: Iterable[str], since_s: float) -> Sample:
        """Of these replicas together, as of `since_s` (monotonic)."""
        found = [one for replica in replicas for one in self._of.get(replica, ()) if one.at_s >= since_s]
        times = sorted(one.first_byte_s for one in found if one.first_byte_s is not None)
        p99 = times[-max(LEAST_SLOW, len(times) // 100 + 1)] if len(times) >= LEAST_TIMED else None
        return Sample(len(found), len(found) - len(times), p99)

    def keep_only(self, replicas: set[str]) -> None:
        """Forgets replicas that exist no more."""
        for gone in self._of.keys() - replicas:
            del self._of[gone]


def worse(new: Sample, old: Sample) -> str:
    """Why the new version does worse, "" where it is not known to."""
    if new.failed >= LEAST_FAILED and new.failed_share > old.failed_share + MORE_FAILED:
        return f"{new.failed} of {new.tries} tries failed, of the version before {old.failed} of {old.tries}"
    if new.first_byte_p99_s is None or old.first_byte_p99_s is None:
        return ""
    if new.first_byte_p99_s > SLOWER * old.first_byte_p99_s + SLOWER_S:
        return f"its p99 of the time to the first byte is {new.first_byte_p99_s:.3g} s, that of the version before {old.first_byte_p99_s:.3g} s"
    return ""
