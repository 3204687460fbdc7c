"""What a hostile agent tries at the checkpoint service with its own, valid certificate: b/n2 against a job that runs on a/n1."""

import pytest

from tests.support.acting import Acting, agent
from whaleflux import names
from whaleflux.checkpoint_storage import job_folder
from whaleflux.errors import Aborted, InvalidArgument, NotFound, PermissionDenied
from whaleflux.rpc.auth import Identity
from whaleflux.store import keys, placements
from whaleflux.store.api import Delete, Put
from whaleflux.store.memory import MemoryStore
from whaleflux.trust.ownership import Access
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux_checkpoint.servicer import Checkpoints

JOB, OTHER = "queues/default/jobs/train", "queues/default/jobs/eve"


class World:
    """A checkpoint service as its own agent (`own`), the hostile one (`eve`) and a neighbour (`near`) reach it."""

    def __init__(self):
        self.store, self.members = MemoryStore(), frozenset()
        service = Checkpoints(self.store, queue_access=lambda queue: Access(self.members))
        self.own, self.near = Acting(service, agent("a/n1")), Acting(service, agent("a/n9"))
        self.eve, self.ann = Acting(service, agent("b/n2")), Acting(service, Identity("user", "ann"))

    async def place(self, job, epoch, *nodes, location="", uid="uid"):
        placed = placements.put(job, epoch, uid, nodes, location)
        await self.store.commit(Put(keys.of_name(keys.JOB_FENCES, job), str(epoch).encode()), placed)

    async def saved(self, step, epoch=1, keep=0):
        begun = await self.own.BeginCheckpoint(begin(JOB, step, epoch, keep=keep))
        return (await self.own.ReportPieces(report(begun.name, epoch))).checkpoint

    async def revision(self):
        return (await self.store.list(keys.ROOT)).revision


@pytest.fixture
async def world():
    made = World()
    await made.place(JOB, 1, "sites/a/nodes/n1")
    await made.place(OTHER, 1, "sites/b/nodes/n2")
    yield made
    await made.store.close()


def begin(job, step, epoch=1, **more):
    location = f"{job_folder('/c', job, 'uid')}/{names.checkpoint_id(step, epoch, 0)}"
    known = {"job": job, "epoch": epoch, "step": step, "world_size": 1, "job_uid": "uid", "location": location}
    return pb.BeginCheckpointRequest(**{**known, **more})


def report(checkpoint, epoch=1):
    piece = pb.Piece(path="__0_0.distcp", size_bytes=1, checksum="xxh3-128:0")
    return pb.ReportPiecesRequest(checkpoint=checkpoint, epoch=epoch, complete_ranks=[0], pieces=[piece])


def read(checkpoint):
    return pb.Piece(path="__0_0.distcp", size_bytes=1, checksum="xxh3-128:1")


