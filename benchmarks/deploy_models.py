"""A model that goes to three sites over links of their own, with other weights, in a bad version under load, and from one replica to eight.

Real: the embedded suite with its router, scheduler, inventory and front door, an agent process for each node, engines as processes that read
their weights, requests through Envoy. Played: the machines and their GPUs; an engine that answers with a word; each site's link is what its
agent may pull (`dataset_bytes_per_s`), and the source of the eight is capped by the server that gives it.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Array
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.dataset_peers import Capped, apart
from whaleflux.context import Context
from whaleflux.data import hashing, sources
from whaleflux.demo.fleet import DemoFleet, Machine
from whaleflux.embedded.suite import Suite, SuiteOptions
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import health_pb2, inventory_pb2
from whaleflux.v1 import router_pb2 as pb

MODEL = "models/m"
SIZE_BYTES = {"quick": 64 << 20, "full": 1 << 30}
LINKS = {  # bytes a second into each site
    "quick": {"onprem": 16 << 20, "cloud": 8 << 20, "edge": 4 << 20},
    "full": {"onprem": 100 << 20, "cloud": 50 << 20, "edge": 25 << 20},
}
EIGHT = 8
MOST_TIME, MOST_CHANGED, MOST_OF_ONE = 1.2, 0.15, 1.5
_LIMIT_S = 900.0
_CHANGED = 0.10
_BLOCK = 1 << 20


class Source(Capped):
    """Files by name; `caps` are bytes a second by name, over all connections together."""

    paths: ClassVar[dict[str, Path]] = {}
    caps: ClassVar[dict[str, float]] = {}
    free_s: ClassVar[dict[str, float]] = {}

    @property
    def path_of(self) -> Path:
        return self.paths[self.name]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def wait(self, count: int) -> None:
        cap = self.caps.get(self.name)
        if not cap:
            return
        with self.lock:
            begins_s = max(self.free_s.get(self.name, 0.0), time.monotonic())
            self.free_s[self.name] = begins_s + count / cap
        time.sleep(max(0.0, begins_s - time.monotonic()))


@contextmanager
def serving(paths: dict[str, Path], caps: dict[str, float]) -> Iterator[tuple[str, Any]]:
    """The URL of the source, in a process of its own, and the bytes that each name gave."""
    names = tuple(paths)
    counts = Array("q", len(names), lock=False)
    handler = type("Handler", (Source,), {"paths": paths, "caps": caps, "counts": counts, "names": names, "free_s": {}})
    with apart(handler) as url:
        yield url, counts


def write_weights(folder: Path, size: int) -> dict[str, Path]:
    """`one`; `two`, in which a tenth of it differs in one stretch; and `eight`, which has nothing in common with either."""
    paths = {name: folder / name for name in ("one", "two", "eight")}
    changed = range(int(size / _BLOCK * 0.4), int(size / _BLOCK * (0.4 + _CHANGED)))
    with paths["one"].open("wb") as one, paths["two"].open("wb") as two, paths["eight"].open("wb") as eight:
        for number in range(size // _BLOCK):
            block = os.urandom(_BLOCK)
            one.write(block)
            two.write(os.urandom(_BLOCK) if number in changed else block)
            eight.write(os.urandom(_BLOCK))
    return paths


@dataclass(slots=True)
class Load:
    """Clients of the front door, each asking again and again, until `stop`."""

    context: Context
    asked: int = 0
    failed: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(4)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(60)

    _threads: list[threading.Thread] = field(default_factory=list)

    def _ask(self) -> None:
        address = self.context.inference_url.removeprefix("http://").partition("/")[0]
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8})
        headers = {"authorization": f"Bearer {self.context.api_key or 'none'}", "content-type": "application/json"}
        while not self.stop.is_set():
            connection = http.client.HTTPConnection(address, timeout=60)
            try:
                connection.request("POST", "/v1/chat/completions", body, headers)
                answer = connection.getresponse()
                text = answer.read()
                if answer.status != 200:
                    self.failed.append(f"{answer.status} {text[:200]!r}")
            except OSError as error:
                self.failed.append(repr(error))
            finally:
                connection.close()
            self.asked += 1
            time.sleep(0.02)


@dataclass(slots=True)
class World:
    """The suite's client, and the source."""

    client: AsyncClient
    context: Context
    url: str
    counts: Any
    names: tuple[str, ...]
    size: int

    def given(self, name: str) -> int:
        return int(self.counts[self.names.index(name)])

    async def declare(self, name: str) -> None:
        """As `whaleflux datasets add --hash` does: what it consists of is known before a node reads it."""
        uri = f"{self.url}/{name}"
        found = await asyncio.to_thread(lambda: hashing.hashed(sources.open_source(uri)))
        request = inventory_pb2.CreateDatasetRequest(dataset_id=name, manifest=found.to_proto())
        request.dataset.uri, request.dataset.size_bytes = uri, self.size
        await self.client.inventory.CreateDataset(request)

    def model(self, weights: str, sites: dict[str, int], gpus: int = 1, wrong: str = "") -> pb.Model:
        words = [
            sys.executable,
            "-m",
            "benchmarks.deploy_lab.engine",
            "--weights",
            "{weights}",
            "--port",
            "{port}",
            "--model",
            "m",
        ]
        if wrong:
            words += ["--wrong", wrong]
        made = pb.Model(name=MODEL, engine=pb.Engine(command=words, weights=f"datasets/{weights}", gpus=gpus))
        made.engine.working_directory = str(Path.cwd())
        made.replicas.min = 1
        made.sites.extend(pb.ModelSite(site=f"sites/{site}", replicas=count) for site, count in sites.items())
        made.rollout_policy.watch.FromSeconds(5)
        made.rollout_policy.ready_within.FromSeconds(600)
        made.rollout_policy.canary_percent = 20
        return made

    async def create(self, model: pb.Model) -> float:
        """Until all of its replicas are READY, seconds."""
        began = time.perf_counter()
        await self.client.router.CreateModel(pb.CreateModelRequest(model_id="m", model=model), timeout=30)
        await until(lambda: self.all_ready(model))
        return time.perf_counter() - began

    async def change(self, model: pb.Model) -> None:
        model.etag = (await self.client.router.GetModel(pb.GetModelRequest(name=MODEL))).etag
        await self.client.router.UpdateModel(pb.UpdateModelRequest(model=model), timeout=30)

    async def all_ready(self, model: pb.Model) -> bool:
        found = await self.client.router.ListReplicas(pb.ListReplicasRequest(parent=MODEL))
        ready = sum(one.state == pb.REPLICA_STATE_READY for one in found.replicas)
        return bool(ready >= sum(site.replicas for site in model.sites))

    async def rolled(self, state: pb.RolloutState) -> pb.Model:
        async def there() -> bool:
            found.append(await self.client.router.GetModel(pb.GetModelRequest(name=MODEL)))
            return found[-1].rollout.state == state

        found = list[pb.Model]()
        await until(there)
        return found[-1]

    async def engine_start_s(self, site: str) -> float:
        """As the router measured it there: from the process to its first token."""

        async def known() -> bool:
            model = await self.client.router.GetModel(pb.GetModelRequest(name=MODEL))
            found.extend(one.engine_start_s for one in model.measures if one.site == f"sites/{site}")
            return bool(found)

        found = list[float]()
        await until(known)
        return found[0]

    async def remove(self) -> None:
        await self.client.router.DeleteModel(pb.DeleteModelRequest(name=MODEL))
        await until(self._is_gone)

    async def _is_gone(self) -> bool:
        return not (await self.client.router.ListReplicas(pb.ListReplicasRequest(parent="models/-"))).replicas

    async def estimates(self) -> dict[str, str]:
        asked = pb.EstimateDeploymentRequest(model=self.model("two", {"onprem": 1, "cloud": 1, "edge": 1}))
        asked.model.name = MODEL
        found = await self.client.router.EstimateDeployment(asked)
        return {one.site.rpartition("/")[2]: f"{one.ready_in.seconds} s: {one.why}" for one in found.sites}


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(_LIMIT_S):
        while not await holds():
            await asyncio.sleep(0.1)


