"""How far off forecasts of spending are on a real trace, day by day, against last week again.

python -m benchmarks.forecast_error [--quick] --json FILE

The trace's jobs are billed at one price from their start on; each of its clusters is a queue, and all together a fleet. From each day that has two
weeks before it, the ledger's forecast says what the next 7 and 14 days will cost, and what happened says how far off that was.
"""

from __future__ import annotations

import csv
import gzip
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from benchmarks.common import Options, Report, Row, Target, main
from whaleflux_console.core.forecast import DAY_MS, forecast

USD_MICROS_PER_GPU_HOUR = 2_000_000
AHEAD_DAYS, KNOWN_DAYS, WEEK = (7, 14), 14, 7
FEWEST_MICROS_PER_DAY = 24 * USD_MICROS_PER_GPU_HOUR  # in the median; smaller queues are single jobs
EVERYTHING = "all"
MOST_OFF = 1.0  # of the naive way's median
WITHIN = 0.8  # what the range stands for


@dataclass(frozen=True, slots=True)
class Trial:
    """What was foretold from one day on, and what came; micro-dollars. `within`: between low and high; None: no range was given."""

    foretold: int
    naive: int
    came: int
    within: bool | None

    @property
    def errors(self) -> tuple[float, float]:
        """Of the forecast and of the naive way, as shares of what came."""
        return abs(self.foretold - self.came) / self.came, abs(self.naive - self.came) / self.came


def measure(options: Options) -> Report:
    """Tries every day of every queue."""
    spent = spending(options.trace("pollux", "philly.csv.gz"))
    names = [EVERYTHING] if options.quick else [EVERYTHING, *sorted(spent.keys() - {EVERYTHING})]
    rows: list[Row] = []
    targets: list[Target] = []
    for ahead in AHEAD_DAYS:
        whole = list(trials(spent[EVERYTHING], ahead))
        rows.append(_row(EVERYTHING, ahead, whole))
        targets += _targets("fleet", ahead, whole)
        queues = [trial for name in names[1:] for trial in trials(spent[name], ahead)]
        if queues:
            rows.append(_row(f"{len(names) - 1} queues", ahead, queues))
            targets += _targets("queues", ahead, queues)
    days = len(spent[EVERYTHING])
    return Report(
        rows=rows,
        targets=targets,
        simulated="jobs of a published trace at one price; the forecast is the service's",
        notes=[
            f"{days} days; queues whose median day costs less than a GPU's, and days before which two weeks are not whole, are left out",
        ],
    )


def spending(path: Path) -> dict[str, dict[int, int]]:
    """By queue and day (milliseconds), micro-dollars; days between a queue's first and the trace's last submission."""
    found: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    last_ms = 0
    with gzip.open(path, "rt") as lines:
        for job in csv.DictReader(lines):
            start_ms = round(datetime.fromisoformat(job["timestamp"]).replace(tzinfo=UTC).timestamp() * 1000)
            last_ms = max(last_ms, start_ms)
            for day_ms, share_ms in _days(start_ms, start_ms + round(float(job["duration"]) * 1000)):
                micros = share_ms * int(job["num_gpus"]) * USD_MICROS_PER_GPU_HOUR / 3_600_000
                for name in (EVERYTHING, job["cluster"]):
                    found[name][day_ms] += micros
    until_ms = last_ms // DAY_MS * DAY_MS
    whole = {name: _filled(days, until_ms) for name, days in found.items()}
    return {
        name: _grown(days) for name, days in whole.items() if days and median(days.values()) >= FEWEST_MICROS_PER_DAY
    }


def _grown(days: Mapping[int, int]) -> dict[int, int]:
    """Without the trace's beginning, which has none of the jobs that were running: from the first day on that costs half of the median one."""
    first = next(at for at in sorted(days) if days[at] >= median(days.values()) / 2)
    return {at: micros for at, micros in days.items() if at >= first}


def _days(start_ms: int, end_ms: int) -> Iterator[tuple[int, int]]:
    for day_ms in range(start_ms // DAY_MS * DAY_MS, end_ms, DAY_MS):
        yield day_ms, min(end_ms, day_ms + DAY_MS) - max(start_ms, day_ms)


def _filled(days: Mapping[int, float], until_ms: int) -> dict[int, int]:
    """Whole days alone: without the first and the last, which begin and end within."""
    return {at: round(days.get(at, 0.0)) for at in range(min(days) + DAY_MS, until_ms, DAY_MS)}


def trials(days: Mapping[int, int], ahead: int) -> Iterator[Trial]:
    """From each day on that has enough before and behind it."""
    known = sorted(days)
    for place in range(KNOWN_DAYS, len(known) - ahead + 1):
        now_ms = known[place]
        came = sum(days[at] for at in known[place : place + ahead])
        said = forecast(0, {at: days[at] for at in known[:place]}, now_ms, now_ms + ahead * DAY_MS)
        if said is None or came <= 0:
            continue
        low, high = said.low_micros, said.high_micros
        within = low <= came <= high if low is not None and high is not None else None
        naive = sum(days[at] for at in known[place - WEEK : place]) * ahead // WEEK
        yield Trial(said.expected_micros, naive, came, within)


def _row(name: str, ahead: int, found: list[Trial]) -> Row:
    ours, naive = zip(*(trial.errors for trial in found), strict=True)
    return {
        "spending of": name,
        "days ahead": ahead,
        "trials": len(found),
        "error p50": f"{_at(ours, 0.5):.1%}",
        "error p90": f"{_at(ours, 0.9):.1%}",
        "last week p50": f"{_at(naive, 0.5):.1%}",
        "last week p90": f"{_at(naive, 0.9):.1%}",
        "within its range": f"{_within(found):.0%}",
    }


def _targets(name: str, ahead: int, found: list[Trial]) -> list[Target]:
    within = _within(found)
    return [
        Target(f"{name}, {ahead} days: median error over last week's", _ratio(found), MOST_OFF, "x"),
        Target(f"{name}, {ahead} days: within the range", within, WITHIN, "of trials", better="higher"),
    ]


def _within(found: list[Trial]) -> float:
    ranged = [trial.within for trial in found if trial.within is not None]
    return sum(ranged) / len(ranged) if ranged else float("nan")


def _ratio(found: list[Trial]) -> float:
    ours, naive = zip(*(trial.errors for trial in found), strict=True)
    return float(median(ours) / median(naive))


def _at(values: tuple[float, ...], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


if __name__ == "__main__":
    sys.exit(main("forecast_error", measure))
