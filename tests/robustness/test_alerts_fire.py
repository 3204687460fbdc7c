"""Each alert's fault is provoked in a real suite that a real Prometheus scrapes: the alert is quiet before it, and fires by it.

Rules are those that are shipped, with `for` and windows a sixtieth as long (`tests.support.prometheus.hurried`). Here the few that are
quick; all of them: WHALEFLUX_TEST_ALERTS=1, or `make soak`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.prometheus import Prometheus, hurried, prometheus, rules
from tests.support.relay import Relay
from tests.support.suite import RunningSuite, ready_nodes, running_suite, until
from whaleflux import names
from whaleflux.demo.fleet import DemoFleet, Machine
from whaleflux.embedded.layout import Layout
from whaleflux.errors import StatusError
from whaleflux.rpc import pki
from whaleflux.rpc.channel import connect
from whaleflux.rpc.tls_files import TlsFiles
from whaleflux.sdk.client import AsyncClient
from whaleflux.services import ROLES
from whaleflux.store import Put, keys
from whaleflux.v1 import console_pb2, router_pb2, scheduler_pb2, types_pb2, usage_pb2
from whaleflux.v1.usage_pb2_grpc import UsageServiceStub

ALL = bool(os.environ.get("WHALEFLUX_TEST_ALERTS"))
pytestmark = [
    pytest.mark.robustness,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not here: apt-get install prometheus"),
]
SETTINGS = {"WHALEFLUX_AUDIT_SPOOL_BYTES": str(1 << 20), "WHALEFLUX_LEDGER_TICK_S": "1"}
AGENT = (("usage_every_s", "1"),)
NOWHERE = (
    ("advertise", "nowhere.invalid:9"),
)  # where a node is probed: on one host an agent's own port would answer, or refuse
IDLE = Machine("onprem", "idle", "a100x8:usage=0%@1h", settings=AGENT)
UNSEEN = Machine("unseen", "a", "a100x8", settings=AGENT)
SMALL = Machine("small", "two", "rtx4090x2", settings=AGENT)
# Saves each step; after as many as its argument says it stands still, though it runs on.
TRAINING = textwrap.dedent(
    """
    import sys, time
    import torch
    from whaleflux.sdk import Checkpointer

    model = torch.nn.Linear(3, 3)
    with Checkpointer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) as saved:
        for step, batch in saved.steps(lambda step: step, total=100_000):
            time.sleep(3600 if step == int(sys.argv[1]) else 1)
            saved.report(1.0)
    """
)
FAILS_ONCE = "import os, sys, time; sys.exit(3) if os.environ['WHALEFLUX_EPOCH'] == '1' else time.sleep(600)"


@dataclass(frozen=True)
class World:
    suite: RunningSuite
    seen: Prometheus
    folder: Path

    async def submit(
        self, client: AsyncClient, id_: str, command: list[str], gpus: int, site: str, **fields: Any
    ) -> str:
        spec = scheduler_pb2.JobSpec(command=command, gpus=gpus, sites=[site], **fields)
        request = scheduler_pb2.CreateJobRequest(parent="queues/default", job_id=id_, job=scheduler_pb2.Job(spec=spec))
        return str((await client.scheduler.CreateJob(request, timeout=10)).name)

    @contextlib.asynccontextmanager
    async def running(self, id_: str, command: list[str], gpus: int, site: str, **fields: Any) -> AsyncIterator[str]:
        """A job, cancelled in the end."""
        async with self.suite.client() as client:
            name = await self.submit(client, id_, command, gpus, site, **fields)
            try:
                yield name
            finally:
                await client.scheduler.CancelJob(scheduler_pb2.CancelJobRequest(name=name), timeout=10)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("prometheus")
    with running_suite(settings=SETTINGS) as suite:
        asyncio.run(suite.join([IDLE, UNSEEN, SMALL] if ALL else [SMALL]))
        targets = {role: f"127.0.0.1:{suite.port(f'{role}_metrics')}" for role in ROLES}
        with prometheus(folder, targets, hurried()) as seen:
            for role in targets:  # what was counted before the first look at it is nothing that grew
                asyncio.run(until(lambda role=role: seen.scraped(role), f"{role} is scraped", 60, every_s=0.2))
            yield World(suite, seen, folder)


Fault = Callable[[World], AbstractAsyncContextManager[None]]


def hangs(part: str) -> Fault:
    """It is there and answers nothing. One that dies is back before Prometheus has missed it twice."""

    @contextlib.asynccontextmanager
    async def provoked(world: World) -> AsyncIterator[None]:
        world.suite.send(part, signal.SIGSTOP)
        try:
            yield
        finally:
            world.suite.send(part, signal.SIGCONT)

    return provoked


def stutters(part: str, stopped_s: float = 0.6, runs_s: float = 0.3) -> Fault:
    """It runs a third of the time: a disk, or a machine, that others use up."""

    async def stutter(world: World) -> None:
        while True:
            world.suite.send(part, signal.SIGSTOP)
            await asyncio.sleep(stopped_s)
            world.suite.send(part, signal.SIGCONT)
            await asyncio.sleep(runs_s)

    @contextlib.asynccontextmanager
    async def provoked(world: World) -> AsyncIterator[None]:
        task = asyncio.create_task(stutter(world))
        try:
            yield
        finally:
            task.cancel()
            world.suite.send(part, signal.SIGCONT)

    return provoked


@contextlib.asynccontextmanager
async def site_cut_off(world: World) -> AsyncIterator[None]:
    """Nothing leads there any more: the agent's way out is cut, and the address at which it is probed leads nowhere."""
    alone = Machine("island", "a", "rtx4090x1", settings=NOWHERE)
    async with Relay(world.suite.port("envoy")) as uplink, world.suite.client() as client:
        fleet = DemoFleet(world.suite.state / "island", replace(world.suite.context, server=uplink.endpoint))
        try:
            await fleet.join(client, [alone])
            await until(lambda: ready_nodes(client, {alone.name}), "the island is READY", 60)
            uplink.cut()
            yield
            uplink.heal()
            await until(lambda: ready_nodes(client, {alone.name}), "the island is READY again", 60)
        finally:
            fleet.stop()


