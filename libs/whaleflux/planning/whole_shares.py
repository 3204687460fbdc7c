"""Whole numbers dealt out so that nobody takes longer than need be: samples among ranks, layers among stages, micro-batches among replicas.

Pure Python without NumPy: training scripts import it too.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def dealt(total: int, each_s: Sequence[float], least: Sequence[int], most: Sequence[int]) -> tuple[int, ...]:
    """`total` as one whole number for each, between `least` and `most`, so that the longest of number x `each_s` is as short as can be.

    `each_s`: what one unit takes each of them, finite and positive. Exact, in O(n log n) beside the bounds' own size. Raises ValueError where
    the bounds leave no way.
    """
    if not sum(least) <= total <= sum(most) or any(low > high for low, high in zip(least, most, strict=True)):
        raise ValueError(f"{total} is not between what must be taken, {sum(least)}, and what can be, {sum(most)}")
    level_s = _level_s(total, each_s, most)
    found = [
        max(math.floor(min(level_s / unit_s, high)), low) for unit_s, low, high in zip(each_s, least, most, strict=True)
    ]
    _add(found, total, each_s, most)
    _take(found, total, each_s, least)
    return tuple(found)


def _level_s(total: int, each_s: Sequence[float], most: Sequence[int]) -> float:
    """How long all would take if parts could be dealt out: those that are full at that level set aside."""
    left, open_ones = float(total), sorted(range(len(each_s)), key=lambda one: most[one] * each_s[one])
    rate = math.fsum(1.0 / unit_s for unit_s in each_s)
    for one in open_ones:
        if left / rate < most[one] * each_s[one]:
            break
        left, rate = left - most[one], rate - 1.0 / each_s[one]
        if rate <= 0:
            return math.inf
    return max(left, 0.0) / rate


def _add(found: list[int], total: int, each_s: Sequence[float], most: Sequence[int]) -> None:
    """Units that are left, each to whom it delays least."""
    heap = [((found[one] + 1) * each_s[one], one) for one in range(len(found)) if found[one] < most[one]]
    heapq.heapify(heap)
    for _ in range(total - sum(found)):
        _, one = heapq.heappop(heap)
        found[one] += 1
        if found[one] < most[one]:
            heapq.heappush(heap, ((found[one] + 1) * each_s[one], one))


def _take(found: list[int], total: int, each_s: Sequence[float], least: Sequence[int]) -> None:
    """Units too many, each from who takes longest."""
    heap = [(-found[one] * each_s[one], one) for one in range(len(found)) if found[one] > least[one]]
    heapq.heapify(heap)
    for _ in range(sum(found) - total):
        _, one = heapq.heappop(heap)
        found[one] -= 1
        if found[one] > least[one]:
            heapq.heappush(heap, (-found[one] * each_s[one], one))


def longest_s(shares: Sequence[int], each_s: Sequence[float]) -> float:
    """How long the slowest takes."""
    return max(share * unit_s for share, unit_s in zip(shares, each_s, strict=True))


def moved(
    shares: Sequence[int], each_s: Sequence[float], most: Sequence[int], *, gain: float = 0.03, step: float = 0.25
) -> tuple[int, ...]:
    """The next shares after `each_s` was measured: the same ones where nobody gains.

    No share changes by more than `step` of itself (by one, where that is less), so that one odd measurement cannot do much; and nothing
    changes for less than `gain` of the longest time, so that noise moves nothing. Everybody keeps one unit.
    """
    reach = [max(1, math.floor(share * step)) for share in shares]
    least = [max(1, share - far) for share, far in zip(shares, reach, strict=True)]
    top = [min(high, share + far) for share, far, high in zip(shares, reach, most, strict=True)]
    wanted = dealt(sum(shares), each_s, least, top)
    better = longest_s(wanted, each_s) < (1.0 - gain) * longest_s(shares, each_s)
    return wanted if better else tuple(shares)
