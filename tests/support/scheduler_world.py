"""A scheduler in this process with a fleet that tests play: nodes, their health, and agents that do as they are told."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from tests.support.acting import AsAdmin
from tests.support.virtual_time import LoopClock
from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.code.memory import MemoryCode
from whaleflux.convert import facts_to_proto
from whaleflux.errors import NotFound, StatusError
from whaleflux.events.api import Bus
from whaleflux.fleet.model import Gpu, Link, LinkKind, Node, Price
from whaleflux.rpc import auth
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import agent_pb2, checkpoint_pb2, health_pb2, inventory_pb2, types_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.bootstrap import Peers, Service, assemble
from whaleflux_scheduler.bursts import BurstSettings
from whaleflux_scheduler.core.model import Queue
from whaleflux_scheduler.core.observed import Timeouts
from whaleflux_scheduler.core.plan import News, Plan
from whaleflux_scheduler.core.soon_over import MOST_S
from whaleflux_scheduler.rebalances import RebalanceSettings

USER = auth.Identity("user", "ada")
GB = 10**9


async def until(
    true: Callable[[], object] | Callable[[], Awaitable[object]], what: str = "", timeout_s: float = 60.0
) -> object:
    """Polls a condition; fails with `what` when it does not hold in time."""
    end = asyncio.get_running_loop().time() + timeout_s
    while True:
        found = true()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert asyncio.get_running_loop().time() < end, f"not in {timeout_s} s: {what or true}"
        await asyncio.sleep(0.002)


def node(name: str, gpus: int = 4, *, model: str = "H100-80GB", usd: float = 2.0, leaf: str = "l0") -> Node:
    """`name` is "site/node"."""
    site, node_id = name.split("/")
    pairs = itertools.combinations(range(gpus), 2)
    return Node(
        names.node(site, node_id),
        site,
        gpus=tuple(Gpu(i, f"GPU-{name}-{i}", model, 80 * GB, (9, 0)) for i in range(gpus)),
        links=tuple(Link(a, b, LinkKind.NVLINK, 300e9) for a, b in pairs),
        leaf=leaf,
        cpu_millicores=64_000,
        memory_bytes=512 * GB,
        network_bytes_per_s=50e9,
        price=Price(usd_per_gpu_hour=usd),
        simulated=True,
    )


def plan_with_queues(*names_: str, monotonic: Callable[[], float] = lambda: 0.0) -> Plan:
    """A plan that knows these queues, without limits."""
    planner = Plan(monotonic)
    planner.apply(News(queues={name: Queue(names.queue(name)) for name in names_ or ("q",)}))
    return planner


class FakeHealth:
    """Answers ReportFailure as the test says; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[health_pb2.ReportFailureRequest] = []
        self.answer: Callable[[health_pb2.ReportFailureRequest], health_pb2.Incident] = lambda request: (
            health_pb2.Incident(name="incidents/i1", application_fault=request.exit_code != 0, message="it failed")
        )
        self.down: StatusError | None = None

    async def ReportFailure(self, request, timeout=None):
        self.asked.append(request)
        if self.down:
            raise self.down
        return self.answer(request)

    def WatchNodeHealth(self, request):
        return _endless()


class FakeCheckpoint:
    """Names the checkpoint to restore, if there is one."""

    def __init__(self) -> None:
        self.newest = ""
        self.facts: dict[str, object] = {}  # of that
        self.down: StatusError | None = None
        self.kept: list[checkpoint_pb2.Checkpoint] = []
        self.asked: list[str] = []
        self.listed: list[str] = []  # whose checkpoints were asked for

    async def ListCheckpoints(self, request, timeout=None):
        self.listed.append(request.parent)
        of_job = (one for one in self.kept if one.name.startswith(f"{request.parent}/checkpoints/"))
        return checkpoint_pb2.ListCheckpointsResponse(checkpoints=of_job)

    async def FindRestorable(self, request, timeout=None):
        self.asked.append(request.job)
        if self.down:
            raise self.down
        if not self.newest:
            raise NotFound("checkpoint", request.job)
        return checkpoint_pb2.Checkpoint(name=self.newest, **self.facts)


