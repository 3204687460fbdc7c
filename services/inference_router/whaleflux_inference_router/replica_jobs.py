"""The other services as the router sees them: jobs that run replicas, and the nodes they run on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, FailedPrecondition, NotFound, StatusError
from whaleflux.manifests import model_checks
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import roles
from whaleflux.rpc.watching import follow
from whaleflux.v1 import inventory_pb2, scheduler_pb2
from whaleflux.v1 import router_pb2 as pb
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub
from whaleflux_inference_router.rights import SERVING, queue_of

PRIORITY = 500  # users wait for answers: before training, after what operators put first; a queue's own limit holds for its users
CALL_S = 5.0
NODE_KNOWN_S = 60.0
ENDED = frozenset(
    {scheduler_pb2.JOB_STATE_SUCCEEDED, scheduler_pb2.JOB_STATE_FAILED, scheduler_pb2.JOB_STATE_CANCELLED}
)
_NOT_RUNNING = frozenset(
    {scheduler_pb2.JOB_STATE_QUEUED, scheduler_pb2.JOB_STATE_STARTING, scheduler_pb2.JOB_STATE_RECOVERING}
)
_BEGUN = frozenset({scheduler_pb2.JOB_STATE_STARTING, scheduler_pb2.JOB_STATE_RUNNING})
_DOING = {
    scheduler_pb2.TASK_PHASE_PULLING: "its image is pulled:",
    scheduler_pb2.TASK_PHASE_FETCHING: "it fetches",
    scheduler_pb2.TASK_PHASE_SETTING_UP: "it is set up",
}
_READABLE = frozenset(scheduler_pb2.JobState.values()) - {scheduler_pb2.JOB_STATE_UNSPECIFIED}


@dataclass(frozen=True, slots=True)
class ReplicaHost:
    """Where a replica runs, for routing by card and price."""

    node: str = ""
    gpu_model: str = ""
    gpu_memory_bytes: int = 0
    usd_per_hour: float = 0.0


class ReplicaJobs:
    """Services among the jobs, kept current by a watch; nodes, asked for when needed.

    A job is a replica's when it has its name and is its model's owner's: whoever else has a job of that name keeps it.
    """

    def __init__(self, scheduler: SchedulerServiceStub, inventory: InventoryServiceStub, clock: Clock) -> None:
        self._scheduler, self._inventory, self._clock = scheduler, inventory, clock
        self._nodes: dict[str, tuple[float, inventory_pb2.Node]] = {}
        self.jobs: dict[str, scheduler_pb2.Job] = {}
        self.synced = False

    async def watch_jobs(self) -> None:
        """Until cancelled; outages of the scheduler are waited out, the last picture stays."""

        def open_watch(revision: int) -> object:
            return self._scheduler.WatchJobs(scheduler_pb2.WatchJobsRequest(resource_version=revision))

        async for change in follow(open_watch, clock=self._clock):  # type: ignore[arg-type]
            if change.synced:
                self.synced = True
            elif change.value is None:
                self.jobs.pop(change.name, None)
            elif change.value.spec.kind == scheduler_pb2.JOB_KIND_SERVICE:
                self.jobs[change.name] = change.value

    async def ensure_job(self, model: pb.Model, replica_id: str, engine: pb.Engine, site: str = "") -> str:
        """The job of a replica, created when it does not exist; one that has ended is replaced. Returns its name.

        `engine`: as it is for that replica. `site`: where it runs, sites/{site}; "" for wherever it is placed.

        Raises FailedPrecondition where somebody else's job has the name.
        """
        name = job_name(model, replica_id)
        request = scheduler_pb2.CreateJobRequest(
            parent=names.queue(queue_of(model)),
            job_id=replica_id,
            job=scheduler_pb2.Job(spec=_spec(engine, site)),
            request_id=_request_id(model, replica_id),
            wait_for_capacity=True,  # a model is declared once, and served when its GPUs have come
            on_behalf_of=model.owner,
        )
        try:
            job = await self._scheduler.CreateJob(request, timeout=CALL_S)
        except AlreadyExists:  # of an earlier model of this name
            if not await self.end_job(name, model.owner):
                return ""
            raise FailedPrecondition(
                f"{name} is the name of a job that runs no replica of {model.name}; delete that job, or give the model another name",
                reason=ErrorReason.WRONG_STATE,
                metadata={"name": name},
            ) from None
        except NotFound:
            if queue_of(model) != SERVING:
                raise
            await self._make_queue()
            return ""
        if job.state in ENDED:
            await self._scheduler.DeleteJob(scheduler_pb2.DeleteJobRequest(name=name), timeout=CALL_S)
            return ""
        self.jobs.setdefault(name, job)
        return name

    async def end_job(self, name: str, owner: str) -> bool:
        """Cancels a job, then deletes its record; True when nothing of the owner's is left under that name."""
        try:
            job = self.jobs.get(name) or await self._scheduler.GetJob(
                scheduler_pb2.GetJobRequest(name=name), timeout=CALL_S
            )
            if not _is_of(job, owner):
                return True
            if job.state not in ENDED:
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

    async def serving_sizes(self, request: scheduler_pb2.PlanServingRequest) -> scheduler_pb2.PlanServingResponse:
        """Which GPUs of the fleet serve a model."""
        answer: scheduler_pb2.PlanServingResponse = await self._scheduler.PlanServing(request, timeout=CALL_S)
        return answer

    def of(self, name: str, owner: str) -> scheduler_pb2.Job | None:
        """The replica's job as it is known; None: there is none, or it is somebody else's."""
        found = self.jobs.get(name)
        return found if found is not None and _is_of(found, owner) else None

    def has_ended(self, name: str, owner: str) -> bool:
        """Whether a job that is known has ended."""
        found = self.of(name, owner)
        return found is not None and found.state in ENDED

    def is_waiting(self, name: str, owner: str) -> bool:
        """Whether a job waits for GPUs, and nobody holds it back."""
        found = self.of(name, owner)
        return found is not None and found.state == scheduler_pb2.JOB_STATE_QUEUED and not found.HasField("hold")

    def is_known(self, name: str, owner: str) -> bool:
        """Whether anything follows from `endpoint`: not before the scheduler answered, nor where it cannot read the job's record."""
        found = self.of(name, owner)
        return self.synced if found is None else found.state in _READABLE

    def endpoint(self, name: str, owner: str) -> tuple[str, str, int]:
        """Address and node of a job's running process and its GPUs; empty while it has none."""
        found = self.of(name, owner)
        if found is None or found.state != scheduler_pb2.JOB_STATE_RUNNING or not found.attempt.tasks:
            return "", "", 0
        task = found.attempt.tasks[0]
        running = task.phase == scheduler_pb2.TASK_PHASE_RUNNING and task.endpoint
        return (task.endpoint, task.node, len(task.gpu_uuids)) if running else ("", "", 0)

    def waits_for(self, name: str, owner: str) -> str:
        """Why a job has no running process yet, in its scheduler's and its agent's words."""
        found = self.of(name, owner)
        if found is None or found.state not in _NOT_RUNNING | ENDED:
            return "its job has no running process"
        log = f"whaleflux logs {names.top(name)}/{names.last(name)}"
        if found.state in ENDED:
            return f"its job ended: {found.state_message or 'nobody said why'} ({log})"
        ended = found.past_attempts[-1].end_reason if found.past_attempts else ""
        return _waits(found) + (f"; its last process ended: {ended} ({log})" if ended else "")

    def task(self, name: str, owner: str) -> scheduler_pb2.Task | None:
        """What its agent says of a job that starts or runs."""
        found = self.of(name, owner)
        begun = found is not None and found.state in _BEGUN and found.attempt.tasks
        return found.attempt.tasks[0] if found is not None and begun else None

    async def host(self, node: str, gpus: int) -> ReplicaHost:
        """What is known of a node; empty where inventory does not answer."""
        known = self._nodes.get(node)
        now_s = self._clock.monotonic()
        if known is None or now_s - known[0] > NODE_KNOWN_S:
            try:
                asked = await self._inventory.GetNode(inventory_pb2.GetNodeRequest(name=node), timeout=CALL_S)
            except StatusError:
                return ReplicaHost(node)
            known = self._nodes[node] = (now_s, asked)
        found = known[1]
        if not found.facts.gpus:
            return ReplicaHost(node)
        price = found.price if found.HasField("price") else found.facts.price
        first = found.facts.gpus[0]
        return ReplicaHost(node, first.model, first.memory_bytes, gpus * price.usd_per_gpu_hour)

    async def _make_queue(self) -> None:
        queue = scheduler_pb2.Queue(max_priority=PRIORITY)
        request = scheduler_pb2.CreateQueueRequest(queue_id=SERVING, queue=queue, request_id=f"router-{SERVING}")
        try:
            await self._scheduler.CreateQueue(request, timeout=CALL_S)
        except AlreadyExists:
            return


