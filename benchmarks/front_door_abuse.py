"""What the front door holds, and how long others wait, while a thousand connections without a key send slow or huge bodies.

A suite of this machine with one engine that answers at once. A client with a key asks at a steady rate, first alone, then while a process of
its own, at the same priority, holds the hostile connections: half of them send a byte of their body every 50 ms, half as fast as it is taken,
all of a body said to have 16 MiB; a third have a wrong key that looks like one, the others none. Each that is refused dials again a second later.
Windows with and without alternate, so that what else the host does falls on both, and p99 is that of all latencies of each kind together.

Three settings. Apart: the hostile process has a core (the last) for itself, all else the others: it stands for machines elsewhere. Shared:
everybody has all cores. Floor: shared, but the hostile connections go to an Envoy of their own that answers 401 and does nothing else: what it
costs that somebody computes on the same cores. Envoy's memory is its resident set, sampled each 50 ms, over its highest idle value. All of it on
loopback, for a bounded time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.common import ROOT, Options, Report, Row, Target, main, percentile
from benchmarks.idle_cost import parts, suite
from whaleflux import frontdoor
from whaleflux.context import Context
from whaleflux.frontdoor.parts import address_of, connection_manager, network_filter, router_filter
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import router_pb2

CONNECTIONS = 1_000
BODY_BYTES = 16 << 20
WINDOW_S, ROUNDS = {"quick": 3.0, "full": 6.0}, {"quick": 3, "full": 10}
RATE_PER_S, CLIENTS = 100.0, 4
MEMORY_MIB, P99_RATIO = 64.0, 2.0
_AGAIN_S, _BYTE_EVERY_S, _SAMPLE_S = 1.0, 0.05, 0.05
_HEAD = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{key}content-length: {length}\r\n\r\n"


@dataclass(slots=True)
class Window:
    """What was seen for a while."""

    latencies_s: list[float] = field(default_factory=list)
    failures: int = 0
    rss_mib: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Setting:
    """Who computes where, and whom the hostile connections dial."""

    name: str
    apart: bool = False
    floor: bool = False


APART, SHARED, FLOOR = Setting("a core of its own", apart=True), Setting("shared cores"), Setting("floor", floor=True)


def hold_apart(port: int, connections: int, seconds: float, cores: set[int]) -> None:
    """The hostile process."""
    os.sched_setaffinity(0, cores)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, connections + 100)), hard))
    asyncio.run(hold(port, connections, seconds))


async def hold(port: int, connections: int, seconds: float) -> None:
    """`connections` hostile ones at a time, for so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for number in range(connections):
                group.create_task(_hostile(port, number, connections))


async def _hostile(port: int, number: int, of: int) -> None:
    """One connection after another; the first ones are spread over a second."""
    await asyncio.sleep(number / of)
    key = f"authorization: Bearer wf-{number:043d}\r\n" if number % 3 == 0 else ""
    head = _HEAD.format(key=key, length=BODY_BYTES).encode()
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            try:
                writer.write(head)
                await _send_body(writer, slow=number % 2 == 0)
            finally:
                writer.transport.abort()
        await asyncio.sleep(_AGAIN_S)


