"""What the same work costs, rung by rung: blind placement, ours, (with --moves) running jobs moved, idle GPUs released, jobs right-sized; and what each kind of recommendation keeps of its promise.

python -m benchmarks.tco_replay [--quick] [--gpus 128 1024] [--weeks 8 9] [--idle 0.1] [--moves] --json FILE
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.tco_lab import blind, kinds, pools
from benchmarks.tco_lab.speeds import NODE, App, apps
from benchmarks.tco_lab.work import Work, nodes, submissions, week
from whaleflux_console.core.facts import WHOLE_PPM
from whaleflux_console.core.recommend import fewer_gpus, tracking
from whaleflux_console.core.recommend.recommendation import Kind
from whaleflux_console.core.recommend.release_idle import GRACE_MS
from whaleflux_scheduler.core.rebalance import RebalanceRules
from whaleflux_scheduler.simulation import traces
from whaleflux_scheduler.simulation.runner import SIMULATED, Simulation
from whaleflux_scheduler.simulation.workload import Delays, Workload

USD_PER_GPU_HOUR = 2.95  # H100 SXM, on demand: Nebius, catalog v8 snapshot (2025-26), validation/prices.csv
LOAD = 0.9
HELD_OUT = (8, 11)  # weeks of the trace that nothing was tuned on
DONE = 0.95  # owned GPUs are counted until so much of the work is done: the last days belong to a few long jobs
KEPT, SAVED = 0.9, 35.0
CASES = 1_000
DELAYS = Delays(start_s=30.0, save_s=30.0, restart_s=60.0)


def main_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, nargs="+", help="fleet sizes (default 128 1024; quick: 128)")
    parser.add_argument("--weeks", type=int, nargs="+", help=f"weeks of the trace, from 0 (default {HELD_OUT})")
    parser.add_argument(
        "--idle", type=float, nargs="+", help="mean idle time over run time (default 0 0.1 0.2; quick: 0.1)"
    )
    parser.add_argument(
        "--moves", action="store_true", help="also move running jobs, each minute's look: minutes of CPU a rung"
    )


@dataclass(frozen=True, slots=True)
class Ran:
    """One rung: GPU-seconds that were paid for, and when so much of the work was done."""

    held_gpu_s: float
    done_s: float
    p95_s: float


def measure(options: Options) -> Report:
    """Dollars per GPU-hour of useful work on Philly's jobs with Pollux's speeds, by elastic and by owned GPUs."""
    known = apps(options.file("traces", "pollux", "throughput"))
    report = Report(
        simulated=f"{SIMULATED}; idle time and which application a job is are drawn, sizes, times and speeds are traces'"
    )
    sizes = options.extra.gpus or ([128] if options.quick else [128, 1024])
    weeks = options.extra.weeks or (HELD_OUT[:1] if options.quick else HELD_OUT)
    for gpus in sizes:
        trace = traces.read(options.trace("pollux", "philly.csv.gz"), gpus // 2)
        for idle in options.extra.idle or ([0.1] if options.quick else [0.0, 0.1, 0.2]):
            for number in weeks:
                work = week(trace, number, LOAD, gpus, idle, known, options.seed + number)
                report.rows += _ladder(work, gpus, number, idle, RebalanceRules() if options.extra.moves else None)
    cases = _cases(known, CASES, options.seed)
    ours = (
        pools.cases(options.seed, back=10, together=2, reserved=10)
        if options.quick
        else pools.cases(options.seed, back=40, together=20, reserved=40)
    )
    cases += [case for case in ours if case.promised]
    report.rows += [_kind(kind, cases) for kind in dict.fromkeys(case.kind for case in cases)]
    report.targets += [
        Target(f"replayed/promised, {row['kind']}", row["kept"], KEPT, "", "higher")
        for row in report.rows
        if "kind" in row
    ]
    report.targets += _savings(report.rows)
    return report


def _ladder(work: Sequence[Work], gpus: int, number: int, idle: float, rules: RebalanceRules | None) -> list[Row]:
    """Each rung with all below it."""
    sized = [_right_sized(_released(one)) for one in work]
    rungs = {
        "blind": _blind(work, gpus),
        "placement": _ours(work, gpus, None),
        **({"moves": _ours(work, gpus, rules)} if rules else {}),
        "idle released": _ours([_released(one) for one in work], gpus, rules),
        "right-sized": _ours(sized, gpus, rules),
    }
    useful_h = sum(one.useful_gpu_s for one in work) / 3600
    base = rungs["blind"]
    rows, before = list[Row](), base
    for name, ran in rungs.items():
        rows.append(
            {
                "gpus": gpus, "week": number, "idle": idle, "jobs": len(work), "rung": name,
                "elastic $/h": round(ran.held_gpu_s / 3600 * USD_PER_GPU_HOUR / useful_h, 3),
                "elastic saved %": _percent(base.held_gpu_s, ran.held_gpu_s),
                "its share": round(_percent(base.held_gpu_s, ran.held_gpu_s) - _percent(base.held_gpu_s, before.held_gpu_s), 1),
                "owned $/h": round(gpus * ran.done_s / 3600 * USD_PER_GPU_HOUR / (DONE * useful_h), 3),
                "owned saved %": _percent(base.done_s, ran.done_s),
                "p95 completion h": round(ran.p95_s / 3600, 1),
            }
        )  # fmt: skip
        before = ran
    return rows


def _percent(before: float, after: float) -> float:
    return round(100 * (1 - after / before), 1)


def _blind(work: Sequence[Work], gpus: int) -> Ran:
    done = blind.run(work, gpus)
    held = sum((ran.end_s - ran.start_s + DELAYS.start_s) * one.gpus for one, ran in zip(work, done, strict=True))
    return _ran(work, held, [ran.end_s for ran in done])


def _ours(work: Sequence[Work], gpus: int, rules: RebalanceRules | None) -> Ran:
    """By the production scheduler's step."""
    simulation = Simulation(
        nodes(gpus, USD_PER_GPU_HOUR), Workload(list(submissions(work)), {}, DELAYS), rebalance=rules
    )
    result = simulation.run()
    return _ran(work, result.held.total, [one.end_s for one in result.outcomes])


