"""GPU-hours that idle when each tenant has a partition of its own, and when all share a pool that guarantees them their part.

The partitions hold about twice what is in use on the mean. The pool is made smaller as long as no tenant's p99 wait is longer than in its
partition, with the same jobs; then idle GPU-hours are compared until the last job is submitted. All runs are the production step under
virtual time.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace

from benchmarks import tenants
from benchmarks.common import Options, Report, Row, Target, main
from whaleflux_scheduler.simulation.results import percentile
from whaleflux_scheduler.simulation.runner import SIMULATED
from whaleflux_scheduler.simulation.state import Result

NODES, JOBS, QUICK_JOBS, LOAD = 96, 80_000, 4_000, 0.5
SMALLER = (0.75, 0.65, 0.6, 0.55, 0.5)
NOTICED_S = 60.0  # a wait that is longer by no more than this is as long


def measure(options: Options) -> Report:
    jobs = QUICK_JOBS if options.quick else options.extra.jobs
    static = tenants.read(options.trace("pollux", "philly.csv.gz"), options.extra.nodes, jobs, options.extra.load)
    rows = tuple(row for row in static.trace.rows if row.queue in static.judged and static.fits_at_home(row))
    left_out = len(static.trace.rows) - len(rows)
    static = replace(static, trace=replace(static.trace, rows=rows))
    homes = tenants.homes(static)
    private = {tenant: _waits(static, home, tenant) for tenant, home in homes.items()}
    span_s = static.trace.span_s
    idle_static = _idle_s(static.nodes, sum(tenants.useful_gpu_s(home, span_s) for home in homes.values()), span_s)
    found = [_shown("partitions", static.nodes, idle_static, span_s, 0, 0)]
    best = math.nan
    for part in SMALLER[1:2] if options.quick else SMALLER:
        nodes = round(static.nodes * part)
        pool = tenants.simulate(nodes, tenants.submissions(rows), static.shrunk(nodes).queues())
        idle_s = _idle_s(nodes, tenants.useful_gpu_s(pool, span_s), span_s)
        pooled = {tenant: _waits(static, pool, tenant) for tenant in private}
        worse = [sum(pooled[tenant][at] > private[tenant][at] + NOTICED_S for tenant in private) for at in (0, 1)]
        found.append(_shown(f"pool, {part:.0%}", nodes, idle_s, span_s, *worse))
        if worse[1]:
            break
        best = idle_s
    return Report(
        rows=found,
        targets=[Target("idle_gpu_hours_against_partitions", best / idle_static, 0.5, "x")],
        simulated=SIMULATED,
        notes=[
            f"{len(rows)} jobs of {span_s / 86_400:.0f} days; {left_out} that no partition could hold, or of tenants with few jobs, are left out",
            "a pool counts when no tenant's p99 wait is more than a minute longer than in its partition; mean waits are shown beside it",
        ],
    )


def _waits(static: tenants.Tenants, result: Result, tenant: str) -> tuple[float, float]:
    """Mean and p99, seconds."""
    waited = tenants.waits((job for job in result.outcomes if job.queue == tenant), tenants.warm_up_s(static.trace))
    return (sum(waited) / len(waited), percentile(waited, 99)) if waited else (0.0, 0.0)


def _idle_s(nodes: int, useful_s: float, span_s: float) -> float:
    return nodes * tenants.PER_NODE * span_s - useful_s


def _shown(name: str, nodes: int, idle_s: float, span_s: float, longer_mean: int, longer_p99: int) -> Row:
    gpus = nodes * tenants.PER_NODE
    return {
        "fleet": name,
        "gpus": gpus,
        "idle_gpu_hours": round(idle_s / 3600),
        "idle_percent": round(100 * idle_s / (gpus * span_s), 1),
        "tenants_with_longer_mean_wait": longer_mean,
        "tenants_with_longer_p99_wait": longer_p99,
    }


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=NODES, help="nodes of eight GPUs in all partitions together")
    parser.add_argument("--jobs", type=int, default=JOBS, help="how many jobs of the trace")
    parser.add_argument("--load", type=float, default=LOAD, help="share of the GPUs that they ask for on the mean")


if __name__ == "__main__":
    sys.exit(main("idle_gpus", measure, add_arguments=options_of))
