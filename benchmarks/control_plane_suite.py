"""A control plane for measurements and tests: real etcd and a real scheduler process; fleet, inventory and health are played.

Everything speaks gRPC over mTLS on the loopback interface. An agent here is one stream that accepts, starts and ends tasks as told,
without processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from whaleflux import names
from whaleflux.convert import facts_to_proto
from whaleflux.embedded import etcd
from whaleflux.errors import StatusError, Unavailable
from whaleflux.fleet.model import Gpu, Link, LinkKind, Node, Price
from whaleflux.rpc import roles
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.channel import Channel, connect
from whaleflux.rpc.pki import CertificateAuthority, Tls, TlsFiles, server_name
from whaleflux.rpc.server import Server
from whaleflux.trust.ownership import note_asked
from whaleflux.v1 import agent_pb2, health_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1.agent_pb2_grpc import TaskServiceStub
from whaleflux.v1.health_pb2_grpc import HealthServiceServicer, add_HealthServiceServicer_to_server
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceServicer, add_InventoryServiceServicer_to_server
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub

SERVICES = Path(__file__).resolve().parent.parent / "services"


def machine(name: str, gpus: int = 8) -> Node:
    """A node "site/node" of H100s."""
    site, node_id = name.split("/")
    pairs = itertools.combinations(range(gpus), 2)
    return Node(
        names.node(site, node_id),
        site,
        gpus=tuple(Gpu(i, f"GPU-{node_id}-{i}", "H100-80GB", 80 << 30, (9, 0)) for i in range(gpus)),
        links=tuple(Link(a, b, LinkKind.NVLINK, 347e9) for a, b in pairs),
        leaf=f"leaf-{int(node_id.rpartition('-')[2] or 0) // 16}",
        cpu_millicores=96_000,
        memory_bytes=1 << 40,
        network_bytes_per_s=400e9 / 8 * 8,
        price=Price(usd_per_gpu_hour=2.0),
        simulated=True,
    )


class Played(InventoryServiceServicer, HealthServiceServicer):
    """Inventory and health of a fleet in which nothing changes unless a test says so."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.failures: list[health_pb2.ReportFailureRequest] = []

    async def WatchNodes(
        self, request: inventory_pb2.WatchNodesRequest, context: Any
    ) -> AsyncIterator[inventory_pb2.WatchNodesResponse]:
        for node in self.nodes:
            message = inventory_pb2.Node(
                name=node.name, facts=facts_to_proto(node), intent=inventory_pb2.NODE_INTENT_ACTIVE
            )
            yield inventory_pb2.WatchNodesResponse(added=message)
        yield inventory_pb2.WatchNodesResponse(bookmark={}, resource_version=1)
        await asyncio.Event().wait()

    async def ListDatasets(self, request: Any, context: Any) -> inventory_pb2.ListDatasetsResponse:
        note_asked()  # nobody's things
        return inventory_pb2.ListDatasetsResponse()

    async def ListOffers(self, request: Any, context: Any) -> inventory_pb2.ListOffersResponse:
        note_asked()  # there is nothing to rent
        return inventory_pb2.ListOffersResponse()

    async def ListLeases(self, request: Any, context: Any) -> inventory_pb2.ListLeasesResponse:
        note_asked()
        return inventory_pb2.ListLeasesResponse()

    async def WatchNodeHealth(
        self, request: health_pb2.WatchNodeHealthRequest, context: Any
    ) -> AsyncIterator[health_pb2.WatchNodeHealthResponse]:
        for node in self.nodes:
            message = health_pb2.NodeHealth(name=node.name, phase=health_pb2.NODE_PHASE_READY)
            yield health_pb2.WatchNodeHealthResponse(added=message)
        yield health_pb2.WatchNodeHealthResponse(bookmark={}, resource_version=1)
        await asyncio.Event().wait()

    async def ReportFailure(self, request: health_pb2.ReportFailureRequest, context: Any) -> health_pb2.Incident:
        self.failures.append(request)
        return health_pb2.Incident(name="incidents/played", application_fault=True, message=request.message[:200])


