"""The production scheduler on the jobs of `elastic_jobs`: its own step and lifecycle, under the simulator's clock."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import datetime

from benchmarks.elastic_jobs import MOST_GPUS, TracedJob
from benchmarks.elastic_policies import Outcome
from whaleflux import names
from whaleflux.fleet.model import Gpu, Link, LinkKind, Node
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core.plan import Move, News, Plan
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

PER_NODE = 4
DELAYS = Delays(start_s=0.0, save_s=0.0, checkpoint_every_s=0.0, restart_s=0.0)  # restarts are each job's own
_KNOWN_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)


def nodes(gpus: int) -> list[Node]:
    """Machines of four GPUs."""
    return [_node(at) for at in range(gpus // PER_NODE)]


def _node(at: int) -> Node:
    gpus = tuple(Gpu(i, f"{at:04}-{i}", "T4-16GB", 16 * 10**9, (7, 5)) for i in range(PER_NODE))
    links = tuple(Link(a, b, LinkKind.PCIE_HOST, 12e9) for a in range(PER_NODE) for b in range(a + 1, PER_NODE))
    return Node(names.node("s", f"n{at:04}"), "s", gpus=gpus, links=links, leaf="l", cpu_millicores=48_000,
                memory_bytes=192 * 10**9, network_bytes_per_s=6e9, simulated=True)  # fmt: skip


def submission(job: TracedJob, number: int) -> Submission:
    """The job as its user would submit it: with the speeds that were measured, and the size that it was tuned to as its wish."""
    app = job.app
    most = max((n for n in range(1, MOST_GPUS + 1) if app.speeds[n] > app.speeds[n - 1] * 1.001), default=1)
    wished = min(job.gpus, most)
    speeds = tuple((n, app.speeds[n]) for n in _KNOWN_SIZES)
    spec = Spec(
        command=("train",),
        gpus=wished,
        elastic_min=1,
        elastic_max=max(most, wished),
        elastic_speeds=speeds,
        checkpoint_every_steps=100,
    )
    base = app.speeds[wished]
    name = names.job("default", f"{job.name}-{number}")
    return Submission(
        name,
        spec,
        job.at_s,
        app.work / base,
        speed=lambda n: app.speeds[min(n, MOST_GPUS)] / base,
        restart_s=app.restart_s,
    )


def production(jobs: Sequence[TracedJob], gpus: int) -> tuple[Outcome, Simulation]:
    """What the production scheduler makes of them."""
    workload = Workload([submission(job, number) for number, job in enumerate(jobs)], delays=DELAYS)
    simulation = Simulation(nodes(gpus), workload)
    result = simulation.run()
    outcome = Outcome()
    for one in result.outcomes:
        outcome.jct_h.append(one.completion_s / 3600)
        outcome.restarts += one.suspensions
    outcome.makespan_h = max(one.end_s for one in result.outcomes) / 3600
    outcome.gpu_h = result.held.total / 3600
    return outcome, simulation


class _TimedPlan(Plan):
    """Remembers what each step took of its thread's time, seconds."""

    def __init__(self, spent: list[float]) -> None:
        super().__init__(reasons=False)
        self._spent = spent

    def step(self, news: News, now: datetime, budget_s: float = math.inf) -> list[Move]:
        begun = time.thread_time()
        moves = super().step(news, now, budget_s)
        self._spent.append(time.thread_time() - begun)
        return moves


def timed_steps(jobs: Sequence[TracedJob], gpus: int, until_s: float) -> list[float]:
    """Seconds of CPU that each step took, of what happens until then; a collection of garbage in between is not counted to anybody."""
    spent: list[float] = []
    simulation = Simulation(nodes(gpus), Workload([submission(job, at) for at, job in enumerate(jobs)], delays=DELAYS))
    simulation._plan = _TimedPlan(spent)
    simulation.run(until_s)
    return spent[1:]  # the first takes in the whole fleet
