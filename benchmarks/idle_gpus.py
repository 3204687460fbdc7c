"""GPU-hours that idle when each tenant has a partition of its own, and when all share a pool that guarantees them their part.

Partitions of two sizes: as large as each tenant's peak, so that nobody waits, and with twice of what is in use on the mean. The pool is made
smaller as long as no tenant's p99 wait is more than a minute longer than in its partition, with the same jobs; then idle GPU-hours are
compared until the last job is submitted. In a pool a tenant is guaranteed its partition's part, but no more than it ever asks for at once: what is
beyond that guarantees nobody anything. All runs are the production step under virtual time. Beside them stands what no schedule without
suspensions could do with fewer GPUs than (`idle_bound`), and the idle GPU-hours of that.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from benchmarks import tenants
from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.idle_bound import BoundJob, fewest_gpus
from whaleflux_scheduler.simulation.results import percentile
from whaleflux_scheduler.simulation.runner import SIMULATED
from whaleflux_scheduler.simulation.state import Result

NODES, JOBS, QUICK_JOBS, LOAD = 56, 80_000, 3_000, 0.84  # what the load is stated for
AT_PEAK, AT_TWICE_THE_MEAN = (0.6, 0.55, 0.5), (0.8, 0.7, 0.64, 0.6, 0.55)
NOTICED_S = 60.0  # a wait that is longer by no more than this is as long


def measure(options: Options) -> Report:
    jobs = QUICK_JOBS if options.quick else options.extra.jobs
    path = options.trace("pollux", "philly.csv.gz")
    peak = tenants.read(path, NODES, jobs, options.extra.load).at_peak()
    found, against = _compared("at peak", peak, AT_PEAK[:1] if options.quick else AT_PEAK)
    targets = [Target("idle_gpu_hours_against_partitions_at_peak", against, 0.5, "x")]
    if not options.quick:
        nodes = 2 * NODES
        twice = tenants.read(path, nodes, jobs, options.extra.load / 2)
        more, against = _compared("twice the mean", twice, AT_TWICE_THE_MEAN)
        found += more
        targets.append(Target("idle_gpu_hours_against_partitions_twice_the_mean", against, 0.5, "x"))
    return Report(
        rows=found,
        targets=targets,
        simulated=SIMULATED,
        notes=[
            f"{jobs} jobs of {peak.trace.span_s / 86_400:.0f} days; jobs that no partition could hold, and tenants with few, are left out",
            "a pool counts when no tenant's p99 wait is more than a minute longer than in its partition",
        ],
    )


def _compared(name: str, static: tenants.Tenants, parts: Sequence[float]) -> tuple[list[Row], float]:
    """What idles in partitions, and in ever smaller pools; and the best of these that counts, against the partitions."""
    rows = tuple(row for row in static.trace.rows if row.queue in static.judged and static.fits_at_home(row))
    static = replace(static, trace=replace(static.trace, rows=rows))
    homes, span_s = tenants.homes(static), static.trace.span_s
    alone = {tenant: _waits(static, home, tenant) for tenant, home in homes.items()}
    idle_alone = _idle_s(static.nodes, sum(tenants.useful_gpu_s(home, span_s) for home in homes.values()), span_s)
    found, best = [_shown(f"partitions, {name}", static.nodes * tenants.PER_NODE, idle_alone, span_s, 0, 0)], math.nan
    for part in parts:
        nodes = round(static.nodes * part)
        pool = tenants.simulate(nodes, tenants.submissions(rows), static.as_needed().shrunk(nodes).queues())
        idle_s = _idle_s(nodes, tenants.useful_gpu_s(pool, span_s), span_s)
        shared = {tenant: _waits(static, pool, tenant) for tenant in alone}
        worse = [sum(shared[tenant][at] > alone[tenant][at] + NOTICED_S for tenant in alone) for at in (0, 1)]
        found.append(_shown(f"pool of {part:.0%} of that", nodes * tenants.PER_NODE, idle_s, span_s, *worse))
        if worse[1]:
            break
        best = idle_s / idle_alone
    gpus = _bound(static, alone)
    useful_s = static.nodes * tenants.PER_NODE * span_s - idle_alone
    found.append(
        _shown("no schedule without suspensions could do with fewer", gpus, gpus * span_s - useful_s, span_s, 0, 0)
    )
    return found, best


def _bound(static: tenants.Tenants, alone: dict[str, tuple[float, float]]) -> int:
    """GPUs that it takes at least so that no p99 is more than a minute longer than alone."""
    rows, from_s = static.trace.rows, tenants.warm_up_s(static.trace)
    judged = Counter(row.queue for row in rows if row.at_s >= from_s)
    excused = {tenant: many - math.ceil(0.99 * many) for tenant, many in judged.items()}
    jobs = (
        BoundJob(row.at_s, row.run_s, row.gpus, row.queue, alone[row.queue][1] + NOTICED_S)
        for row in rows
        if row.at_s >= from_s
    )
    return fewest_gpus(jobs, excused, rows[-1].at_s)


def _waits(static: tenants.Tenants, result: Result, tenant: str) -> tuple[float, float]:
    """Mean and p99, seconds."""
    waited = tenants.waits((job for job in result.outcomes if job.queue == tenant), tenants.warm_up_s(static.trace))
    return (sum(waited) / len(waited), percentile(waited, 99)) if waited else (0.0, 0.0)


def _idle_s(nodes: int, useful_s: float, span_s: float) -> float:
    return nodes * tenants.PER_NODE * span_s - useful_s


def _shown(name: str, gpus: int, idle_s: float, span_s: float, longer_mean: int, longer_p99: int) -> Row:
    return {
        "fleet": name,
        "gpus": gpus,
        "idle_gpu_hours": round(idle_s / 3600),
        "idle_percent": round(100 * idle_s / (gpus * span_s), 1),
        "tenants_with_longer_mean_wait": longer_mean,
        "tenants_with_longer_p99_wait": longer_p99,
    }


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=JOBS, help="how many jobs of the trace")
    parser.add_argument(
        "--load", type=float, default=LOAD, help=f"share of {8 * NODES} GPUs that they ask for on the mean"
    )


if __name__ == "__main__":
    sys.exit(main("idle_gpus", measure, add_arguments=options_of))
