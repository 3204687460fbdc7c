"""What this replica shows of the ledger to Prometheus."""

from __future__ import annotations

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.telemetry import Metric
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.rows import CLASSES
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.question import Question

SPENDING_HOURS = 24
SPENDING_EVERY_S = 60.0  # the ledger's newest hour is closed anew about as often


class Figures:
    """Gauges of what the ledger says; call `show` as often as you like."""

    def __init__(self, answers: Answers, clock: Clock) -> None:
        self._answers, self._clock = answers, clock
        self._next_s = float("-inf")

    async def show(self) -> None:
        """Until when usage is known; by class, what the last 24 hours cost, at most once a minute. Raises what `Answers.ask` raises."""
        watermark_ms = self._answers.state.watermark_ms
        if not watermark_ms:  # nothing is in the ledger yet: not known is neither 1970 nor nothing spent
            return
        telemetry.gauge(Metric.LEDGER_WATERMARK).set(watermark_ms / 1000)
        if self._clock.monotonic() < self._next_s:
            return
        self._next_s = self._clock.monotonic() + SPENDING_EVERY_S
        spent = (await self._answers.ask(last_hours(round(self._clock.now().timestamp() * 1000)))).total
        for kind, micros in zip(CLASSES, spent.micros, strict=True):
            telemetry.gauge(Metric.SPENDING).labels(kind.value).set(micros)


def last_hours(now_ms: int) -> Question:
    """The hour that `now_ms` is in and the 23 before it."""
    end_ms = (now_ms // HOUR_MS + 1) * HOUR_MS
    return Question(end_ms - SPENDING_HOURS * HOUR_MS, end_ms)
