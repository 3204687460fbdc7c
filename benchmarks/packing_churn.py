"""How much of a GPU-sharing fleet is allocated while pods come and go, with moves for at most 1 % of GPU time: openb requests and lives."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.baselines_packing import Policy, typical_pods
from benchmarks.churn_kernel import BY_TABLE, MOVE_BUDGET, MOVE_S, by_time_in_use, run_churn
from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.packing_bound import Cuts, cuts_of, is_share, most_milli, supply_of
from benchmarks.packing_columns import WHOLE_MILLI, DeviceArrays, Ints
from benchmarks.packing_openb import DAY_S, LATEST_LIFE_S, Stream, Workload, draw_stream, read_fleet, read_workload
from benchmarks.placement_lab.idle_table import IdleTable
from benchmarks.placement_lab.sharing_replay import Schedule, learn

WORKLOAD = "default"
LOADS = (1.05, 1.2)
OURS = "learned idle + moves"
POLICIES = (
    (OURS, BY_TABLE, MOVE_BUDGET),
    ("FGD + best-fit + moves", int(Policy.FGD_BEST_FIT), MOVE_BUDGET),
    ("learned idle", BY_TABLE, 0.0),
    ("FGD + best-fit", int(Policy.FGD_BEST_FIT), 0.0),
)
# While pods leave, gangs wait for whole nodes: the fuller node is worth more than in a fleet that only fills up.
RUNNING_TIGHTNESS_MILLI = 1000.0


@dataclass(frozen=True, slots=True)
class Span:
    """Days simulated and, at their end, measured; lives are capped so that the warm-up forgets the empty start."""

    warm_up_days: float
    measured_days: float
    longest_s: float
    samples: int  # moments at which the bound is computed


FULL = Span(8.0, 30.0, LATEST_LIFE_S, 48)
SHORT = Span(0.12, 0.05, 0.1 * DAY_S, 8)  # too short to compare policies by: that the benchmark works


def measure(options: Options) -> Report:
    """Allocated GPU share with Poisson arrivals above capacity, next to a bound."""
    fleet, models = read_fleet(options.trace("openb"))
    work = read_workload(options.trace("openb"), WORKLOAD, models)
    span = SHORT if options.quick else FULL
    report = Report(simulated="the fleet and its time; scores are the production code's")
    policies = POLICIES[:2] if options.quick else POLICIES
    history = by_time_in_use(work, 20_000, span.longest_s, options.seed + 1)
    table = learn(fleet, work.kinds, history, seed=7, schedule=Schedule(rounds=8 if options.quick else 16))
    for load in LOADS[-1:] if options.quick else LOADS:
        rows = list(load_rows(fleet, work, table, load, span, options.seed, policies))
        report.rows += rows
        report.targets += targets(load, {row["policy"]: row for row in rows})
    report.notes = [
        f"a move costs {MOVE_S:.0f} s on the pod's GPUs, which 'net' leaves out; the budget is {MOVE_BUDGET:.0%} of GPU time",
        "bound: at sampled moments, the most that fits of what would run on an endless fleet; CPU, memory and gangs ignored",
        f"lives capped at {span.longest_s / DAY_S:g} days, {span.warm_up_days:g} days of warm-up, {span.measured_days:g} measured",
    ]
    return report


def load_rows(
    fleet: DeviceArrays,
    work: Workload,
    table: IdleTable,
    load: float,
    span: Span,
    seed: int,
    policies: tuple[tuple[str, int, float], ...],
) -> Iterator[Row]:
    capacity = int(fleet.free_milli.sum())
    days = span.warm_up_days + span.measured_days
    stream = draw_stream(work, capacity, load, days, span.longest_s, seed)
    bound = bound_pct(work, stream, capacity, span.warm_up_days * DAY_S, span.samples)
    typical = typical_pods(work.kinds, work.pods)
    fuller = table._replace(tightness_milli=RUNNING_TIGHTNESS_MILLI)
    for label, policy, budget in policies:
        begun = time.perf_counter()
        seen = run_churn(
            fleet,
            work.kinds,
            stream,
            span.warm_up_days * DAY_S,
            fuller,
            typical,
            policy=policy,
            move_budget=budget,
        )
        whole = capacity * (stream.time_s[-1] - span.warm_up_days * DAY_S)
        yield {
            "load": load,
            "policy": label,
            "allocated %": 100 * seen.allocated_milli_s / whole,
            "net %": 100 * (seen.allocated_milli_s - seen.moving_milli_s) / whole,
            "bound %": bound,
            "moving % of GPU time": 100 * seen.moving_milli_s / seen.allocated_milli_s,
            "moves": seen.moves,
            "dropped %": 100 * seen.dropped / seen.arrived,
            "dropped gangs %": 100 * seen.dropped_gangs / max(1, seen.arrived_gangs),
            "arrivals/s": len(stream.kind) / (time.perf_counter() - begun),
        }


def bound_pct(work: Workload, stream: Stream, capacity_milli: int, from_s: float, samples: int) -> float:
    """No policy allocates more, whatever it drops or moves: what it runs at a moment would also run on an endless fleet."""
    cuts = cuts_of(np.unique(work.kinds.gpu_milli[work.pods][is_share(work.kinds)[work.pods]]))
    if cuts is None:
        return 100.0
    moments = np.linspace(from_s, stream.time_s[-1], samples)
    most = [_most_at(work, stream, cuts, capacity_milli, moment) for moment in moments]
    return 100.0 * float(np.mean(most)) / capacity_milli


def _most_at(work: Workload, stream: Stream, cuts: Cuts, capacity_milli: int, moment_s: float) -> float:
    alive: Ints = stream.kind[(stream.time_s <= moment_s) & (stream.time_s + stream.life_s > moment_s)]
    kinds = work.kinds
    whole = int(kinds.gpus[alive][kinds.gpu_milli[alive] == WHOLE_MILLI].sum())
    supply = supply_of(kinds, alive, cuts)
    return most_milli(cuts, supply, np.zeros_like(supply), whole, capacity_milli // WHOLE_MILLI)


def targets(load: float, rows: dict[str, Row]) -> list[Target]:
    ours = rows[OURS]
    return [
        Target(f"net of moves at {load:g}x", ours["net %"], 98.0, "%", "higher"),
        Target(f"distance to the bound at {load:g}x", ours["bound %"] - ours["net %"], 1.0, "points", "lower"),
        Target(f"moves at {load:g}x", ours["moving % of GPU time"], 100 * MOVE_BUDGET, "% of GPU time", "lower"),
    ]


if __name__ == "__main__":
    sys.exit(main("packing_churn", measure))
