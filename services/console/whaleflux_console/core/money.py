"""Exact money: what an interval costs, and how a sum is divided. Whole micro-dollars in, whole micro-dollars out, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux_console.core.facts import HOUR_MS, PriceSpan


def charge(span: PriceSpan, start_ms: int, end_ms: int) -> int:
    """What a card costs over the part of [start_ms, end_ms) that lies in the span, micro-dollars.

    Counted from the span's own beginning and rounded down at both ends, so that it telescopes: however time is cut, the pieces sum to the
    whole.
    """
    start, end = max(start_ms, span.start_ms), min(end_ms, span.end_ms)
    if end <= start:
        return 0
    since = span.start_ms
    rate = span.micros_per_hour
    return rate * (end - since) // HOUR_MS - rate * (start - since) // HOUR_MS


def split(total: int, weights: Sequence[int]) -> list[int]:
    """Divides `total` by largest remainder; parts sum to it exactly, each is within 1 of its share, and no weight gets nothing.

    Ties go to the earlier one. A credit (negative total) is divided as its amount is. Raises ValueError where there is something to divide and
    no weight, or a weight is negative.
    """
    if total < 0:
        return [-part for part in split(-total, weights)]
    whole = sum(weights)
    if not total:
        return [0] * len(weights)
    if not whole or min(weights) < 0:
        raise ValueError(
            f"{total} cannot be divided by weights {list(weights)[:8]}: give weights of 0 or more, and one above 0"
        )
    parts = [total * weight // whole for weight in weights]
    left = total - sum(parts)
    if left:
        by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
        for i in by_remainder[:left]:
            parts[i] += 1
    return parts
