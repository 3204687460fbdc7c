"""Failure detection with real processes: etcd, NATS, inventory, health_monitor and agents that are really killed."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest
import pytest_asyncio

from tests.support.etcd_server import EtcdServer, free_ports
from tests.support.nats_server import PASSWORD, USER, NatsServer
from whaleflux.rpc import pki
from whaleflux.rpc.channel import connect
from whaleflux.rpc.pki import CertificateAuthority, TlsFiles, server_name
from whaleflux.store import placements
from whaleflux.store.etcd import EtcdStore
from whaleflux.v1 import events_pb2, health_pb2, inventory_pb2
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]
NODES = ("a/n1", "a/n2", "b/n1")
RESTART_S = 10  # how long a dead agent on a living host is waited for
BUSY_S = 3  # what a busy machine may add to a moment; no other cause comes within it


def named(node):
    site, node_id = node.split("/")
    return f"sites/{site}/nodes/{node_id}"


class Suite:
    """The processes, and an operator's view of them."""

    def __init__(self, folder, etcd, nats):
        self.folder, self.etcd, self.nats = folder, etcd, nats
        self.ca = CertificateAuthority.create(datetime.now(UTC))
        self.processes = {}
        ports = free_ports(2)
        self.inventory, self.health = (f"127.0.0.1:{port}" for port in ports)
        (folder / "ca.crt").write_bytes(self.ca.certificate_pem)
        (folder / "ca.key").write_bytes(self.ca.key_pem)

    def identity(self, role, name):
        return self.ca.issue(role, name, datetime.now(UTC), hosts=["localhost"])

    def start(self, module, role, listen, *flags):
        files = TlsFiles.under(self.folder / role, "service")
        files.save(self.identity(role, "1"))
        command = [
            sys.executable, "-m", module, "--listen", listen, "--store", f"http://{self.etcd.endpoint}",
            "--plain-loopback", "--nats", f"nats://{self.nats.address}", "--nats-user", USER, "--nats-password", PASSWORD,
            "--tls-cert", str(files.chain), "--tls-key", str(files.key), "--tls-ca", str(files.roots),
            "--inventory", self.inventory, "--health-monitor", self.health, *flags,
        ]  # fmt: skip
        self._spawn(role, command)

    def start_inventory(self):
        ca = ("--ca-cert", str(self.folder / "ca.crt"), "--ca-key", str(self.folder / "ca.key"))
        self.start("whaleflux_inventory", "inventory", self.inventory, *ca)

    def start_health(self):
        self.start("whaleflux_health_monitor", "health_monitor", self.health, "--restart-s", str(RESTART_S))

    def start_agent(self, node):
        folder = self.folder / node
        TlsFiles.under(folder, "agent").save(self.identity("agent", node))
        job = node.split("/")[0]  # the nodes of a site work together
        module = [sys.executable, "-m", "tests.support.small_agent"]
        self._spawn(node, [*module, str(folder), named(node), job, self.inventory, self.health])

    def _spawn(self, name, command):
        log = (self.folder / f"{name.replace('/', '-')}.log").open("ab")
        self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def signal(self, name, what):
        self.processes[name].send_signal(what)

    def kill(self, name):
        self.processes.pop(name).kill()

    def close(self):
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
        for process in self.processes.values():
            process.wait(10)

    def stub(self, kind, role, target, *, caller=("operator", "olga")):
        return kind(connect(target, self.identity(*caller), server=server_name(role)))

    @property
    def health_stub(self):
        return self.stub(HealthServiceStub, "health_monitor", self.health)


