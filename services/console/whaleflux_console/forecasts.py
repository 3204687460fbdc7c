"""What this month will have cost, out of the ledger's days."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.forecast import DAY_MS, HISTORY_DAYS, Forecast, forecast, month_of
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.question import Question

Where = Mapping[str, tuple[str, ...]]
_PPM = 1_000_000


def scope_of(message: Any) -> dict[str, tuple[str, ...]]:
    """Which rows a budget or a question is for: by its queue, user and site, where they are set."""
    site = names.last(message.site) if message.site else ""
    return {
        name: (value,) for name, value in (("queue", message.queue), ("user", message.user), ("site", site)) if value
    }


@dataclass(frozen=True, slots=True)
class Spent:
    """Of a month, until now, by a ledger that has what was reported before `as_of_ms`; 0: nobody knows."""

    micros: int
    as_of_ms: int


@dataclass(frozen=True, slots=True)
class Forecasts:
    """One question to the ledger each: its days tell both what was spent and what will be."""

    answers: Answers
    clock: Clock

    def question(self, where: Where) -> Question:
        """The days that a forecast is made of, whole ones and today."""
        now_ms = round(self.clock.now().timestamp() * 1000)
        end_ms = now_ms // HOUR_MS * HOUR_MS + HOUR_MS
        return Question(max(0, now_ms // DAY_MS * DAY_MS - HISTORY_DAYS * DAY_MS), end_ms, ("day",), where)

    async def spent(self, where: Where) -> Spent:
        """Of this month. Raises Unavailable until the ledger was read once, DeadlineExceeded."""
        start_ms = round(month_of(self.clock.now())[0].timestamp() * 1000)
        asked = replace(self.question(where), start_ms=start_ms, by=())
        answer = await self.answers.ask(asked)
        return Spent(answer.total.bill_micros, answer.as_of_ms)

    async def of(self, where: Where) -> pb.Forecast:
        """This month's. Raises Unavailable until the ledger was read once."""
        now = self.clock.now()
        start, end = month_of(now)
        start_ms, end_ms, now_ms = (round(at.timestamp() * 1000) for at in (start, end, now))
        nobody = any(not values for values in where.values())
        answer = None if nobody else await self.answers.ask(self.question(where))
        days = {int(row.keys[0]): row.bill_micros for row in answer.rows} if answer else {}
        spent = sum(micros for day_ms, micros in days.items() if day_ms >= start_ms)
        found = pb.Forecast(spent_micros=spent)
        found.start_time.FromDatetime(start)
        found.end_time.FromDatetime(end)
        if answer and answer.as_of_ms:
            found.watermark.FromMilliseconds(answer.as_of_ms)
        _add(found, forecast(spent, days, now_ms, end_ms))
        return found


def _add(message: pb.Forecast, found: Forecast | None) -> None:
    if found is None:
        return
    message.expected_micros, message.trials = found.expected_micros, found.trials
    if found.low_micros is not None and found.high_micros is not None and found.error is not None:
        message.low_micros, message.high_micros = found.low_micros, found.high_micros
        message.error_ppm = round(found.error * _PPM)