def job_name(model: pb.Model, replica_id: str) -> str:
    """In the model's queue."""
    return names.job(queue_of(model), replica_id)


def _waits(job: scheduler_pb2.Job) -> str:
    """What a job that does not run is at."""
    if job.state == scheduler_pb2.JOB_STATE_STARTING and job.attempt.tasks:
        task = job.attempt.tasks[0]
        doing = _DOING.get(task.phase, "its agent starts it")
        return f"{doing} {task.message}".strip() + f" on {task.node}"
    why = job.decision.summary or job.state_message
    return "its job waits for GPUs" + (f": {why}" if why else "")


def _is_of(job: scheduler_pb2.Job, owner: str) -> bool:
    """Whether it is a service of the model's owner; models of before have none, and the router's own identity submitted their jobs."""
    whose = job.submitter == owner if owner else job.submitter.startswith(f"{roles.INFERENCE_ROUTER}/")
    return whose and job.spec.kind == scheduler_pb2.JOB_KIND_SERVICE


def _spec(engine: pb.Engine, site: str) -> scheduler_pb2.JobSpec:
    gpus = engine.gpus or 1
    return scheduler_pb2.JobSpec(
        command=[model_checks.GPUS_MARK.sub(str(gpus), word) for word in engine.command],
        launch_once=True,  # one server for all of a replica's GPUs
        image=engine.image,
        gpus=gpus,
        nodes=scheduler_pb2.NodeCount(min=1, max=1),
        gpu=scheduler_pb2.GpuRequirement(any_of=engine.gpu_models, min_memory_bytes=engine.gpu_memory_bytes),
        sites=[names.last(site)] if site else [],
        datasets=[engine.weights] if engine.weights else [],
        environment=engine.environment,
        secrets=engine.secrets,
        kind=scheduler_pb2.JOB_KIND_SERVICE,
        working_directory=engine.working_directory,
        priority=PRIORITY,
    )


def _request_id(model: pb.Model, replica_id: str) -> str:
    """The same for the same replica of the same model, another one when a model of that name is made anew."""
    made = f"{model.create_time.ToNanoseconds()}".encode()
    return hashlib.sha256(made + b"\0" + replica_id.encode()).hexdigest()[:32]
