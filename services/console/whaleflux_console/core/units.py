"""What a unit of work costs: a million trained tokens, a run, a GPU-hour that was useful."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from whaleflux_console.core.facts import HOUR_MS

_MILLION = 1_000_000
BY = ("job", "model", "queue")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a job (its uid) cost in a window, and what it did. `tokens` is None where its ranks do not say."""

    uid: str
    job: str
    queue: str
    model: str
    bill_micros: int
    gpu_ms: int
    useful_gpu_ms: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Of all runs of one key. A cost is None where there is nothing to divide by; money is whole micro-dollars, rounded down."""

    key: str
    runs: int
    bill_micros: int
    gpu_ms: int
    useful_gpu_ms: int
    tokens: int | None  # of the runs that say them; None: none does
    micros_per_million_tokens: int | None  # by the bills of those runs alone
    micros_per_run: int
    micros_per_useful_gpu_hour: int | None


def unit_costs(runs: Iterable[Run], by: str) -> list[UnitCost]:
    """By one of BY, the dearest first. Runs without such a key are left out."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if key := getattr(run, by):
            found[key].append(run)
    return sorted((_unit(key, those) for key, those in found.items()), key=lambda one: (-one.bill_micros, one.key))


def _unit(key: str, runs: list[Run]) -> UnitCost:
    bill, useful = sum(run.bill_micros for run in runs), sum(run.useful_gpu_ms for run in runs)
    told = [run for run in runs if run.tokens is not None]
    tokens = sum(run.tokens or 0 for run in told)
    return UnitCost(
        key=key,
        runs=len(runs),
        bill_micros=bill,
        gpu_ms=sum(run.gpu_ms for run in runs),
        useful_gpu_ms=useful,
        tokens=tokens if told else None,
        micros_per_million_tokens=_MILLION * sum(run.bill_micros for run in told) // tokens if tokens else None,
        micros_per_run=bill // len(runs),
        micros_per_useful_gpu_hour=HOUR_MS * bill // useful if useful else None,
    )
