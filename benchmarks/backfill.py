"""Promised starts on the Philly jobs, by the production step, beside FIFO, EASY, 16 reservations and no reservations at all.

Nodes of 8 GPUs; the fleet's size makes the load. What users say of run times: exact, one to five times as much, off by a factor of e either way
(half of them too short), off by 2 to 10 either way, or nothing: then all policies learn the same from the jobs that have ended. Judged are the
waits of jobs of 16 GPUs and more; each of 64 and more is listed. A `delay` is the whole time that a job did not run, suspensions included.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.baselines_backfill import BASELINES, Predictor, Said, TraceJob, run
from benchmarks.common import Options, Report, Row, Target, main
from whaleflux.fleet.model import Gpu, Link, LinkKind, Node, Price
from whaleflux_scheduler.core.estimates import DEFAULT_S, Estimates
from whaleflux_scheduler.core.model import Job, JobState
from whaleflux_scheduler.simulation import estimates, results, traces
from whaleflux_scheduler.simulation.runner import SIMULATED, Simulation
from whaleflux_scheduler.simulation.state import Result
from whaleflux_scheduler.simulation.timeline import instant
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

SIZE = 8
WARM_UP_S = 3 * 86400.0
PROMISE_TOLERANCE_S = 1.0
DELAYS = Delays(save_s=30.0, restart_s=60.0)
LARGE, LARGEST = 16, 64
COMPARED = ("fifo", "easy", "16 reservations", "work-conserving")
QUICK_FROM_DAY, QUICK_DAYS, QUICK_GPUS = 86.0, 8.0, 320  # days with many large jobs


def main_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, nargs="+", help="fleet sizes (default 512 448 400; quick: 320)")
    parser.add_argument(
        "--estimates", nargs="+", choices=sorted(estimates.ESTIMATES), help="what users say (default: all)"
    )
    parser.add_argument("--from-day", type=float, default=0.0, help="leave out what came before (default 0)")
    parser.add_argument("--days", type=float, help="take so many days (default: all; quick: 8)")
    parser.add_argument(
        "--policies",
        nargs="*",
        choices=sorted(BASELINES),
        default=COMPARED,
        help="what to compare with (default: all but conservative)",
    )
    parser.add_argument(
        "--load", type=float, help="move the jobs closer together or farther apart to this load of the fleet"
    )
    parser.add_argument("--trace", default="philly.csv.gz", help="a file of that format under traces/pollux")


def measure(options: Options) -> Report:
    """Waits, promises and use of the fleet for each fleet size and kind of estimate."""
    extra = options.extra
    days = extra.days or (QUICK_DAYS if options.quick else None)
    sizes = extra.gpus or ([QUICK_GPUS] if options.quick else [512, 448, 400])
    kinds = extra.estimates or (["lognormal"] if options.quick else list(estimates.ESTIMATES))
    report = Report(simulated=SIMULATED + "; baselines are re-implemented on nodes of 8, without delays")
    for gpus in sizes:
        from_day = QUICK_FROM_DAY if options.quick and not extra.from_day else extra.from_day
        trace = _window(traces.read(options.trace("pollux", extra.trace), gpus), from_day, days)
        trace = trace.at_load(extra.load, gpus) if extra.load else trace
        for kind in kinds:
            _compare(report, Case(gpus, kind, list(_submissions(trace, kind, options.seed))), extra.policies)
    return report


def _window(trace: traces.Trace, from_day: float, days: float | None) -> traces.Trace:
    begin_s = from_day * 86400.0
    end_s = float("inf") if days is None else begin_s + days * 86400.0
    return replace(
        trace, rows=tuple(replace(r, at_s=r.at_s - begin_s) for r in trace.rows if begin_s <= r.at_s < end_s)
    )


def _submissions(trace: traces.Trace, kind: str, seed: int) -> Iterator[Submission]:
    """A gang lies on as few nodes as can hold it; all save checkpoints."""
    for job in trace.submissions(estimates.ESTIMATES[kind], seed):
        nodes = -(-job.spec.gpus // SIZE)
        yield replace(job, spec=replace(job.spec, max_nodes=nodes, checkpoint_every_steps=100))


def _node(number: int) -> Node:
    name = f"sites/s/nodes/n{number:04}"
    gpus = tuple(Gpu(i, f"GPU-{number}-{i}", "H100-80GB", 80 * 10**9, (9, 0)) for i in range(SIZE))
    links = tuple(Link(a, b, LinkKind.NVLINK, 300e9) for a in range(SIZE) for b in range(a + 1, SIZE))
    return Node(
        name, "s", gpus=gpus, links=links, leaf=f"l{number // 16}", cpu_millicores=128_000, memory_bytes=10**12,
        network_bytes_per_s=50e9, price=Price(usd_per_gpu_hour=2.0), simulated=True,
    )  # fmt: skip


class Learned:
    """What the scheduler learns from jobs that have ended, told to a baseline."""

    def __init__(self, jobs: Sequence[Submission]) -> None:
        self._submitted, self._known = jobs, Estimates()
        self._jobs = [Job(one.name, one.spec, JobState.QUEUED, instant(one.at_s), uid=one.name) for one in jobs]

    def guess_s(self, number: int, ran_s: float) -> float:
        return max(1.0, self._known.of(self._jobs[number], ran_s).safe_s)

    def ended(self, number: int) -> None:
        run_s = self._submitted[number].run_s
        self._known.learn(replace(self._jobs[number], state=JobState.SUCCEEDED, run_s=run_s))


@dataclass(slots=True)
class Found:
    """One policy's run: when each job started, and how long it did not run in all, in the order of the jobs."""

    start_s: list[float]
    delay_s: list[float]
    promised_s: dict[int, float]
    utilisation: float
    more: Row = field(default_factory=dict)

    def broken(self) -> int:
        return sum(self.start_s[number] > at_s + PROMISE_TOLERANCE_S for number, at_s in self.promised_s.items())


