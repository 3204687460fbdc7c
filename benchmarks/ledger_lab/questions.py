"""A year's ledger, and what dashboards ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.ledger_lab.fleet import BEGIN_MS, MadeFleet
from whaleflux import names
from whaleflux.store.api import Store
from whaleflux.store.election import elect
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger.cache import HOT_DAYS
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.ledger import HourInput, Ledger, open_ledger
from whaleflux_console.ledger.manifest import DAY_MS
from whaleflux_console.ledger.question import Question

FILL_TTL_S = 60.0  # nobody else wants to lead, and rows are made between commits


async def fill(
    folder: Path, store: Store, fleet: MadeFleet, days: int, hot_days: int = HOT_DAYS, *, begin_ms: int = BEGIN_MS
) -> int:
    """A ledger of so many days; returns its rows. Days before the last weeks have one hour, whose rows are the day's: its roll-up is as large."""
    rows = 0
    async with elect(store, "console", "benchmark", ttl_s=FILL_TTL_S) as leader:
        ledger = await open_ledger(LocalFolder(folder), store, leader)
        end_ms = begin_ms + days * DAY_MS
        for day in range(days):
            hours = 24 if day >= days - hot_days else 1
            for hour in range(hours):
                rows += await _close(ledger, fleet, begin_ms + day * DAY_MS + hour * HOUR_MS)
        await ledger.advance(end_ms - 1)
        await ledger.keep_house(end_ms)
    return rows


async def _close(ledger: Ledger, fleet: MadeFleet, hour_ms: int) -> int:
    rows = list(fleet.rows(hour_ms))
    nothing = HourInput(hour_ms, ledger.state.number)
    await ledger.close(nothing, rows)
    return len(rows)


def questions(begin_ms: int, days: int) -> Iterator[tuple[str, Question]]:
    """By what a person sees on the page."""
    end = begin_ms + days * DAY_MS
    month, week = end - 30 * DAY_MS, end - 7 * DAY_MS
    job = names.job("queue-0", f"job-{(end - DAY_MS - BEGIN_MS) // (7 * DAY_MS)}-12")
    yield "year by class", Question(begin_ms, end, ("class",))
    yield "year by day", Question(begin_ms, end, ("day",))
    yield "year by queue", Question(begin_ms, end, ("queue",))
    yield "year by site and GPU class", Question(begin_ms, end, ("site", "gpu_class"))
    yield "year by user, 20 dearest", Question(begin_ms, end, ("user",), limit=20)
    yield (
        "year, 20 jobs with the most avoidable communication",
        Question(begin_ms, end, ("job",), order="comm_avoidable", limit=20),
    )
    yield "a job's year by day and class", Question(begin_ms, end, ("day", "class"), {"job": (job,)})
    yield "year by model", Question(begin_ms, end, ("model",))
    yield "year by node, 20 dearest in idle", Question(begin_ms, end, ("node",), order="idle", limit=20)
    yield "month by day and class", Question(month, end, ("day", "class"))
    yield "month by day and queue", Question(month, end, ("day", "queue"))
    yield (
        "a queue's month by job, 20 dearest",
        Question(month, end, ("job",), {"queue": (names.queue("queue-3"),)}, limit=20),
    )
    yield "week by hour and class", Question(week, end, ("hour", "class"))
    yield "a user's week by job and class", Question(week, end, ("job", "class"), {"user": ("user/person-5",)})
