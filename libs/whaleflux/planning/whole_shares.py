"""Whole numbers dealt out so that nobody takes longer than need be: samples among ranks, layers among stages, micro-batches among replicas.

Pure Python without NumPy: training scripts import it too.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_HALVINGS = 80  # of an interval of seconds: to the last bit of a float


def dealt(
    total: int,
    each_s: Sequence[float],
    least: Sequence[int],
    most: Sequence[int],
    fixed_s: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """`total` as one whole number for each, between `least` and `most`, so that the longest of fixed_s + number x each_s is as short as can be.

    `each_s`: what one unit takes each of them, finite and positive; `fixed_s`: what each takes whatever its number (nothing). Exact. Raises
    ValueError where the bounds leave no way.
    """
    if not sum(least) <= total <= sum(most) or any(low > high for low, high in zip(least, most, strict=True)):
        raise ValueError(f"{total} is not between what must be taken, {sum(least)}, and what can be, {sum(most)}")
    ones = [_One(*one) for one in zip(each_s, least, most, fixed_s or [0.0] * len(each_s), strict=True)]
    level_s = _level_s(total, ones)
    found = [math.floor(one.units_in(level_s)) for one in ones]
    _add(found, total, ones)
    _take(found, total, ones)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _One:
    each_s: float
    least: int
    most: int
    fixed_s: float

    def units_in(self, seconds: float) -> float:
        return min(max((seconds - self.fixed_s) / self.each_s, self.least), self.most)

    def takes_s(self, units: int) -> float:
        return self.fixed_s + units * self.each_s


def _level_s(total: int, ones: Sequence[_One]) -> float:
    """How long all would take if units could be cut: never longer than in whole ones."""
    alike = Counter(ones).items()  # thousands of replicas are of a few kinds
    low, high = 0.0, max(one.takes_s(one.most) for one, _ in alike)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if math.fsum(count * one.units_in(middle) for one, count in alike) >= total:
            high = middle
        else:
            low = middle
    return low


def _add(found: list[int], total: int, ones: Sequence[_One]) -> None:
    """Units that are left, each to whom it delays least."""
    heap = [
        (one.takes_s(units + 1), number)
        for number, (units, one) in enumerate(zip(found, ones, strict=True))
        if units < one.most
    ]
    heapq.heapify(heap)
    for _ in range(total - sum(found)):
        _, number = heapq.heappop(heap)
        found[number] += 1
        if found[number] < ones[number].most:
            heapq.heappush(heap, (ones[number].takes_s(found[number] + 1), number))


def _take(found: list[int], total: int, ones: Sequence[_One]) -> None:
    """Units too many (the level is a rounded number), each from who takes longest."""
    heap = [
        (-one.takes_s(units), number)
        for number, (units, one) in enumerate(zip(found, ones, strict=True))
        if units > one.least
    ]
    heapq.heapify(heap)
    for _ in range(sum(found) - total):
        _, number = heapq.heappop(heap)
        found[number] -= 1
        if found[number] > ones[number].least:
            heapq.heappush(heap, (-ones[number].takes_s(found[number]), number))


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