@contextlib.asynccontextmanager
async def gpu_falls_off_the_bus(world: World) -> AsyncIterator[None]:
    await world.suite.join([Machine("onprem", "sick", "rtx4090x2:xid=79/0@3s", settings=AGENT)])
    yield


@contextlib.asynccontextmanager
async def node_dies(world: World) -> AsyncIterator[None]:
    """A power cut: nothing answers at its address any more, as where an agent alone has died."""
    dying = Machine("onprem", "dying", "rtx4090x1", settings=NOWHERE)
    await world.suite.join([dying])
    world.suite.fleet.kill_node(dying.name)
    yield


@contextlib.asynccontextmanager
async def job_too_large_for_what_is_free(world: World) -> AsyncIterator[None]:
    async with (
        world.running("one", ["sleep", "600"], 1, "small"),
        world.running("two", ["sleep", "600"], 2, "small"),
    ):
        yield


def stalls(*, beside_one_that_goes_on: bool) -> Fault:
    """A training that stands still after five steps."""

    @contextlib.asynccontextmanager
    async def provoked(world: World) -> AsyncIterator[None]:
        program = world.folder / "training.py"
        program.write_text(TRAINING)
        policy = scheduler_pb2.CheckpointPolicy(every_steps=1, keep=3)
        async with contextlib.AsyncExitStack() as stack:
            for id_, steps in (("stands", 5), ("goes-on", -1))[: 1 + beside_one_that_goes_on]:
                command = [sys.executable, str(program), str(steps)]
                name = f"{id_}-{datetime.now(UTC):%M%S}"
                await stack.enter_async_context(world.running(name, command, 1, "small", checkpoint=policy))
            yield

    return provoked


@contextlib.asynccontextmanager
async def restart_waits(world: World) -> AsyncIterator[None]:
    """A job whose file says to wait 65 s after a failure."""
    retry = types_pb2.RetryPolicy(max_restarts=2)
    retry.backoff.FromSeconds(65)
    async with world.running("again", [sys.executable, "-c", FAILS_ONCE], 1, "small", retry=retry):
        yield


def gpus_held(id_: str, machine: Machine) -> Fault:
    @contextlib.asynccontextmanager
    async def provoked(world: World) -> AsyncIterator[None]:
        async with world.running(id_, ["sleep", "3600"], 8, machine.site):
            yield

    return provoked


@contextlib.asynccontextmanager
async def more_gpus_than_there_are(world: World) -> AsyncIterator[None]:
    engine = router_pb2.Engine(kind="openai", command=["vllm", "serve", "--port", "{port}"], gpus=64)
    model = router_pb2.Model(engine=engine, replicas=router_pb2.ReplicaCount(min=1, max=1))
    async with world.suite.client() as client:
        await client.router.CreateModel(router_pb2.CreateModelRequest(model_id="large", model=model), timeout=10)
        yield
        await client.router.DeleteModel(router_pb2.DeleteModelRequest(name="models/large"), timeout=10)


