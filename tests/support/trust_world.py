"""Five services in this process behind real servers and certificates, over one memory store: who is refused what, over the wire.

Nodes join as machines do, and their agents do as they are told as far as a test needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from whaleflux.clock import SystemClock
from whaleflux.errors import StatusError
from whaleflux.rpc import pki
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.channel import Channel, connect
from whaleflux.rpc.pki import CertificateAuthority, Tls, server_name
from whaleflux.rpc.retry_policy import CallPolicy
from whaleflux.rpc.server import Server
from whaleflux.services import ROLES
from whaleflux.store.memory import MemoryStore
from whaleflux.trust.audit import AuditRecord, NoAudit
from whaleflux.trust.view import TrustView
from whaleflux.v1 import (
    agent_pb2,
    agent_pb2_grpc,
    checkpoint_pb2_grpc,
    health_pb2_grpc,
    inventory_pb2,
    inventory_pb2_grpc,
    router_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
)
from whaleflux_checkpoint.servicer import Checkpoints
from whaleflux_health_monitor.campaign import Campaign
from whaleflux_health_monitor.core.evidence import Probe
from whaleflux_health_monitor.core.timing import Timing
from whaleflux_health_monitor.leader_session import Dependencies
from whaleflux_health_monitor.servicer import HealthServicer
from whaleflux_inference_router.routing_state import routing
from whaleflux_inference_router.servicer import Router
from whaleflux_inventory.service import assemble as assemble_inventory
from whaleflux_scheduler.bootstrap import Peers, assemble
from whaleflux_scheduler.core.observed import Timeouts

_ONCE = CallPolicy(attempts=1, timeout_s=5.0)
_STUBS: dict[str, Any] = {
    "inventory": inventory_pb2_grpc.InventoryServiceStub,
    "scheduler": scheduler_pb2_grpc.SchedulerServiceStub,
    "health_monitor": health_pb2_grpc.HealthServiceStub,
    "checkpoint": checkpoint_pb2_grpc.CheckpointServiceStub,
    "inference_router": router_pb2_grpc.RouterServiceStub,
}


class Trail(NoAudit):
    """What is written down of calls."""

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []

    def record(self, record: AuditRecord) -> None:
        self.records.append(record)


class Neighbours:
    """What inventory asks other services."""

    dead = False
    boot = ""

    async def unreachable(self, node: str) -> bool:
        return self.dead

    async def gpus_held(self, node: str) -> int:
        return 0

    async def connected_boot(self, node: str) -> str:
        return self.boot


@dataclass
class Caller:
    """The five services as one certificate reaches them."""

    world: TrustWorld
    tls: Tls
    channels: dict[str, Channel] = field(default_factory=dict)

    def channel(self, role: str) -> Channel:
        if role not in self.channels:
            port = self.world.servers[role].port
            dialled = connect(f"127.0.0.1:{port}", self.tls, server=server_name(role), policy=_ONCE)
            self.channels[role] = self.world.keep(dialled)
        return self.channels[role]

    def __getattr__(self, role: str) -> Any:
        if role not in _STUBS:
            raise AttributeError(role)
        return _STUBS[role](self.channel(role))

    @property
    def tasks(self) -> Any:
        return agent_pb2_grpc.TaskServiceStub(self.channel("scheduler"))


@dataclass
class Machine:
    """What a machine keeps."""

    id: str
    node_id: str
    key: bytes = b""
    certificate: bytes = b""

    def tls(self, roots: bytes) -> Tls:
        return Tls(self.key, self.certificate, roots)

    async def join(self, world: TrustWorld, token: str = "", certificate: bytes = b"") -> Caller:
        """By a token, or by its ended certificate."""
        if not self.key:
            self.key, _ = pki.new_key_and_request()
        request = inventory_pb2.JoinRequest(
            token=token,
            node_id=self.node_id,
            machine_id=self.id,
            certificate_request_pem=pki.request_for(self.key).decode(),
            certificate_pem=certificate.decode(),
        )
        answer = await world.outside.inventory.Join(request)
        self.certificate = answer.certificate_pem.encode()
        return world.caller(self.tls(world.ca.certificate_pem))

    @property
    def session(self) -> str:
        return pki.identity_of(self.certificate).session


class Stream:
    """An open stream to the scheduler or to health_monitor; what it is told is obeyed by whoever looks at `got`."""

    def __init__(self, method: Any, first: Any) -> None:
        self.outbox: asyncio.Queue[Any] = asyncio.Queue()
        self.got: list[Any] = []
        self.error: StatusError | None = None
        self.ended = asyncio.Event()
        self.outbox.put_nowait(first)
        self.task = asyncio.create_task(self._run(method))

    async def _run(self, method: Any) -> None:
        async def requests() -> AsyncIterator[Any]:
            while True:
                yield await self.outbox.get()

        try:
            async with method(requests()) as answers:
                async for answer in answers:
                    self.got.append(answer)
        except StatusError as error:
            self.error = error
        finally:
            self.ended.set()

    def say(self, request: Any) -> None:
        self.outbox.put_nowait(request)


class TrustWorld:
    """`async with TrustWorld() as world:`."""

    def __init__(self) -> None:
        self.store, self.clock, self.trail, self.neighbours = MemoryStore(), SystemClock(), Trail(), Neighbours()
        self.ca = CertificateAuthority.create(datetime.now(UTC))
        self.servers = {role: Server(self.issue(role, "t"), Authority()) for role in ROLES}
        self._stack = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[Any]] = []
        self.stopping = asyncio.Event()

    def issue(self, role: str, name: str, session: str = "") -> Tls:
        return self.ca.issue(role, name, datetime.now(UTC), session=session)

    def caller(self, tls: Tls) -> Caller:
        return Caller(self, tls)

    def keep(self, channel: Channel) -> Channel:
        self._stack.push_async_callback(channel.close)
        return channel

    @property
    def outside(self) -> Caller:
        """Through the front door without a certificate."""
        return self.caller(self.issue("frontdoor", "t"))

    async def __aenter__(self) -> Self:
        view = await self._stack.enter_async_context(TrustView(self.store, self.clock).running())
        await view.until_known()
        for server in self.servers.values():
            server.bind("127.0.0.1:0")
            server.guard(view, self.trail)
            self._start(server.end_streams_of_the_revoked())
            self._stack.push_async_callback(server.drain, 0)
        await self._serve(view)
        for server in self.servers.values():
            await server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping.set()
        await self._stack.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.store.close()

    def _start(self, loop: Coroutine[Any, Any, Any]) -> None:
        self._tasks.append(asyncio.create_task(loop))

    async def _serve(self, view: TrustView) -> None:
        inventory = assemble_inventory(self.store, self.clock, self.ca, self.neighbours)
        self._add("inventory", inventory_pb2_grpc.add_InventoryServiceServicer_to_server, inventory, "Inventory")
        as_scheduler = self.caller(self.issue("scheduler", "t"))
        peers = Peers.dial(as_scheduler.channel("inventory"), None, None)
        scheduler = assemble(self.store, None, self.clock, peers, Timeouts(), "127.0.0.1:1")
        for add, servicer, name in scheduler.servicers:
            self.servers["scheduler"].add(add, servicer, name)
        for loop in scheduler.loops:
            self._start(loop())
        campaign = self._health()
        health = HealthServicer(self.store, campaign, self.clock, self.stopping)
        self._add("health_monitor", health_pb2_grpc.add_HealthServiceServicer_to_server, health, "Health")
        self._start(campaign.run())
        checkpoints = Checkpoints(self.store, self.clock, view.queue_access)
        self._add("checkpoint", checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server, checkpoints, "Checkpoint")
        current = await self._stack.enter_async_context(routing(self.store, self.clock))
        router = Router(self.store, self.clock, current)
        self._add("inference_router", router_pb2_grpc.add_RouterServiceServicer_to_server, router, "Router")

    def _add(self, role: str, add: Any, servicer: Any, name: str) -> None:
        self.servers[role].add(add, servicer, f"whaleflux.v1.{name}Service")

    def _health(self) -> Campaign:
        as_health = self.caller(self.issue("health_monitor", "t"))

        def watch(since: int) -> Any:
            return as_health.inventory.WatchNodes(inventory_pb2.WatchNodesRequest(resource_version=since))

        async def probe(node: str, address: str) -> Probe:
            return Probe.ANSWERED

        def no_span(*_: Any, **__: Any) -> str:
            return ""

        return Campaign(Dependencies(self.store, self.clock, probe, watch, Timing(), no_span), "127.0.0.1:1")

    async def token(self, site: str, node: str = "") -> str:
        """What an operator hands to a machine."""
        olga = self.caller(self.issue("operator", "olga"))
        wanted = inventory_pb2.CreateJoinTokenRequest(site=f"sites/{site}", node=node)
        return str((await olga.inventory.CreateJoinToken(wanted)).secret)


async def until(true: Any, what: str, within_s: float = 30.0) -> Any:
    """Polls a condition; fails with `what`."""
    end_s = asyncio.get_running_loop().time() + within_s
    while True:
        found = true()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert asyncio.get_running_loop().time() < end_s, what
        await asyncio.sleep(0.005)


def facts(node: str) -> inventory_pb2.NodeFacts:
    """One GPU."""
    found = inventory_pb2.NodeFacts(simulated=True, cpu_millicores=8000, memory_bytes=64 << 30)
    found.gpus.add(index=0, model="H200", uuid=f"GPU-{node}", memory_bytes=141 << 30, healthy=True)
    return found


def obey(stream: Stream, seen: int = 0) -> int:
    """Says of each desired task what a good agent would; returns how many answers were looked at."""
    for answer in stream.got[seen:]:
        for desired in (*answer.desired.tasks, *([answer.changed] if answer.HasField("changed") else [])):
            running = scheduler_pb2.TASK_PHASE_RUNNING if desired.start else scheduler_pb2.TASK_PHASE_ACCEPTED
            report = agent_pb2.TaskReport(
                task=desired.task.id, job=desired.job, epoch=desired.epoch, phase=running, rendezvous="127.0.0.1:29500"
            )
            report.sequence = len(stream.got) + (1000 if desired.start else 0)
            stream.say(agent_pb2.SyncRequest(report=report))
    return len(stream.got)
