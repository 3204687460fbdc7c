"""When an hour is closed, when it is closed again, and which files may go. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger.manifest import DAY_MS, File, Kind, State, day_of

MINUTE_MS = 60_000
MAX_DUE = 48  # hours of one pass: the next takes the others


class HourState(StrEnum):
    """Open until everything that arrived in time was read; restated when more came or became known."""

    OPEN = "open"
    CLOSED = "closed"
    RESTATED = "restated"


@dataclass(frozen=True, slots=True)
class Rules:
    """Settings of the ledger, as the core wants them."""

    close_after_ms: int = 15 * MINUTE_MS  # behind the hour's end, by the watermark
    restate_every_ms: int = 15 * MINUTE_MS  # of one hour
    raw_days: int = 14
    minute_days: int = 90
    hour_days: int = 1_096


def state_of(state: State, hour_ms: int) -> HourState:
    rows = state.newest(Kind.HOURS, hour_ms)
    if rows is None or not rows.version:  # of one that is open the rows are as of now
        return HourState.OPEN
    return HourState.CLOSED if rows.version == 1 else HourState.RESTATED


def open_hours(state: State) -> tuple[int, ...]:
    """Hours of which something is told and that are not closed yet, oldest first."""
    return tuple(sorted(hour for hour in state.unsettled if state_of(state, hour) is HourState.OPEN))


def due(state: State, rules: Rules, closed_ms: Mapping[int, int]) -> tuple[int, ...]:
    """Hours to close or to restate, oldest first. `closed_ms`: by which watermark an hour was last closed, or put off, as far as it is remembered."""
    ready_ms = state.watermark_ms - HOUR_MS - rules.close_after_ms

    def is_due(hour_ms: int) -> bool:
        if hour_ms in closed_ms and state.watermark_ms < closed_ms[hour_ms] + rules.restate_every_ms:
            return False
        return hour_ms <= ready_ms or state_of(state, hour_ms) is not HourState.OPEN

    return tuple(sorted(filter(is_due, state.unsettled)))[:MAX_DUE]


def unrolled_days(state: State, rules: Rules) -> tuple[int, ...]:
    """Days that are over, none of whose hours waits to be closed for the first time, and whose roll-up is not there or older than an hour of it."""
    over_ms = state.watermark_ms - DAY_MS - HOUR_MS - rules.close_after_ms
    waiting = {day_of(hour) for hour in state.unsettled if state_of(state, hour) is HourState.OPEN}
    return tuple(sorted(day for day in state.unrolled - waiting if day <= over_ms))


def outlived(state: State, rules: Rules, now_ms: int) -> tuple[File, ...]:
    """Files that may go: too old, and what is rolled up from them is there and newer. Looks at every file: ask once a day."""
    kept_days = dict(_kept_days(rules))
    return tuple(
        file
        for file in state.files.values()
        if file.kind in kept_days
        and file.start_ms + kept_days[file.kind] * DAY_MS <= now_ms
        and _is_rolled_up(state, file)
    )


def _is_rolled_up(state: State, file: File) -> bool:
    if file.start_ms in state.unsettled:
        return False
    if file.kind in {Kind.HOURS, Kind.FACTS}:
        return (
            day_of(file.start_ms) not in state.unrolled and state.newest(Kind.DAYS, day_of(file.start_ms)) is not None
        )
    return state_of(state, file.start_ms) is not HourState.OPEN


def _kept_days(rules: Rules) -> Iterator[tuple[Kind, int]]:
    yield Kind.RAW, rules.raw_days
    yield Kind.STEPS, rules.raw_days
    yield Kind.MINUTES, rules.minute_days
    yield Kind.WORK, rules.minute_days
    yield Kind.FACTS, rules.hour_days
    yield Kind.PROGRESS, rules.hour_days
    yield Kind.HOURS, rules.hour_days
    yield Kind.RUNS, rules.hour_days
