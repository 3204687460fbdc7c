"""Promised starts on the Philly jobs, by the production step, beside FIFO, EASY, 16 reservations and no reservations at all.

Nodes of 8 GPUs; the fleet's size makes the load. What users say of run times: exact, one to five times as much, off by a factor of e either way
(half of them too short), or nothing (learned). Judged are the waits of jobs of 16 GPUs and more; each of 64 and more has a row of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks import baselines_backfill as baselines
from benchmarks.baselines_backfill import TraceJob
from benchmarks.common import Options, Report, Row, Target, main
from whaleflux.fleet.model import Gpu, Link, LinkKind, Node, Price
from whaleflux_scheduler.core.estimates import DEFAULT_S
from whaleflux_scheduler.simulation import estimates, results, traces
from whaleflux_scheduler.simulation.runner import SIMULATED, Simulation
from whaleflux_scheduler.simulation.state import Result
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

SIZE = 8
WARM_UP_S = 3 * 86400.0
DELAYS = Delays(save_s=30.0, restart_s=60.0)
LARGE, LARGEST = 16, 64
QUICK_FROM_DAY = 60.0  # of days with many large jobs


def main_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, nargs="+", help="fleet sizes (default 512 448 400; quick: 256)")
    parser.add_argument(
        "--estimates", nargs="+", choices=sorted(estimates.ESTIMATES), help="what users say (default: all)"
    )
    parser.add_argument("--from-day", type=float, default=0.0, help="leave out what came before (default 0)")
    parser.add_argument("--days", type=float, help="take so many days (default: all; quick: 4)")
    parser.add_argument("--trace", default="philly.csv.gz", help="a file of that format under traces/pollux")


def measure(options: Options) -> Report:
    """Waits, promises and use of the fleet for each fleet size and kind of estimate."""
    extra = options.extra
    days = extra.days or (4.0 if options.quick else None)
    sizes = extra.gpus or ([256] if options.quick else [512, 448, 400])
    kinds = extra.estimates or (["lognormal"] if options.quick else ["exact", "uniform", "lognormal", "none"])
    report = Report(simulated=SIMULATED + "; baselines are re-implemented on nodes of 8, without delays")
    for gpus in sizes:
        from_day = QUICK_FROM_DAY if options.quick and not extra.from_day else extra.from_day
        trace = _window(traces.read(options.trace("pollux", extra.trace), gpus), from_day, days)
        for kind in kinds:
            _compare(report, gpus, kind, list(_submissions(trace, kind, options.seed)))
    return report


def _window(trace: traces.Trace, from_day: float, days: float | None) -> traces.Trace:
    begin_s = from_day * 86400.0
    end_s = float("inf") if days is None else begin_s + days * 86400.0
    return replace(
        trace, rows=tuple(replace(r, at_s=r.at_s - begin_s) for r in trace.rows if begin_s <= r.at_s < end_s)
    )


def _submissions(trace: traces.Trace, kind: str, seed: int) -> Iterator[Submission]:
    """A gang lies on as few nodes as can hold it."""
    for job in trace.submissions(estimates.ESTIMATES[kind], seed):
        yield replace(job, spec=replace(job.spec, max_nodes=-(-job.spec.gpus // SIZE)))


def _node(number: int) -> Node:
    name = f"sites/s/nodes/n{number:04}"
    gpus = tuple(Gpu(i, f"GPU-{number}-{i}", "H100-80GB", 80 * 10**9, (9, 0)) for i in range(SIZE))
    links = tuple(Link(a, b, LinkKind.NVLINK, 300e9) for a in range(SIZE) for b in range(a + 1, SIZE))
    return Node(
        name, "s", gpus=gpus, links=links, leaf=f"l{number // 16}", cpu_millicores=128_000, memory_bytes=10**12,
        network_bytes_per_s=50e9, price=Price(usd_per_gpu_hour=2.0), simulated=True,
    )  # fmt: skip


def _compare(report: Report, gpus: int, kind: str, jobs: list[Submission]) -> None:
    end_s = jobs[-1].at_s
    warm_s = jobs[0].at_s + min(WARM_UP_S, 0.2 * (end_s - jobs[0].at_s))
    load = sum(job.run_s * job.spec.gpus for job in jobs) / (gpus * (end_s - jobs[0].at_s))
    where = {"gpus": gpus, "load": round(load, 2), "estimates": "learned" if kind == "none" else kind}
    starts: dict[str, list[float]] = {}
    begun = time.perf_counter()
    ours = Simulation([_node(n) for n in range(gpus // SIZE)], Workload(jobs, {}, DELAYS)).run()
    spent_s = time.perf_counter() - begun
    outcomes = {outcome.name: outcome for outcome in ours.outcomes}
    starts["whaleflux"] = [outcomes[job.name].start_s for job in jobs]
    summary = results.summary_of(ours)
    trace = [TraceJob(job.at_s, job.run_s, job.spec.gpus, job.spec.expected_s or DEFAULT_S) for job in jobs]
    policies = {
        "fifo": baselines.fifo,
        "easy": baselines.with_reservations(1),
        "16 reservations": baselines.with_reservations(16),
        "work-conserving": baselines.no_reservations,
    }
    broken = {"whaleflux": summary.promises_violated}
    for name, policy in policies.items():
        found = baselines.run(trace, gpus // SIZE, SIZE, policy)
        starts[name] = found.start_s
        broken[name] = sum(found.start_s[number] > at_s + 1.0 for number, at_s in found.promised_s.items())
    busy = {name: _used(jobs, begin, warm_s, end_s) / (gpus * (end_s - warm_s)) for name, begin in starts.items()}
    busy["whaleflux"] = _held(ours, warm_s, end_s) / (gpus * (end_s - warm_s)) - _wasted(summary, gpus, ours.end_s)
    for name, begin in starts.items():
        row: Row = {**where, "policy": name, "utilisation": round(busy[name], 4), "promises broken": broken[name]}
        for title, least, most in (("1-4", 1, 4), ("8-15", 8, 15), (f">={LARGE}", LARGE, 10**6)):
            waits = sorted(
                at - job.at_s
                for at, job in zip(begin, jobs, strict=True)
                if least <= job.spec.gpus <= most and job.at_s >= warm_s
            )
            row[f"{title} mean h"] = round(sum(waits) / len(waits) / 3600, 3) if waits else None
            row[f"{title} p95 h"] = round(results.percentile(waits, 95) / 3600, 3)
        if name == "whaleflux":
            row |= {"suspensions": summary.suspensions, "promised": summary.promised, "wall s": round(spent_s, 1)}
        report.rows.append(row)
    _judge(report, where, jobs, starts, busy, broken, warm_s)


def _used(jobs: Sequence[Submission], starts: Sequence[float], from_s: float, to_s: float) -> float:
    """GPU-seconds held in that time by jobs that run from start to end."""
    return sum(
        job.spec.gpus * max(0.0, min(start + job.run_s, to_s) - max(start, from_s))
        for job, start in zip(jobs, starts, strict=True)
    )


def _held(result: Result, from_s: float, to_s: float) -> float:
    means = result.held.means()
    width_s = result.held.bin_s
    return sum(level * max(0.0, min(begin + width_s, to_s) - max(begin, from_s)) for begin, level in means)


def _wasted(summary: results.Summary, gpus: int, end_s: float) -> float:
    """The part of the fleet's time that was held without work: saves, restarts."""
    return summary.wasted_gpu_hours * 3600 / (gpus * end_s)


