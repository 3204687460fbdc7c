"""The inference router in this process behind a real Envoy, with engines in processes of their own. All on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from envoy.service.accesslog.v3.als_pb2_grpc import add_AccessLogServiceServicer_to_server
from envoy.service.endpoint.v3.eds_pb2_grpc import add_EndpointDiscoveryServiceServicer_to_server
from google.protobuf.wrappers_pb2 import StringValue

from whaleflux import frontdoor, hostport
from whaleflux.clock import SystemClock
from whaleflux.rpc import auth
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.channel import Channel, connect
from whaleflux.rpc.pki import CertificateAuthority, TlsFiles, server_name
from whaleflux.rpc.retry_policy import CallPolicy
from whaleflux.rpc.server import Server
from whaleflux.services import ROLES
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux.trust.audit import AuditRecord, NoAudit
from whaleflux.trust.ownership import note_asked
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub
from whaleflux_inference_router.core import allowed_networks
from whaleflux_inference_router.endpoints import Endpoints
from whaleflux_inference_router.feedback import Feedback
from whaleflux_inference_router.policy_server import serving
from whaleflux_inference_router.replica_jobs import ReplicaJobs
from whaleflux_inference_router.replica_manager import ReplicaManager
from whaleflux_inference_router.request_authorizer import RequestAuthorizer
from whaleflux_inference_router.resolver import Resolver
from whaleflux_inference_router.routing_state import RoutingState, routing
from whaleflux_inference_router.servicer import Router

CA = CertificateAuthority.create(datetime.now(UTC))
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def until(true: Callable[[], Any], within_s: float = 30.0, what: str = "") -> None:
    """Polls until `true()`; raises TimeoutError naming `what`."""
    end_s = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end_s:
            raise TimeoutError(f"{what or true} did not come true within {within_s} s")
        await asyncio.sleep(0.01)


class Process:
    """An engine of its own."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.support.small_engine", host], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self.popen.stdout is not None
        self.port = int(self.popen.stdout.readline())
        self.popen.stdout.close()
        self.address = hostport.join(host, self.port)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)


