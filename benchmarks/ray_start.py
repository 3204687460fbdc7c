"""From what waits in a Ray cluster to the start of a worker for it: how long the scheduler takes, over demands that come one after another.

Real etcd, a real scheduler process, mTLS; nodes are streams without processes. Several clusters live side by side. Each of them: tasks come, what waits is
told by the agent of the head's node, workers start and join, the tasks end, the workers leave. The time is from the telling until the agent of a worker's
node has been sent its task; for the first of a demand's workers, and for the last. Jobs that fit nowhere wait meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import Options, Report, Row, Target, main, percentile
from benchmarks.control_plane_suite import Agent, Suite, machine, request
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub

NODES, CLUSTERS, DEMANDS, WAITING = 64, 4, 40, 500
MOST_TASKS = 6  # of a demand, a GPU each
SAY_S = 1.0  # the reader says that nothing changed as often
REST_S = (0.2, 2.0)  # between what a demand leaves and the next one
WITHIN_S = 30.0


@dataclass(slots=True)
class Cluster:
    """One Ray cluster as its reader tells of it. Times are seconds of a clock that only goes forward."""

    name: str
    agents: dict[str, Agent]
    head: agent_pb2.DesiredTask | None = None
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)  # Ray nodes by worker's job
    sent: dict[str, tuple[float, agent_pb2.DesiredTask]] = field(
        default_factory=dict
    )  # workers by job, when their agent had them
    waits: int = 0
    number: int = 0

    def takes(self, task: agent_pb2.DesiredTask) -> None:
        """A task of one of its jobs has reached an agent."""
        role = task.job.rpartition("/")[2].removeprefix(f"{self.name}-")
        if role.startswith("head"):
            self.head = task
        elif role.startswith("worker"):
            self.sent.setdefault(task.job, (time.perf_counter(), task))

    def agent_of(self, task: agent_pb2.DesiredTask) -> Agent:
        return next(agent for agent in self.agents.values() if task.task.id in agent.tasks)

    def says(self, *, changed: bool = True) -> float:
        """Tells what waits; when."""
        assert self.head is not None
        self.number += changed
        said = agent_pb2.RayReading(job=self.head.job, epoch=self.head.epoch, number=self.number)
        if changed:
            shape = {"resources": {"GPU": 1, "CPU": 1}, "count": self.waits}
            bundles = [shape] if self.waits else []
            demand = {
                "bundles": bundles,
                "nodes": list(self.nodes.values()),
                "session": self.name,
                "version": self.number,
            }
            said.demand = zlib.compress(json.dumps(demand).encode())
        self.agent_of(self.head).outbox.put_nowait(agent_pb2.SyncRequest(ray=said))
        return time.perf_counter()

    def joins(self, task: agent_pb2.DesiredTask) -> None:
        total = {"GPU": 1, "CPU": 1, "gpu_memory": 81920}
        self.nodes[task.job] = {
            "id": f"{len(self.nodes):04x}", "status": "RUNNING", "total": total, "available": {}, "instance": f"{task.job}/{task.epoch}",
        }  # fmt: skip


async def _until(true: Any, what: str) -> None:
    try:
        async with asyncio.timeout(WITHIN_S):
            while not true():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise TimeoutError(f"not within {WITHIN_S:g} s: {what}") from None


async def _up(cluster: Cluster, scheduler: SchedulerServiceStub) -> None:
    made = pb.RayCluster(max_gpus=NODES * 8)
    await scheduler.CreateRayCluster(
        pb.CreateRayClusterRequest(ray_cluster_id=cluster.name, ray_cluster=made), timeout=10
    )
    await _until(lambda: cluster.head is not None, f"the head of {cluster.name} is placed")
    head = cluster.head
    assert head is not None
    agent = cluster.agent_of(head)
    await _until(lambda: head.task.id in agent.started, "it runs")
    agent.report(head, pb.TASK_PHASE_RUNNING, endpoint="10.0.0.1:6379")
    cluster.says()


async def _reader(cluster: Cluster) -> None:
    while True:
        await asyncio.sleep(SAY_S)
        cluster.says(changed=False)


async def _demand(cluster: Cluster, draw: random.Random) -> tuple[float, float]:
    """Tasks come, run and end; seconds until the first and the last of their workers was sent."""
    known, cluster.waits = set(cluster.sent), draw.randint(1, MOST_TASKS)
    wanted, told_s = cluster.waits, cluster.says()

    def new() -> list[tuple[float, agent_pb2.DesiredTask]]:
        return [one for job, one in cluster.sent.items() if job not in known]

    await _until(lambda: len(new()) >= wanted, f"{wanted} workers of {cluster.name} are started")
    found = sorted(at_s - told_s for at_s, _ in new())
    tasks = [task for _, task in new()]
    await _until(lambda: all(t.task.id in cluster.agent_of(t).started for t in tasks), "they run")
    for task in tasks:
        cluster.joins(task)
    cluster.waits = 0
    cluster.says()
    await asyncio.sleep(draw.uniform(*REST_S))
    for task in tasks:
        del cluster.nodes[task.job]
    cluster.says()
    for task in tasks:
        cluster.agent_of(task).end(task.task.id)
    await asyncio.sleep(draw.uniform(*REST_S))
    return found[0], found[-1]


async def _life(cluster: Cluster, demands: int, seed: int) -> list[tuple[float, float]]:
    draw, reading = random.Random(f"{seed} {cluster.name}"), asyncio.create_task(_reader(cluster))
    try:
        await asyncio.sleep(draw.uniform(*REST_S))
        return [await _demand(cluster, draw) for _ in range(demands)]
    finally:
        reading.cancel()


def _taken(clusters: list[Cluster], task: agent_pb2.DesiredTask) -> None:
    for one in clusters:
        one.takes(task)


async def _measured(folder: Path, nodes: int, demands: int, waiting: int, seed: int) -> list[tuple[float, float]]:
    async with Suite(folder, [machine(f"site/node-{n}") for n in range(nodes)]) as suite:
        clusters = [Cluster(f"ray{n}", suite.agents) for n in range(CLUSTERS)]
        for agent in suite.agents.values():
            agent.on_task = lambda task: _taken(clusters, task)
        scheduler = suite.stub("admin", "operator")
        nowhere = pb.GpuRequirement(any_of=["no-such-gpu"])
        for _ in range(waiting):
            await scheduler.CreateJob(request(8, gpu=nowhere), timeout=10)
        for cluster in clusters:
            await _up(cluster, scheduler)
        lives = await asyncio.gather(*(_life(one, demands, seed) for one in clusters))
    return [one for life in lives for one in life]


def measure(options: Options) -> Report:
    demands, waiting = (10, 50) if options.quick else (DEMANDS, WAITING)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(_measured(Path(folder), NODES, demands, waiting, options.seed))
    first, last = [one for one, _ in found], [one for _, one in found]
    rows: list[Row] = [_row("the first worker of a demand", first), _row("its last worker", last)]
    return Report(
        rows=rows,
        targets=[Target("demand_seen_to_worker_start_p99", percentile(first, 99), 1.5, "s")],
        simulated="nodes, agents and Ray; scheduler, store and their network are real",
        notes=[
            f"{len(found)} demands of {CLUSTERS} clusters on {NODES * 8} GPUs; {waiting} jobs wait for GPUs that there are none of"
        ],
    )


def _row(what: str, found_s: list[float]) -> Row:
    return {
        "until": what, "demands": len(found_s), "p50_s": round(percentile(found_s, 50), 3), "p99_s": round(percentile(found_s, 99), 3),
        "most_s": round(max(found_s), 3),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("ray_start", measure))
