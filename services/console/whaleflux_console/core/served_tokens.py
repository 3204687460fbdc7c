"""What engines served, by hour, out of counters that only grow while an engine lives. Pure.

A counter is read now and then; what it grew by since it was read last is of the hour in which it is read. Both are kept together, so whoever goes on
from what was told counts nothing twice and, while the engine lives, leaves nothing out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from whaleflux_console.core.facts import HOUR_MS, Served

TOLD_EVERY_MS = 300_000  # within an hour; what is not told yet is still in the counters
YOUNG_MS = 2 * HOUR_MS  # of an engine whose counters were never read: all that it counts is of about now
_MOST_KNOWN = 50_000  # engines


@dataclass(frozen=True, slots=True)
class Counters:
    """Tokens since the engine began, at least one of them known."""

    input_tokens: int | None
    output_tokens: int | None


class ServedTokens:
    """Of all replicas. Instants are the caller's."""

    def __init__(self) -> None:
        self._hours: dict[int, dict[str, Served]] = {}  # by uid
        self._newest: dict[str, Served] = {}  # that was read last, the one that was read longest ago first
        self._told_ms: dict[int, int] = {}  # by hour, when it was told last
        self._fresh: set[int] = set()

    def copied(self) -> ServedTokens:
        """As they are now."""
        found = ServedTokens()
        found._hours = {hour: dict(served) for hour, served in self._hours.items()}
        found._newest, found._told_ms, found._fresh = dict(self._newest), dict(self._told_ms), set(self._fresh)
        return found

    def taken(self, now_ms: int) -> ServedTokens:
        """A copy that has what is `fresh` now; here that begins anew."""
        found = self.copied()
        self.fresh(now_ms)
        return found

    def read(self, uid: str, attempt: int, counters: Counters, now_ms: int, began_ms: int) -> None:
        """Its counters are so now. `began_ms`: when the attempt was placed."""
        hour_ms = now_ms // HOUR_MS * HOUR_MS
        last = self._newest.pop(uid, None)
        same = last if last is not None and last.attempt == attempt else None
        grew = _Growth(same, young=last is not None or now_ms - began_ms < YOUNG_MS)
        before = self._hours.get(hour_ms, {}).get(uid)
        served = Served(
            uid,
            attempt,
            hour_ms,
            _sum(before, before.input_tokens if before else None, grew.by(counters.input_tokens, "read_input")),
            _sum(before, before.output_tokens if before else None, grew.by(counters.output_tokens, "read_output")),
            counters.input_tokens if counters.input_tokens is not None else grew.last("read_input"),
            counters.output_tokens if counters.output_tokens is not None else grew.last("read_output"),
        )
        self._newest[uid] = served
        while len(self._newest) > _MOST_KNOWN:
            del self._newest[next(iter(self._newest))]
        if served != before:
            self._hours.setdefault(hour_ms, {})[uid] = served
            self._fresh.add(hour_ms)

    def resume(self, told: Iterable[Served]) -> None:
        """Goes on from what was told."""
        for one in sorted(told, key=lambda one: one.hour_ms):
            self._hours.setdefault(one.hour_ms, {})[one.uid] = self._newest[one.uid] = one

    def fresh(self, now_ms: int) -> dict[int, tuple[Served, ...]]:
        """By hour, what changed and was not told for a while."""
        due = [hour for hour in self._fresh if now_ms - self._told_ms.get(hour, 0) >= TOLD_EVERY_MS]
        self._fresh.difference_update(due)
        self._told_ms |= dict.fromkeys(due, now_ms)
        return {hour: self.of_hour(hour) for hour in due}

    def of_hour(self, hour_ms: int) -> tuple[Served, ...]:
        return tuple(self._hours.get(hour_ms, {}).values())

    def forget(self, before_ms: int) -> None:
        """Hours before are told."""
        for hour in [hour for hour in self._hours if hour < before_ms]:
            del self._hours[hour]
            self._fresh.discard(hour)
            self._told_ms.pop(hour, None)


@dataclass(frozen=True, slots=True)
class _Growth:
    """Since the engine was read last (None: never). `young`: what a counter says that was not there before is of about now."""

    before: Served | None
    young: bool

    def last(self, name: str) -> int | None:
        return getattr(self.before, name) if self.before is not None else None

    def by(self, now: int | None, name: str) -> int | None:
        """None: nobody knows."""
        last = self.last(name)
        if now is None:
            return None
        if last is None:
            return now if self.young else None
        return now - last if now >= last else now  # it began anew


def _sum(before: Served | None, known: int | None, more: int | None) -> int | None:
    """Of an hour of which something is not known the sum is not either."""
    if more is None or (before is not None and known is None):
        return None
    return (known or 0) + more
