"""Checkpoints end with their job, after a grace, and never on a guess."""

import pytest

from tests.support.acting import Acting, agent
from whaleflux import names
from whaleflux.checkpoint_storage import job_folder
from whaleflux.clock import VirtualClock
from whaleflux.errors import NotFound, Unavailable
from whaleflux.rpc.auth import Identity
from whaleflux.store import keys, placements
from whaleflux.store.api import Put
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux.v1 import scheduler_pb2
from whaleflux_checkpoint.collector import Collector
from whaleflux_checkpoint.servicer import Checkpoints

JOB = "queues/default/jobs/train"
GRACE_S = 600.0


class Scheduler:
    """Jobs by name, or an error."""

    def __init__(self):
        self.uids, self.error = {JOB: "first"}, None

    async def GetJob(self, request, timeout):
        if self.error is not None:
            raise self.error
        if request.name not in self.uids:
            raise NotFound("job", request.name)
        return scheduler_pb2.Job(name=request.name, uid=self.uids[request.name])


class World:
    """A store with checkpoints, and collectors that come and go."""

    def __init__(self):
        self.clock, self.store, self.scheduler = VirtualClock(), MemoryStore(), Scheduler()
        self.service = Acting(Checkpoints(self.store, self.clock), agent("a/n1"))

    async def save(self, step, uid="first", epoch=1, *, whole=True):
        placed = placements.put(JOB, epoch, uid, ["sites/a/nodes/n1"])
        await self.store.commit(Put(keys.of_name(keys.JOB_FENCES, JOB), str(epoch).encode()), placed)
        location = f"{job_folder('/c', JOB, uid)}/{names.checkpoint_id(step, epoch, 0)}"
        begun = await self.service.BeginCheckpoint(
            pb.BeginCheckpointRequest(job=JOB, epoch=epoch, step=step, world_size=1, location=location, job_uid=uid),
            None,
        )
        if whole:
            piece = pb.Piece(path="__0_0.distcp", size_bytes=1, checksum="xxh3-128:0")
            await self.service.ReportPieces(
                pb.ReportPiecesRequest(checkpoint=begun.name, epoch=epoch, complete_ranks=[0], pieces=[piece]), None
            )
        return begun.name

    async def rounds(self, count=1):
        """Each by a collector that has just become leader."""
        for _ in range(count):
            async with elect(self.store, "checkpoint", "me") as leader:
                await Collector(self.store, self.scheduler, self.clock, GRACE_S, leader).round()

    async def states(self):
        operator = Acting(Checkpoints(self.store), Identity("operator", "olga"))
        listed = await operator.ListCheckpoints(pb.ListCheckpointsRequest(parent=JOB), None)
        return {c.name: pb.CheckpointState.Name(c.state).removeprefix("CHECKPOINT_STATE_") for c in listed.checkpoints}

    async def later(self, seconds):
        await self.clock.advance(seconds)


@pytest.fixture
async def world():
    made = World()
    yield made
    await made.store.close()


async def test_checkpoints_of_a_deleted_job_end_after_the_grace_whoever_leads(world):
    whole, half = await world.save(10), await world.save(20, whole=False)
    await world.rounds(2)
    del world.scheduler.uids[JOB]
    await world.rounds()
    await world.later(GRACE_S - 1)
    await world.rounds()
    assert await world.states() == {whole: "COMMITTED", half: "WRITING"}
    await world.later(2)
    await world.rounds()
    assert await world.states() == {whole: "EXPIRED", half: "ABANDONED"}
    listed = await world.service.ListDeletable(pb.ListDeletableRequest(), None)
    assert {c.name for c in listed.checkpoints} == {whole, half}


async def test_a_new_job_of_the_name_keeps_its_own_and_the_old_ones_go(world):
    old = await world.save(10)
    world.scheduler.uids[JOB] = "second"
    new = await world.save(5, uid="second", epoch=2)
    await world.rounds()
    await world.later(GRACE_S + 1)
    await world.rounds()
    assert await world.states() == {old: "EXPIRED", new: "COMMITTED"}


async def test_a_scheduler_that_does_not_answer_says_nothing_about_its_jobs(world):
    name = await world.save(10)
    world.scheduler.error = Unavailable("away")
    await world.rounds()
    await world.later(GRACE_S + 1)
    await world.rounds()
    assert await world.states() == {name: "COMMITTED"}


async def test_a_job_that_is_seen_again_keeps_its_checkpoints(world):
    name = await world.save(10)
    found = world.scheduler.uids.pop(JOB)
    await world.rounds()
    world.scheduler.uids[JOB] = found
    await world.rounds()
    del world.scheduler.uids[JOB]
    await world.later(GRACE_S + 1)
    await world.rounds()
    assert await world.states() == {name: "COMMITTED"}, "the grace begins anew"


async def test_a_job_whose_record_cannot_be_read_is_not_gone(world):
    """Its scheduler shows it, and does not know what it is."""
    saved = await world.save(10)
    world.scheduler.uids[JOB] = ""
    await world.rounds()
    await world.later(2 * GRACE_S)
    await world.rounds()
    assert await world.states() == {saved: "COMMITTED"}


async def test_a_checkpoint_whose_record_cannot_be_read_holds_up_no_other(world):
    await world.store.commit(Put(keys.of_name(keys.CHECKPOINTS, f"{JOB}/checkpoints/s1-e1-n000000"), b"\xff broken"))
    saved = await world.save(10)
    del world.scheduler.uids[JOB]
    await world.rounds()
    await world.later(2 * GRACE_S)
    await world.rounds()
    assert (await world.states())[saved] == "EXPIRED"
