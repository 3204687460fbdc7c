"""Whose turn it is among queues beside one another: by weight, the one that held least beyond its guarantee, of late and now. Pure.

What a queue holds beyond its guarantee is averaged with a half-life: a(t) = k * integral of held(s) * exp(-k * (t - s)) ds, k = ln 2 /
half-life, in GPUs. Its score is the mean of a(t) and of what it holds now, which is the a(t) that it will have in one half-life if it goes on
like that. The average counts what was; what is held now counts at once, so that equal queues that ask together share evenly.

Forward decay (Cormode et al., 2009): instead of letting all scores fall, keys grow: key = log2(score / weight) + t / half-life. The key
of a queue that holds nothing never changes, and any other's only grows until its holdings change. So a heap of keys stays valid as time
goes: whoever takes the least asks whether it has grown since (`TICK` of a half-life at a time), and nobody else is touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TICK = 0.01  # of a half-life: keys are this old at most, which changes a score by less than 1 %


@dataclass(slots=True)
class _Use:
    weight: float = 1.0
    held: float = 0.0  # GPUs beyond the guarantee
    average: float = 0.0  # at `at_s`
    at_s: float = 0.0


class FairShare:
    """Scores of queues, by id. Times are seconds of one clock, which may step back: then nothing decays until it has caught up, or `set_back`."""

    def __init__(self, half_life_s: float) -> None:
        """`half_life_s` 0: only what is held now counts."""
        self._half_life_s = half_life_s
        self._uses: dict[str, _Use] = {}

    def set_weight(self, queue: str, weight: float) -> None:
        self._uses.setdefault(queue, _Use()).weight = weight if weight > 0 else 1.0

    def forget(self, queue: str) -> None:
        self._uses.pop(queue, None)

    def set_back(self, now_s: float) -> None:
        """The clock was ahead: what was averaged by then is the average of now. Keys may fall by that."""
        for use in self._uses.values():
            use.at_s = min(use.at_s, now_s)

    def hold(self, queue: str, gpus: float, now_s: float) -> None:
        """What it holds beyond its guarantee from now on. O(1)."""
        use = self._uses.setdefault(queue, _Use())
        if use.held != gpus:
            use.average, use.at_s = self._average(use, now_s), max(now_s, use.at_s)
            use.held = gpus

    def score(self, queue: str, now_s: float) -> float:
        """GPUs beyond its guarantee that count, not divided by its weight."""
        use = self._uses.get(queue)
        return 0.0 if use is None else (self._average(use, now_s) + use.held) / 2

    def average(self, queue: str, now_s: float) -> float:
        """GPUs that it held beyond its guarantee, averaged with the half-life."""
        use = self._uses.get(queue)
        return 0.0 if use is None else self._average(use, now_s)

    def key(self, queue: str, now_s: float) -> float:
        """The least goes first. Keys of different times may be compared; see the module."""
        use = self._uses.get(queue)
        if use is None:
            return -math.inf
        if self._half_life_s <= 0:
            return use.held / use.weight
        if not use.held:  # the key of what only decays stays the same
            at, weighed = use.at_s / self._half_life_s, use.average / use.weight / 2
            return math.log2(weighed) + at if weighed > 0 else -math.inf
        tick_s = math.floor(now_s / (TICK * self._half_life_s)) * TICK * self._half_life_s
        at_s = max(tick_s, use.at_s)
        score = (self._average(use, at_s) + use.held) / 2
        return math.log2(score / use.weight) + at_s / self._half_life_s

    def _average(self, use: _Use, now_s: float) -> float:
        if self._half_life_s <= 0:
            return use.held
        kept = math.exp2(-max(0.0, now_s - use.at_s) / self._half_life_s)
        return use.held + (use.average - use.held) * kept