async def three_sites(world: World, links: dict[str, int]) -> Row:
    """From the declaration to the last of three replicas, beside the slowest link's transfer and its engine's start."""
    await world.declare("one")
    took = await world.create(world.model("one", dict.fromkeys(links, 1)))
    transfer_s, start_s = world.size / min(links.values()), await world.engine_start_s("edge")
    return {
        "what": "to three sites",
        "seconds": took,
        "limit s": transfer_s + start_s,
        "ratio": took / (transfer_s + start_s),
    }


async def bad_versions(world: World, links: dict[str, int]) -> list[Row]:
    """Under load: one that makes no token, and one that fails what clients ask; each is to go by itself."""
    rows = list[Row]()
    with Load(world.context) as load:
        for wrong in ("never", "requests"):
            begun, before, failed = time.perf_counter(), load.asked, len(load.failed)
            model = world.model("one", dict.fromkeys(links, 1), wrong=wrong)
            if wrong == "never":
                model.rollout_policy.ready_within.FromSeconds(20)
            else:
                model.rollout_policy.watch.FromSeconds(60)
            await world.change(model)
            after = await world.rolled(pb.ROLLOUT_STATE_ROLLED_BACK)
            rows.append(
                {
                    "what": f"bad version ({wrong})",
                    "seconds": time.perf_counter() - begun,
                    "requests": load.asked - before,
                    "failed": len(load.failed) - failed,
                    "said": after.rollout.message,
                }
            )
        for text in load.failed[:3]:
            print(f"failed: {text}", file=sys.stderr)
    return rows