class Phases:
    """Follows the phases of all nodes with the time at which each change arrived."""

    def __init__(self, suite):
        self.suite, self.now, self.history = suite, {}, []
        self.task = asyncio.create_task(self._follow())

    async def _follow(self):
        stub, since = self.suite.health_stub, 0
        while True:
            with contextlib.suppress(Exception):
                async for change in stub.WatchNodeHealth(
                    health_pb2.WatchNodeHealthRequest(resource_version=since), wait_for_ready=True
                ):
                    since = max(since, change.resource_version)
                    if which := {"added": change.added, "modified": change.modified}.get(change.WhichOneof("event")):
                        phase = health_pb2.NodePhase.Name(which.phase).removeprefix("NODE_PHASE_")
                        self.now[which.name] = phase
                        self.history.append((time.monotonic(), which.name, phase, which.reason, which.incident))
            await asyncio.sleep(0.1)

    async def until(self, node, phase, within_s, after_s=0.0):
        """The time at which the node got this phase; fails after `within_s`."""
        async with asyncio.timeout(within_s):
            while True:
                for at, name, got, *_ in self.history:
                    if name == named(node) and got == phase and at >= after_s:
                        return at
                await asyncio.sleep(0.01)


async def place(etcd, nodes):
    """The scheduler's word on where each site's job runs: what agents say of their tasks counts by it."""
    store = EtcdStore([etcd.endpoint])
    for site in {node.split("/")[0] for node in nodes}:
        here = [named(node) for node in nodes if node.startswith(f"{site}/")]
        await store.commit(placements.put(f"queues/q/jobs/{site}", 1, "uid", here))
    await store.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("health")
    nats = NatsServer(folder)
    async with EtcdServer(folder) as etcd:
        await nats.start()
        suite = Suite(folder, etcd, nats)
        await place(etcd, NODES)
        try:
            suite.start_inventory()
            suite.start_health()
            yield suite
        finally:
            suite.close()
            nats.kill()


@pytest_asyncio.fixture(loop_scope="module")
async def phases(suite):
    """Everybody lives and is READY when a test begins."""
    phases = Phases(suite)
    for node in NODES:
        if node not in suite.processes:
            suite.start_agent(node)
    async with asyncio.timeout(60):
        while any(phases.now.get(named(node)) != "READY" for node in NODES):
            await asyncio.sleep(0.05)
    yield phases
    phases.task.cancel()


async def report(suite, *, node, nodes, epoch):
    stub = suite.stub(HealthServiceStub, "health_monitor", suite.health, caller=("scheduler", "1"))
    request = health_pb2.ReportFailureRequest(
        job="queues/q/jobs/a", epoch=epoch, task="j-1-1", node=named(node), exit_code=1, nodes=map(named, nodes)
    )
    begun = time.monotonic()
    return await stub.ReportFailure(request, timeout=15), time.monotonic() - begun


async def test_an_agent_killed_alone_is_suspect_at_once_fenced_when_it_stays_away_and_ready_when_it_is_back(
    suite, phases
):
    killed = time.monotonic()
    suite.kill("b/n1")
    suspect = await phases.until("b/n1", "SUSPECT", 30, killed)
    fenced = await phases.until("b/n1", "UNREACHABLE", RESTART_S + 30, killed)
    assert suspect - killed <= 2 + BUSY_S
    assert RESTART_S - 1 <= fenced - killed <= RESTART_S + 2 + BUSY_S
    assert phases.now[named("a/n2")] == phases.now[named("a/n1")] == "READY"
    suite.start_agent("b/n1")
    await phases.until("b/n1", "READY", 45, fenced)
    events = await published(suite, count=4)
    assert [e.what for e in events if e.resource == named("b/n1")][-4:] == [
        "READY", "SUSPECT", "UNREACHABLE", "READY",
    ]  # fmt: skip


async def published(suite, count):
    """Events about nodes' phases so far, at least `count` of them about b/n1."""
    bus = await suite.nats.connect()
    events = []
    try:
        async with asyncio.timeout(45), bus.subscribe(["wf.v1.hub.node.*.phase"], durable="test") as news:
            async for delivery in news:
                events.append(events_pb2.Event.FromString(delivery.data))
                await delivery.ack()
                seen = [e.what for e in events if e.resource == named("b/n1")]
                if len(seen) >= count and seen[-1] == "READY" and "UNREACHABLE" in seen:
                    return events
    finally:
        await bus.close()


