"""The time of one step."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timedelta


class Stopwatch:
    """`began` is by the caller's clock. Without a bound no clock is read, and time stands still."""

    def __init__(self, began: datetime, budget_s: float, monotonic: Callable[[], float]) -> None:
        self.began, self._budget_s, self._monotonic = began, budget_s, monotonic
        self.bounded = budget_s != math.inf
        self._start_s = monotonic() if self.bounded else 0.0

    @property
    def passed_s(self) -> float:
        return self._monotonic() - self._start_s if self.bounded else 0.0

    @property
    def over(self) -> bool:
        return self.bounded and self.passed_s >= self._budget_s

    @property
    def now(self) -> datetime:
        """The caller's time when the step began, and what has passed since."""
        return self.began + timedelta(seconds=self.passed_s) if self.bounded else self.began