@contextlib.asynccontextmanager
async def engine_is_slow(world: World) -> AsyncIterator[None]:
    """Four clients of an engine that thinks for three seconds."""
    command = [sys.executable, "-m", "tests.support.small_engine"]
    engine = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert engine.stdout is not None
    address = f"127.0.0.1:{int(await engine.stdout.readline())}"
    asked = {"model": "slow", "messages": [{"role": "user", "content": "hello"}], "pause_s": 3}
    context = world.suite.context

    async def ask(http: httpx.AsyncClient) -> None:
        while True:
            await http.post("/chat/completions", json=asked)

    try:
        async with world.suite.client() as client, asyncio.TaskGroup() as group:
            model = router_pb2.Model(engine=router_pb2.Engine(kind="openai", addresses=[address]))
            await client.router.CreateModel(router_pb2.CreateModelRequest(model_id="slow", model=model), timeout=10)
            bearer = {"Authorization": f"Bearer {context.api_key}"}
            async with httpx.AsyncClient(
                base_url=context.inference_url, headers=bearer, timeout=30, trust_env=False
            ) as http:
                asking = [group.create_task(ask(http)) for _ in range(4)]
                yield
                for one in asking:
                    one.cancel()
    finally:
        engine.terminate()
        await engine.wait()


@contextlib.asynccontextmanager
async def certificate_is_not_renewed(world: World) -> AsyncIterator[None]:
    """The checkpoint service's has an hour left."""
    layout = Layout(world.suite.state)
    files = layout.tls("checkpoint")
    before = files.load()
    authority = pki.CertificateAuthority.load(
        (layout.pki / "ca.crt").read_bytes(), (layout.pki / "authority.key").read_bytes()
    )
    files.save(authority.issue("checkpoint", "embedded", datetime.now(UTC), lifetime=timedelta(hours=1)))
    try:
        yield
    finally:
        files.save(before)


@contextlib.asynccontextmanager
async def budget_is_too_small(world: World) -> AsyncIterator[None]:
    budget = console_pb2.Budget(micros_per_month=1)
    async with world.running("spends", ["sleep", "600"], 1, "small"), world.suite.client() as client:
        await client.console.SetBudget(console_pb2.SetBudgetRequest(budget_id="tiny", budget=budget), timeout=10)
        yield
        await client.console.DeleteBudget(console_pb2.DeleteBudgetRequest(name="budgets/tiny"), timeout=10)


@contextlib.asynccontextmanager
async def record_is_garbage(world: World) -> AsyncIterator[None]:
    """Somebody wrote into etcd by hand: a budget that can be read by nobody is set anew, again and again."""
    store = world.suite.store()
    await store.commit(Put(keys.BUDGETS + "broken", b"\xff garbage"))
    await store.close()
    async with world.suite.client() as client:

        async def ask() -> None:
            while True:
                with contextlib.suppress(StatusError):
                    await client.console.SetBudget(
                        console_pb2.SetBudgetRequest(
                            budget_id="broken", budget=console_pb2.Budget(micros_per_month=10**9)
                        ),
                        timeout=5,
                    )
                await asyncio.sleep(0.2)

        asking = asyncio.create_task(ask())
        try:
            yield
        finally:
            asking.cancel()


@contextlib.asynccontextmanager
async def agent_speaks_for_another(world: World) -> AsyncIterator[None]:
    """The agent of one node, by its own certificate, tells of steps of a job that runs on another."""
    files, context = TlsFiles.under(world.suite.fleet.folder(SMALL.name) / "identity", "agent"), world.suite.context
    async with (
        world.running("theirs", ["sleep", "600"], 1, "onprem") as job,
        world.suite.client() as client,
        connect(context.server, files, server=context.server_name) as channel,
    ):

        async def runs() -> bool:
            found = await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=job), timeout=5)
            return bool(found.state == scheduler_pb2.JOB_STATE_RUNNING)

        await until(runs, "the job runs", 60)
        batch = usage_pb2.UsageBatch(node=SMALL.name, boot_id="b", start=names.ulid(), sequence=1)
        batch.end_time.FromDatetime(datetime.now(UTC))
        batch.start_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=1))
        batch.gpus.add(device="GPU-x", holders=[usage_pb2.UsageHolder(job=job, epoch=99)])
        request = usage_pb2.ReportUsageRequest(node=SMALL.name, batches=[batch], time=batch.end_time)
        answer = await UsageServiceStub(channel).ReportUsage(request, timeout=10)
        assert "is not placed on" in answer.refused_reason
        yield


