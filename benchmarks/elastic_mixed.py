"""Elastic jobs on a fleet of three GPU types: completion times of the production scheduler against Gavel and Sia on the same jobs.

64 GPUs as in Sia's evaluation (24 of four a machine, 24 and 16 of eight), speeds as Gavel measured them, restarts of 25 to 250 s. A job file states
one speed for each type and one for each number of GPUs, so the scheduler knows their product, while jobs run as fast as was measured; Gavel and
Sia are given the measured table. Nobody knows how long jobs run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.elastic_jobs import application, workload
from benchmarks.elastic_ours import DELAYS
from benchmarks.elastic_policies import Outcome
from benchmarks.elastic_typed_policies import Gavel, sia, simulate
from benchmarks.elastic_types import TypedJob, typed, typed_apps
from whaleflux import names
from whaleflux.fleet.model import Gpu, Link, LinkKind, Node
from whaleflux.manifests.gpu_values import GpuChoice
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.workload import Submission, Workload

GPUS = {"K80-12GB": 24, "P100-16GB": 24, "V100-16GB": 16}
_A_NODE = {"K80-12GB": 4, "P100-16GB": 8, "V100-16GB": 8}


def measure(options: Options) -> Report:
    """Average and p99 completion on three GPU types, at one and at half of the workloads' load."""
    report = Report(simulated="restarts, speeds and the passing of time; the scheduler's decisions are real")
    folder = options.trace("pollux")
    traced = {path.name: application(path) for path in sorted((folder / "throughput").iterdir())}
    apps = typed_apps(options.trace("gavel", "simulation_throughputs.json.gz"))
    files = sorted((folder / "workloads").glob("*.csv"))
    loads = [typed(workload(path, traced), apps, options.seed + at) for at, path in enumerate(files)]
    loads = [loads[2][::2]] if options.quick else loads
    rows = {name: _row(name, run, loads) for name, run in POLICIES.items()}
    report.rows += rows.values()
    for figure in ("average_h", "p99_h"):
        best = min(row[figure] for name, row in rows.items() if name != "whaleflux")
        report.targets.append(Target(f"{figure} at or below the better of them", rows["whaleflux"][figure], best, "h"))
    return report


def _row(name: str, run: Callable[[Sequence[TypedJob]], Outcome], loads: Sequence[Sequence[TypedJob]]) -> Row:
    begun, outcomes = time.process_time(), [run(jobs) for jobs in loads]
    hours = [hour for outcome in outcomes for hour in outcome.jct_h]
    return {
        "policy": name,
        "jobs": len(hours),
        "average_h": round(float(np.mean(hours)), 3),
        "p99_h": round(float(np.percentile(hours, 99)), 2),
        "makespan_h": round(float(np.mean([one.makespan_h for one in outcomes])), 2),
        "gpu_h_per_job": round(sum(one.gpu_h for one in outcomes) / len(hours), 2),
        "restarts_per_job": round(sum(one.restarts for one in outcomes) / len(hours), 2),
        "cpu_s": round(time.process_time() - begun, 1),
    }


def nodes(gpus: Mapping[str, int] = GPUS) -> list[Node]:
    """Machines of one type each."""
    return [_node(model, at) for model, count in gpus.items() for at in range(count // _A_NODE[model])]


def _node(model: str, at: int) -> Node:
    many, id_ = range(_A_NODE[model]), f"{model.partition('-')[0].lower()}-{at:02}"
    gpus = tuple(Gpu(i, f"{id_}-{i}", model, 16 * 10**9, (7, 0)) for i in many)
    links = tuple(Link(a, b, LinkKind.PCIE_HOST, 12e9) for a in many for b in many if a < b)
    return Node(names.node("s", id_), "s", gpus=gpus, links=links, leaf="l", cpu_millicores=96_000,
                memory_bytes=384 * 10**9, network_bytes_per_s=6e9, simulated=True)  # fmt: skip


def submission(job: TypedJob, number: int) -> Submission:
    """The job as its user would submit it: GPU types with their speeds, and what numbers of GPUs bring."""
    app, types = job.app, job.app.throughputs()
    choices = tuple(GpuChoice(model, throughput=speed) for model, speed in types.items())
    spec = Spec(
        command=("train",),
        gpus=job.gpus,
        any_of=tuple(types),
        gpu_options=tuple(choice for choice in choices if not choice.plain),
        elastic_min=1,
        elastic_max=app.most,
        elastic_speeds=app.by_count(),
        checkpoint_every_steps=100,
    )
    name = names.job("default", f"{job.name}-{number}")
    return Submission(
        name, spec, job.at_s, job.work, restart_s=app.restart_s, speed_on=lambda gpus, model: app.speed(model, gpus)
    )


def production(jobs: Sequence[TypedJob]) -> Outcome:
    """What the production scheduler makes of them."""
    submissions = [submission(job, number) for number, job in enumerate(jobs)]
    result = Simulation(nodes(), Workload(submissions, delays=DELAYS)).run()
    outcome = Outcome(gpu_h=result.held.total / 3600)
    for one in result.outcomes:
        outcome.jct_h.append(one.completion_s / 3600)
        outcome.restarts += one.suspensions
        outcome.makespan_h = max(outcome.makespan_h, one.end_s / 3600)
    return outcome


POLICIES: dict[str, Callable[[Sequence[TypedJob]], Outcome]] = {
    "whaleflux": production,
    "gavel, tuned sizes": lambda jobs: simulate(jobs, GPUS, Gavel(), 360.0),
    "sia": lambda jobs: simulate(jobs, GPUS, sia, 60.0),
}


if __name__ == "__main__":
    sys.exit(main("elastic_mixed", measure))
