"""A console as users reach it, python -m whaleflux_console on a real etcd and a folder, whose peers are played: so many GPUs, held by jobs of 16."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.control_plane_suite import Child, Played, machine
from benchmarks.ledger_lab import questions, rates
from benchmarks.ledger_lab.fleet import MadeFleet
from whaleflux.errors import StatusError, Unavailable
from whaleflux.fleet.model import Node
from whaleflux.rpc import roles
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.channel import connect
from whaleflux.rpc.pki import CertificateAuthority, TlsFiles, server_name
from whaleflux.rpc.server import Server
from whaleflux.store.election import elect
from whaleflux.store.etcd import EtcdStore
from whaleflux.trust.ownership import note_asked
from whaleflux.v1 import console_pb2 as pb
from whaleflux.v1 import scheduler_pb2
from whaleflux.v1.console_pb2_grpc import CostServiceStub
from whaleflux.v1.health_pb2_grpc import add_HealthServiceServicer_to_server
from whaleflux.v1.inventory_pb2_grpc import add_InventoryServiceServicer_to_server
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceServicer, add_SchedulerServiceServicer_to_server
from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM, Attempt, Facts, Holding, Presence
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.ledger import open_ledger
from whaleflux_console.ledger.manifest import DAY_MS, Kind, day_of, hour_of
from whaleflux_console.ledger.question import BILL, CLASS, Question

GANG = 16
WAITING = 4  # hours: some of them are closed before the year is read
READY_S, CLOSED_S = 180.0, 600.0
_PEERS = ("inventory", "health_monitor", "scheduler", "inference_router", "checkpoint")  # the last two say nothing
_HELD_S = 7_200
_CALL_S = 30.0


class PlayedFleet(Played, SchedulerServiceServicer):
    """Nodes of eight GPUs, and jobs that hold nine tenths of them since two hours."""

    def __init__(self, gpus: int) -> None:
        super().__init__([_node(number) for number in range(gpus // 8)])
        self.gpus = gpus

    async def WatchJobs(
        self, request: scheduler_pb2.WatchJobsRequest, context: Any
    ) -> AsyncIterator[scheduler_pb2.WatchJobsResponse]:
        note_asked()  # nobody's queues
        for job in self._jobs(time.time() - _HELD_S):
            yield scheduler_pb2.WatchJobsResponse(added=job)
        yield scheduler_pb2.WatchJobsResponse(bookmark={}, resource_version=1)
        await asyncio.Event().wait()

    def _jobs(self, since_s: float) -> Iterator[scheduler_pb2.Job]:
        for gang in _gangs(self.gpus):
            number = gang[0] // GANG
            job = scheduler_pb2.Job(
                name=f"queues/queue-{number % 12}/jobs/now-{number}", uid=f"uid-now-{number}", submitter="user/ada"
            )
            job.state, job.attempt.number, job.attempt.epoch = scheduler_pb2.JOB_STATE_RUNNING, 1, 1
            job.attempt.allocate_time.FromSeconds(round(since_s))
            job.attempt.run_time.FromSeconds(round(since_s))
            for first in (gang[:8], gang[8:]):
                job.attempt.tasks.add(node=_node_name(first[0]), gpu_uuids=[_card(card) for card in first])
            yield job

    def told(self, hour_ms: int) -> Facts:
        """The same of an hour that is over."""
        since, end = hour_ms - HOUR_MS, hour_ms + HOUR_MS
        cards = range(self.gpus)
        return Facts(
            presences=tuple(
                Presence(_card(c), _card(c), _node_name(c), "H100-80GB", WHOLE_PPM, since, end, goes_on=True)
                for c in cards
            ),
            holdings=tuple(
                Holding(_card(c), job.name, job.uid, 1, WHOLE_PPM, since, end)
                for job, gang in zip(self._jobs(since / 1000), _gangs(self.gpus), strict=True)
                for c in gang
            ),
            attempts=tuple(
                Attempt(job.name, job.uid, 1, job.name.rpartition("/jobs/")[0], job.submitter, "", since, since, None, None)
                for job in self._jobs(since / 1000)
            ),
        )  # fmt: skip


def _gangs(gpus: int) -> Iterator[range]:
    return (range(first, first + GANG) for first in range(0, gpus // GANG * GANG, GANG) if first // GANG % 10 != 9)


def _card(card: int) -> str:
    return f"GPU-{card:032x}"


def _node_name(card: int) -> str:
    return f"sites/site-0/nodes/node-{card // 8}"


def _node(number: int) -> Node:
    made = machine(f"site-0/node-{number}")
    return replace(made, gpus=tuple(replace(gpu, uuid=_card(number * 8 + gpu.index)) for gpu in made.gpus), links=())


class BusyConsole:
    """A year of a fleet lies in the folder, and the last hours of another one wait to be closed."""

    def __init__(self, folder: Path, gpus: int, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._fleet = PlayedFleet(gpus)
        self._authority = CertificateAuthority.create(datetime.now(UTC))
        self._waiting_ms = hour_of(round(time.time() * 1000)) - WAITING * HOUR_MS
        self.end_ms = day_of(self._waiting_ms)  # of the year
        self.closed_hours = 0  # when none waits any more
        self.started_s = 0.0

    @property
    def gpus(self) -> int:
        return self._fleet.gpus

    async def fill(self, store: EtcdStore, fleet: MadeFleet, days: int, hot_days: int) -> int:
        """Rows of the year that was closed by `end_ms`."""
        place = self._folder / "ledger"
        rows = await questions.fill(place, store, fleet, days, hot_days, begin_ms=self.end_ms - days * DAY_MS)
        async with elect(store, "console-ledger", "benchmark", ttl_s=questions.FILL_TTL_S) as leader:
            ledger = await open_ledger(LocalFolder(place), store, leader)
            chance = np.random.default_rng(self._seed)
            for hour in range(WAITING):
                hour_ms = self._waiting_ms + hour * HOUR_MS
                await ledger.tell(hour_ms, await asyncio.to_thread(self._fleet.told, hour_ms))
                for quarter in range(hour * 4, hour * 4 + 4):
                    await ledger.append(rates.minutes(quarter, self._fleet.gpus, chance, self._waiting_ms))
            self.closed_hours = len(ledger.state.all_of(Kind.HOURS)) + WAITING
        return rows

    @contextlib.asynccontextmanager
    async def running(self, endpoint: str) -> AsyncIterator[CostServiceStub]:
        """The console as operators reach it, since it has read its ledger."""
        server = Server(self._tls("inventory"), Authority(table=roles.TABLE))
        server.add(add_InventoryServiceServicer_to_server, self._fleet, "whaleflux.v1.InventoryService")
        server.add(add_HealthServiceServicer_to_server, self._fleet, "whaleflux.v1.HealthService")
        server.add(add_SchedulerServiceServicer_to_server, self._fleet, "whaleflux.v1.SchedulerService")
        peers = server.bind("127.0.0.1:0")
        await server.start()
        self.started_s = time.perf_counter()
        process = Child(self._command(endpoint, peers), self._folder / "console.log", dict(os.environ))
        try:
            channel = connect(
                f"127.0.0.1:{await self._port(process)}", self._tls("operator"), server=server_name("console")
            )
            try:
                yield CostServiceStub(channel)
            finally:
                await channel.close()
        finally:
            process.kill()
            await server.drain(0)

    def _tls(self, role: str) -> Any:
        hosts = ["127.0.0.1", "localhost", *(server_name(peer) for peer in (*_PEERS, "console"))]
        return self._authority.issue(role, "1", datetime.now(UTC), hosts=hosts)

    def _command(self, endpoint: str, peers: int) -> list[str]:
        files = TlsFiles.under(self._folder, "console")
        files.save(self._tls("console"))
        told = {name.replace("_", "-"): f"127.0.0.1:{peers}" for name in _PEERS}
        told |= {
            "store": f"http://{endpoint}", "tls-cert": f"{files.chain}", "tls-key": f"{files.key}", "tls-ca": f"{files.roots}",
            "ledger-folder": f"{self._folder / 'ledger'}", "ledger-close-after-s": "0", "ledger-tick-s": "1",
            "port-file": f"{self._folder / 'ports.json'}",
        }  # fmt: skip
        return [sys.executable, "-m", "whaleflux_console", "--plain-loopback"] + [
            word for name, value in told.items() for word in (f"--{name}", value)
        ]

    async def _port(self, process: Child) -> int:
        ports = self._folder / "ports.json"
        async with asyncio.timeout(READY_S):
            while not ports.exists():
                process.check()
                await asyncio.sleep(0.1)
        told: dict[str, int] = json.loads(ports.read_text())
        return told["grpc"]


def request_of(question: Question) -> pb.GetCostRequest:
    """The same by CostService, which tells the classes of each group anyway."""
    filter_ = pb.CostFilter()
    for name, values in question.where.items():
        setattr(filter_, name, values[0])
    filter_.start_time.FromMilliseconds(question.start_ms)
    filter_.end_time.FromMilliseconds(question.end_ms)
    by = [pb.CostGrouping.Value(f"COST_GROUPING_{word.upper()}") for word in question.by if word != CLASS]
    order = 0 if question.order == BILL else pb.CostClass.Value(f"COST_CLASS_{question.order.upper()}")
    return pb.GetCostRequest(filter=filter_, group_by=by, limit=question.limit, order_by=order)  # type: ignore[arg-type]


@dataclass(slots=True)
class Taken:
    """Milliseconds of each answer, by what was asked, while hours were closed and after that; `closing_s`: how long it was seen."""

    opened_s: float = 0.0
    closing_s: float = 0.0
    closing: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    after: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    light: list[float] = field(
        default_factory=list
    )  # of a call that asks nothing of the ledger, while they were closed


async def ask(busy: BusyConsole, stub: CostServiceStub, asked: Mapping[str, pb.GetCostRequest], rounds: int) -> Taken:
    """Asks everything in turn while the last hours are closed, and `rounds` times after that."""
    taken = Taken()
    await _answered(stub, next(iter(asked.values())))
    taken.opened_s = time.perf_counter() - busy.started_s
    probe = asyncio.create_task(_probe(stub, taken, busy.closed_hours))
    await asyncio.sleep(0)
    while not probe.done():
        for name, request in asked.items():
            taken.closing[name].append(await _ms(stub.GetCost(request, timeout=_CALL_S)))
    await probe
    for _ in range(rounds):
        for name, request in asked.items():
            taken.after[name].append(await _ms(stub.GetCost(request, timeout=_CALL_S)))
    return taken


async def _answered(stub: CostServiceStub, request: pb.GetCostRequest) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            with contextlib.suppress(StatusError):
                await stub.GetCost(request, timeout=_CALL_S)
                return
            await asyncio.sleep(0.05)


async def _probe(stub: CostServiceStub, taken: Taken, closed_hours: int) -> None:
    """Until so many hours are closed."""
    begun = time.perf_counter()
    async with asyncio.timeout(CLOSED_S):
        while (await stub.GetLedger(pb.GetLedgerRequest(), timeout=_CALL_S)).closed_hours < closed_hours:
            await asyncio.sleep(0.02)
            taken.light.append(await _ms(stub.ListAdjustments(pb.ListAdjustmentsRequest(), timeout=_CALL_S)))
    taken.closing_s = time.perf_counter() - begun
    if not taken.light:
        raise Unavailable(f"all {WAITING} hours were closed before the first answer: let more of them wait")


async def _ms(call: Awaitable[object]) -> float:
    begun = time.perf_counter()
    await call
    return (time.perf_counter() - begun) * 1_000