class FakeInventory:
    """Knows the datasets that a test names."""

    def __init__(self) -> None:
        self.datasets: dict[str, inventory_pb2.Dataset] = {}
        self.complete = False  # whether it tells that it has told of all nodes, which the tests set beside it
        self.unreadable: list[str] = []
        self.offers: list[inventory_pb2.Offer] = []
        self.sites = ["sites/onprem", "sites/elsewhere"]
        self.leases: dict[str, inventory_pb2.Lease] = {}

    async def GetDataset(self, request, timeout=None):
        if request.name in self.unreadable:
            return inventory_pb2.Dataset(name=request.name)
        if request.name not in self.datasets:
            raise NotFound("dataset", request.name)
        return self.datasets[request.name]

    async def ListDatasets(self, request, timeout=None):
        return inventory_pb2.ListDatasetsResponse(datasets=self.datasets.values(), unreadable=self.unreadable)

    async def ListSites(self, request, timeout=None):
        return inventory_pb2.ListSitesResponse(sites=[inventory_pb2.Site(name=one) for one in self.sites])

    async def ListOffers(self, request, timeout=None):
        return inventory_pb2.ListOffersResponse(offers=self.offers)

    async def ListLeases(self, request, timeout=None):
        return inventory_pb2.ListLeasesResponse(leases=self.leases.values(), unreadable=self.unreadable)

    async def CreateLease(self, request, timeout=None):
        name = f"leases/l{len(self.leases)}"
        lease = inventory_pb2.Lease(
            name=name,
            state=inventory_pb2.LEASE_STATE_INTENT,
            owner="scheduler/here",
            node=f"sites/cloud/nodes/l{len(self.leases)}",
        )
        lease.offer.CopyFrom(next(offer for offer in self.offers if offer.name == request.offers[0]))
        lease.offers[:] = request.offers
        lease.queue, lease.reason, lease.cost_cap_usd = request.queue, request.reason, request.cost_cap_usd
        self.leases[name] = lease
        return lease

    async def EndLease(self, request, timeout=None):
        self.leases[request.name].end_reason = request.reason
        return self.leases[request.name]

    def WatchNodes(self, request):
        return _told() if self.complete else _endless()


async def _told() -> AsyncIterator[object]:
    yield inventory_pb2.WatchNodesResponse(bookmark=types_pb2.Bookmark())
    await asyncio.Event().wait()


async def _endless() -> AsyncIterator[object]:
    await asyncio.Event().wait()
    yield


