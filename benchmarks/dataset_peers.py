"""What several nodes that need one dataset at once take from its source, and how long they need, beside one node alone.

Real: the embedded suite, its inventory and scheduler, one agent process for each node, mTLS between them, and a job on four nodes that waits
for its data. Played: the machines; the source is a web server on loopback whose bytes a second are capped, over all connections together.
"""

from __future__ import annotations

import asyncio
import http.server
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Array
from pathlib import Path
from typing import Any

from benchmarks.common import Options, Report, Row, Target, main
from whaleflux.data.hashing import hashed
from whaleflux.data.sources import Local
from whaleflux.embedded.simulated import SimulatedNode
from whaleflux.embedded.suite import Suite, SuiteOptions
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import inventory_pb2, scheduler_pb2

NODES = 4
SIZES_MIB = {"quick": (64, 192), "full": (64, 192, 1024)}  # the last is what the targets are held against
WAYS = ("one", "all", "hashed")
CAP_BYTES_PER_S = 12 << 20
MOST_TRAFFIC, MOST_TIME = 1.15, 1.3
_PIECE = 64 << 10
_LIMIT_S = 900.0


class Capped(http.server.BaseHTTPRequestHandler):
    """Files by ranges, at so many bytes a second in all: `counts` are bytes by the folder of the file."""

    protocol_version = "HTTP/1.1"
    folder = Path()
    counts: Any = None
    names: tuple[str, ...] = ()
    lock = threading.Lock()
    free_at_s = 0.0

    @property
    def name(self) -> str:
        """What is counted as one."""
        return self.path.split("/")[1]

    @property
    def path_of(self) -> Path:
        return self.folder / self.name / "data"

    def do_GET(self) -> None:
        size = self.path_of.stat().st_size
        first, last = (self.headers.get("Range") or f"bytes=0-{size - 1}").removeprefix("bytes=").split("-")
        count = min(int(last), size - 1) - int(first) + 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(count))
        self.end_headers()
        with open(self.path_of, "rb") as file:
            file.seek(int(first))
            while count:
                data = file.read(min(count, _PIECE))
                self.wait(len(data))
                self.wfile.write(data)
                self.counts[self.names.index(self.name)] += len(data)
                count -= len(data)

    def wait(self, count: int) -> None:
        kind = type(self)
        with self.lock:
            begins_s = max(kind.free_at_s, time.monotonic())
            kind.free_at_s = begins_s + count / CAP_BYTES_PER_S
        time.sleep(max(0.0, begins_s - time.monotonic()))

    def log_message(self, *_: Any) -> None:
        """Silent."""


