"""From the stream into the ledger: each report once, whatever happened between; what was gone is counted, never guessed."""

from datetime import UTC, datetime

import pytest

from tests.support.ledger_world import BEGIN_MS, leading
from whaleflux.clock import VirtualClock
from whaleflux.errors import Unavailable
from whaleflux.events.memory import MemoryBus
from whaleflux.events.subjects import usage_id, usage_subject
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import usage_pb2 as pb
from whaleflux_console.core.facts import Sample, Steps
from whaleflux_console.ledger.feed import Feed
from whaleflux_console.ledger.manifest import Kind
from whaleflux_console.ledger.shelf import table_of

NODE, START = "sites/s/nodes/n", "01jzzzzzzzzzzzzzzzzzzzzzzz"


class World:
    def __init__(self, kept=10_000):
        self.clock = VirtualClock(datetime.fromtimestamp(BEGIN_MS / 1000, UTC))
        self.bus, self.store = MemoryBus(self.clock, max_events=kept), MemoryStore(self.clock)

    async def report(self, sequence, *, gpus=(), steps=(), at_ms=0):
        batch = pb.UsageBatch(node=NODE, boot_id="boot", start=START, sequence=sequence, gpus=gpus, steps=steps)
        batch.start_time.FromMilliseconds(at_ms or BEGIN_MS + sequence * 10_000)
        batch.end_time.FromMilliseconds((at_ms or BEGIN_MS + sequence * 10_000) + 10_000)
        await self.bus.publish(
            usage_subject(NODE, START), batch.SerializeToString(), id=usage_id(NODE, "boot", START, sequence)
        )


@pytest.fixture
def world():
    return World()


def gpu(**more):
    return pb.GpuUsage(device="GPU-0", source="gpm", **more)


async def drained(feed):
    while await feed.step():
        pass
    await feed.keep()


def sequences(ledger):
    files = ledger.state.all_files(Kind.RAW)
    return [n for file in files for n in table_of(ledger.folder, file)["sequence"].to_pylist()]


async def test_what_was_said_is_what_is_known_and_nothing_else(world, tmp_path):
    steps = pb.StepUsage(job="queues/q/jobs/j", job_uid="u", epoch=3, rank=7, device="GPU-0")
    steps.start_time.FromMilliseconds(BEGIN_MS + 10_000)
    steps.end_time.FromMilliseconds(BEGIN_MS + 20_000)
    steps.times.CopyFrom(pb.StepTimes(first_step=1, last_step=10, data_us=1_500_999, comm_cross_us=0, tokens=4096))
    await world.report(
        1, gpus=[gpu(tensor_ppm=0, idle_power=False), pb.GpuUsage(device="GPU-1", source="nvml")], steps=[steps]
    )
    async with leading(tmp_path, world.store) as ledger:
        await drained(Feed(ledger, world.bus, world.clock))
        facts = (await ledger.inputs(BEGIN_MS)).facts
        assert facts.samples == (
            Sample("GPU-0", BEGIN_MS + 10_000, BEGIN_MS + 20_000, tensor_ppm=0, idle_power=False, source="gpm"),
            Sample("GPU-1", BEGIN_MS + 10_000, BEGIN_MS + 20_000, source="nvml"),
        )
        assert facts.steps == (
            Steps(
                "u",
                3,
                7,
                "GPU-0",
                BEGIN_MS + 10_000,
                BEGIN_MS + 20_000,
                1,
                10,
                data_ms=1_500,
                comm_cross_ms=0,
                tokens=4096,
            ),
        )


async def test_the_next_leader_goes_on_where_the_ledger_is(world, tmp_path):
    for n in range(1, 6):
        await world.report(n, gpus=[gpu()])
    async with leading(tmp_path, world.store) as ledger:
        await drained(Feed(ledger, world.bus, world.clock))
    for n in range(6, 9):
        await world.report(n, gpus=[gpu()])
    async with leading(tmp_path, world.store) as ledger:
        feed = Feed(ledger, world.bus, world.clock)
        assert not await feed.step()
        assert ledger.state.position.sequence == 5
        await drained(feed)
        assert sequences(ledger) == list(range(1, 9))


async def test_a_batch_a_minute(world, tmp_path):
    async with leading(tmp_path, world.store) as ledger:
        feed = Feed(ledger, world.bus, world.clock)
        for n in range(1, 31):
            await world.report(n, gpus=[gpu()])
            await world.clock.advance(10)
            await feed.step()
        assert len(ledger.state.all_files(Kind.RAW)) == 5
        assert sequences(ledger) == list(range(1, 31))


async def test_with_nothing_reported_the_watermark_goes_on(world, tmp_path):
    async with leading(tmp_path, world.store) as ledger:
        feed = Feed(ledger, world.bus, world.clock)
        await world.clock.advance(120)
        await feed.step()
        assert ledger.state.watermark_ms == round(world.clock.now().timestamp() * 1000)


async def test_a_stream_that_began_anew_is_read_from_its_first(world, tmp_path):
    for n in range(1, 6):
        await world.report(n, gpus=[gpu()])
    async with leading(tmp_path, world.store) as ledger:
        await drained(Feed(ledger, world.bus, world.clock))
        for longer in (0, 5):
            world.bus = MemoryBus(world.clock)
            for n in range(100 + longer, 103 + 2 * longer):
                await world.report(n, gpus=[gpu()])
            await drained(Feed(ledger, world.bus, world.clock))
        assert sorted(sequences(ledger)) == [1, 2, 3, 4, 5, 100, 101, 102, *range(105, 113)]


async def test_what_was_gone_before_it_was_read_is_counted(tmp_path):
    world = World(kept=5)
    for n in range(1, 4):
        await world.report(n, gpus=[gpu()])
    async with leading(tmp_path, world.store) as ledger:
        await drained(Feed(ledger, world.bus, world.clock))
        for n in range(4, 12):
            await world.report(n, gpus=[gpu()])
        await drained(Feed(ledger, world.bus, world.clock))
        assert sequences(ledger) == [1, 2, 3, 7, 8, 9, 10, 11]
        assert ledger.state.position.missed == 3


async def test_files_that_are_gone_are_filled_from_the_stream_as_far_as_it_goes(tmp_path):
    world = World(kept=7)
    async with leading(tmp_path, world.store) as ledger:
        for first in (1, 4, 7):
            for n in range(first, first + 3):
                await world.report(n, gpus=[gpu()])
            await drained(Feed(ledger, world.bus, world.clock))
    for file in (tmp_path / "raw").rglob("*.parquet"):
        file.unlink()
    async with leading(tmp_path, world.store) as ledger:
        await drained(Feed(ledger, world.bus, world.clock))
        assert sequences(ledger) == list(range(3, 10))
        assert ledger.state.position.missed == 2
        assert ledger.state.position.sequence == 9


async def test_a_bus_that_is_away_is_no_end_of_the_stream(world, tmp_path):
    await world.report(1, gpus=[gpu()])
    async with leading(tmp_path, world.store) as ledger:
        feed = Feed(ledger, world.bus, world.clock)
        world.bus.reachable = False
        await world.clock.advance(3600)
        with pytest.raises(Unavailable):
            await feed.step()
        assert ledger.state.watermark_ms == 0
