"""Is any tenant worse off for sharing? Each tenant of a trace in its private cluster, against one pool in which that size is guaranteed.

All runs are the production step under virtual time. The private clusters are the same scheduler with one queue each. The pool's
throughput is compared with the same fleet without tenants: one queue in the order of submission, in which whatever fits goes on
(work-conserving), so that no GPU idles for anybody's sake.
"""

from __future__ import annotations

import argparse
import math
import sys

from benchmarks import tenants
from benchmarks.common import Options, Report, Row, Target, main
from whaleflux_scheduler.simulation.results import percentile
from whaleflux_scheduler.simulation.runner import SIMULATED
from whaleflux_scheduler.simulation.state import Result

NODES, JOBS, QUICK_JOBS, LOAD = 56, 80_000, 4_000, 0.84


def measure(options: Options) -> Report:
    jobs = QUICK_JOBS if options.quick else options.extra.jobs
    shared = tenants.read(options.trace("pollux", "philly.csv.gz"), options.extra.nodes, jobs, options.extra.load)
    pool = tenants.simulate(shared.nodes, tenants.submissions(shared.trace.rows), shared.queues())
    fifo = tenants.simulate(shared.nodes, tenants.submissions(shared.trace.rows, "all"), {})
    rows = [_row(shared, tenant, home, pool) for tenant, home in tenants.homes(shared).items()]
    span_s = shared.trace.span_s
    throughput = tenants.useful_gpu_s(pool, span_s) / tenants.useful_gpu_s(fifo, span_s)
    worst = max((row["pool_p99_s"] / row["private_p99_s"] for row in rows if row["private_p99_s"]), default=math.nan)
    worse = [row["tenant"] for row in rows if row["pool_p99_s"] > row["private_p99_s"]]
    return Report(
        rows=[*rows, _all("pool with guarantees", pool), _all("one queue, work-conserving", fifo)],
        targets=[
            Target("tenants_worse_off_at_p99", len(worse), 0, "tenants"),
            Target("worst_p99_wait_against_private", worst, 1.0, "x"),
            Target("pooled_throughput_against_fifo", throughput, 0.95, "x", better="higher"),
        ],
        simulated=SIMULATED,
        notes=[
            _about(shared, len(rows)),
            f"{sum(pool.outcomes.suspensions)} suspensions in the pool; planner {pool.step_s:.0f} s for {pool.steps} steps",
            *(f"worse off: {', '.join(worse)}" for _ in worse[:1]),
        ],
    )


def _about(shared: tenants.Tenants, judged: int) -> str:
    gpus = shared.nodes * tenants.PER_NODE
    load = shared.trace.gpu_s / shared.trace.span_s / gpus
    return (
        f"{len(shared.trace.rows)} jobs of {shared.trace.span_s / 86_400:.0f} days on {gpus} GPUs, load {load:.2f}; {judged} tenants with at least "
        f"{tenants.FEWEST_JOBS} jobs are judged, on jobs that their private cluster could hold"
    )


def _row(shared: tenants.Tenants, tenant: str, home: Result, pool: Result) -> Row:
    gpus, from_s = shared.guaranteed[tenant] * tenants.PER_NODE, tenants.warm_up_s(shared.trace)
    private = tenants.waits(home.outcomes, from_s)
    pooled = tenants.waits((job for job in pool.outcomes if job.queue == tenant and job.gpus <= gpus), from_s)
    return {
        "tenant": tenant,
        "guaranteed_gpus": gpus,
        "jobs": len(pooled),
        "too_large_alone": shared.jobs[tenant] - len(home.outcomes),
        "private_mean_s": round(sum(private) / max(1, len(private))),
        "pool_mean_s": round(sum(pooled) / max(1, len(pooled))),
        "private_p99_s": round(percentile(private, 99)) if private else 0,
        "pool_p99_s": round(percentile(pooled, 99)) if pooled else 0,
    }


def _all(name: str, result: Result) -> Row:
    waited = tenants.waits(result.outcomes, 0.0)
    return {
        "tenant": name,
        "jobs": len(waited),
        "pool_mean_s": round(sum(waited) / max(1, len(waited))),
        "pool_p99_s": round(percentile(waited, 99)),
    }


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=NODES, help="nodes of eight GPUs in the pool")
    parser.add_argument("--jobs", type=int, default=JOBS, help="how many jobs of the trace")
    parser.add_argument("--load", type=float, default=LOAD, help="share of the GPUs that they ask for on the mean")


if __name__ == "__main__":
    sys.exit(main("fairness", measure, add_arguments=options_of))
