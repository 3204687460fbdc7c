"""When lines of a log were written. Pure.

Ranks write their files themselves, so nobody sees each line come: every half second it is noted how long a log is, and when it was
last written to. A line was written between two such marks; it gets the time of the later one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

MAX_MARKS = 16_384


class Mark(NamedTuple):
    """All before `end_bytes` had been written at `at_ns` (Unix time)."""

    end_bytes: int
    at_ns: int


def mark_of(marks: Sequence[Mark], end_bytes: int) -> Mark | None:
    """The mark whose time is that of what ends at `end_bytes`; None: it was written after the last one."""
    index = bisect_left(marks, end_bytes, key=lambda mark: mark.end_bytes)
    return marks[index] if index < len(marks) else None


def end_before(marks: Sequence[Mark], at_ns: int) -> int:
    """How long the log was, by all that is known, before `at_ns`; what lies behind is to be shown from that time on."""
    index = bisect_left(marks, at_ns, key=lambda mark: mark.at_ns)
    return marks[index - 1].end_bytes if index else 0


def thinned(marks: Sequence[Mark], first_kept_byte: int) -> list[Mark]:
    """At most three quarters as many, for a file that holds `MAX_MARKS`: none of what is freed, old times half as exact."""
    kept = marks[bisect_right(marks, first_kept_byte, key=lambda mark: mark.end_bytes) :]
    if len(kept) <= MAX_MARKS // 2:
        return list(kept)
    half = len(kept) // 2
    return [*kept[1:half:2], *kept[half:]]