@dataclass
class Agent:
    """One stream: accepts at once, says RUNNING at once, ends tasks after `run_s` (None: never by itself)."""

    channel: Channel
    node: str
    run_s: float | None = None
    on_task: Callable[[agent_pb2.DesiredTask], None] = lambda _: None
    tasks: dict[str, agent_pb2.DesiredTask] = field(default_factory=dict)
    reports: dict[str, agent_pb2.TaskReport] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    acknowledged: int = 0
    sequence: int = 0
    outbox: asyncio.Queue[agent_pb2.SyncRequest] = field(default_factory=asyncio.Queue)

    async def run(self) -> None:
        """Redials for ever."""
        while True:
            with contextlib.suppress(StatusError):
                self.outbox = asyncio.Queue()
                hello = agent_pb2.SyncHello(node=self.node, boot_id="boot", tasks=self.reports.values())
                self.outbox.put_nowait(agent_pb2.SyncRequest(hello=hello))
                async with TaskServiceStub(self.channel).Sync(self._requests(self.outbox)) as answers:
                    async for answer in answers:
                        self._take(answer)
            await asyncio.sleep(0.1)

    async def _requests(
        self, outbox: asyncio.Queue[agent_pb2.SyncRequest]
    ) -> AsyncGenerator[agent_pb2.SyncRequest, None]:
        while True:
            yield await outbox.get()

    def report(self, task: agent_pb2.DesiredTask, phase: pb.TaskPhase, exit_code: int = 0, **more: Any) -> None:
        self.sequence += 1
        report = agent_pb2.TaskReport(
            task=task.task.id,
            job=task.job,
            epoch=task.epoch,
            phase=phase,
            exit_code=exit_code,
            sequence=self.sequence,
            **more,
        )
        self.reports[task.task.id] = report
        self.outbox.put_nowait(agent_pb2.SyncRequest(report=report))

    def _take(self, answer: agent_pb2.SyncResponse) -> None:
        match answer.WhichOneof("message"):
            case "desired":
                wanted = {task.task.id: task for task in answer.desired.tasks}
                for name in [*self.reports]:
                    if name not in wanted:
                        self._stop(name)
                for task in wanted.values():
                    self._want(task)
            case "changed":
                self._want(answer.changed)
            case "removed":
                self._stop(answer.removed)
            case "acknowledged_sequence":
                self.acknowledged = answer.acknowledged_sequence

    def _want(self, task: agent_pb2.DesiredTask) -> None:
        name = task.task.id
        last = self.reports.get(name)
        self.tasks[name] = task
        if not task.start and last is None:
            self.on_task(task)
            self.report(task, pb.TASK_PHASE_ACCEPTED, rendezvous="127.0.0.1:29500" if not task.task.group_rank else "")
        elif task.start and (last is None or last.phase < pb.TASK_PHASE_RUNNING):
            self.started.append(name)
            self.report(task, pb.TASK_PHASE_RUNNING)
            if self.run_s is not None:
                asyncio.get_running_loop().call_later(self.run_s, self.end, name)

    def end(self, name: str, exit_code: int = 0) -> None:
        """A task's ranks end by themselves."""
        if task := self.tasks.get(name):
            self.report(task, pb.TASK_PHASE_EXITED, exit_code)

    def _stop(self, name: str) -> None:
        task, last = self.tasks.pop(name, None), self.reports.get(name)
        if task is not None and last is not None and last.phase < pb.TASK_PHASE_EXITED:
            self.report(task, pb.TASK_PHASE_KILLED, -15)
        self.reports.pop(name, None)


