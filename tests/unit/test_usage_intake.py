"""What the console takes of agents: what can be true of their own node, once, onto the bus."""

import asyncio
from datetime import timedelta

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.events.memory import MemoryBus
from whaleflux.store.memory import MemoryStore
from whaleflux.store.placements import Placements, put
from whaleflux.v1 import usage_pb2 as pb
from whaleflux_console.intake import MOST_BATCHES, MOST_GPUS, UsageIntake

NODE, OTHER = "sites/s/nodes/n", "sites/s/nodes/other"
JOB = "queues/default/jobs/train"
START = "01jzzzzzzzzzzzzzzzzzzzzzzz"
ALL = ["wf.usage.>"]


class World:
    def __init__(self):
        self.clock = VirtualClock()
        self.bus, self.store = MemoryBus(self.clock), MemoryStore(self.clock)
        self.intake = UsageIntake(self.bus, Placements(self.store), self.clock)

    async def place(self, epoch=2, nodes=(NODE,), uid="u"):
        await self.store.commit(put(JOB, epoch, uid, nodes))

    def batch(self, sequence=1, *, gpus=(), steps=(), start=START, node=NODE, before_s=10.0, **more):
        batch = pb.UsageBatch(node=node, boot_id="boot", start=start, sequence=sequence, gpus=gpus, steps=steps, **more)
        batch.start_time.FromDatetime(self.clock.now() - timedelta(seconds=before_s))
        batch.end_time.FromDatetime(self.clock.now())
        return batch

    def steps(self, job=JOB, uid="u", epoch=2, **times):
        found = pb.StepUsage(job=job, job_uid=uid, epoch=epoch, rank=0, device="GPU-0")
        found.start_time.FromDatetime(self.clock.now() - timedelta(seconds=5))
        found.end_time.FromDatetime(self.clock.now())
        found.times.CopyFrom(pb.StepTimes(**{"first_step": 1, "last_step": 10, **times}))
        return found

    def request(self, *batches, node=NODE, clock_s=0.0):
        request = pb.ReportUsageRequest(node=node, batches=batches)
        request.time.FromDatetime(self.clock.now() + timedelta(seconds=clock_s))
        return request

    async def report(self, *batches, **more):
        return await self.intake.ReportUsage(self.request(*batches, **more), None)

    async def taken(self):
        return [pb.UsageBatch.FromString(event.data) for event in (await self.bus.read(ALL)).events]


@pytest.fixture
def world():
    return World()


async def test_what_a_node_saw_is_on_the_bus_under_its_own_subject(world):
    await world.place()
    holder = pb.UsageHolder(job=JOB, job_uid="u", epoch=2)
    sent = world.batch(
        gpus=[pb.GpuUsage(device="GPU-0", source="gpm", tensor_ppm=5, holders=[holder])], steps=[world.steps()]
    )
    answer = await world.report(sent)
    assert answer == pb.ReportUsageResponse()
    assert await world.taken() == [sent]
    assert world.bus.events[0].subject == f"wf.usage.s.n.{START}.samples"


async def test_a_batch_that_comes_again_counts_once(world):
    await world.report(world.batch(1), world.batch(2))
    await world.report(world.batch(2), world.batch(3))
    assert [one.sequence for one in await world.taken()] == [1, 2, 3]


async def test_a_bus_that_is_away_answers_nothing(world):
    world.bus.reachable = False
    with pytest.raises(Unavailable):
        await world.report(world.batch())


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"epoch": 2, "uid": "later"}, "is not placed"),
        ({"epoch": 3}, "is not placed"),
        ({"job": "queues/default"}, "does not have the form"),
        ({"save_us": 6_000_000}, "save_us is 6000000; use 0 to 5000000"),
        ({"first_step": 0}, "first_step 0"),
    ],
)
async def test_steps_that_cannot_be_true_are_left_out_and_told_of(world, claim, said):
    await world.place()
    answer = await world.report(world.batch(steps=[world.steps(**claim), world.steps()]))
    assert answer.refused_records == 1
    assert said in answer.refused_reason
    ((kept,),) = [one.steps for one in await world.taken()]
    assert kept == world.steps()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (253_402_300_799, "no instants of 1970 to 2100"),
        (2**62, "no instants of 1970 to 2100"),
        (0, "s before the batch's; use -5 to 86400 s"),
    ],
)
async def test_steps_of_no_time_of_their_batch_hold_nothing_up(world, seconds, said):
    await world.place()
    strange = world.steps()
    strange.start_time.seconds = strange.end_time.seconds = seconds
    answer = await world.report(world.batch(steps=[strange, world.steps()]), clock_s=3)
    assert (answer.refused_records, said in answer.refused_reason) == (1, True)
    ((kept,),) = [one.steps for one in await world.taken()]
    assert kept.times == world.steps().times


