"""How the last requests of each replica went, and whether one version does worse than another. No I/O.

From the front door's records, as far as they come: a hint that may lead back to the engine of before, never an account. What is compared is
shares and times of the same while, so that what clients do wrong, or leave, counts on both sides.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

KEPT = 500  # outcomes of each replica
LEAST_FAILED, MORE_FAILED = 3, 0.05  # a version is worse with so many failed tries, and so much more of them
SURE = 3.0  # standard errors, for what clients may cause as well: refused and left requests, and those that last
LEAST_TIMED, SLOWER, SLOWER_S = 20, 1.5, 0.05  # or with a p99 so much higher: times, and seconds on top
LEAST_SLOW = 3  # of few tries the third slowest stands for the p99: one that was slow by chance leads nowhere
LONG_S, LONG, LONGEST_S = (
    10.0,
    3.0,
    300.0,
)  # what lasts is so long, or so many times the p90 of the version before, and no longer than this
LEAST_ENDED = 3  # requests of the version before, for that
_SHORTEST_S, _PER_DOUBLING, _MOST = 0.001, 8, 200  # buckets of times: 9 % apart


class End(Enum):
    """How a try ended."""

    ANSWERED = "ANSWERED"
    FAILED = "FAILED"  # by the engine, or the way to it
    REFUSED = "REFUSED"  # by the engine with a 4xx
    LEFT = "LEFT"  # by the client, before the first byte


class Outcome(NamedTuple):
    """One try: when it ended (monotonic), how, the time to its first byte and to its last; None: not known."""

    at_s: float
    end: End
    first_byte_s: float | None = None
    lasted_s: float | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """The tries of a version; those of several routers are added. Times are counted by bucket."""

    failed: int = 0
    refused: int = 0
    left: int = 0
    first_byte: Counter[int] = field(default_factory=Counter)  # of those that were answered
    lasted: Counter[int] = field(default_factory=Counter)  # the same
    under_way: Counter[int] = field(default_factory=Counter)  # ages of those that have not ended

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.failed + other.failed,
            self.refused + other.refused,
            self.left + other.left,
            self.first_byte + other.first_byte,
            self.lasted + other.lasted,
            self.under_way + other.under_way,
        )

    @property
    def answered(self) -> int:
        return self.first_byte.total()

    @property
    def tries(self) -> int:
        """Those that have ended."""
        return self.failed + self.refused + self.left + self.answered

    @property
    def first_byte_p99_s(self) -> float | None:
        """None: too few."""
        if self.answered < LEAST_TIMED:
            return None
        return _from_above(self.first_byte, max(LEAST_SLOW, self.answered // 100 + 1))

    @property
    def lasted_p90_s(self) -> float | None:
        """None: too few."""
        count = self.lasted.total()
        return _from_above(self.lasted, count // 10 + 1) if count >= LEAST_ENDED else None

    def longer_than(self, seconds: float) -> tuple[int, int]:
        """How many lasted or are under way for longer, and of how many that is known."""
        at = bucket_of(seconds)
        late = sum(count for times in (self.lasted, self.under_way) for one, count in times.items() if one > at)
        return late, self.lasted.total() + sum(count for one, count in self.under_way.items() if one > at)


def bucket_of(seconds: float) -> int:
    """The bucket of a time; the times of one are at most 9 % apart."""
    return min(_MOST, max(0, math.ceil(_PER_DOUBLING * math.log2(max(seconds, _SHORTEST_S) / _SHORTEST_S) - 1e-9)))


def _upper_s(bucket: int) -> float:
    return float(_SHORTEST_S * 2 ** (bucket / _PER_DOUBLING))


def _from_above(times: Counter[int], rank: int) -> float:
    """The time at a rank, counted from the longest as 1."""
    for bucket in sorted(times, reverse=True):
        rank -= times[bucket]
        if rank <= 0:
            return _upper_s(bucket)
    return 0.0


class Outcomes:
    """By replica name."""

    def __init__(self) -> None:
        self._of: dict[str, deque[Outcome]] = {}

    def add(self, replica: str, outcome: Outcome) -> None:
        self._of.setdefault(replica, deque(maxlen=KEPT)).append(outcome)

    def tally(self, replicas: Iterable[str], since_s: float, ages_s: Iterable[float] = ()) -> Tally:
        """Of these replicas together, as of `since_s` (monotonic). `ages_s`: of what is under way there."""
        found = [one for replica in replicas for one in self._of.get(replica, ()) if one.at_s >= since_s]
        ends = Counter(one.end for one in found)
        answered = [one for one in found if one.end is End.ANSWERED]
        return Tally(
            ends[End.FAILED],
            ends[End.REFUSED],
            ends[End.LEFT],
            Counter(bucket_of(one.first_byte_s or 0.0) for one in answered),
            Counter(bucket_of(one.lasted_s or one.first_byte_s or 0.0) for one in answered),
            Counter(map(bucket_of, ages_s)),
        )

    def keep_only(self, replicas: set[str]) -> None:
        """Forgets replicas that exist no more."""
        for gone in self._of.keys() - replicas:
            del self._of[gone]


def worse(new: Tally, old: Tally) -> str:
    """Why the new version does worse, "" where it is not known to."""
    if new.failed >= LEAST_FAILED and _share(new.failed, new.tries) > _share(old.failed, old.tries) + MORE_FAILED:
        return f"{new.failed} of {new.tries} tries failed, of the version before {old.failed} of {old.tries}"
    for count, before, words in (
        (new.refused, old.refused, "were answered with a 4xx"),
        (new.left, old.left, "were given up by their clients before a first byte"),
    ):
        if _is_more(count, new.tries, before, old.tries):
            return f"{count} of {new.tries} requests {words}, of the version before {before} of {old.tries}"
    return _slower(new, old) or _hangs(new, old)


def unproven(new: Tally, old: Tally) -> str:
    """Why nothing speaks for the new version: it was asked and has answered nothing, while the one before has; "" where that is not so."""
    asked = new.tries + new.under_way.total()
    if not asked or new.answered or not old.answered:
        return ""
    return f"it has answered none of {asked} requests, the version before {old.answered}"


def _slower(new: Tally, old: Tally) -> str:
    ours, theirs = new.first_byte_p99_s, old.first_byte_p99_s
    if ours is None or theirs is None or ours <= SLOWER * theirs + SLOWER_S:
        return ""
    return f"its p99 of the time to the first byte is {ours:.3g} s, that of the version before {theirs:.3g} s"


def _hangs(new: Tally, old: Tally) -> str:
    usual_s = old.lasted_p90_s
    if usual_s is None:
        return ""
    long_s = min(LONGEST_S, max(LONG_S, LONG * usual_s))
    (late, known), (before, of) = new.longer_than(long_s), old.longer_than(long_s)
    if not _is_more(late, known, before, of):
        return ""
    return f"{late} of {known} requests take longer than {long_s:.3g} s, of the version before {before} of {of}"


def _share(count: int, of: int) -> float:
    return count / of if of else 0.0


def _is_more(count: int, of: int, before: int, before_of: int) -> bool:
    """Whether a share is larger than another one by more than chance makes it; not where nothing is known of the other."""
    if count < LEAST_FAILED or not before_of:
        return False
    more, all_in = _share(count, of) - _share(before, before_of), (count + before) / (of + before_of)
    return more > max(MORE_FAILED, SURE * math.sqrt(all_in * (1 - all_in) * (1 / of + 1 / before_of)))