@contextlib.asynccontextmanager
async def bus_is_away_while_much_is_changed(world: World) -> AsyncIterator[None]:
    """NATS hangs, and people change more than there is room for records of it."""
    async with world.suite.client() as client:

        async def change(number: int) -> None:
            for again in range(300):
                budget = console_pb2.Budget(micros_per_month=10**9 + again)
                request = console_pb2.SetBudgetRequest(budget_id=f"b{number}", budget=budget)
                with contextlib.suppress(StatusError):
                    await client.console.SetBudget(request, timeout=10)

        world.suite.send("nats", signal.SIGSTOP)
        changing = [asyncio.create_task(change(number)) for number in range(16)]
        try:
            yield
        finally:
            world.suite.send("nats", signal.SIGCONT)
            for one in changing:
                one.cancel()


# alert -> what provokes it, seconds within which it fires, and whether it is tried without being asked for
FAULTS: dict[str, tuple[Fault, float, bool]] = {
    "WhaleFluxUnknownShareHigh": (
        gpus_held("unseen", UNSEEN),
        500,
        False,
    ),  # shares of what was spent: first, while that is little
    "WhaleFluxIdleAllocatedHigh": (gpus_held("idle", IDLE), 500, False),
    "WhaleFluxTargetDown": (hangs("checkpoint"), 30, False),
    "WhaleFluxNodeUnreachable": (node_dies, 60, False),
    "WhaleFluxGpuXidFatal": (gpu_falls_off_the_bus, 60, True),
    "WhaleFluxSitePartitioned": (site_cut_off, 60, True),
    "WhaleFluxEtcdSlow": (stutters("etcd"), 90, True),
    "WhaleFluxEventLoopLagging": (stutters("checkpoint"), 90, False),
    "WhaleFluxNoLeader": (hangs("etcd"), 90, False),
    "WhaleFluxGpusIdleWhileJobsWait": (job_too_large_for_what_is_free, 90, False),
    "WhaleFluxJobNotProgressing": (stalls(beside_one_that_goes_on=True), 180, False),
    "WhaleFluxCheckpointStale": (stalls(beside_one_that_goes_on=False), 240, False),
    "WhaleFluxRecoverySlow": (restart_waits, 180, False),
    "WhaleFluxReplicaBelowMinimum": (more_gpus_than_there_are, 60, False),
    "WhaleFluxFirstTokenSloBurn": (engine_is_slow, 120, False),
    "WhaleFluxCertificateExpiring": (certificate_is_not_renewed, 120, False),
    "WhaleFluxBudgetForecastExceeded": (budget_is_too_small, 400, False),
    "WhaleFluxCallsFailing": (record_is_garbage, 60, False),
    "WhaleFluxAgentClaimsRefused": (agent_speaks_for_another, 60, False),
    "WhaleFluxAuditLost": (bus_is_away_while_much_is_changed, 200, False),
}
# Tried by promtool alone (tests/unit/test_alerts.py), and why.
WITHOUT_A_RUN = {
    "WhaleFluxGpuBrokenLong": "a GPU has to be out of use for a day",
    "WhaleFluxJobWaitLong": "a job has to wait for an hour",
    "WhaleFluxLedgerLagging": "reports have to be ten minutes late, whatever the windows",
    "WhaleFluxLedgerResidual": "sums that do not add up: a fault of ours that nothing from outside provokes",
    "WhaleFluxEndpointsRefused": "a front door that refuses what we send: a fault of ours that nothing from outside provokes",
    "WhaleFluxCrossNodeWasteHigh": "a job has to tell of its communication for an hour, while better places were free",
}
TRIED = {alert: fault for alert, fault in FAULTS.items() if ALL or fault[2]}


@pytest.mark.parametrize("alert", TRIED)
async def test_an_alert_fires_by_its_fault(world: World, alert: str) -> None:
    fault, within_s, _ = TRIED[alert]

    async def fires() -> bool:
        return alert in await asyncio.to_thread(world.seen.firing)

    async def quiet() -> bool:
        return not await fires()

    await until(quiet, f"{alert} is quiet before its fault", 30)
    async with fault(world):
        await until(fires, f"{alert} fires", within_s, every_s=0.2)


def test_every_alert_has_its_fault_or_a_reason_why_not() -> None:
    alerts = {rule["alert"] for group in rules()["groups"] for rule in group["rules"] if "alert" in rule}
    assert FAULTS.keys().isdisjoint(WITHOUT_A_RUN)
    assert FAULTS.keys() | WITHOUT_A_RUN.keys() == alerts