async def test_a_node_speaks_for_no_attempt_that_is_elsewhere(world):
    await world.place(nodes=[OTHER])
    gpu = pb.GpuUsage(
        device="GPU-0", source="gpm", tensor_ppm=5, holders=[pb.UsageHolder(job=JOB, job_uid="u", epoch=2)]
    )
    answer = await world.report(world.batch(gpus=[gpu], steps=[world.steps()]))
    assert answer.refused_records == 2
    (kept,) = await world.taken()
    assert (len(kept.steps), kept.gpus[0].tensor_ppm, len(kept.gpus[0].holders)) == (0, 5, 0)


async def test_the_last_words_of_an_attempt_come_after_the_next_one_was_placed(world):
    await world.place(epoch=3, nodes=[OTHER])
    answer = await world.report(world.batch(steps=[world.steps(epoch=2)]))
    assert answer.refused_records == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor_ppm": -1},
        {"tensor_ppm": 3_000_000},
        {"power_mw": 1 << 40},
        {"nvlink_sent_bytes": 1 << 60},
        {"device": ""},
    ],
)
async def test_devices_that_cannot_have_done_that_are_left_out(world, wrong):
    gpus = [pb.GpuUsage(**{"device": "GPU-0", **wrong}), pb.GpuUsage(device="GPU-1", tensor_ppm=1)]
    assert (await world.report(world.batch(gpus=gpus))).refused_records == 1
    assert [one.device for one in (await world.taken())[0].gpus] == ["GPU-1"]


async def test_ports_that_cannot_have_moved_that_are_left_out(world):
    network = pb.NetworkUsage(rdma_sent_bytes=-5, kernel_sent_bytes=3)
    assert (await world.report(world.batch(network=network))).refused_records == 1
    assert not (await world.taken())[0].HasField("network")


async def test_a_node_whose_clock_is_wrong_is_dated_by_ours(world):
    batch = world.batch(before_s=10)
    for time in (batch.start_time, batch.end_time):
        time.FromDatetime(time.ToDatetime() + timedelta(seconds=100))
    await world.report(batch, clock_s=100.2)
    (kept,) = await world.taken()
    assert kept.end_time.ToDatetime() == world.clock.now().replace(tzinfo=None)
    assert kept.end_time.ToNanoseconds() - kept.start_time.ToNanoseconds() == 10 * 10**9


async def test_small_differences_of_clocks_are_the_way_of_the_message(world):
    batch = world.batch()
    await world.report(batch, clock_s=-0.3)
    assert (await world.taken())[0].end_time == batch.end_time


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda w: w.request(), "batches"),
        (lambda w: w.request(*(w.batch(n + 1) for n in range(MOST_BATCHES + 1))), "batches"),
        (lambda w: w.request(w.batch(), node="n"), "node"),
        (lambda w: w.request(w.batch(node=OTHER)), "batches[0].node"),
        (lambda w: w.request(w.batch(), w.batch(0)), "batches[1].sequence"),
        (lambda w: w.request(w.batch(start="x.y")), "batches[0].start"),
        (lambda w: w.request(w.batch(dropped_batches=-1)), "batches[0].dropped_batches"),
        (lambda w: w.request(w.batch(before_s=-1)), "batches[0].end_time"),
        (lambda w: w.request(w.batch(before_s=90_000)), "batches[0].end_time"),
        (lambda w: w.request(w.batch(), clock_s=-60), "batches[0].end_time"),
        (lambda w: w.request(w.batch(), clock_s=40 * 86_400), "batches[0].end_time"),
        (lambda w: w.request(w.batch(gpus=[pb.GpuUsage(device="g")] * (MOST_GPUS + 1))), "batches[0].gpus"),
        (lambda w: w.request(w.batch(gpus=[pb.GpuUsage(device="g" * 600_000)])), "batches"),
        (lambda w: pb.ReportUsageRequest(node=NODE, batches=[w.batch()]), "time"),
        (lambda w: pb.ReportUsageRequest(node=NODE, batches=[w.batch()], time={"seconds": 2**62}), "time"),
        (lambda w: w.request(pb.UsageBatch(node=NODE, boot_id="b", start=START, sequence=1, start_time={"seconds": -9})), "batches[0].start_time"),
    ],
)  # fmt: skip
async def test_what_no_agent_says_is_refused_by_field_and_changes_nothing(world, make, field):
    with pytest.raises(InvalidArgument) as wrong:
        await world.intake.ReportUsage(make(world), None)
    assert wrong.value.violations[0].field == field
    assert await world.taken() == []


async def test_a_gang_asks_the_store_once_for_its_placement(world):
    await world.place()
    reads = 0
    get = world.store.get

    async def counted(key):
        nonlocal reads
        reads += 1
        return await get(key)

    world.store.get = counted
    await world.report(*(world.batch(at + 1, steps=[world.steps()] * 8) for at in range(4)))
    assert reads == 1


async def test_many_nodes_report_side_by_side(world):
    await asyncio.gather(*(world.report(world.batch(at + 1)) for at in range(20)))
    assert sorted(one.sequence for one in await world.taken()) == list(range(1, 21))
