"""The checkpoint service over the memory store: what commits, what is refused, what may be deleted."""

import pytest

from whaleflux.errors import Conflict, Invalid, NotFound, WrongState
from whaleflux.store import keys
from whaleflux.store.api import Delete, Put
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux_checkpoint.servicer import Checkpoints

JOB = "queues/default/jobs/train"


@pytest.fixture
async def store():
    store = MemoryStore()
    await fence(store, 1)
    yield store
    await store.close()


@pytest.fixture
def service(store):
    return Checkpoints(store)


async def fence(store, epoch):
    await store.commit(Put(keys.of_name(keys.JOB_FENCES, JOB), str(epoch).encode()))


def begin(step, epoch=1, **more):
    return pb.BeginCheckpointRequest(
        **{"job": JOB, "epoch": epoch, "step": step, "world_size": 2, "location": f"/c/{step}", **more}
    )


def report(name, *ranks, epoch=1, path="__{}_0.distcp"):
    pieces = [pb.Piece(rank=r, path=path.format(r), size_bytes=10, checksum="xxh3-128:0", tier="shared") for r in ranks]
    return pb.ReportPiecesRequest(checkpoint=name, epoch=epoch, complete_ranks=ranks, pieces=pieces)


async def committed(service, step, epoch=1, **more):
    made = await service.BeginCheckpoint(begin(step, epoch, **more), None)
    return (await service.ReportPieces(report(made.name, 0, 1, epoch=epoch), None)).checkpoint


async def test_is_restorable_only_when_every_rank_has_reported(service):
    made = await service.BeginCheckpoint(begin(10), None)
    half = await service.ReportPieces(report(made.name, 0), None)
    assert half.checkpoint.state == pb.CHECKPOINT_STATE_WRITING
    with pytest.raises(NotFound):
        await service.FindRestorable(pb.FindRestorableRequest(job=JOB), None)
    whole = await service.ReportPieces(report(made.name, 1), None)
    assert whole.checkpoint.state == pb.CHECKPOINT_STATE_COMMITTED
    found = await service.FindRestorable(pb.FindRestorableRequest(job=JOB), None)
    assert (found.name, found.size_bytes, [p.rank for p in found.pieces]) == (made.name, 20, [0, 1])


async def test_begin_and_report_may_be_repeated(service):
    first = await service.BeginCheckpoint(begin(10), None)
    again = await service.BeginCheckpoint(begin(10), None)
    assert first == again
    await service.ReportPieces(report(first.name, 0), None)
    await service.ReportPieces(report(first.name, 0), None)
    done = await service.ReportPieces(report(first.name, 1), None)
    repeated = await service.ReportPieces(report(first.name, 1), None)
    assert done.checkpoint.state == repeated.checkpoint.state == pb.CHECKPOINT_STATE_COMMITTED


async def test_an_old_attempt_can_neither_begin_nor_commit(service, store):
    made = await service.BeginCheckpoint(begin(10), None)
    await service.ReportPieces(report(made.name, 0), None)
    await fence(store, 2)
    with pytest.raises(Conflict) as refused:
        await service.ReportPieces(report(made.name, 1), None)
    assert refused.value.reason == "EPOCH_FENCED"
    with pytest.raises(Conflict):
        await service.BeginCheckpoint(begin(20), None)
    with pytest.raises(NotFound):
        await service.FindRestorable(pb.FindRestorableRequest(job=JOB), None)


async def test_the_fence_is_compared_in_the_transaction_that_commits(service, store):
    """The fence moves after the report was taken and before the commit: the manifest must not become restorable."""
    made = await service.BeginCheckpoint(begin(10), None)
    real_commit = store.commit

    async def commit_after_fence(*writes, when=()):
        if any(isinstance(w, Put) and w.key.startswith(keys.CHECKPOINTS) for w in writes):
            await real_commit(Put(keys.of_name(keys.JOB_FENCES, JOB), b"2"))
        return await real_commit(*writes, when=when)

    store.commit = commit_after_fence
    with pytest.raises(Conflict):
        await service.ReportPieces(report(made.name, 0, 1), None)
    assert (await service.GetCheckpoint(pb.GetCheckpointRequest(name=made.name), None)).state == 1


async def test_keeps_the_newest_and_deletes_in_two_steps(service):
    names = [(await committed(service, step, keep=2)).name for step in (10, 20, 30)]
    made = await service.BeginCheckpoint(begin(40, keep=2), None)
    answer = await service.ReportPieces(report(made.name, 0, 1), None)
    assert [c.name for c in answer.deletable] == names[:2]
    await service.ConfirmDeleted(pb.ConfirmDeletedRequest(names=[*names, "queues/a/jobs/b/checkpoints/s0-e1"]), None)
    left = await service.ListCheckpoints(pb.ListCheckpointsRequest(parent=JOB), None)
    assert [c.name for c in left.checkpoints] == [made.name, names[2]], "what is restorable cannot be confirmed away"


async def test_newest_step_wins_and_of_two_attempts_the_later(service, store):
    await committed(service, 20)
    await committed(service, 30)
    await fence(store, 2)
    later = await committed(service, 30, epoch=2)
    found = await service.FindRestorable(pb.FindRestorableRequest(job=JOB), None)
    assert found.name == later.name


async def test_a_damaged_checkpoint_is_not_offered_again(service):
    older, newer = await committed(service, 10), await committed(service, 20)
    await service.MarkLost(pb.MarkLostRequest(name=newer.name, message="checksum"), None)
    await service.MarkLost(pb.MarkLostRequest(name=newer.name, message="checksum"), None)
    assert (await service.FindRestorable(pb.FindRestorableRequest(job=JOB), None)).name == older.name
    unfinished = await service.BeginCheckpoint(begin(30), None)
    with pytest.raises(WrongState):
        await service.MarkLost(pb.MarkLostRequest(name=unfinished.name), None)


async def test_a_job_without_a_fence_cannot_save(service, store):
    await store.commit(Delete(keys.of_name(keys.JOB_FENCES, JOB)))
    with pytest.raises(Conflict):
        await service.BeginCheckpoint(begin(1), None)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"step": -1}, "step"),
        ({"epoch": 0}, "epoch"),
        ({"world_size": 10**9}, "world_size"),
        ({"location": ""}, "location"),
        ({"data_position": b"x" * 70_000}, "data_position"),
        ({"job": "jobs/x"}, "job"),
    ],
)
async def test_bad_begins_name_the_field_and_change_nothing(service, store, change, field):
    before = (await store.list(keys.ROOT)).revision
    with pytest.raises(Invalid) as refused:
        await service.BeginCheckpoint(
            begin(1, **{k: v for k, v in change.items() if k not in {"step", "epoch"}})
            if not {"step", "epoch"} & change.keys()
            else begin(**{"step": 1, **change}),
            None,
        )
    assert refused.value.violations[0].field == field
    assert (await store.list(keys.ROOT)).revision == before


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "", "x" * 2000])
async def test_pieces_outside_of_the_location_are_refused(service, path):
    made = await service.BeginCheckpoint(begin(1), None)
    with pytest.raises(Invalid):
        await service.ReportPieces(report(made.name, 0, path=path), None)
