"""What it costs a unary call to be judged and written down: admission, the owner's question and the audit trail.

The same handler is called through the real boundary of a server: as a method that nobody owns and no trail keeps, twice (their difference is
the noise), as GetJob (a read: the owner is asked for in a queue that names groups), and as CancelJob (a change: a record of it is sealed into
the process's chain too, and written to the spool's file before the answer). They take turns, call by call, so that a busy moment meets all;
medians are compared, and those of ten rounds show the spread. What users get is the figure over gRPC with mTLS on loopback, so the target is
that one; in the process alone the same code runs with warm caches. Shipping to a bus in memory goes on beside it.

Each of the methods passes the caller's certificate, quota and admission: they were there before, or cost a look into a dictionary.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from benchmarks.common import Options, Report, Row, Target, main
from whaleflux.clock import SystemClock
from whaleflux.events.memory import MemoryBus
from whaleflux.rpc import auth, roles
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.boundary import Boundary
from whaleflux.rpc.channel import connect
from whaleflux.rpc.limits import CallLimits
from whaleflux.rpc.pki import CertificateAuthority, server_name
from whaleflux.rpc.server import Server
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.store.memory import MemoryStore
from whaleflux.trust import ownership
from whaleflux.trust.audit_trail import Options as TrailOptions
from whaleflux.trust.audit_trail import Trail
from whaleflux.trust.ownership import Access
from whaleflux.trust.view import TrustView
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1 import trust_pb2

OVERHEAD_US = 30.0
CALLS = {"quick": 4_000, "full": 40_000}
WIRE_CALLS = {"quick": 3_000, "full": 20_000}
CHANGE, READ = "/whaleflux.v1.SchedulerService/CancelJob", "/whaleflux.v1.SchedulerService/GetJob"
BARE, AGAIN = "/whaleflux.v1.BenchmarkService/Bare", "/whaleflux.v1.BenchmarkService/Again"
TABLE: roles.Table = {**roles.TABLE, BARE: roles.PEOPLE, AGAIN: roles.PEOPLE}
ROUNDS = 10
LIMITS = CallLimits(calls_per_s=1e9, burst=1e9)  # one caller makes all the calls
WIRE = "gRPC, mTLS, loopback"
WHAT = (("bare, again (noise)", AGAIN), ("a read", READ), ("a change", CHANGE))
ACCESS = Access(frozenset({"groups/research", "groups/vision", "users/bob"}))
REQUEST = pb.CancelJobRequest(name="queues/research/jobs/llama-70b-sft")


class FakeContext:
    """What a boundary asks of gRPC, answered at once."""

    def __init__(self) -> None:
        self._certificate = {"peer_uri": (b"spiffe://whaleflux/user/ann",)}

    def auth_context(self) -> Any:
        return self._certificate

    def invocation_metadata(self) -> Any:
        return (
            ("user-agent", "grpc-python/1.85.3"),
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        )

    def peer(self) -> str:
        return "ipv4:10.1.2.3:45678"

    def time_remaining(self) -> float:
        return 10.0


async def judged(request: pb.CancelJobRequest, context: Any) -> pb.Job:
    """A servicer that asks for the owner, and does nothing else."""
    ownership.require_change(auth.principal(), "user/ann", ACCESS, request.name)
    return pb.Job(name=request.name)


async def bare(request: pb.CancelJobRequest, context: Any) -> pb.Job:
    return pb.Job(name=request.name)


def _handler(behaviour: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(behaviour, pb.CancelJobRequest.FromString, pb.Job.SerializeToString)


HANDLERS = {BARE: _handler(bare), AGAIN: _handler(bare), READ: _handler(judged), CHANGE: _handler(judged)}
Took = dict[str, list[float]]


@contextlib.asynccontextmanager
async def trusted(folder: Path) -> AsyncIterator[tuple[TrustView, Trail]]:
    """Trust records of a company, and a trail that ships."""
    clock, store = SystemClock(), MemoryStore()
    members = [f"users/user-{n}" for n in range(500)]
    for group in ("research", "vision", "audio"):
        content = trust_pb2.Group(members=["users/ann", *members]).SerializeToString()
        await store.commit(Put(keys.GROUPS + group, content))
    bus = MemoryBus(clock)
    trail = Trail(bus, store, clock, "scheduler", "benchmark", TrailOptions(folder / "audit"))
    async with TrustView(store, clock).running() as view:
        await view.until_known()
        shipping = asyncio.create_task(trail.run())
        try:
            yield view, trail
        finally:
            shipping.cancel()
            await trail.close()


class Call:
    """The continuation of an interceptor for one method."""

    def __init__(self, method: str) -> None:
        self.method = method

    async def __call__(self, details: Any) -> Any:
        return HANDLERS[self.method]


async def in_process(view: TrustView, trail: Trail, calls: int) -> Took:
    """Seconds of each call through a boundary, by method."""
    boundary, context, raw = Boundary(Authority(table=TABLE), LIMITS), FakeContext(), REQUEST.SerializeToString()
    boundary.guard(view, trail)
    guarded = {m: (await boundary.intercept_service(Call(m), Call(m))).unary_unary for m in HANDLERS}
    return await _in_turns({m: partial(_in_task, b, raw, context) for m, b in guarded.items()}, calls)


async def over_the_wire(view: TrustView, trail: Trail, calls: int) -> Took:
    """The same as a client sees it."""
    authority = CertificateAuthority.create(datetime.now(UTC))
    server = Server(authority.issue("scheduler", "b", datetime.now(UTC)), Authority(table=TABLE), LIMITS)
    for service in ("whaleflux.v1.SchedulerService", "whaleflux.v1.BenchmarkService"):
        mine = {m.rpartition("/")[2]: h for m, h in HANDLERS.items() if m.startswith(f"/{service}/")}
        server.add(_adds(service, mine), None, service)
    server.guard(view, trail)
    port = server.bind("127.0.0.1:0")
    await server.start()
    tls = authority.issue("user", "ann", datetime.now(UTC))
    try:
        async with connect(f"127.0.0.1:{port}", tls, server=server_name("scheduler")) as channel:
            codecs = (pb.CancelJobRequest.SerializeToString, pb.Job.FromString)
            stubs = {m: channel.unary_unary(m, *codecs) for m in HANDLERS}
            return await _in_turns({m: partial(s, REQUEST, timeout=10) for m, s in stubs.items()}, calls)
    finally:
        await server.drain(0)


def _in_task(behaviour: Any, raw: bytes, context: Any) -> Any:
    """As gRPC does: each call in a task of its own, whose context variables end with it."""
    return asyncio.create_task(behaviour(raw, context))


def _adds(service: str, handlers: dict[str, Any]) -> Callable[[Any, Any], None]:
    def add(_: Any, server: Any) -> None:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    return add


async def _in_turns(calls: dict[str, Callable[[], Any]], count: int) -> Took:
    took: Took = {method: [] for method in calls}
    order, shuffled = list(calls.items()), random.Random(1)  # whoever comes after a change meets other caches
    for number in range(count + count // 10):
        shuffled.shuffle(order)
        for method, call in order:
            begun = time.perf_counter()
            await call()
            if number >= count // 10:  # the first ones warm up
                took[method].append(time.perf_counter() - begun)
    return took


def measure(options: Options) -> Report:
    """What admission, the owner's question and the audit trail add to a unary call."""
    mode = "quick" if options.quick else "full"
    with tempfile.TemporaryDirectory(prefix="wf-") as folder:
        alone, wired = asyncio.run(_measured(Path(folder), CALLS[mode], WIRE_CALLS[mode]))
    return Report(
        rows=[_row(w, what, m, took) for w, took in (("in the process", alone), (WIRE, wired)) for what, m in WHAT],
        targets=[
            Target("a change: owner check and audit", _added_us(wired, CHANGE), OVERHEAD_US, f"us, {WIRE}", per="python"),
            Target("a read: owner check", _added_us(wired, READ), OVERHEAD_US, f"us, {WIRE}", per="python"),
        ],
        notes=["the record is in the spool's file before the answer; shipping it in batches goes on beside it"],
    )  # fmt: skip


async def _measured(folder: Path, calls: int, wire_calls: int) -> tuple[Took, Took]:
    async with trusted(folder) as (view, trail):
        return await in_process(view, trail, calls), await over_the_wire(view, trail, wire_calls)


def _added_us(took: Took, method: str) -> float:
    return 1e6 * (statistics.median(took[method]) - statistics.median(took[BARE]))


def _row(where: str, what: str, method: str, took: Took) -> Row:
    size = len(took[BARE]) // ROUNDS
    rounds = [{m: took[m][n * size : (n + 1) * size] for m in (BARE, method)} for n in range(ROUNDS)]
    added = sorted(_added_us(one, method) for one in rounds)
    return {
        "where": where,
        "call": what,
        "calls": len(took[method]),
        "median us": 1e6 * statistics.median(took[method]),
        "added us": _added_us(took, method),
        "least of ten rounds": added[0],
        "most": added[-1],
    }


if __name__ == "__main__":
    sys.exit(main("trust_overhead", measure))