@dataclass(frozen=True, slots=True)
class Case:
    """Jobs on a fleet of that many GPUs; counted are those that come after the warm-up, and the fleet's use up to the last one."""

    gpus: int
    kind: str
    jobs: Sequence[Submission]

    @property
    def end_s(self) -> float:
        return self.jobs[-1].at_s

    @property
    def warm_s(self) -> float:
        begin_s = self.jobs[0].at_s
        return begin_s + min(WARM_UP_S, 0.2 * (self.end_s - begin_s))

    @property
    def load(self) -> float:
        return sum(job.run_s * job.spec.gpus for job in self.jobs) / (self.gpus * (self.end_s - self.jobs[0].at_s))

    @property
    def counted_gpu_s(self) -> float:
        return self.gpus * (self.end_s - self.warm_s)

    def counted(self, least: int, most: int = 10**9) -> list[int]:
        return [n for n, job in enumerate(self.jobs) if least <= job.spec.gpus <= most and job.at_s >= self.warm_s]

    def p95_h(self, found: Found) -> float:
        waits = (found.start_s[n] - self.jobs[n].at_s for n in self.counted(LARGE))
        return results.percentile(sorted(waits), 95) / 3600


def _compare(report: Report, case: Case, policies: Sequence[str]) -> None:
    found = {"whaleflux": _ours(case)} | {name: _baseline(case, name) for name in policies}
    where = {
        "gpus": case.gpus,
        "load": round(case.load, 2),
        "estimates": "learned" if case.kind == "none" else case.kind,
    }
    report.rows += [where | {"policy": name} | _row(case, one) for name, one in found.items()]
    _judge(report, f"{case.gpus} GPUs, {where['estimates']}", case, found)