@dataclass
class Agent:
    """Accepts, starts and stops what it is told, unless a test takes over (`obey` False, `refuse` set)."""

    world: World
    node: str
    obey: bool = True
    refuse: str = ""
    slow_to_die: bool = False
    ends_after_s: float = 0.0  # it was told to stop a task
    network: str = ""
    tasks: dict[str, agent_pb2.DesiredTask] = field(default_factory=dict)
    reports: dict[str, agent_pb2.TaskReport] = field(default_factory=dict)
    acknowledged: int = 0
    ahead: list[agent_pb2.DataClaim] = field(
        default_factory=list
    )  # data that it is to pull for jobs that are to start here
    logs: list[agent_pb2.LogRequest] = field(default_factory=list)
    cancelled_logs: list[str] = field(default_factory=list)
    ray: list[agent_pb2.RayDecision] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    error: StatusError | None = None
    sequence: int = 0
    _outbox: asyncio.Queue[agent_pb2.SyncRequest | None] | None = None
    running: asyncio.Task[None] | None = None

    async def connect(self, clock_behind_s: float = 0.0) -> Agent:
        self._outbox = asyncio.Queue()
        hello = agent_pb2.SyncHello(node=self.node, boot_id="b", tasks=self.reports.values(), network=self.network)
        hello.time.FromDatetime(self.world.clock.now() - timedelta(seconds=clock_behind_s))
        self._outbox.put_nowait(agent_pb2.SyncRequest(hello=hello))
        self.running = asyncio.create_task(self._stream(self._outbox))
        await until(lambda: self.node in self.world.service.sessions.connected, f"{self.node} connects")
        return self

    async def disconnect(self) -> None:
        assert self.running is not None
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await until(lambda: self.node not in self.world.service.sessions.connected, f"{self.node} disconnects")

    def report(self, task: str, phase: int, exit_code: int = 0, **more) -> None:
        known = self.tasks.get(task)
        self.sequence += 1
        report = agent_pb2.TaskReport(
            task=task,
            job=known.job if known else self.reports[task].job,
            epoch=known.epoch if known else self.reports[task].epoch,
            phase=phase,
            exit_code=exit_code,
            sequence=self.sequence,
            traceparent=known.traceparent if known else "",
            **more,
        )
        self.reports[task] = report
        self.history.append(f"{task} {pb.TaskPhase.Name(phase).removeprefix('TASK_PHASE_')}")
        self.say(agent_pb2.SyncRequest(report=report))

    def exit(self, code: int = 0, task: str = "", message: str = "") -> None:
        """All its tasks, or one, end by themselves."""
        for name in [task] if task else list(self.tasks):
            self.report(name, pb.TASK_PHASE_EXITED, code, message=message)

    def say(self, request: agent_pb2.SyncRequest) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(request)

    @property
    def heard(self) -> bool:
        """Whether the leader has taken all that it said: what leaves the outbox is dealt with before anything else runs."""
        return self._outbox is None or self._outbox.empty()

    def step(self, job: str, epoch: int, step: int, loss: float) -> None:
        moved = agent_pb2.TaskProgress(job=job, epoch=epoch, step=step, loss=loss)
        self.say(agent_pb2.SyncRequest(progress=agent_pb2.ProgressReport(tasks=[moved])))

    async def _stream(self, outbox: asyncio.Queue[agent_pb2.SyncRequest | None]) -> None:
        site, node_id = self.node.split("/")[1::2]

        async def requests() -> AsyncIterator[agent_pb2.SyncRequest]:
            while (request := await outbox.get()) is not None:
                yield request

        with auth.acting_as(auth.Identity("agent", f"{site}/{node_id}")):
            try:
                async with contextlib.aclosing(self.world.tasks.Sync(requests(), None)) as answers:
                    async for answer in answers:
                        self._take(answer)
            except StatusError as error:
                self.error = error

    def _take(self, answer: agent_pb2.SyncResponse) -> None:
        match answer.WhichOneof("message"):
            case "desired":
                wanted = {task.task.id: task for task in answer.desired.tasks}
                left_alone = set(answer.desired.unreadable_jobs)
                for name in dict.fromkeys([*self.tasks, *self.reports]):
                    known = self.tasks.get(name) or self.reports[name]
                    if name not in wanted and known.job not in left_alone:
                        self._stop(name)
                for task in wanted.values():
                    self._want(task)
            case "changed":
                self._want(answer.changed)
            case "removed":
                self._stop(answer.removed)
            case "acknowledged_sequence":
                self.acknowledged = answer.acknowledged_sequence
            case "data":
                self.ahead = list(answer.data.claims)
            case "logs":
                self.logs.append(answer.logs)
            case "cancel_logs":
                self.cancelled_logs.append(answer.cancel_logs)
            case "ray":
                self.ray += [answer.ray] if answer.ray.job else []

    def _want(self, task: agent_pb2.DesiredTask) -> None:
        name = task.task.id
        self.tasks[name] = task
        if self.refuse:
            self.report(name, pb.TASK_PHASE_REFUSED, message=self.refuse)
        elif not self.obey:
            return
        elif not task.start:
            leads = task.task.group_rank == 0
            self.report(name, pb.TASK_PHASE_ACCEPTED, rendezvous="10.0.0.1:29500" if leads else "")
        elif self.reports.get(name) is None or self.reports[name].phase < pb.TASK_PHASE_RUNNING:
            self.report(name, pb.TASK_PHASE_RUNNING)

    def _stop(self, name: str) -> None:
        if self.ends_after_s:
            asyncio.get_running_loop().call_later(self.ends_after_s, self._stopped, name)
        else:
            self._stopped(name)

    def _stopped(self, name: str) -> None:
        last = self.reports.get(name)
        if last is None:  # nothing of it ever ran
            self.report(name, pb.TASK_PHASE_GONE)
        elif last.phase < pb.TASK_PHASE_EXITED and not self.slow_to_die:
            self.report(name, pb.TASK_PHASE_KILLED, -15)
        self.tasks.pop(name, None)
        if not self.slow_to_die:
            self.reports.pop(name, None)