@contextmanager
def serving(folder: Path, sets: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The URL of the source, in a process of its own, and its counts."""
    counts = Array("q", len(sets), lock=False)
    with apart(type("Handler", (Capped,), {"folder": folder, "counts": counts, "names": sets})) as url:
        yield url, counts


@contextmanager
def apart(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server in a process of its own, which ends with this."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    child = os.fork()
    if not child:
        server.serve_forever()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        server.server_close()


@dataclass(slots=True)
class World:
    """The suite's client, and the source."""

    client: AsyncClient
    url: str
    counts: Any
    folder: Path

    async def declare(self, name: str, size_mib: int) -> None:
        dataset = inventory_pb2.Dataset(uri=f"{self.url}/{name}/data")
        request = inventory_pb2.CreateDatasetRequest(dataset_id=name, dataset=dataset)
        if name.endswith("hashed"):
            original = Local(self.folder / name / "data")
            request.manifest.CopyFrom((await asyncio.to_thread(hashed, original)).to_proto())
        await self.client.inventory.CreateDataset(request)

    async def copies(self, name: str) -> int:
        found = await self.client.inventory.GetDataset(inventory_pb2.GetDatasetRequest(name=f"datasets/{name}"))
        failed = [copy for copy in found.copies if copy.state == inventory_pb2.DATASET_COPY_STATE_FAILED]
        assert not failed, failed
        return sum(copy.state == inventory_pb2.DATASET_COPY_STATE_READY for copy in found.copies)

    async def submit(self, name: str, nodes: int) -> str:
        spec = scheduler_pb2.JobSpec(command=["sleep", "86400"], gpus=8 * nodes, datasets=[f"datasets/{name}"])
        request = scheduler_pb2.CreateJobRequest(parent="queues/default", job_id=name, job=scheduler_pb2.Job(spec=spec))
        return str((await self.client.scheduler.CreateJob(request)).name)

    async def end(self, job: str) -> None:
        await self.client.scheduler.CancelJob(scheduler_pb2.CancelJobRequest(name=job))
        await until(lambda: self._ended(job))

    async def _ended(self, job: str) -> bool:
        state = (await self.client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=job))).state
        return bool(state == scheduler_pb2.JOB_STATE_CANCELLED)

    async def pull(self, way: str, size_mib: int) -> Row:
        """A job on one node or all of them, until each has the whole of it."""
        name, nodes, size = f"{size_mib}-{way}", 1 if way == "one" else NODES, size_mib << 20
        await self.declare(name, size_mib)
        before, begun = sum(self.counts), time.perf_counter()
        job = await self.submit(name, nodes)
        await until(lambda: self._read(before))
        first = time.perf_counter()
        await until(lambda: self._holds(name, nodes))
        took = time.perf_counter() - first
        await self.end(job)
        return {
            "what": f"{nodes} node(s)" + ", manifest known before" * (way == "hashed"),
            "MiB": size_mib,
            "seconds": took,
            "s to first byte": first - begun,
            "source traffic": (sum(self.counts) - before) / size,
        }

    async def _read(self, before: int) -> bool:
        return bool(sum(self.counts) > before)

    async def _holds(self, name: str, nodes: int) -> bool:
        return await self.copies(name) >= nodes


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(_LIMIT_S):
        while not await holds():
            await asyncio.sleep(0.05)


async def run(folder: Path, url: str, counts: Any, sizes_mib: tuple[int, ...]) -> list[Row]:
    nodes = [SimulatedNode("lab", f"n{i}", "h100x8") for i in range(NODES)]
    suite = Suite(SuiteOptions(state=folder / "suite", simulate=nodes), lambda _: None)
    try:
        await suite.start()
        async with AsyncClient.from_context(suite.layout.context_file) as client:
            world = World(client, url, counts, folder)
            rows = [await world.pull(way, size_mib) for size_mib in sizes_mib for way in WAYS]
            for i, row in enumerate(rows):
                row["x one node"] = row["seconds"] / rows[i - i % len(WAYS)]["seconds"]
            return rows
    finally:
        await suite.stop()


def measure(options: Options) -> Report:
    """One node alone, then four that begin at once: without and with a manifest that is known."""
    sizes_mib = SIZES_MIB["quick" if options.quick else "full"]
    with tempfile.TemporaryDirectory(prefix="wf-", dir=Path.cwd() / ".build") as name:
        folder = Path(name)
        sets = tuple(f"{size_mib}-{way}" for size_mib in sizes_mib for way in WAYS)
        for one in sets:  # other bytes in each, for nodes copy what they have
            (folder / one).mkdir()
            with open(folder / one / "data", "wb") as file:
                for _ in range(int(one.partition("-")[0])):
                    file.write(os.urandom(1 << 20))
        with serving(folder, sets) as (url, counts):
            rows = asyncio.run(run(folder, url, counts, sizes_mib))
    *_, alone, four, known = rows
    return Report(
        rows=rows,
        targets=[
            Target("source traffic of four nodes", four["source traffic"], MOST_TRAFFIC, "of the dataset's size"),
            Target("time of four nodes", four["x one node"], MOST_TIME, f"of one node's {alone['seconds']:.1f} s"),
            Target("the same, manifest known: traffic", known["source traffic"], MOST_TRAFFIC, "of the dataset's size"),
            Target("the same, manifest known: time", known["x one node"], MOST_TIME, "of one node's"),
        ],
        simulated="the machines; the source's rate is capped at 12 MiB/s by the server that gives it",
        notes=["from the first byte that the source gives to the last copy that is whole; all on one host"],
    )


if __name__ == "__main__":
    sys.exit(main("dataset_peers", measure))