def _judge(
    report: Report,
    where: Row,
    jobs: Sequence[Submission],
    starts: dict[str, list[float]],
    busy: dict[str, float],
    broken: dict[str, int],
    warm_s: float,
) -> None:
    label = f"{where['gpus']} GPUs, {where['estimates']}"
    large = [n for n, job in enumerate(jobs) if job.spec.gpus >= LARGE and job.at_s >= warm_s]
    p95 = {
        name: results.percentile(sorted(begin[n] - jobs[n].at_s for n in large), 95) / 3600
        for name, begin in starts.items()
    }
    report.targets += [
        Target(f"{label}: p95 wait of >= {LARGE} GPUs against half of EASY's", p95["whaleflux"], p95["easy"] / 2, "h"),
        Target(f"{label}: promises broken", broken["whaleflux"], 0, "promises"),
        Target(
            f"{label}: utilisation below work-conserving",
            100 * (busy["work-conserving"] - busy["whaleflux"]),
            1.0,
            "points",
        ),
    ]
    for n in large:
        if jobs[n].spec.gpus >= LARGEST:
            waits = ", ".join(f"{name} {(begin[n] - jobs[n].at_s) / 3600:.2f} h" for name, begin in starts.items())
            report.notes.append(
                f"{label}: job of {jobs[n].spec.gpus} GPUs at day {jobs[n].at_s / 86400:.2f} waits {waits}"
            )


if __name__ == "__main__":
    sys.exit(main("backfill", measure, add_arguments=main_arguments))
