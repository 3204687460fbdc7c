"""A month of a large fleet, simulated with the production step: how long it takes, and whether it is the same twice.

5,000 nodes of 8 GPUs, a million jobs in 30 days that ask for 80 % of all GPU time, in ten queues and three priorities. Sizes and run times
are pairs drawn with replacement from Philly's job list where it is present, else from a log-normal that is close to it; of jobs of 8 GPUs
and more the size is multiplied by 1 to 16, as a fleet of 40,000 GPUs has larger gangs than one of 2,500, and all run times are stretched to
the load. The quick form is 5,000 jobs on 25 nodes, run twice. Seconds are CPU time of the one thread.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from functools import lru_cache

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.scheduler_speed import fleet
from whaleflux.manifests.job_fields import Spec
from whaleflux.service import collect_rarely
from whaleflux_scheduler.core.model import Queue
from whaleflux_scheduler.simulation import traces
from whaleflux_scheduler.simulation.results import summary_of
from whaleflux_scheduler.simulation.runner import SIMULATED, Simulation
from whaleflux_scheduler.simulation.state import Result
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

MONTH_S, LOAD, NODES, JOBS = 30 * 86400.0, 0.8, 5_000, 1_000_000
WITHIN_S, LONGEST_S = 300.0, 7 * 86400.0
QUEUES = {f"q{at}": Queue(f"queues/q{at}", weight=float(1 + at % 3)) for at in range(10)}
_SHARES = tuple(range(10, 0, -1))  # of the jobs, by queue
_PRIORITIES, _PRIORITY_SHARES = (0, 50, 100), (85, 12, 3)


def pairs(options: Options) -> tuple[list[tuple[int, float]], str]:
    """(GPUs, seconds) of real jobs, or alike, and which."""
    path = options.data / "traces" / "pollux" / "philly.csv.gz"
    if path.exists():
        rows = traces.read(path, 128).rows
        return [(row.gpus, min(LONGEST_S, max(1.0, row.run_s))) for row in rows], "pairs of Philly's job list"
    drawn = random.Random(options.seed)
    sizes, shares = (1, 2, 4, 8, 16, 32, 64, 128), (931, 22, 23, 20, 2.4, 0.8, 0.1, 0.05)
    lives = (
        (drawn.choices(sizes, shares)[0], min(LONGEST_S, max(1.0, drawn.lognormvariate(6.9, 2.4))))
        for _ in range(80_000)
    )
    return list(lives), "log-normal pairs like Philly's"


class Month:
    """The jobs of a month; each iteration draws the same."""

    def __init__(self, known: list[tuple[int, float]], jobs: int, nodes: int, seed: int) -> None:
        self.jobs, self.seed = jobs, seed
        self.most = nodes * 8 // 4
        drawn = random.Random(f"{seed}/pairs")
        self.pairs = [(self.larger(gpus, drawn), run_s) for gpus, run_s in drawn.choices(known, k=min(jobs, 200_000))]
        mean_gpu_s = sum(gpus * run_s for gpus, run_s in self.pairs) / len(self.pairs)
        self.stretch = LOAD * nodes * 8 * MONTH_S / jobs / mean_gpu_s

    def larger(self, gpus: int, drawn: random.Random) -> int:
        return gpus if gpus < 8 else min(self.most, gpus * drawn.choice((1, 1, 2, 4, 16)))

    def __iter__(self) -> Iterator[Submission]:
        drawn, at_s, names = random.Random(self.seed), 0.0, tuple(QUEUES)
        for number in range(self.jobs):
            at_s += drawn.expovariate(self.jobs / MONTH_S)
            gpus, run_s = drawn.choice(self.pairs)
            run_s = float(max(1, round(run_s * self.stretch)))
            spec = spec_of(gpus, drawn.choices(_PRIORITIES, _PRIORITY_SHARES)[0])
            queue = drawn.choices(names, _SHARES)[0]
            yield Submission(f"queues/{queue}/jobs/j{number}", spec, float(int(at_s)), run_s)


@lru_cache(maxsize=10_000)
def spec_of(gpus: int, priority: int) -> Spec:
    return Spec(command=("true",), gpus=gpus, priority=priority)


def simulated(month: Month, nodes: int) -> Result:
    """Steps are of whole seconds, as the trace's times are. Garbage is collected as in a service."""
    simulation = Simulation(fleet(nodes), Workload(month, QUEUES, Delays(start_s=0.0, save_s=30.0)))
    collect_rarely()
    return simulation.run()


def row_of(name: str, result: Result) -> Row:
    summary = summary_of(result)
    rest_s = result.total_s - result.step_s - result.apply_s
    return {
        "run": name,
        "jobs": summary.jobs,
        "nodes": result.gpus // 8,
        "CPU s": round(result.total_s, 2),
        "step s": round(result.step_s, 2),
        "lifecycle s": round(result.apply_s, 2),
        "simulator s": round(rest_s, 2),
        "ms a job": round(1000 * result.total_s / summary.jobs, 3),
        "steps": result.steps,
        "moves": summary.moves,
        "preempted": summary.suspensions,
        "month held %": round(100 * held_in(result, MONTH_S) / (result.gpus * MONTH_S), 1),
        "wait p50 s": summary.overall.wait_p50_s,
        "wait p99 s": summary.overall.wait_p99_s,
        "digest": summary.moves_digest[:12],
    }


def held_in(result: Result, until_s: float) -> float:
    """GPU-seconds held until then."""
    width = result.held.bin_s
    return sum(level * min(width, max(0.0, until_s - at)) for at, level in result.held.means())


def measure(options: Options) -> Report:
    """Simulates a month of 40,000 GPUs and a million jobs with the production step."""
    known, which = pairs(options)
    jobs, nodes = (5_000, 25) if options.quick else (JOBS, NODES)
    jobs, nodes = options.extra.jobs or jobs, options.extra.nodes or nodes
    month = Month(known, jobs, nodes, options.seed)
    results = [simulated(month, nodes) for _ in range(2 if options.quick else 1)]
    report = Report([row_of(f"{at + 1}", result) for at, result in enumerate(results)])
    report.simulated = f"jobs ({which}), nodes and time; {SIMULATED}"
    whole_s = results[0].total_s * JOBS / jobs
    report.targets.append(Target("fleet_month_cpu_s", whole_s, WITHIN_S, "s", per="python"))
    if options.quick:
        same = len({result.moves.digest for result in results}) == 1
        report.targets.append(Target("runs_that_differ", float(not same), 0.0, "runs"))
        report.notes.append(
            "the quick form's time is scaled to a million jobs; its fleet is a two-hundredth, so placing is cheaper, and gangs that fill it wait more"
        )
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=0, help="so many jobs instead")
    parser.add_argument("--nodes", type=int, default=0, help="so many nodes of 8 GPUs instead")


if __name__ == "__main__":
    sys.exit(main("fleet_month", measure, add_arguments=add_arguments))