async def _send_body(writer: asyncio.StreamWriter, *, slow: bool) -> None:
    piece = b"x" if slow else b"x" * 65_536
    for _ in range(BODY_BYTES // len(piece)):
        writer.write(piece)
        await writer.drain()
        if writer.transport.is_closing():
            return
        if slow:
            await asyncio.sleep(_BYTE_EVERY_S)


class Client:
    """Asks with a key at a steady rate over connections that are kept, and notes how long each answer took."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "one two three"}]}).encode()
        self._head = _HEAD.format(key=f"authorization: Bearer {key}\r\n", length=len(self._body)).encode()

    async def ask(self, window: Window, seconds: float) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._one(window, number, time.monotonic() + seconds))

    async def _one(self, window: Window, number: int, end_s: float) -> None:
        every_s = CLIENTS / RATE_PER_S
        due_s = time.monotonic() + every_s * number / CLIENTS
        async with self._connection() as (reader, writer):
            while due_s < end_s:
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                status = await self._answer(reader, writer)
                window.latencies_s.append(
                    time.monotonic() - due_s
                )  # from when it was due: a stall counts for all behind it
                window.failures += status != 200
                due_s += every_s

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        writer.write(self._head + self._body)
        async with asyncio.timeout(30):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length"))
            await reader.readexactly(length)
        return int(head.split(" ")[1])


async def _sample(pid: int, window: Window) -> None:
    while True:
        window.rss_mib.append(rss_mib(pid))
        await asyncio.sleep(_SAMPLE_S)


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


async def watch(client: Client, envoy: int, window: Window, seconds: float) -> None:
    """Adds to `window` what is seen in the next `seconds`."""
    sampling = asyncio.create_task(_sample(envoy, window))
    try:
        await client.ask(window, seconds)
    finally:
        sampling.cancel()


@dataclass(frozen=True, slots=True)
class Scene:
    """What is there: the client, the suite's Envoy, the processes that serve, and whom the hostile ones dial."""

    client: Client
    envoy: int
    serving: list[int]
    port: int
    floor_port: int


async def compare(scene: Scene, setting: Setting, options: Options) -> tuple[Window, Window]:
    """Windows without and with the hostile process, in turns."""
    mode = "quick" if options.quick else "full"
    alone, abused, cores = Window(), Window(), sorted(os.sched_getaffinity(0))
    hostile = {cores[-1]} if setting.apart and len(cores) > 1 else set(cores)
    port = scene.floor_port if setting.floor else scene.port
    with placed([os.getpid(), *scene.serving], set(cores) - hostile or set(cores)):
        await watch(scene.client, scene.envoy, Window(), 1.0)  # warm
        for _ in range(ROUNDS[mode]):
            await watch(scene.client, scene.envoy, alone, WINDOW_S[mode])
            with _beside(_process(port, WINDOW_S[mode] + 2.0, hostile)):
                await asyncio.sleep(1.5)  # until all of them dialled
                await watch(scene.client, scene.envoy, abused, WINDOW_S[mode])
            await asyncio.sleep(0.5)
    return alone, abused


@contextlib.contextmanager
def placed(pids: list[int], cores: set[int]) -> Iterator[None]:
    """All threads of these processes on these cores only, for as long as the block runs."""
    before = os.sched_getaffinity(0)
    _place(pids, cores)
    try:
        yield
    finally:
        _place(pids, before)


def _place(pids: list[int], cores: set[int]) -> None:
    for task in (int(task.name) for pid in pids for task in Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(ProcessLookupError):  # ended just now
            os.sched_setaffinity(task, cores)


def _process(port: int, seconds: float, cores: set[int]) -> multiprocessing.process.BaseProcess:
    return multiprocessing.get_context("spawn").Process(
        target=hold_apart, args=(port, CONNECTIONS, seconds, cores), daemon=True
    )


@contextlib.contextmanager
def _beside(process: multiprocessing.process.BaseProcess) -> Iterator[None]:
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join(10)


@contextlib.contextmanager
def engine() -> Iterator[tuple[int, int]]:
    """An engine that answers at once; gives its port and its process."""
    argv = [sys.executable, "-m", "tests.support.small_engine"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process.pid
    finally:
        process.kill()
        process.wait(10)


@contextlib.contextmanager
def refusing_envoy(folder: Path) -> Iterator[int]:
    """An Envoy that answers everything with 401; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 401}}
    manager = connection_manager("floor", [route], frontdoor.FrontDoorLimits()) | {"http_filters": [router_filter()]}
    chain = {"filters": [network_filter(manager)]}
    listener = {"name": "floor", "address": address_of(f"127.0.0.1:{port}"), "filter_chains": [chain]}
    config = folder / "floor.yaml"
    config.write_text(json.dumps({"static_resources": {"listeners": [listener]}}))
    process = subprocess.Popen(frontdoor.command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.kill()
        process.wait(10)


async def serve(context_file: Path, port: int, client: Client) -> None:
    """Declares the engine and waits until it answers through the front door."""
    async with AsyncClient.from_context(context_file) as fleet:
        model = router_pb2.Model(engine=router_pb2.Engine(kind="openai", addresses=[f"127.0.0.1:{port}"]))
        await fleet.router.CreateModel(router_pb2.CreateModelRequest(model_id="echo", model=model), timeout=10)
    end_s = time.monotonic() + 30
    while True:
        window = Window()
        await client.ask(window, 0.2)
        if window.latencies_s and not window.failures:
            return
        if time.monotonic() > end_s:
            raise RuntimeError("the engine did not become ready")


def measure(options: Options) -> Report:
    """Memory of the front door and latency of others while 1,000 connections without a key send slow or huge bodies."""
    with tempfile.TemporaryDirectory(prefix="wf-") as folder, suite(Path(folder)) as supervisor:
        state = Path(folder)
        context = Context.load(state / "context.json")
        http = urlsplit(context.inference_url).port or 0
        client = Client(http, context.api_key)
        with engine() as (port, pid), refusing_envoy(state) as floor_port:
            asyncio.run(serve(state / "context.json", port, client))
            found = parts(state, supervisor)
            scene = Scene(client, found["envoy"], [*found.values(), pid], http, floor_port)
            seen = {s: asyncio.run(compare(scene, s, options)) for s in (APART, SHARED, FLOOR)}
    return report(seen)


def report(seen: dict[Setting, tuple[Window, Window]]) -> Report:
    """Two rows for each setting."""
    idle = max(max(alone.rss_mib) for setting, (alone, _) in seen.items() if setting is APART)
    grown = max(max(abused.rss_mib) for setting, (_, abused) in seen.items() if not setting.floor) - idle
    return Report(
        rows=[
            _row(setting.name, who, window)
            for setting, windows in seen.items()
            for who, window in zip(("nobody else", f"{CONNECTIONS} hostile ones"), windows, strict=True)
        ],
        targets=[
            Target("memory above idle", grown, MEMORY_MIB, "MiB"),
            Target("others' p99, apart", _ratio(*seen[APART]), P99_RATIO, "x of without"),
            Target("others' p99, shared cores", _ratio(*seen[SHARED]), P99_RATIO, "x of without"),
            Target("others' failures", float(sum(w.failures for _, w in seen.values())), 0.0, "requests"),
        ],
        notes=[
            f"shared cores, hostile connections at an Envoy that does nothing but refuse (the floor): {_ratio(*seen[FLOOR]):.2f}x",
            f"this host has {os.cpu_count()} cores",
        ],
    )


def _ratio(alone: Window, abused: Window) -> float:
    return percentile(abused.latencies_s, 99) / percentile(alone.latencies_s, 99)


def _row(setting: str, beside: str, window: Window) -> Row:
    return {
        "setting": setting,
        "beside": beside,
        "requests": len(window.latencies_s),
        "failed": window.failures,
        "p50 ms": 1e3 * percentile(window.latencies_s, 50),
        "p99 ms": 1e3 * percentile(window.latencies_s, 99),
        "Envoy MiB, most": max(window.rss_mib),
    }


if __name__ == "__main__":
    sys.exit(main("front_door_abuse", measure))