async def test_a_killed_node_that_ranks_elsewhere_miss_is_fenced_at_once(suite, phases):
    killed = time.monotonic()
    suite.kill("a/n1")
    incident, took_s = await report(suite, node="a/n2", nodes=["a/n1", "a/n2"], epoch=1)
    lost = (
        health_pb2.INCIDENT_KIND_PEER_LOST,
        health_pb2.INCIDENT_KIND_NODE_LOST,
    )  # one incident, by who noticed first
    assert incident.kind in lost and list(incident.nodes) == [named("a/n1")]
    assert took_s <= 0.5 + BUSY_S
    assert await phases.until("a/n1", "UNREACHABLE", 30, killed) - killed <= 2 + BUSY_S


async def test_a_failure_among_living_nodes_is_the_works_own_fault(suite, phases):
    incident, took_s = await report(suite, node="a/n2", nodes=["a/n1", "a/n2"], epoch=2)
    assert incident.kind == health_pb2.INCIDENT_KIND_PROCESS_EXIT and incident.application_fault
    assert took_s <= 0.5 + BUSY_S


async def test_a_paused_agent_is_suspected_not_fenced_while_its_ranks_work_and_withdrawn_after(suite, phases):
    paused = time.monotonic()
    suite.signal("a/n1", signal.SIGSTOP)
    assert await phases.until("a/n1", "SUSPECT", 30, paused) - paused <= 2.5 + BUSY_S
    await asyncio.sleep(
        max(0.0, paused + 7 - time.monotonic())
    )  # longer than the fence of a dead node: real time is the point
    assert phases.now[named("a/n1")] == "SUSPECT"
    suite.signal("a/n1", signal.SIGCONT)
    await phases.until("a/n1", "READY", 30, paused)


async def test_the_next_monitor_goes_on_where_the_killed_one_was(suite, phases):
    suite.kill("health_monitor")
    suite.kill("b/n1")
    suite.start_health()
    back = time.monotonic()
    fenced = await phases.until("b/n1", "UNREACHABLE", 60, back)
    assert fenced - back >= 5  # a whole window of its own
    assert {name for at, name, phase, *_ in phases.history if at > back and phase in ("SUSPECT", "UNREACHABLE")} == {
        named("b/n1")
    }


async def test_nobody_is_fenced_while_the_store_is_away_nor_after(suite, phases):
    lost = time.monotonic()
    suite.etcd.kill()
    await asyncio.sleep(7)  # longer than the fence: real time is the point
    await suite.etcd.start()
    back = time.monotonic()
    suite.kill("b/n1")  # and whoever really dies now is found
    assert await phases.until("b/n1", "SUSPECT", 45, back) - back <= 10 + BUSY_S
    verdicts = {name for at, name, phase, *_ in phases.history if at > lost and phase in {"SUSPECT", "UNREACHABLE"}}
    assert verdicts == {named("b/n1")}


async def test_a_node_joins_with_a_token_and_registers(suite):
    operator = suite.stub(InventoryServiceStub, "inventory", suite.inventory)
    request = inventory_pb2.CreateJoinTokenRequest(site="sites/edge")
    token = await operator.CreateJoinToken(request, timeout=20, wait_for_ready=True)
    stranger = suite.stub(InventoryServiceStub, "inventory", suite.inventory, caller=("frontdoor", "1"))
    key, csr = pki.new_key_and_request()
    joined = await stranger.Join(
        inventory_pb2.JoinRequest(token=token.secret, node_id="cam-7", certificate_request_pem=csr.decode())
    )
    mine = pki.Tls(key, joined.certificate_pem.encode(), joined.authority_pem.encode())
    agent = InventoryServiceStub(connect(suite.inventory, mine, server=server_name("inventory")))
    node = await agent.RegisterNode(
        inventory_pb2.RegisterNodeRequest(
            name="sites/edge/nodes/cam-7", boot_id="b",
            facts={"gpus": [{"index": 0, "model": "RTX4090", "uuid": "u", "memory_bytes": 24 << 30}]},
        )
    )  # fmt: skip
    listed = await operator.ListNodes(inventory_pb2.ListNodesRequest(parent="sites/edge"))
    assert [n.etag for n in listed.nodes] == [node.etag]
