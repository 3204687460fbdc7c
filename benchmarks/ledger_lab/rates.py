"""What reports cost on their way from the stream into closed hours: real NATS, real etcd, real files; what is reported is made up."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.ledger_lab.fleet import BEGIN_MS, MadeFleet
from benchmarks.ledger_lab.servers import a_bus, an_etcd
from whaleflux import names
from whaleflux.clock import SystemClock
from whaleflux.events.nats import NatsBus
from whaleflux.events.subjects import usage_id, usage_subject
from whaleflux.store.election import elect
from whaleflux.store.etcd import EtcdStore
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import usage_pb2 as pb
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.feed import Feed
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.ledger import Ledger, Reports, open_ledger
from whaleflux_console.ledger.manifest import Kind
from whaleflux_console.ledger.schemas import SAMPLES, STEPS

GPUS = 8  # of a node, and rows of samples of a report
INTERVAL_MS = 10_000
_IN_FLIGHT = 50
_START = "01jzzzzzzzzzzzzzzzzzzzzzzz"


@dataclass(frozen=True, slots=True)
class Rate:
    """`cpu_s` of the console's process, all its threads."""

    rows: int
    cpu_s: float
    wall_s: float
    bytes: int


@contextlib.asynccontextmanager
async def leading(folder: Path, store: MemoryStore | EtcdStore) -> AsyncIterator[Ledger]:
    engine = Engine()
    try:
        async with elect(store, "console-ledger", "benchmark") as leader:
            yield await open_ledger(LocalFolder(folder), store, leader, engine=engine)
    finally:
        engine.close()


def batch(node: int, sequence: int, chance: random.Random) -> pb.UsageBatch:
    """What a node with eight GPUs and a training on them says each ten seconds."""
    start_ms = BEGIN_MS + sequence * INTERVAL_MS
    found = pb.UsageBatch(node=names.node("s", f"node-{node}"), boot_id="boot", start=_START, sequence=sequence)
    found.start_time.FromMilliseconds(start_ms)
    found.end_time.FromMilliseconds(start_ms + INTERVAL_MS)
    for gpu in range(GPUS):
        found.gpus.add(
            device=f"GPU-{node:08x}-{gpu}", source="gpm", tensor_ppm=chance.randrange(900_000), sm_active_ppm=chance.randrange(1_000_000),
            dram_active_ppm=chance.randrange(900_000), busy_ppm=1_000_000, clock_ppm=950_000, power_mw=650_000, idle_power=False,
            memory_used_bytes=70 << 30, nvlink_sent_bytes=chance.randrange(1 << 40), nvlink_received_bytes=chance.randrange(1 << 40),
        )  # fmt: skip
    return found


async def end_to_end(folder: Path, nodes: int, intervals: int, seed: int) -> Rate:
    """From the stream to the closed hour, of reports that were published before."""
    async with a_bus(folder) as bus, an_etcd(folder) as endpoint:
        await _publish(bus, nodes, intervals, random.Random(seed))
        store = EtcdStore([endpoint])
        async with leading(folder / "ledger", store) as ledger:
            feed = Feed(ledger, bus, SystemClock())
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            while await feed.step():
                pass
            await feed.keep()
            await ledger.close(await ledger.inputs(BEGIN_MS), [])
            spent = time.process_time() - cpu_s, time.perf_counter() - wall_s
            files = ledger.state.all_files(Kind.RAW)
        await store.close()
        return Rate(sum(f.rows for f in files), *spent, sum(f.bytes for f in files))


async def _publish(bus: NatsBus, nodes: int, intervals: int, chance: random.Random) -> None:
    for sequence in range(1, intervals + 1):
        said = [batch(node, sequence, chance) for node in range(nodes)]
        for first in range(0, nodes, _IN_FLIGHT):
            await asyncio.gather(*(_publish_one(bus, each) for each in said[first : first + _IN_FLIGHT]))


async def _publish_one(bus: NatsBus, said: pb.UsageBatch) -> None:
    own_id = usage_id(said.node, said.boot_id, said.start, said.sequence)
    await bus.publish(usage_subject(said.node, said.start), said.SerializeToString(), id=own_id)


@dataclass(frozen=True, slots=True)
class Month:
    """Hours of a large fleet, appended, rolled up and closed; `peak_bytes` is the process' largest size until then."""

    hours: int
    rows: int
    append_cpu_s: float
    close_cpu_s: float
    bytes: int
    peak_bytes: int


async def month(folder: Path, gpus: int, hours: int, seed: int) -> Month:
    """A sample a minute of each GPU."""
    fleet, chance = MadeFleet(cards=gpus), np.random.default_rng(seed)
    appended = closed = 0.0
    async with leading(folder, MemoryStore()) as ledger:
        for hour in range(hours):
            begun = time.process_time()
            for quarter in range(4):
                await ledger.append(minutes(hour * 4 + quarter, gpus, chance))
            appended += time.process_time() - begun
            rows = list(fleet.rows(BEGIN_MS + hour * HOUR_MS))
            begun = time.process_time()
            await ledger.close(await ledger.inputs(BEGIN_MS + hour * HOUR_MS), rows)
            closed += time.process_time() - begun
        files = ledger.state.all_files(Kind.RAW)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return Month(
            hours, sum(f.rows for f in files), appended, closed, sum(f.bytes for f in ledger.state.files.values()), peak
        )


def minutes(quarter: int, gpus: int, chance: np.random.Generator, begin_ms: int = BEGIN_MS) -> Reports:
    """A quarter of an hour of the whole fleet."""
    count = gpus * 15
    device = pa.DictionaryArray.from_arrays(
        pa.array(np.tile(np.arange(gpus, dtype=np.int32), 15)), pa.array([f"GPU-{n:032x}" for n in range(gpus)])
    ).cast(pa.string())
    start = begin_ms + (quarter * 15 + np.repeat(np.arange(15), gpus)) * 60_000
    given = {
        "node": pa.array(["sites/s/nodes/n"]).take(pa.array(np.zeros(count, np.int32))),
        "reporter": pa.array(["boot/start"]).take(pa.array(np.zeros(count, np.int32))),
        "sequence": pa.array(quarter * count + np.arange(count)),
        "device": device,
        "start_ms": pa.array(start),
        "end_ms": pa.array(start + 60_000),
        "tensor_ppm": pa.array(chance.integers(0, 900_000, count)),
        "sm_active_ppm": pa.array(chance.integers(0, 1_000_000, count)),
        "power_mw": pa.array(chance.integers(100_000, 700_000, count)),
        "idle_power": pa.array(np.zeros(count, bool)),
        "source": pa.array(["gpm"]).take(pa.array(np.zeros(count, np.int32))),
    }
    columns = [given[field.name] if field.name in given else pa.nulls(count, field.type) for field in SAMPLES]
    last = (quarter + 1) * count
    samples = pa.table(columns, schema=SAMPLES)
    return Reports(
        samples, STEPS.empty_table(), quarter * count + 1, last, f"id-{last}", begin_ms + (quarter + 1) * 900_000
    )
