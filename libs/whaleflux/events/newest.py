"""The newest events first, out of a stream that can only be read forwards.

Where they begin is found by counting: a count costs the server about the same wherever it begins. So a page of the newest
takes one count and one reading where little matches, and a few counts more where much does.
"""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux.events.api import MAX_READ, Bus, StoredEvent

GROWTH = 8  # of the part of the stream in which a page is looked for


async def newest(bus: Bus, filters: Sequence[str], *, before: int = 0, limit: int) -> list[StoredEvent]:
    """At most `limit` matching events below sequence `before` (0: from the end), newest first. Raises as `Bus.read` does."""
    whole = await bus.read(filters, limit=0)
    beyond = (await bus.read(filters, start=before, limit=0)).matching if before else 0
    if whole.matching <= beyond:
        return []
    begin, held = 1, whole.matching
    if held - beyond > MAX_READ:
        begin, held = await _beginning(bus, filters, whole.first, before or whole.last + 1, beyond, limit)
    read = await bus.read(filters, start=begin, limit=min(MAX_READ, held - beyond))
    found = [event for event in read.events if not before or event.sequence < before]
    return found[: -limit - 1 : -1]


async def _beginning(
    bus: Bus, filters: Sequence[str], first: int, end: int, beyond: int, limit: int
) -> tuple[int, int]:
    """A sequence from which on at least `limit` and at most MAX_READ events match before `end`, and how many match in all."""
    too_late, span = end, 2 * limit
    while True:
        begin = max(first, end - span)
        held = (await bus.read(filters, start=begin, limit=0)).matching
        if held - beyond >= limit or begin == first:
            break
        too_late, span = begin, span * GROWTH
    while held - beyond > MAX_READ:  # at most one event per sequence: it ends
        middle = (begin + too_late) // 2
        there = (await bus.read(filters, start=middle, limit=0)).matching
        if there - beyond >= limit:
            begin, held = middle, there
        else:
            too_late = middle
    return begin, held
