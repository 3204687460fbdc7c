"""What a month will have cost, out of the days before: weekdays and trend by medians; how far off, by its own past errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

from whaleflux_console.core.facts import HOUR_MS

DAY_MS = 24 * HOUR_MS
HISTORY_DAYS = 120  # that are looked at
FEWEST_DAYS = 3  # whole ones, below which nothing is foretold
_WEEK = 7
_NEWEST_DAYS = 35  # by which weekdays and trend are told
_FEWEST_FOR_WEEKS = 14
_FEWEST_TRIALS = 8  # of the past, below which nobody knows how far off it is
_LOW, _HIGH = 0.1, 0.9  # of the errors: four of five months lie within


@dataclass(frozen=True, slots=True)
class Forecast:
    """Micro-dollars of the whole month. `low` and `high` are None, and `error` with them, where there are too few days to try it on.

    `error` is the median of how far off it was, as a share, when it was tried on `trials` days of the past, for as many days ahead.
    """

    expected_micros: int
    low_micros: int | None
    high_micros: int | None
    error: float | None
    trials: int


def month_of(at: datetime) -> tuple[datetime, datetime]:
    """Its beginning and the next one's, UTC."""
    start = datetime(at.year, at.month, 1, tzinfo=UTC)
    return start, start.replace(year=at.year + at.month // 12, month=at.month % 12 + 1)


def forecast(spent_micros: int, days: Mapping[int, int], now_ms: int, end_ms: int) -> Forecast | None:
    """The month that ends at `end_ms` and cost `spent_micros` until now. `days`: day_ms -> micro-dollars, whole days before now, without gaps.

    None: there are fewer than FEWEST_DAYS.
    """
    whole = _series(days, now_ms)
    if len(whole) < FEWEST_DAYS:
        return None
    ahead = (end_ms - now_ms) / DAY_MS
    rest = _ahead(whole, now_ms // DAY_MS, ahead + now_ms % DAY_MS / DAY_MS, now_ms % DAY_MS / DAY_MS)
    ratios = _trials(whole, now_ms // DAY_MS, max(1, round(ahead)))
    expected = spent_micros + round(rest)
    if len(ratios) < _FEWEST_TRIALS:
        return Forecast(expected, None, None, None, len(ratios))
    low, high = (spent_micros + round(rest * _quantile(ratios, at)) for at in (_LOW, _HIGH))
    error = median(abs(ratio - 1) for ratio in ratios)
    return Forecast(expected, min(low, expected), max(high, expected), error, len(ratios))


def _series(days: Mapping[int, int], now_ms: int) -> list[float]:
    """The newest whole days, oldest first: from the first that is known on, a day that is not named cost nothing."""
    today = now_ms // DAY_MS
    known = [at // DAY_MS for at in days if today - HISTORY_DAYS <= at // DAY_MS < today]
    return [float(days.get(day * DAY_MS, 0)) for day in range(min(known, default=today), today)]


def _ahead(whole: Sequence[float], today: int, length: float, gone: float = 0.0) -> float:
    """What `length` days from the beginning of `today` on cost, less the share of today that is `gone`. `whole` ends with yesterday."""
    newest = whole[-_NEWEST_DAYS:]
    slope = _slope(newest)
    usual = _usual([value + slope * (len(newest) - place) for place, value in enumerate(newest)], today)
    total, at = 0.0, 0
    while at < length:
        share = min(1.0, length - at) - (gone if at == 0 else 0.0)
        total += share * max(0.0, usual[(today + at) % _WEEK] + slope * at)
        at += 1
    return total


def _slope(newest: Sequence[float]) -> float:
    """By how much a day costs more than the one before: the median over all days that are whole weeks apart; 0 of less than two weeks."""
    count = len(newest)
    pairs = [(i, j) for i in range(count) for j in range(i + _WEEK, count, _WEEK)] if count >= _FEWEST_FOR_WEEKS else []
    return median((newest[j] - newest[i]) / (j - i) for i, j in pairs) if pairs else 0.0


def _usual(level: Sequence[float], today: int) -> list[float]:
    """Of each weekday the median, of days brought to today's level; of less than two weeks every day's."""
    if len(level) < _FEWEST_FOR_WEEKS:
        return [median(level[-_WEEK:])] * _WEEK
    first = today - len(level)
    return [median(value for at, value in enumerate(level, first) if at % _WEEK == day) for day in range(_WEEK)]


def _trials(whole: Sequence[float], today: int, length: int) -> list[float]:
    """What `length` days really cost against what was foretold, from each day of the past that has enough before and behind it."""
    ratios = []
    for known in range(_FEWEST_FOR_WEEKS, len(whole) - length + 1):
        foretold = _ahead(whole[:known], today - len(whole) + known, length)
        if foretold > 0:
            ratios.append(sum(whole[known : known + length]) / foretold)
    return ratios


def _quantile(values: Sequence[float], at: float) -> float:
    ordered = sorted(values)
    return ordered[round(at * (len(ordered) - 1))]
