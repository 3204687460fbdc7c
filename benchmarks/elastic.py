"""Elastic jobs: completion times of the production scheduler against Pollux, Sia and Gavel on the same jobs, and what its decisions cost.

All share the jobs, their measured speeds, the fleet (64 GPUs, four a machine) and the cost of a restart (15-250 s by application). The
baselines decide in rounds and find the optimum of their own objective (`elastic_policies`); the scheduler is the production step under the
simulator's clock, which decides when something happens. Nobody knows how long jobs run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common import Options, Report, Row, Target, main, percentile
from benchmarks.elastic_jobs import Application, TracedJob, application, workload
from benchmarks.elastic_ours import production, timed_steps
from benchmarks.elastic_policies import Outcome, gavel, pollux, sia, simulate

GPUS, MANY_GPUS = 64, 2048
PUBLISHED = (
    "published for Sia's Philly jobs, which are not "
    "these, on 64 mixed GPUs (SOSP 2023, Table 3): Sia 0.6 / 9.5 h, Pollux 1.0 / 14.9 h, Gavel with tuned jobs 1.9 / 30.0 h"
)
Run = Callable[[Sequence[TracedJob]], Outcome]
POLICIES: dict[str, Run] = {
    "whaleflux": lambda jobs: production(jobs, GPUS)[0],
    "pollux": lambda jobs: simulate(jobs, GPUS, pollux, 60.0),
    "sia": lambda jobs: simulate(jobs, GPUS, sia, 60.0),
    "gavel, tuned sizes": lambda jobs: simulate(jobs, GPUS, gavel, 360.0, fixed=True),
}


def measure(options: Options) -> Report:
    """Average and p99 completion of the Pollux workloads on 64 GPUs; decisions on 2,048."""
    report = Report(
        simulated="restarts, speeds by placement and the passing of time; the scheduler's decisions are real and timed",
        notes=[PUBLISHED],
    )
    folder = options.trace("pollux")
    apps = {path.name: application(path) for path in sorted((folder / "throughput").iterdir())}
    files = _files(folder, options)
    found = {name: _row(name, run, files, apps) for name, run in POLICIES.items()}
    report.rows += [row for row, _ in found.values()]
    ours, best = found["whaleflux"][0], [row for name, (row, _) in found.items() if name != "whaleflux"]
    for figure in ("average_h", "p99_h"):
        report.targets.append(
            Target(f"{figure} at or below the best of them", ours[figure], min(row[figure] for row in best), "h")
        )
    scale = _decisions(files[0], apps, quick=options.quick)
    report.rows.append(scale)
    report.targets.append(Target("p99 of a decision at 2,048 GPUs", scale["p99_ms"], 50.0, "ms", per="python"))
    return report


def _files(folder: Path, options: Options) -> list[Path]:
    if options.extra.workload:
        return [Path(one) for one in options.extra.workload]
    found = sorted((folder / "workloads").glob("*.csv"))
    return found[2:3] if options.quick else found


def _row(name: str, run: Run, files: Sequence[Path], apps: dict[str, Application]) -> tuple[Row, list[Outcome]]:
    begun, outcomes = time.process_time(), [run(workload(path, apps)) for path in files]
    hours = [hour for outcome in outcomes for hour in outcome.jct_h]
    row: Row = {
        "policy": name,
        "jobs": len(hours),
        "average_h": round(float(np.mean(hours)), 3),
        "p99_h": round(float(np.percentile(hours, 99)), 2),
        "p99_mean_of_files_h": round(float(np.mean([np.percentile(one.jct_h, 99) for one in outcomes])), 2),
        "makespan_h": round(float(np.mean([one.makespan_h for one in outcomes])), 2),
        "gpu_h_per_job": round(sum(one.gpu_h for one in outcomes) / len(hours), 2),
        "restarts_per_job": round(sum(one.restarts for one in outcomes) / len(hours), 2),
        "cpu_s": round(time.process_time() - begun, 1),
    }
    return row, outcomes


def _decisions(path: Path, apps: dict[str, Application], *, quick: bool) -> Row:
    """32 times the jobs on 32 times the GPUs, shifted so that they do not come together; the time of each step."""
    times, hours = MANY_GPUS // GPUS, 0.25 if quick else 2.0
    jobs = [
        replace(job, name=f"{job.name}-{copy}", at_s=job.at_s + 7.0 * copy)
        for job in workload(path, apps)
        for copy in range(times)
    ]
    spent_ms = sorted(
        1000 * s for s in timed_steps(sorted(jobs, key=lambda job: (job.at_s, job.name)), MANY_GPUS, hours * 3600)
    )
    return {
        "policy": f"whaleflux, decisions on {MANY_GPUS} GPUs, first {hours:g} h",
        "steps": len(spent_ms),
        "p50_ms": round(percentile(spent_ms, 50), 2),
        "p99_ms": round(percentile(spent_ms, 99), 2),
        "most_ms": round(spent_ms[-1], 1),
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workload",
        action="append",
        metavar="CSV",
        help="instead of the Pollux workloads: name,time,application,num_replicas,batch_size",
    )


if __name__ == "__main__":
    sys.exit(main("elastic", measure, add_arguments=arguments))