async def changed_weights(world: World, links: dict[str, int]) -> Row:
    """A tenth of the bytes is another; what moves to three sites of what three whole copies are."""
    before = world.given("two")
    with Load(world.context) as load:
        began = time.perf_counter()
        await world.change(world.model("two", dict.fromkeys(links, 1)))
        await world.rolled(pb.ROLLOUT_STATE_DONE)
        took = time.perf_counter() - began
    share = (world.given("two") - before) / (world.size * len(links))
    return {
        "what": "10 % changed weights",
        "seconds": took,
        "moved share": share,
        "requests": load.asked,
        "failed": len(load.failed),
    }


async def one_to_eight(world: World) -> list[Row]:
    """One replica from a capped source, then eight of it on as many nodes."""
    await world.declare("eight")
    one = await world.create(world.model("eight", {"rack": 1}, gpus=2))
    before, began = world.given("eight"), time.perf_counter()
    wanted = world.model("eight", {"rack": EIGHT}, gpus=2)
    await world.change(wanted)
    await until(lambda: world.all_ready(wanted))
    eight = time.perf_counter() - began
    traffic = (world.given("eight") - before) / world.size
    return [
        {"what": "one replica in a site", "seconds": one},
        {"what": "from one to eight", "seconds": eight, "ratio": eight / one, "source traffic": traffic},
    ]


def machines(links: dict[str, int]) -> list[Machine]:
    """A node at each of three sites behind its link, and eight at a fourth."""
    limited = [
        Machine(site, f"{site}-1", "h200x8", settings=(("dataset_bytes_per_s", str(rate)),))
        for site, rate in links.items()
    ]
    return [*limited, *(Machine("rack", f"rack-{number}", "rtx4090x2") for number in range(EIGHT))]


async def run(
    folder: Path, url: str, counts: Any, names: tuple[str, ...], size: int, links: dict[str, int]
) -> list[Row]:
    suite = Suite(SuiteOptions(state=folder / "suite", simulate=[]), lambda _: None)
    fleet: DemoFleet | None = None
    try:
        await suite.start()
        context = Context.load(suite.layout.context_file)
        fleet = DemoFleet(folder / "suite", context)
        async with AsyncClient.from_context(suite.layout.context_file) as client:
            nodes = machines(links)
            await fleet.join(client, nodes)
            await until(lambda: _all_well(client, len(nodes)))
            world = World(client, context, url, counts, names, size)
            rows = [await three_sites(world, links)]
            print(rows, file=sys.stderr, flush=True)
            rows += await bad_versions(world, links)
            await world.declare("two")
            told = await world.estimates()
            rows.append(await changed_weights(world, links))
            await world.remove()
            rows += await one_to_eight(world)
            return (
                [*rows, *({"what": f"estimate for {site}", "said": words} for site, words in told.items())]
                if told
                else rows
            )
    finally:
        if fleet is not None:
            fleet.stop()
        await suite.stop()


async def _all_well(client: AsyncClient, count: int) -> bool:
    listed = await client.health.ListNodeHealth(health_pb2.ListNodeHealthRequest())
    return bool(sum(one.phase == health_pb2.NODE_PHASE_READY for one in listed.node_health) >= count)


def measure(options: Options) -> Report:
    """All four, one after the other, in one fleet."""
    kind = "quick" if options.quick else "full"
    size, links = SIZE_BYTES[kind], LINKS[kind]
    with tempfile.TemporaryDirectory(prefix="wf-", dir=Path.cwd() / ".build") as name:
        folder = Path(name)
        paths = write_weights(folder, size)
        with serving(paths, {"eight": float(links["edge"])}) as (url, counts):
            rows = asyncio.run(run(folder, url, counts, tuple(paths), size, links))
    of = {row["what"]: row for row in rows}
    bad = [row for what, row in of.items() if what.startswith("bad version")]
    failed = sum(row["failed"] for row in (*bad, of["10 % changed weights"]))
    return Report(
        rows=rows,
        targets=[
            Target(
                "three sites ready",
                of["to three sites"]["ratio"],
                MOST_TIME,
                "of the slowest link's transfer and an engine's start",
            ),
            Target(
                "bytes moved for 10 % changed weights",
                of["10 % changed weights"]["moved share"],
                MOST_CHANGED,
                "of whole copies",
            ),
            Target("failed requests while versions came and went", failed, 0, "requests"),
            Target("from one replica to eight", of["from one to eight"]["ratio"], MOST_OF_ONE, "of the time of one"),
        ],
        simulated="the machines and the engine; links are what agents may pull, the rack's source is capped by its server",
        notes=["all on one host; requests come from four clients through the front door all the while"],
    )


if __name__ == "__main__":
    sys.exit(main("deploy_models", measure))
