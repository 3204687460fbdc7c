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
from whaleflux.embedded.simulated import SimulatedNode
from whaleflux.embedded.suite import Suite, SuiteOptions
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import inventory_pb2, scheduler_pb2

NODES = 4
SIZE_BYTES = {"quick": 192 << 20, "full": 1 << 30}
CAP_BYTES_PER_S = 12 << 20
MOST_TRAFFIC, MOST_TIME = 1.15, 1.3
_PIECE = 64 << 10
_LIMIT_S = 900.0


class Capped(http.server.BaseHTTPRequestHandler):
    """One file by ranges, at so many bytes a second in all; `counts` are bytes by what the URL ends with."""

    protocol_version = "HTTP/1.1"
    path_of = Path()
    counts: Any = None
    names: tuple[str, ...] = ()
    lock = threading.Lock()
    free_at_s = 0.0

    def do_GET(self) -> None:
        size = self.path_of.stat().st_size
        first, last = (self.headers.get("Range") or f"bytes=0-{size - 1}").removeprefix("bytes=").split("-")
        count = min(int(last), size - 1) - int(first) + 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(count))
        self.end_headers()
        which = self.names.index(self.path.rpartition("/")[2])
        with open(self.path_of, "rb") as file:
            file.seek(int(first))
            while count:
                data = file.read(min(count, _PIECE))
                self.wait(len(data))
                self.wfile.write(data)
                self.counts[which] += len(data)
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
def serving(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The URL of the source, in a process of its own, and its counts."""
    counts = Array("q", len(names), lock=False)
    handler = type("Handler", (Capped,), {"path_of": path, "counts": counts, "names": names})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    child = os.fork()
    if not child:
        server.serve_forever()
    try:
        yield f"http://127.0.0.1:{server.server_port}", counts
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
    size: int

    async def declare(self, name: str) -> None:
        dataset = inventory_pb2.Dataset(uri=f"{self.url}/{name}")
        await self.client.inventory.CreateDataset(inventory_pb2.CreateDatasetRequest(dataset_id=name, dataset=dataset))

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

    async def pull(self, name: str, nodes: int) -> Row:
        """A job on so many nodes, until each of them has the whole of it."""
        await self.declare(name)
        before, begun = sum(self.counts), time.perf_counter()
        job = await self.submit(name, nodes)
        await until(lambda: self._read(before))
        first = time.perf_counter()
        await until(lambda: self._holds(name, nodes))
        took = time.perf_counter() - first
        await self.end(job)
        return {
            "what": f"{nodes} node(s)",
            "MB": self.size / 1e6,
            "seconds": took,
            "s to first byte": first - begun,
            "source traffic": (sum(self.counts) - before) / self.size,
        }

    async def _read(self, before: int) -> bool:
        return bool(sum(self.counts) > before)

    async def _holds(self, name: str, nodes: int) -> bool:
        return await self.copies(name) >= nodes


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(_LIMIT_S):
        while not await holds():
            await asyncio.sleep(0.05)


async def run(folder: Path, url: str, counts: Any, size: int) -> list[Row]:
    nodes = [SimulatedNode("lab", f"n{i}", "h100x8") for i in range(NODES)]
    suite = Suite(SuiteOptions(state=folder / "suite", simulate=nodes), lambda _: None)
    try:
        await suite.start()
        async with AsyncClient.from_context(suite.layout.context_file) as client:
            world = World(client, url, counts, size)
            return [await world.pull("one", 1), await world.pull("all", NODES)]
    finally:
        await suite.stop()


def measure(options: Options) -> Report:
    """One node alone, then four that begin at once."""
    size = SIZE_BYTES["quick" if options.quick else "full"]
    with tempfile.TemporaryDirectory(prefix="wf-", dir=Path.cwd() / ".build") as name:
        folder = Path(name)
        with open(folder / "original", "wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        with serving(folder / "original", ("one", "all")) as (url, counts):
            one, four = asyncio.run(run(folder, url, counts, size))
    return Report(
        rows=[one, four],
        targets=[
            Target("source traffic of four nodes", four["source traffic"], MOST_TRAFFIC, "of the dataset's size"),
            Target("time of four nodes", four["seconds"] / one["seconds"], MOST_TIME, "of one node's"),
        ],
        simulated="the machines; the source's rate is capped at 12 MiB/s by the server that gives it",
        notes=["from the first byte that the source gives to the last copy that is whole; both on one host"],
    )


if __name__ == "__main__":
    sys.exit(main("dataset_peers", measure))