class Child:
    """A process of ours, its output in a file."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def check(self) -> None:
        if self._process.poll() is not None:
            raise Unavailable(f"{self.log.stem} ended: {self.log.read_text()[-2000:]}")


class Suite:
    """`async with Suite(folder, nodes) as suite:` etcd, the scheduler, played peers, and an agent per node."""

    def __init__(
        self, folder: Path, nodes: list[Node], *, run_s: float | None = None, agents: bool = True, followers: int = 0
    ) -> None:
        self._folder, self._run_s, self._with_agents = folder, run_s, agents
        self.played = Played(nodes)
        self.authority = CertificateAuthority.create(datetime.now(UTC))
        self.agents: dict[str, Agent] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._channels: list[Channel] = []
        self.etcd: Child | None = None
        self.process: Child | None = None
        self.client_port, self.peer_port, self.scheduler_port, *self.follower_ports = free_ports(3 + followers)
        self.followers: list[Child] = []

    async def __aenter__(self) -> Suite:
        try:
            await self.start_etcd()
            table = {**roles.TABLE}
            self._server = Server(self.tls("inventory"), Authority(table=table))
            self._server.add(add_InventoryServiceServicer_to_server, self.played, "whaleflux.v1.InventoryService")
            self._server.add(add_HealthServiceServicer_to_server, self.played, "whaleflux.v1.HealthService")
            self._peers = self._server.bind("127.0.0.1:0")
            await self._server.start()
            await self.start_scheduler()
            if self._with_agents:
                await self.connect_agents()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()
        if hasattr(self, "_server"):
            await self._server.drain(0)
        for child in (*self.followers, self.process, self.etcd):
            if child is not None:
                child.kill()

    def tls(self, role: str, name: str = "1") -> Tls:
        hosts = ["127.0.0.1", "localhost", server_name("inventory"), server_name("health_monitor")]
        return self.authority.issue(role, name, datetime.now(UTC), hosts=hosts)

    async def start_etcd(self) -> None:
        data = self._folder / "etcd"
        command = etcd.command(etcd.find(), data, client_port=self.client_port, peer_port=self.peer_port)
        self.etcd = Child(command, self._folder / "etcd.log")
        await etcd.wait_ready("127.0.0.1", self.client_port)

    async def start_scheduler(self) -> None:
        files = TlsFiles.under(self._folder, "scheduler")
        files.save(self.tls("scheduler"))
        self.process = self._scheduler(files, self.scheduler_port, "scheduler")
        await self._answers(self.process, self.channel("admin", "operator"))
        for port in self.follower_ports:
            follower = self._scheduler(files, port, f"scheduler-{port}")
            self.followers.append(follower)
            await self._answers(follower, self.channel("admin", "operator", port))

    def _scheduler(self, files: TlsFiles, port: int, name: str) -> Child:
        peers = f"127.0.0.1:{self._peers}"
        command = [
            sys.executable,
            "-m",
            "whaleflux_scheduler",
            *("--listen", f"127.0.0.1:{port}"),
            *("--store", f"http://127.0.0.1:{self.client_port}", "--plain-loopback"),
            *("--inventory", peers, "--health-monitor", peers),
            *("--tls-cert", str(files.chain), "--tls-key", str(files.key), "--tls-ca", str(files.roots)),
            *("--log-level", "warning"),
            *("--port-file", str(self._folder / f"{name}.json")),
        ]
        return Child(command, self._folder / f"{name}.log", dict(os.environ))

    async def _answers(self, process: Child, channel: Channel) -> None:
        client = SchedulerServiceStub(channel)
        async with asyncio.timeout(30):
            while True:
                process.check()
                with contextlib.suppress(StatusError):
                    await client.GetQueue(pb.GetQueueRequest(name="queues/default"), timeout=1)
                    return
                await asyncio.sleep(0.05)

    async def connect_agents(self) -> None:
        for node in self.played.nodes:
            site, node_id = node.name.split("/")[1::2]
            agent = Agent(self.channel("agent", f"{site}/{node_id}"), node.name, self._run_s)
            self.agents[node.name] = agent
            self._tasks.append(asyncio.create_task(agent.run()))

    def channel(self, role: str, name: str, port: int = 0) -> Channel:
        target = f"127.0.0.1:{port or self.scheduler_port}"
        channel = connect(target, self.tls(role, name), server=server_name("scheduler"))
        self._channels.append(channel)
        return channel

    def stub(self, role: str = "user", name: str = "ada") -> SchedulerServiceStub:
        return SchedulerServiceStub(self.channel(role, name))

    def plain_channel(self, role: str = "user", name: str = "ada", port: int = 0) -> grpc.aio.Channel:
        """A channel of gRPC's own with nothing of ours around it, for load whose sender should cost as little as it can."""
        tls = self.tls(role, name)
        credentials = grpc.ssl_channel_credentials(tls.roots, tls.key, tls.chain)
        options = [("grpc.ssl_target_name_override", server_name("scheduler"))]
        return grpc.aio.secure_channel(f"127.0.0.1:{port or self.scheduler_port}", credentials, options=options)

    def ports(self) -> dict[str, int]:
        """What the scheduler says it listens on."""
        told: dict[str, int] = json.loads((self._folder / "scheduler.json").read_text())
        return told


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def request(gpus: int = 1, **spec: Any) -> pb.CreateJobRequest:
    """A job of the kind that the measurements submit."""
    job = pb.Job(spec=pb.JobSpec(command=["python", "train.py", "--config", "sft.yaml"], gpus=gpus, **spec))
    return pb.CreateJobRequest(parent="queues/default", job=job, wait_for_capacity=True)


async def until(true: Callable[[], object], timeout_s: float = 45.0) -> float:
    """Seconds until a condition held; raises TimeoutError."""
    begun = time.perf_counter()
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.005)
    return time.perf_counter() - begun
