"""Ray clusters in a scheduler of a test: what is read of them is what the test says, and workers are as its agents play them."""

from __future__ import annotations

import asyncio
import json
import zlib

from tests.support.scheduler_world import World, node, until
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb

ADDRESS = "10.0.0.1:6379"
MIB = 80 * 10**9 // 2**20  # of the nodes' GPUs


def gpu_tasks(count):
    """Each fills the memory of a GPU, so that each gets a worker."""
    return [{"resources": {"gpu_memory": 60_000, "CPU": 1}, "count": count}]


class RayWorld(World):
    """Two nodes of four GPUs; `nodes` and `waits` are what the cluster says of itself."""

    def __init__(self, **more):
        super().__init__(**more)
        self.number, self.session = 0, "session-1"
        self.waits, self.ray_nodes = [], {}

    async def start(self):
        await super().start()
        if not self.agents:
            await self.add(node("s/a"), node("s/b"))

    async def up(self, name="rl", **fields):
        cluster = pb.RayCluster(**({"max_gpus": 8} | fields))
        return await self.scheduler.CreateRayCluster(
            pb.CreateRayClusterRequest(ray_cluster_id=name, ray_cluster=cluster, request_id="once"), None
        )

    async def cluster(self, name="rl"):
        return await self.scheduler.GetRayCluster(pb.GetRayClusterRequest(name=f"rayClusters/{name}"), None)

    async def jobs(self, role=pb.RAY_ROLE_WORKER, *, ended=False):
        found = await self.scheduler.ListJobs(
            pb.ListJobsRequest(parent="queues/-", show_ended=ended, page_size=1000), None
        )
        return sorted((job for job in found.jobs if job.ray.role == role), key=lambda job: job.name)

    async def workers(self, count, state=pb.JOB_STATE_RUNNING):
        """Once there are so many in that state, and no others."""

        async def there():
            found = await self.jobs()
            return found if len(found) == count and all(job.state == state for job in found) else None

        return await until(there, f"{count} workers") if count else await self.none()

    async def none(self):
        async def gone():
            return not await self.jobs()

        await until(gone, "no workers")
        return []

    async def head(self, role=pb.RAY_ROLE_HEAD):
        """The head's job, once it runs and is reached."""

        async def runs():
            jobs = await self.jobs(role)
            return jobs[0] if jobs and jobs[0].state == pb.JOB_STATE_RUNNING else None

        job = await until(runs, "the head runs")
        task = job.attempt.tasks[0]
        self.agents[task.node].report(task.id, pb.TASK_PHASE_RUNNING, endpoint=ADDRESS)
        await self.caught_up()
        return job

    async def says(self, job, *, waits=None, changed=True, node_name=""):
        """What its reader tells, through its agent."""
        if waits is not None:
            self.waits = waits
        self.number += changed
        demand = {
            "bundles": self.waits, "gangs": [], "constraints": [], "nodes": list(self.ray_nodes.values()), "session": self.session,
            "version": self.number, "ray_version": "2.60.0",
        }  # fmt: skip
        said = agent_pb2.RayReading(job=job.name, epoch=job.epoch, number=self.number)
        if changed:
            said.demand = zlib.compress(json.dumps(demand).encode())
        self.agents[node_name or job.attempt.tasks[0].node].say(agent_pb2.SyncRequest(ray=said))
        await self.caught_up()

    def joins(self, worker, *, busy=False):
        total = dict(worker.ray.total)
        self.ray_nodes[worker.name] = {
            "id": f"{len(self.ray_nodes):02x}", "status": "RUNNING" if busy else "IDLE", "total": total, "available": {} if busy else total,
            "instance": f"{worker.name}/{worker.epoch}", "labels": {"whaleflux/gpu": "H100-80GB"},
        }  # fmt: skip

    @property
    def decisions(self):
        """What readers were told."""
        return [json.loads(one.decision) for agent in self.agents.values() for one in agent.ray]

    async def seconds(self, count, head=None):
        """Lets time pass; the reader goes on saying that nothing changed."""
        for _ in range(int(count)):
            if head is not None:
                await self.says(head, changed=False)
            await asyncio.sleep(1.0)