ATTACKS = {
    "begin": lambda saved, begun: ("BeginCheckpoint", begin(JOB, 99)),
    "begin in the next epoch": lambda saved, begun: ("BeginCheckpoint", begin(JOB, 99, 2)),
    "report": lambda saved, begun: ("ReportPieces", report(begun.name)),
    "abandon": lambda saved, begun: ("AbandonCheckpoint", pb.AbandonCheckpointRequest(name=begun.name, epoch=1)),
    "mark lost": lambda saved, begun: ("MarkLost", pb.MarkLostRequest(name=saved.name, epoch=1, read=read(saved))),
    "mark intact": lambda saved, begun: ("MarkIntact", pb.MarkIntactRequest(name=saved.name, epoch=1)),
    "get": lambda saved, begun: ("GetCheckpoint", pb.GetCheckpointRequest(name=saved.name)),
    "list": lambda saved, begun: ("ListCheckpoints", pb.ListCheckpointsRequest(parent=JOB)),
    "list all": lambda saved, begun: ("ListCheckpoints", pb.ListCheckpointsRequest(parent="queues/-/jobs/-")),
    "find": lambda saved, begun: ("FindRestorable", pb.FindRestorableRequest(job=JOB)),
    "confirm": lambda saved, begun: ("ConfirmDeleted", pb.ConfirmDeletedRequest(names=[saved.name])),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_an_agent_without_a_task_of_the_job_does_nothing_to_its_checkpoints(world, attack):
    saved = await world.saved(10)
    begun = await world.own.BeginCheckpoint(begin(JOB, 20))
    before = await world.revision()
    method, request = ATTACKS[attack](saved, begun)
    with pytest.raises(PermissionDenied) as refused:
        await getattr(world.eve, method)(request)
    assert refused.value.reason == "NOT_OWN_NODE"
    assert await world.revision() == before


async def test_the_job_s_own_agent_does_all_of_it(world):
    saved = await world.saved(10)
    begun = await world.own.BeginCheckpoint(begin(JOB, 20))
    for attack in ATTACKS.keys() - {"begin in the next epoch", "list all", "mark intact"}:
        method, request = ATTACKS[attack](saved, begun)
        await getattr(world.own, method)(request)


@pytest.mark.parametrize(
    "location",
    [
        "/c/queues%2Fdefault%2Fjobs%2Ftrain.uid/s000000000010-e1-n000000",  # another job's
        "/tmp/evil",
        "/c/queues%2Fdefault%2Fjobs%2Feve.uid/s000000000011-e1-n000000",  # another checkpoint's
        "/c/../x/queues%2Fdefault%2Fjobs%2Feve.uid/s000000000010-e1-n000000",
        "c/queues%2Fdefault%2Fjobs%2Feve.uid/s000000000010-e1-n000000",
        "/c/queues%2Fdefault%2Fjobs%2Feve.uid/s000000000010-e1-n000000/",
        "/c/queues%2Fdefault%2Fjobs%2Feve.other/s000000000010-e1-n000000",
    ],
)
async def test_a_checkpoint_lies_in_its_own_job_s_folder_only(world, location):
    before = await world.revision()
    with pytest.raises(InvalidArgument) as refused:
        await world.eve.BeginCheckpoint(begin(OTHER, 10, location=location))
    assert refused.value.violations[0].field == "location"
    assert await world.revision() == before
    await world.eve.BeginCheckpoint(begin(OTHER, 10))


async def test_where_the_job_names_a_folder_its_checkpoints_lie_there(world):
    await world.place(JOB, 2, "sites/a/nodes/n1", location="s3://bucket/runs")
    with pytest.raises(InvalidArgument, match="s3://bucket/runs"):
        await world.own.BeginCheckpoint(begin(JOB, 10, 2))
    there = f"{job_folder('s3://bucket/runs', JOB, 'uid')}/{names.checkpoint_id(10, 2, 0)}"
    assert (await world.own.BeginCheckpoint(begin(JOB, 10, 2, location=there))).location == there


async def test_another_job_s_uid_is_refused(world):
    with pytest.raises(InvalidArgument) as refused:
        await world.own.BeginCheckpoint(begin(JOB, 10, job_uid="eve"))
    assert refused.value.violations[0].field == "job_uid"


async def test_an_agent_of_an_earlier_attempt_writes_no_more_on_any_verb(world):
    saved, lost = await world.saved(10), await world.saved(5)
    await world.own.MarkLost(pb.MarkLostRequest(name=lost.name, epoch=1, read=read(lost)))
    begun = await world.own.BeginCheckpoint(begin(JOB, 20))
    await world.place(JOB, 2, "sites/a/nodes/n9")
    before = await world.revision()
    for attack in ("begin", "report", "abandon", "mark lost", "mark intact"):
        method, request = ATTACKS[attack](lost if attack == "mark intact" else saved, begun)
        with pytest.raises(Aborted) as refused:
            await getattr(world.own, method)(request)
        assert refused.value.reason == "EPOCH_FENCED"
    assert await world.revision() == before
    assert (await world.near.FindRestorable(pb.FindRestorableRequest(job=JOB))).name == saved.name


async def test_what_an_attempt_wrote_is_deleted_by_its_own_site_alone(world):
    old = await world.saved(10, keep=1)
    await world.saved(20, keep=1)
    assert (await world.eve.ListDeletable(pb.ListDeletableRequest())).checkpoints == []
    gone = pb.ConfirmDeletedRequest(names=[old.name])
    with pytest.raises(PermissionDenied):
        await world.eve.ConfirmDeleted(gone)
    assert [c.name for c in (await world.near.ListDeletable(pb.ListDeletableRequest())).checkpoints] == [old.name]
    await world.near.ConfirmDeleted(gone)  # the node that wrote it may be gone for good
    assert (await world.near.ListDeletable(pb.ListDeletableRequest())).checkpoints == []


async def test_a_placement_is_read_once_for_each_attempt_and_a_job_that_was_deleted_has_none(world):
    await world.saved(10)
    reads = []
    get = world.store.get

    async def counted(key):
        reads.append(key)
        return await get(key)

    world.store.get = counted
    begun = await world.own.BeginCheckpoint(begin(JOB, 20))
    await world.own.ReportPieces(report(begun.name))
    assert placements.key_of(JOB) not in reads
    await world.store.commit(Delete(placements.key_of(JOB)))
    with pytest.raises(PermissionDenied):
        await world.near.BeginCheckpoint(begin(JOB, 30))


async def test_a_later_job_of_the_name_gets_at_nothing_that_the_earlier_one_left(world):
    """Names are used again by anybody; the uid tells whose it was."""
    saved = await world.saved(10)
    begun = await world.own.BeginCheckpoint(begin(JOB, 20))
    await world.place(JOB, 2, "sites/b/nodes/n2", uid="of eve")
    before = await world.revision()
    for attack, (method, request) in {
        "report": ("ReportPieces", report(begun.name, 2)),
        "abandon": ("AbandonCheckpoint", pb.AbandonCheckpointRequest(name=begun.name, epoch=2)),
        "mark lost": ("MarkLost", pb.MarkLostRequest(name=saved.name, epoch=2, read=read(saved))),
        "get": ("GetCheckpoint", pb.GetCheckpointRequest(name=saved.name)),
    }.items():
        with pytest.raises(PermissionDenied, match="earlier job"):
            await getattr(world.eve, method)(request)
            pytest.fail(f"{attack} was done")
    assert await world.revision() == before
    assert (await world.eve.ListCheckpoints(pb.ListCheckpointsRequest(parent=JOB))).checkpoints == []
    with pytest.raises(NotFound):
        await world.eve.FindRestorable(pb.FindRestorableRequest(job=JOB, job_uid="uid"))


async def test_people_see_checkpoints_of_queues_that_are_for_them(world):
    saved = await world.saved(10)
    reads = {attack: ATTACKS[attack](saved, saved) for attack in ("get", "find", "list", "list all")}
    for method, request in reads.values():
        assert saved.name in str(await getattr(world.ann, method)(request))
    world.members = frozenset({"users/bob"})
    for attack in ("get", "find"):
        method, request = reads[attack]
        with pytest.raises(NotFound):
            await getattr(world.ann, method)(request)
    for attack in ("list", "list all"):
        method, request = reads[attack]
        assert (await getattr(world.ann, method)(request)).checkpoints == []