class World:
    """`async with World() as world:` leads at once."""

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        timeouts: Timeouts | None = None,
        keep_ended: int = 10_000,
        bus: Bus | None = None,
        secrets: Any = None,
        rebalancing: RebalanceSettings | None = None,
        let_end_s: float = MOST_S,
        bursting: BurstSettings | None = None,
        people: Callable[[str], auth.Principal | None] | None = None,
        measured: Any = None,
    ) -> None:
        self.people, self.measured = people, measured
        self.bus, self.rebalancing, self.let_end_s, self.bursting = bus, rebalancing, let_end_s, bursting
        self.clock = clock or LoopClock()
        self.store = MemoryStore(self.clock)
        self.code = MemoryCode(self.clock)
        self.health, self.checkpoint, self.inventory = FakeHealth(), FakeCheckpoint(), FakeInventory()
        self.secrets = secrets  # stub of SecretService
        self.timeouts, self.keep_ended = timeouts or Timeouts(), keep_ended
        self.agents: dict[str, Agent] = {}
        self.nodes: dict[str, inventory_pb2.Node] = {}
        self.machines: dict[str, Node] = {}  # as they were added
        self.phases: dict[str, health_pb2.NodeHealth] = {}

    async def __aenter__(self) -> World:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        await self.store.close()

    async def start(self) -> None:
        peers = Peers(self.inventory, self.health, self.checkpoint, self.secrets)
        self.service: Service = assemble(
            self.store,
            self.bus,
            self.clock,
            peers,
            self.timeouts,
            "here:1",
            self.keep_ended,
            self.code,
            rebalancing=self.rebalancing,
            let_end_s=self.let_end_s,
            bursting=self.bursting,
            people=self.people,
            measured=self.measured,
        )
        scheduler, self.tasks = (servicer for _, servicer, _ in self.service.servicers)
        self.scheduler = AsAdmin(scheduler)
        self._loop = asyncio.create_task(self.service.loops[0]())
        await until(lambda: self.service.leader_session.current is not None or self._loop.done(), "it leads")
        if self._loop.done():
            self._loop.result()
        for name, message in self.nodes.items():
            self.node_view.set_node(name, message)
        for name, phase in self.phases.items():
            self.node_view.set_health(name, phase)

    async def stop(self) -> None:
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)

    async def restart(self) -> None:
        """Another process takes over; agents dial again."""
        await self.stop()
        await self.start()
        for agent in self.agents.values():
            if agent.running is not None:
                await asyncio.gather(agent.running, return_exceptions=True)
                await agent.connect()

    @property
    def node_view(self):
        return self.service.nodes

    @property
    def planner(self):
        """The leader's planner."""
        assert self.service.leader_session.current is not None
        return self.service.leader_session.current.planner

    async def held(self):
        """GPUs held by job and node, as the leader's planner knows them."""
        return await self.planner.ask(lambda planner: planner.held())

    async def caught_up(self) -> None:
        """Returns when the leader has dealt with all that the store holds and all that agents said."""
        newest = (await self.store.list("", limit=1)).revision
        await self.service.jobs.cache.at_least(newest)
        await until(lambda: all(agent.heard for agent in self.agents.values()), "agents are heard")
        current = self.service.leader_session.current
        assert current is not None
        await current.view.caught_up()

    async def held_on(self, node: str) -> int:
        """How many GPUs of the node are held."""
        return sum(len(holding.get(node, ())) for holding in (await self.held()).values())

    async def closed_reason(self, node: str) -> str:
        return self.node_view.closed(node)

    async def add(self, *nodes: Node, connect: bool = True) -> list[Agent]:
        """Nodes that are READY, with their agents."""
        added = []
        for fact in nodes:
            message = inventory_pb2.Node(
                name=fact.name, facts=facts_to_proto(fact), intent=inventory_pb2.NODE_INTENT_ACTIVE
            )
            self.nodes[fact.name], self.machines[fact.name] = message, fact
            self.node_view.set_node(fact.name, message)
            self.phase(fact.name, health_pb2.NODE_PHASE_READY)
            agent = self.agents[fact.name] = Agent(self, fact.name)
            added.append(await agent.connect() if connect else agent)
        return added

    def phase(self, name: str, phase: int, reason: str = "") -> None:
        health = health_pb2.NodeHealth(name=name, phase=phase, reason=reason, message=reason.lower())
        health.transition_time.FromDatetime(self.clock.now())
        self.phases[name] = health
        self.node_view.set_health(name, health)

    def intend(self, name: str, intent: int, reason: str = "") -> None:
        message = inventory_pb2.Node()
        message.CopyFrom(self.nodes[name])
        message.intent, message.intent_reason = intent, reason
        self.nodes[name] = message
        self.node_view.set_node(name, message)

    def reports(self, fact: Node) -> None:
        """The node's agent registers other facts."""
        message = inventory_pb2.Node()
        message.CopyFrom(self.nodes[fact.name])
        message.facts.CopyFrom(facts_to_proto(fact))
        self.nodes[fact.name] = message
        self.node_view.set_node(fact.name, message)

    async def submit(
        self, gpus: int = 1, *, job_id: str = "", queue: str = "default", request_id: str = "", **spec
    ) -> str:
        made = await self.create(gpus, job_id=job_id, queue=queue, request_id=request_id, **spec)
        await asyncio.sleep(0.001)  # of two jobs the one that was submitted later has the later name and time
        return made.name

    async def create(
        self,
        gpus: int = 1,
        *,
        job_id: str = "",
        queue: str = "default",
        request_id: str = "",
        dry=False,
        wait_for_capacity=False,
        **spec,
    ) -> pb.Job:
        job = pb.Job(spec=pb.JobSpec(command=["python", "train.py"], gpus=gpus, **spec))
        request = pb.CreateJobRequest(
            parent=f"queues/{queue}",
            job_id=job_id,
            job=job,
            request_id=request_id,
            validate_only=dry,
            wait_for_capacity=wait_for_capacity,
        )
        with auth.acting_as(USER):
            return await self.scheduler.CreateJob(request, None)

    async def job(self, name: str) -> pb.Job:
        return await self.scheduler.GetJob(pb.GetJobRequest(name=name), None)

    async def reaches(self, name: str, state: str, timeout_s: float = 60.0) -> pb.Job:
        wanted = pb.JobState.Value(f"JOB_STATE_{state}")

        async def there() -> pb.Job | None:
            job = await self.job(name)
            return job if job.state == wanted else None

        found = await until(there, f"{name} is {state}, it is {await self.job(name)}", timeout_s)
        return found  # type: ignore[return-value]
