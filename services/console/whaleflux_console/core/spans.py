"""What was so from when to when: changes go in as they are seen, spans come out for the hours that they touch. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Span(Generic[V_co]):
    """`value` was so of `key` from start to end; `goes_on`: as far as is known it still is."""

    key: str
    value: V_co
    start_ms: int
    end_ms: int
    goes_on: bool = False


class Spans(Generic[V]):
    """One value per key at a time. What ended is kept until `forget`."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, V]] = {}
        self._ended: list[Span[V]] = []
        self._fresh: dict[tuple[str, int], None] = {}

    def copied(self) -> Spans[V]:
        """As it is now."""
        found: Spans[V] = Spans()
        found._open, found._ended, found._fresh = dict(self._open), list(self._ended), dict(self._fresh)
        return found

    def taken(self) -> Spans[V]:
        """A copy that has what is new; here that begins anew."""
        found, self._fresh = self.copied(), {}
        return found

    def set(self, key: str, value: V | None, now_ms: int, since_ms: int | None = None) -> None:
        """From now on (of a key that is new: from `since_ms` on) it is so; None: not any more."""
        before = self._open.get(key)
        if before is not None and value is not None and before[1] == value:
            self._open[key] = (before[0], value)  # equal in what counts
            return
        if before is not None:
            self._end(key, now_ms)
        if value is not None:
            start_ms = now_ms if before is not None or since_ms is None else min(since_ms, now_ms)
            self._open[key] = (start_ms, value)
            self._fresh[key, start_ms] = None

    def keep_only(self, keys: Iterable[str], now_ms: int) -> None:
        """All other keys are gone."""
        for key in set(self._open) - set(keys):
            self._end(key, now_ms)

    def resume(self, key: str, value: V, start_ms: int) -> None:
        """It was so when somebody last looked, and goes on."""
        self._open[key] = (start_ms, value)

    def known(self, key: str) -> V | None:
        """What it is now."""
        found = self._open.get(key)
        return found[1] if found else None

    @property
    def keys(self) -> tuple[str, ...]:
        """Those that go on."""
        return tuple(self._open)

    def fresh(self, now_ms: int) -> tuple[Span[V], ...]:
        """What began or ended since this was last asked."""
        asked, self._fresh = self._fresh, {}
        if not asked:
            return ()
        everything = [*self._ended, *self._going_on(now_ms, {key for key, _ in asked})]
        return tuple(span for span in everything if (span.key, span.start_ms) in asked)

    def touching(self, start_ms: int, end_ms: int, now_ms: int) -> tuple[Span[V], ...]:
        """All that was so at some time of the window."""
        everything = [*self._ended, *self._going_on(now_ms, self._open)]
        return tuple(span for span in everything if span.start_ms < end_ms and start_ms < span.end_ms)

    def forget(self, before_ms: int) -> None:
        """Lets go what ended before."""
        self._ended = [span for span in self._ended if span.end_ms > before_ms]

    def _going_on(self, now_ms: int, keys: Iterable[str]) -> Iterable[Span[V]]:
        for key in keys:
            start_ms, value = self._open.get(key, (now_ms, None))
            if value is not None and start_ms < now_ms:
                yield Span(key, value, start_ms, now_ms, goes_on=True)

    def _end(self, key: str, now_ms: int) -> None:
        start_ms, value = self._open.pop(key)
        if start_ms < now_ms:
            self._ended.append(Span(key, value, start_ms, now_ms))
            self._fresh[key, start_ms] = None