def _ran(work: Sequence[Work], held_gpu_s: float, ends: Sequence[float]) -> Ran:
    whole, so_far, done_s = sum(one.useful_gpu_s for one in work), 0.0, 0.0
    for end_s, one in sorted(zip(ends, work, strict=True), key=lambda pair: pair[0]):
        so_far, done_s = so_far + one.useful_gpu_s, end_s
        if so_far >= DONE * whole:
            break
    took = sorted(end_s - one.at_s for end_s, one in zip(ends, work, strict=True))
    return Ran(held_gpu_s, done_s, took[int(0.95 * (len(took) - 1))])


def _released(one: Work) -> Work:
    """Its GPUs go back half an hour into its rest."""
    return replace(one, idle_s=min(one.idle_s, GRACE_MS / 1000))


def _right_sized(one: Work) -> Work:
    """On half of its GPUs where the console says so and both speeds were measured: for the same work at the same global batch."""
    best, half = one.fewest_nodes, -(-one.gpus // 2 // NODE)
    sizes = [size for size in one.app.batches(one.gpus, best) if 2 * size in one.app.batches(one.gpus // 2, half)]
    if one.gpus < 2 or not sizes:
        return one
    batch = sizes[len(sizes) // 2]
    now, then = one.app.step(one.gpus, best, batch), one.app.step(one.gpus // 2, half, 2 * batch)
    name = "comm_in_node" if best == 1 else "comm_structural"
    part = kinds.part(one.run_s, one.gpus, **{name: one.run_s * min(1.0, now.sync_s / now.step_s)})
    if not kinds.promised(fewer_gpus.find, [part], one.gpus):
        return one
    return replace(one, gpus=one.gpus // 2, run_s=one.run_s * then.step_s / now.step_s)


def _cases(known: Sequence[App], count: int, seed: int) -> list[kinds.Case]:
    drawn = random.Random(seed)
    found = list[kinds.Case]()
    for _ in range(count):
        found += [
            kinds.idle(drawn),
            kinds.island(drawn, drawn.choice(known)),
            kinds.fewer(drawn, drawn.choice(known)),
            kinds.interval(drawn),
        ]
    return [case for case in found if case.promised]


def _kind(kind: str, cases: Sequence[kinds.Case]) -> Row:
    """The first half of the cases, then the second with what the console learned of the first."""
    mine = [case for case in cases if case.kind == kind]
    early, late = mine[: len(mine) // 2], mine[len(mine) // 2 :]
    told = ((Kind(kind), round(case.promised), round(case.replayed)) for case in early)
    trust = tracking.records(told)[Kind(kind)].trust_ppm / WHOLE_PPM
    return {
        "kind": kind,
        "cases": len(mine),
        "kept at first": round(_kept(early), 3),
        "trust then": round(trust, 3),
        "kept": round(_kept(late) / trust, 3),
        "cases that saved less than 0.9": sum(case.replayed < KEPT * trust * case.promised for case in late),
    }


def _kept(cases: Sequence[kinds.Case]) -> float:
    return sum(case.replayed for case in cases) / sum(case.promised for case in cases)


def _savings(rows: Sequence[Row]) -> list[Target]:
    last = [row for row in rows if row.get("rung") == "right-sized"]
    return [
        Target(f"saved, {how}, worst", min(row[f"{how} saved %"] for row in last), SAVED, "%", "higher")
        for how in ("elastic", "owned")
    ]


if __name__ == "__main__":
    sys.exit(main("tco_replay", measure, add_arguments=main_arguments))