def _ours(case: Case) -> Found:
    begun = time.thread_time()
    simulation = Simulation([_node(n) for n in range(case.gpus // SIZE)], Workload(case.jobs, {}, DELAYS))
    result = simulation.run()
    outcomes = {outcome.name: outcome for outcome in result.outcomes}
    ours, summary = [outcomes[job.name] for job in case.jobs], results.summary_of(result)
    wasted = summary.wasted_gpu_hours * 3600 / (case.gpus * result.end_s)  # held without work: saves, restarts
    return Found(
        [one.start_s for one in ours],
        [one.completion_s - job.run_s for one, job in zip(ours, case.jobs, strict=True)],
        {number: one.promised_s for number, one in enumerate(ours) if not math.isnan(one.promised_s)},
        _held(result, case.warm_s, case.end_s) / case.counted_gpu_s - wasted,
        {"suspensions": summary.suspensions, "cpu s": round(time.thread_time() - begun, 1)},
    )


def _held(result: Result, from_s: float, to_s: float) -> float:
    means = result.held.means()
    width_s = result.held.bin_s
    return sum(level * max(0.0, min(begin + width_s, to_s) - max(begin, from_s)) for begin, level in means)


def _baseline(case: Case, name: str) -> Found:
    begun = time.thread_time()
    jobs = [TraceJob(job.at_s, job.run_s, job.spec.gpus, job.spec.expected_s or DEFAULT_S) for job in case.jobs]
    told: Predictor = Learned(case.jobs) if case.kind == "none" else Said(jobs)
    made = run(jobs, case.gpus // SIZE, SIZE, BASELINES[name](), told)
    waits = [start_s - job.at_s for start_s, job in zip(made.start_s, jobs, strict=True)]
    used = sum(
        job.gpus * max(0.0, min(start_s + job.run_s, case.end_s) - max(start_s, case.warm_s))
        for job, start_s in zip(jobs, made.start_s, strict=True)
    )
    spent = {"cpu s": round(time.thread_time() - begun, 1)}
    return Found(made.start_s, waits, made.promised_s, used / case.counted_gpu_s, spent)


def _row(case: Case, found: Found) -> Row:
    row: Row = {"utilisation": round(found.utilisation, 4)}
    for title, least, most in (("1-4", 1, 4), ("8-15", 8, 15), (f">={LARGE}", LARGE, 10**9)):
        counted = case.counted(least, most)
        waits = sorted(found.start_s[n] - case.jobs[n].at_s for n in counted)
        row[f"{title} mean h"] = round(sum(waits) / max(1, len(waits)) / 3600, 2)
        row[f"{title} p95 h"] = round(results.percentile(waits, 95) / 3600, 2)
    delays = sorted(found.delay_s[n] for n in case.counted(LARGE))
    row[f">={LARGE} p95 delay h"] = round(results.percentile(delays, 95) / 3600, 2)
    return row | {"promised": len(found.promised_s), "broken": found.broken()} | found.more


def _judge(report: Report, label: str, case: Case, found: dict[str, Found]) -> None:
    ours, easy = found["whaleflux"], found.get("easy")
    if easy is not None:
        title = f"{label}: p95 wait of >= {LARGE} GPUs against half of EASY's"
        report.targets.append(Target(title, case.p95_h(ours), case.p95_h(easy) / 2, "h"))
    report.targets.append(Target(f"{label}: promises broken", ours.broken(), 0, "promises"))
    if (conserving := found.get("work-conserving")) is not None:
        lost = 100 * (conserving.utilisation - ours.utilisation)
        report.targets.append(Target(f"{label}: utilisation below work-conserving", lost, 1.0, "points"))
    report.notes += [_largest(label, case, n, found) for n in case.counted(LARGEST)]


def _largest(label: str, case: Case, number: int, found: dict[str, Found]) -> str:
    """One job, from its submission on, hours."""
    job = case.jobs[number]
    promised_s = found["whaleflux"].promised_s.get(number)
    promise = "promised nothing" if promised_s is None else f"promised {(promised_s - job.at_s) / 3600:.2f} h"
    waits = ", ".join(f"{name} {(one.start_s[number] - job.at_s) / 3600:.2f} h" for name, one in found.items())
    return (
        f"{label}: {job.spec.gpus} GPUs for {job.run_s / 3600:.2f} h, submitted on day {job.at_s / 86400:.2f}: "
        f"{promise}, waited: {waits}"
    )


if __name__ == "__main__":
    sys.exit(main("backfill", measure, add_arguments=main_arguments))