def echo_service(name: str, methods: list[str]) -> Callable[[Any, Any], None]:
    """A service whose methods answer with the caller as this server sees it."""

    async def who(request: StringValue, context: Any) -> StringValue:
        note_asked()
        return StringValue(value=f"{auth.caller().role}/{auth.caller().name}")

    async def forever(request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        yield await who(request, context)
        await asyncio.sleep(60)

    codecs = (StringValue.FromString, StringValue.SerializeToString)
    handlers: dict[str, Any] = {m: grpc.unary_unary_rpc_method_handler(who, *codecs) for m in methods}
    handlers["WatchNodes"] = grpc.unary_stream_rpc_method_handler(forever, *codecs)

    def add(_: Any, server: Any) -> None:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

    return add


class Written(list[AuditRecord], NoAudit):
    """What was written down."""

    def record(self, record: AuditRecord) -> None:
        self.append(record)


@dataclass
class World:
    """Ports are fixed for the world's life, so that a router that comes back is found where it was."""

    folder: Path
    store: MemoryStore = field(default_factory=MemoryStore)
    ports: dict[str, int] = field(default_factory=dict)
    routing: RoutingState | None = None
    front: frontdoor.FrontDoor | None = None
    envoy: subprocess.Popen[bytes] | None = None
    router: contextlib.AsyncExitStack | None = None
    trail: Written = field(default_factory=Written)

    @property
    def live(self) -> RoutingState:
        assert self.routing is not None
        return self.routing

    def files(self, role: str, name: str = "t") -> TlsFiles:
        files = TlsFiles.under(self.folder, role)
        hosts = ("127.0.0.1", "localhost") if role == "frontdoor" else ()
        files.save(CA.issue(role, name, datetime.now(UTC), hosts=hosts))
        return files

    def tls(self, role: str, name: str) -> Any:
        return CA.issue(role, name, datetime.now(UTC))

    def channel(self, role: str = "admin", name: str = "root") -> Channel:
        """Through the front door."""
        return self.dial(self.tls(role, name))

    def dial(self, tls: Any) -> Channel:
        once = CallPolicy(attempts=1, timeout_s=5)
        return connect(f"127.0.0.1:{self.ports['front']}", tls, server=server_name("frontdoor"), policy=once)

    async def start_router(self) -> None:
        """Everything that `python -m whaleflux_inference_router` runs, over the store of this world."""
        stack = self.router = contextlib.AsyncExitStack()
        clock = SystemClock()
        current = self.routing = await stack.enter_async_context(routing(self.store, clock))
        resolver = Resolver(clock, allowed=allowed_networks.parse("ordinary,127.0.0.0/8,::1/128"))
        await stack.enter_async_context(
            serving(
                RequestAuthorizer(current, open_access=False, trail=self.trail),
                f"127.0.0.1:{self.ports['policy']}",
                self.files("inference_router"),
            )
        )
        server = Server(self.tls("inference_router", "t"), Authority())
        server.add(
            add_RouterServiceServicer_to_server,
            Router(self.store, clock, current, resolver),
            "whaleflux.v1.RouterService",
        )
        server.add(
            add_AccessLogServiceServicer_to_server,
            Feedback(current, clock, self.trail),
            "envoy.service.accesslog.v3.AccessLogService",
        )
        server.add(add_EndpointDiscoveryServiceServicer_to_server, Endpoints(current, resolver), "envoy.service.endpoint.v3.EndpointDiscoveryService")  # fmt: skip
        server.bind(f"127.0.0.1:{self.ports['inference_router']}")
        await server.start()
        leader = await stack.enter_async_context(elect(self.store, "inference_router", "t"))
        tls = self.tls("inference_router", "t")
        nowhere = await stack.enter_async_context(connect("127.0.0.1:1", tls, policy=CallPolicy(attempts=1)))
        fleet = ReplicaJobs(SchedulerServiceStub(nowhere), InventoryServiceStub(nowhere), clock)
        manager = ReplicaManager(self.store, clock, current, fleet, leader, resolver=resolver)
        for loop in (current.keep_current(), manager.run()):
            task = asyncio.create_task(loop)
            stack.push_async_callback(_cancelled, task)
        stack.push_async_callback(server.drain, 0)

    async def stop_router(self) -> None:
        assert self.router is not None
        await self.router.aclose()
        self.router = self.routing = None

    async def start_inventory(self, authority: Authority | None = None) -> Server:
        server = Server(self.tls("inventory", "t"), authority or Authority())
        name = "whaleflux.v1.InventoryService"
        server.add(echo_service(name, ["GetNode", "GetDataset", "Join", "CordonNode"]), None, name)
        server.bind(f"127.0.0.1:{self.ports['inventory']}")
        await server.start(reflects_all=True)
        return server

    async def start_envoy(self) -> None:
        self.front = frontdoor.FrontDoor(
            grpc_port=self.ports["front"],
            http_port=self.ports["http"],
            admin_port=self.ports["admin"],
            tls=self.files("frontdoor"),
            upstreams={role: f"127.0.0.1:{self.ports[role]}" for role in ROLES},
            policy=f"127.0.0.1:{self.ports['policy']}",
            drains=True,
        )
        config = self.folder / "envoy.yaml"
        config.write_text(frontdoor.render(self.front))
        with (self.folder / "envoy.log").open("wb") as log:
            self.envoy = await asyncio.to_thread(subprocess.Popen, frontdoor.command(config), stdout=log, stderr=log)
        try:
            await frontdoor.wait_ready(f"127.0.0.1:{self.ports['admin']}", 15)
        except Exception as error:
            raise RuntimeError((self.folder / "envoy.log").read_text()[-3000:]) from error

    async def http(
        self, method: str, path: str, body: Any = None, *, key: str = "", within_s: float = 20, **headers: str
    ) -> Answer:
        """One request through the front door's HTTP listener; a dict is sent as JSON. Raises TimeoutError."""
        sent = {"authorization": f"Bearer {key}"} if key else {}
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        return await asyncio.to_thread(_request, self.ports["http"], method, path, raw, {**sent, **headers}, within_s)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    took_s: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def _request(port: int, method: str, path: str, body: bytes | None, headers: dict[str, str], within_s: float) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=within_s)
    began = time.monotonic()
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        got = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, got, content, time.monotonic() - began)
    finally:
        connection.close()


@contextlib.asynccontextmanager
async def world(folder: Path, *, with_envoy: bool = True) -> AsyncIterator[World]:
    """A router and a front door; what was started is stopped at the end, whatever happened."""
    made = World(folder)
    for name in (*ROLES, "front", "http", "admin", "policy"):
        made.ports[name] = free_port()
    try:
        await made.start_router()
        if with_envoy:
            await made.start_envoy()
        yield made
    finally:
        if made.envoy is not None:
            made.envoy.kill()
            made.envoy.wait(10)
        if made.router is not None:
            await made.stop_router()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def have_envoy() -> bool:
    try:
        return os.access(frontdoor.program(), os.X_OK)
    except Exception:
        return False
