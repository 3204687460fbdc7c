"""What a unit of work costs: a million trained or served tokens, a run, one that succeeded, a GPU-hour that was useful."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from whaleflux_console.core.facts import HOUR_MS, Ending

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
    input_tokens: int | None = None  # served; None: nobody knows
    output_tokens: int | None = None
    ending: str | None = None  # of Ending; None: it goes on, or serves


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
    input_tokens: int | None  # served, of the runs that say them
    output_tokens: int | None
    micros_per_million_served: int | None  # of both together, by the bills of runs that say both
    micros_per_million_output: int | None  # the same, were prompts free
    succeeded_runs: int
    failed_runs: int
    failed_micros: int  # their bills
    micros_per_successful_run: int | None  # by the bills of all runs that ended, cancelled ones among them


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
    served = [run for run in runs if run.input_tokens is not None and run.output_tokens is not None]
    tokens, paid = sum(run.tokens or 0 for run in told), _bill(served)
    prompts, answers = _tokens(runs, "input_tokens"), _tokens(runs, "output_tokens")
    failed = [run for run in runs if run.ending == Ending.FAILED]
    succeeded = sum(run.ending == Ending.SUCCEEDED for run in runs)
    return UnitCost(
        key=key,
        runs=len(runs),
        bill_micros=bill,
        gpu_ms=sum(run.gpu_ms for run in runs),
        useful_gpu_ms=useful,
        tokens=tokens if told else None,
        micros_per_million_tokens=_over(_MILLION * _bill(told), tokens),
        micros_per_run=bill // len(runs),
        micros_per_useful_gpu_hour=_over(HOUR_MS * bill, useful),
        input_tokens=prompts,
        output_tokens=answers,
        micros_per_million_served=_over(
            _MILLION * paid, (_tokens(served, "input_tokens") or 0) + (_tokens(served, "output_tokens") or 0)
        ),
        micros_per_million_output=_over(_MILLION * paid, _tokens(served, "output_tokens") or 0),
        succeeded_runs=succeeded,
        failed_runs=len(failed),
        failed_micros=_bill(failed),
        micros_per_successful_run=_over(_bill([run for run in runs if run.ending]), succeeded),
    )


def _bill(runs: Iterable[Run]) -> int:
    return sum(run.bill_micros for run in runs)


def _over(micros: int, units: int) -> int | None:
    return micros // units if units else None


def _tokens(runs: Iterable[Run], name: str) -> int | None:
    known = [getattr(run, name) for run in runs if getattr(run, name) is not None]
    return sum(known) if known else None
