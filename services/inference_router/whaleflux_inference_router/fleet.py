"""The other services as the router sees them: jobs that run replicas, and the nodes they run on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, NotFound, Refusal
from whaleflux.rpc.watching import follow
from whaleflux.v1 import inventory_pb2, scheduler_pb2
from whaleflux.v1 import router_pb2 as pb
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub

QUEUE = "serving"
CALL_S = 5.0
NODE_KNOWN_S = 60.0
ENDED = frozenset(
    {scheduler_pb2.JOB_STATE_SUCCEEDED, scheduler_pb2.JOB_STATE_FAILED, scheduler_pb2.JOB_STATE_CANCELLED}
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a replica runs, for routing by card and price."""

    node: str = ""
    gpu_model: str = ""
    gpu_memory_bytes: int = 0
    usd_per_hour: float = 0.0


class Fleet:
    """Jobs of the serving queue, kept current by a watch; nodes, asked for when needed."""

    def __init__(self, scheduler: SchedulerServiceStub, inventory: InventoryServiceStub, clock: Clock) -> None:
        self._scheduler, self._inventory, self._clock = scheduler, inventory, clock
        self._nodes: dict[str, tuple[float, inventory_pb2.Node]] = {}
        self.jobs: dict[str, scheduler_pb2.Job] = {}
        self.synced = False

    async def watch_jobs(self) -> None:
        """Until cancelled; outages of the scheduler are waited out, the last picture stays."""

        def open_watch(revision: int) -> object:
            return self._scheduler.WatchJobs(scheduler_pb2.WatchJobsRequest(resource_version=revision))

        async for told in follow(open_watch, clock=self._clock):  # type: ignore[arg-type]
            if told.synced:
                self.synced = True
            elif told.value is None:
                self.jobs.pop(told.name, None)
            elif told.name.startswith(f"queues/{QUEUE}/jobs/"):
                self.jobs[told.name] = told.value

    async def ensure_job(self, model: pb.Model, replica_id: str) -> str:
        """The job of a replica, created when it does not exist; one that has ended is replaced. Returns its name."""
        name = job_name(replica_id)
        request = scheduler_pb2.CreateJobRequest(
            parent=f"queues/{QUEUE}",
            job_id=replica_id,
            job=scheduler_pb2.Job(spec=_spec(model)),
            request_id=_request_id(model, replica_id),
        )
        try:
            job = await self._scheduler.CreateJob(request, timeout=CALL_S)
        except AlreadyExists:  # of an earlier model of this name
            job = await self._scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=CALL_S)
            await self.end_job(name, job)
            return ""
        except NotFound:
            await self._make_queue()
            return ""
        if job.state in ENDED:
            await self._scheduler.DeleteJob(scheduler_pb2.DeleteJobRequest(name=name), timeout=CALL_S)
            return ""
        self.jobs.setdefault(name, job)
        return name

    async def end_job(self, name: str, job: scheduler_pb2.Job | None = None) -> bool:
        """Cancels a job, then deletes its record; True when nothing of it is left."""
        job = job or self.jobs.get(name)
        try:
            if job is None or job.state not in ENDED:
                job = await self._scheduler.CancelJob(
                    scheduler_pb2.CancelJobRequest(name=name, reason="the replica is not wanted any more"),
                    timeout=CALL_S,
                )
            if job.state not in ENDED:
                return False
            await self._scheduler.DeleteJob(scheduler_pb2.DeleteJobRequest(name=name), timeout=CALL_S)
        except NotFound:
            pass
        self.jobs.pop(name, None)
        return True

    def has_ended(self, job: str) -> bool:
        """Whether a job that is known has ended."""
        return job in self.jobs and self.jobs[job].state in ENDED

    def endpoint(self, job: str) -> tuple[str, str, int]:
        """Address and node of a job's running process and its GPUs; empty while it has none."""
        found = self.jobs.get(job)
        if found is None or found.state != scheduler_pb2.JOB_STATE_RUNNING or not found.attempt.tasks:
            return "", "", 0
        task = found.attempt.tasks[0]
        running = task.phase == scheduler_pb2.TASK_PHASE_RUNNING and task.endpoint
        return (task.endpoint, task.node, len(task.gpu_indices)) if running else ("", "", 0)

    async def place(self, node: str, gpus: int) -> Place:
        """What is known of a node; empty where inventory does not answer."""
        known = self._nodes.get(node)
        now_s = self._clock.monotonic()
        if known is None or now_s - known[0] > NODE_KNOWN_S:
            try:
                asked = await self._inventory.GetNode(inventory_pb2.GetNodeRequest(name=node), timeout=CALL_S)
            except Refusal:
                return Place(node)
            known = self._nodes[node] = (now_s, asked)
        found = known[1]
        if not found.facts.gpus:
            return Place(node)
        price = found.price if found.HasField("price") else found.facts.price
        first = found.facts.gpus[0]
        return Place(node, first.model, first.memory_bytes, gpus * price.usd_per_gpu_hour)

    async def _make_queue(self) -> None:
        request = scheduler_pb2.CreateQueueRequest(queue_id=QUEUE, request_id=f"router-{QUEUE}")
        try:
            await self._scheduler.CreateQueue(request, timeout=CALL_S)
        except AlreadyExists:
            return


def job_name(replica_id: str) -> str:
    return f"queues/{QUEUE}/jobs/{replica_id}"


def _spec(model: pb.Model) -> scheduler_pb2.JobSpec:
    engine = model.engine
    return scheduler_pb2.JobSpec(
        command=engine.command,
        image=engine.image,
        gpus=engine.gpus or 1,
        nodes=scheduler_pb2.NodeCount(min=1, max=1),
        gpu=scheduler_pb2.GpuRequirement(any_of=engine.gpu_models),
        environment=engine.environment,
        kind=scheduler_pb2.JOB_KIND_SERVICE,
        working_directory=engine.working_directory,
        priority=500,  # users wait for answers: before training, after what operators put first
    )


def _request_id(model: pb.Model, replica_id: str) -> str:
    """The same for the same replica of the same model, another one when a model of that name is made anew."""
    made = f"{model.create_time.ToNanoseconds()}".encode()
    return hashlib.sha256(made + b"\0" + replica_id.encode()).hexdigest()[:32]
