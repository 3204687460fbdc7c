"""Injected waste found again: each class alone and all mixed, and where it goes when signals are taken away.

python -m benchmarks.waste_attribution [--quick] --json FILE
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from random import Random

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.ledger_lab.histories import START_MS
from benchmarks.ledger_lab.wasteful_hour import GPUS, Hour, Wasted, WastefulHour
from whaleflux_console.core.bill import rows_of_hour
from whaleflux_console.core.facts import HOUR_MS, Attempt, Facts, Steps
from whaleflux_console.core.rows import CLASSES, CostClass

ALONE = tuple(kind for kind in CLASSES if kind not in {CostClass.USEFUL, CostClass.UNKNOWN})
ALONE_SHARE = 0.2
MIXES, QUICK_MIXES = 40, 4
OFF_POINTS, GAINED_POINTS = 2.0, 0.5


def _reports(change: Callable[[Steps], Steps | None]) -> Callable[[Facts], Facts]:
    return lambda facts: replace(facts, steps=tuple(new for one in facts.steps if (new := change(one))))


def _attempts(change: Callable[[Attempt], Attempt]) -> Callable[[Facts], Facts]:
    return lambda facts: replace(facts, attempts=tuple(change(one) for one in facts.attempts))


_without_scores = _attempts(
    lambda one: replace(one, communication_s=None, best_communication_s=None, best_free_communication_s=None)
)
TAKEN: Mapping[str, Callable[[Facts], Facts]] = {
    "counters": lambda facts: replace(facts, samples=()),
    "reports": lambda facts: replace(facts, steps=()),
    "reports and counters": lambda facts: replace(facts, steps=(), samples=()),
    "reports of one rank, and counters": lambda facts: replace(
        _reports(lambda one: one if one.rank else None)(facts), samples=()
    ),
    "data waits": _reports(lambda one: replace(one, data_ms=None)),
    "communication and its model": lambda facts: _without_scores(
        _reports(lambda one: replace(one, comm_in_node_ms=None, comm_cross_ms=None))(facts)
    ),
    "scores of placements": _without_scores,
    "plan": _attempts(lambda one: replace(one, plan=None)),
}


def measure(options: Options) -> Report:
    """Injects waste into simulated hours, bills them with the service's arithmetic, and compares."""
    random = Random(options.seed)
    mixes = [_mix(random) for _ in range(QUICK_MIXES if options.quick else MIXES)]
    rows = [_found(kind.value, {kind: ALONE_SHARE}, random) for kind in ALONE]
    rows += [_found(f"mixed {i + 1}", mix, random) for i, mix in enumerate(mixes)]
    gains = [row for mix in mixes for row in _taken(mix, random)]
    rows += [
        max((row for row in gains if row["taken away"] == name), key=lambda row: row["off, points"]) for name in TAKEN
    ]
    return Report(
        rows=rows,
        targets=[
            Target(
                "worst class, all signals",
                max(row["off, points"] for row in rows if "taken away" not in row),
                OFF_POINTS,
                "points",
            ),
            Target(
                "gained by a class other than unknown, signals away",
                max(row["off, points"] for row in gains),
                GAINED_POINTS,
                "points",
            ),
        ],
        simulated="GPUs, work and counters; the attribution is the service's",
    )


def _mix(random: Random) -> Wasted:
    """Some of the classes, together at most three quarters."""
    kinds = random.sample(ALONE, random.randint(3, 8))
    drawn = {kind: random.uniform(0.02, 0.3) for kind in kinds}
    scale = min(1.0, 0.75 / sum(drawn.values()))
    return {kind: max(0.04, share * scale) for kind, share in drawn.items()}


def shares(facts: Facts) -> dict[CostClass, float]:
    """What each class is of the hour's bill, percent."""
    rows = rows_of_hour(facts, START_MS)
    bill = sum(row.bill_micros for row in rows)
    return {kind: 100 * sum(row.of(kind) for row in rows) / bill for kind in CLASSES}


def truth(hour: Hour) -> dict[CostClass, float]:
    """What each class is of what happened, percent."""
    return {kind: 100 * hour.truth_ms[kind] / (GPUS * HOUR_MS) for kind in CLASSES}


def _found(name: str, wasted: Wasted, random: Random) -> Row:
    hour = WastefulHour(wasted, random).play()
    is_so, found = truth(hour), shares(hour.facts)
    worst = max(CLASSES, key=lambda kind: abs(found[kind] - is_so[kind]))
    return {
        "injected": name,
        "share, %": sum(is_so[kind] for kind in wasted),
        "found, %": sum(found[kind] for kind in wasted),
        "worst class": worst.value,
        "off, points": abs(found[worst] - is_so[worst]),
        "unknown, %": found[CostClass.UNKNOWN],
    }


def _taken(wasted: Wasted, random: Random) -> Iterator[Row]:
    """With each signal away: how much some class other than unknown has more than it should, and more than it had with all signals.

    Work done again cannot be told from useful work without the plan: it counts as that.
    """
    hour = WastefulHour(wasted, random).play()
    full, is_so = shares(hour.facts), truth(hour)
    for name, take in TAKEN.items():
        found = shares(take(hour.facts))
        most = {kind: max(is_so[kind], full[kind]) for kind in CLASSES}
        if name == "plan":
            most[CostClass.USEFUL] += most[CostClass.RECOMPUTE]
        gained = {kind: found[kind] - most[kind] for kind in CLASSES if kind is not CostClass.UNKNOWN}
        worst = max(gained, key=lambda kind: gained[kind])
        yield {
            "injected": "a mix",
            "taken away": name,
            "worst class": worst.value,
            "off, points": max(0.0, gained[worst]),
            "unknown, %": found[CostClass.UNKNOWN],
        }


if __name__ == "__main__":
    sys.exit(main("waste_attribution", measure))
