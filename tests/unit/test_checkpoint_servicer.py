"""The checkpoint service over the memory store: what commits, what is refused, what may be deleted."""

import pytest

from tests.support.acting import Acting, agent
from whaleflux import names
from whaleflux.checkpoint_storage import job_folder
from whaleflux.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from whaleflux.rpc.auth import Identity
from whaleflux.store import keys, placements
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
    return Acting(Checkpoints(store), agent("a/n1"))


async def fence(store, epoch, uid="uid"):
    """The job's next attempt is placed on one node."""
    placed = placements.put(JOB, epoch, uid, ["sites/a/nodes/n1"])
    await store.commit(Put(keys.of_name(keys.JOB_FENCES, JOB), str(epoch).encode()), placed)


def begin(step, epoch=1, **more):
    known = {"job": JOB, "epoch": epoch, "step": step, "world_size": 2, "job_uid": "uid", **more}
    id_ = names.checkpoint_id(step, epoch, known.get("serial", 0)) if step >= 0 else "-"
    return pb.BeginCheckpointRequest(
        **{"location": f"{job_folder('/c', known['job'], known['job_uid'])}/{id_}", **known}
    )


def report(name, *ranks, epoch=1, path="__{}_0.distcp"):
    pieces = [pb.Piece(rank=r, path=path.format(r), size_bytes=10, checksum="xxh3-128:0", tier="shared") for r in ranks]
    return pb.ReportPiecesRequest(checkpoint=name, epoch=epoch, complete_ranks=ranks, pieces=pieces)


def proof(checkpoint, rank=0, **change):
    """What a rank read that differs from what was saved."""
    return pb.Piece(**{"path": f"__{rank}_0.distcp", "size_bytes": 10, "checksum": "xxh3-128:1", **change})


def lost(checkpoint, epoch=1, **change):
    return pb.MarkLostRequest(name=checkpoint.name, epoch=epoch, message="checksum", read=proof(checkpoint, **change))


def restorable(**more):
    return pb.FindRestorableRequest(job=JOB, **more)


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
    with pytest.raises(Aborted) as refused:
        await service.ReportPieces(report(made.name, 1), None)
    assert refused.value.reason == "EPOCH_FENCED"
    with pytest.raises(Aborted):
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
    with pytest.raises(Aborted):
        await service.ReportPieces(report(made.name, 0, 1), None)
    assert (await service.GetCheckpoint(pb.GetCheckpointRequest(name=made.name), None)).state == 1


async def test_an_attempt_that_is_over_expires_nothing(service, store):
    """The fence moves after the commit and before what it replaces is expired: the next attempt may be restoring that."""
    before = await committed(service, 10, keep=1)
    real_commit = store.commit

    async def fence_after_commit(*writes, when=()):
        revision = await real_commit(*writes, when=when)
        if any(isinstance(w, Put) and pb.Checkpoint.FromString(w.value).HasField("commit_time") for w in writes):
            await real_commit(Put(keys.of_name(keys.JOB_FENCES, JOB), b"2"))
        return revision

    made = await service.BeginCheckpoint(begin(20, keep=1), None)
    await service.ReportPieces(report(made.name, 0), None)
    store.commit = fence_after_commit
    await service.ReportPieces(report(made.name, 1), None)
    left = (await service.ListCheckpoints(pb.ListCheckpointsRequest(parent=JOB), None)).checkpoints
    assert {c.name: c.state for c in left} == dict.fromkeys((before.name, made.name), pb.CHECKPOINT_STATE_COMMITTED), (
        "the next attempt's own commit expires it"
    )


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
    await service.MarkLost(lost(newer), None)
    await service.MarkLost(lost(newer), None)
    assert (await service.FindRestorable(restorable(), None)).name == older.name
    unfinished = await service.BeginCheckpoint(begin(30), None)
    with pytest.raises(FailedPrecondition):
        await service.MarkLost(lost(unfinished), None)


@pytest.mark.parametrize(
    "change",
    [
        {"checksum": "xxh3-128:0"},  # what was saved
        {"checksum": ""},  # nothing was read
        {"path": "another.distcp"},
        {"path": ""},
    ],
)
async def test_what_proves_nothing_takes_no_checkpoint_away(service, change):
    made = await committed(service, 10)
    with pytest.raises(InvalidArgument):
        await service.MarkLost(lost(made, **change), None)
    assert (await service.FindRestorable(restorable(), None)).state == pb.CHECKPOINT_STATE_COMMITTED


async def test_an_old_attempt_cannot_take_a_checkpoint_away_or_give_one_back(service, store):
    made, damaged = await committed(service, 10), await committed(service, 20)
    await service.MarkLost(lost(damaged), None)
    await fence(store, 2)
    for call in (
        service.MarkLost(lost(made), None),
        service.MarkIntact(pb.MarkIntactRequest(name=damaged.name, epoch=1), None),
    ):
        with pytest.raises(Aborted) as refused:
            await call
        assert refused.value.reason == "EPOCH_FENCED"
    assert (await service.FindRestorable(restorable(), None)).name == made.name


async def test_a_lost_checkpoint_that_is_read_intact_comes_back(service):
    older, newer = await committed(service, 10), await committed(service, 20)
    await service.MarkLost(lost(newer), None)
    for _ in range(2):
        found = await service.MarkIntact(pb.MarkIntactRequest(name=newer.name, epoch=1), None)
        assert found.state == pb.CHECKPOINT_STATE_COMMITTED
    assert (await service.FindRestorable(restorable(), None)).name == newer.name
    unfinished = await service.BeginCheckpoint(begin(30), None)
    with pytest.raises(FailedPrecondition):
        await service.MarkIntact(pb.MarkIntactRequest(name=unfinished.name, epoch=1), None)
    assert older.state == pb.CHECKPOINT_STATE_COMMITTED


async def test_a_lost_one_is_offered_when_nothing_else_is_left(service):
    older, newer = await committed(service, 10), await committed(service, 20)
    await service.MarkLost(lost(newer), None)
    found = await service.FindRestorable(restorable(exclude=[older.name]), None)
    assert (found.name, found.state) == (newer.name, pb.CHECKPOINT_STATE_LOST)


async def test_checkpoints_that_were_all_tried_in_vain_are_not_the_same_as_none(service):
    made = [await committed(service, step) for step in (10, 20)]
    first = await service.FindRestorable(restorable(exclude=[made[1].name]), None)
    assert first.name == made[0].name
    with pytest.raises(FailedPrecondition, match="2 checkpoints were committed, the newest at step 20") as refused:
        await service.FindRestorable(restorable(exclude=[c.name for c in made]), None)
    assert refused.value.reason == "CHECKPOINT_UNREACHABLE"


async def test_a_committed_checkpoint_is_never_begun_again(service):
    made = await committed(service, 10)
    with pytest.raises(AlreadyExists):
        await service.BeginCheckpoint(begin(10), None)
    again = await committed(service, 10, serial=1)
    assert again.name != made.name
    assert (await service.FindRestorable(restorable(), None)).name == again.name
    assert (await service.GetCheckpoint(pb.GetCheckpointRequest(name=made.name), None)).location == made.location


async def test_a_failed_save_is_given_up_and_a_committed_one_is_not(service):
    made = await service.BeginCheckpoint(begin(10), None)
    await service.ReportPieces(report(made.name, 0), None)
    for _ in range(2):
        gone = await service.AbandonCheckpoint(
            pb.AbandonCheckpointRequest(name=made.name, epoch=1, message="full"), None
        )
        assert (gone.state, gone.message) == (pb.CHECKPOINT_STATE_ABANDONED, "full")
    late = await service.ReportPieces(report(made.name, 1), None)
    assert late.checkpoint.state == pb.CHECKPOINT_STATE_ABANDONED
    kept = await committed(service, 20)
    found = await service.AbandonCheckpoint(pb.AbandonCheckpointRequest(name=kept.name, epoch=1), None)
    assert found.state == pb.CHECKPOINT_STATE_COMMITTED


async def test_a_new_job_of_the_same_name_does_not_see_the_old_ones(service, store):
    await fence(store, 1, "first")
    old = await committed(service, 50, job_uid="first")
    await fence(store, 2, "second")
    with pytest.raises(NotFound):
        await service.FindRestorable(restorable(job_uid="second"), None)
    new = await committed(service, 10, epoch=2, job_uid="second")
    assert (await service.FindRestorable(restorable(job_uid="second"), None)).name == new.name
    operator = Acting(Checkpoints(store), Identity("operator", "olga"))
    assert (await operator.FindRestorable(restorable(job_uid="first"), None)).name == old.name


async def test_what_may_be_deleted_is_listed_until_it_is_confirmed(service):
    made = [await committed(service, step, keep=1) for step in (10, 20, 30)]
    failed = await service.BeginCheckpoint(begin(40), None)
    await service.AbandonCheckpoint(pb.AbandonCheckpointRequest(name=failed.name, epoch=1), None)
    listed = await service.ListDeletable(pb.ListDeletableRequest(), None)
    gone = [made[0].name, made[1].name, failed.name]
    assert [c.name for c in listed.checkpoints] == gone
    await service.ConfirmDeleted(pb.ConfirmDeletedRequest(names=gone[:2]), None)
    left = await service.ListDeletable(pb.ListDeletableRequest(), None)
    assert [c.name for c in left.checkpoints] == gone[2:]


@pytest.mark.parametrize("when", ["before", "among"])
async def test_a_report_beside_the_deletion_leaves_no_pieces_behind(service, store, when):
    """The report was taken while the checkpoint was written; it reaches the store before the record goes, or among the deletions."""
    made = await service.BeginCheckpoint(begin(10), None)
    await service.ReportPieces(report(made.name, 0), None)
    real_commit, pieces = store.commit, keys.CHECKPOINT_PIECES

    async def deleted_meanwhile(*writes, when=()):
        store.commit = real_commit
        await service.AbandonCheckpoint(pb.AbandonCheckpointRequest(name=made.name, epoch=1), None)
        await service.ConfirmDeleted(pb.ConfirmDeletedRequest(names=[made.name]), None)
        return await real_commit(*writes, when=when)

    async def reported_meanwhile(*writes, when=()):
        done = await real_commit(*writes, when=when)
        if any(isinstance(w, Delete) and w.key.startswith(pieces) for w in writes):
            store.commit = real_commit
            late = f"{pieces}default/train/{made.name.split('/')[-1]}/000001"
            await real_commit(Put(late, b""))
        return done

    if when == "before":
        store.commit = deleted_meanwhile
        with pytest.raises(NotFound):
            await service.ReportPieces(report(made.name, 1), None)
    else:
        await service.AbandonCheckpoint(pb.AbandonCheckpointRequest(name=made.name, epoch=1), None)
        store.commit = reported_meanwhile
        with pytest.raises(Aborted):
            await service.ConfirmDeleted(pb.ConfirmDeletedRequest(names=[made.name]), None)
        await service.ConfirmDeleted(pb.ConfirmDeletedRequest(names=[made.name]), None)
    for prefix in (keys.CHECKPOINTS, pieces):
        assert (await store.list(prefix)).entries == ()


async def test_a_job_without_a_fence_cannot_save(service, store):
    await store.commit(Delete(keys.of_name(keys.JOB_FENCES, JOB)))
    with pytest.raises(Aborted):
        await service.BeginCheckpoint(begin(1), None)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"step": -1}, "step"),
        ({"epoch": 0}, "epoch"),
        ({"serial": 10**6}, "serial"),
        ({"world_size": 10**9}, "world_size"),
        ({"location": ""}, "location"),
        ({"data_position": b"x" * 70_000}, "data_position"),
        ({"job": "jobs/x"}, "job"),
    ],
)
async def test_bad_begins_name_the_field_and_change_nothing(service, store, change, field):
    before = (await store.list(keys.ROOT)).revision
    with pytest.raises(InvalidArgument) as refused:
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
    with pytest.raises(InvalidArgument):
        await service.ReportPieces(report(made.name, 0, path=path), None)


async def test_a_checkpoint_of_a_newer_version_is_neither_used_nor_given_up_nor_in_the_way(service, store):
    await committed(service, 10)
    made = await service.BeginCheckpoint(begin(20), None)
    entry = await store.get(keys.of_name(keys.CHECKPOINTS, made.name))
    newer = pb.Checkpoint.FromString(entry.value)
    newer.state = 99
    await store.commit(Put(entry.key, newer.SerializeToString()))
    found = await service.FindRestorable(pb.FindRestorableRequest(job=JOB), None)
    assert found.step == 10
    assert (await committed(service, 30, keep=1)).state == pb.CHECKPOINT_STATE_COMMITTED
    listed = await service.ListCheckpoints(pb.ListCheckpointsRequest(parent=JOB), None)
    assert {c.step: c.state for c in listed.checkpoints}[20] == 99


async def test_a_job_with_only_checkpoints_of_a_newer_version_does_not_begin_at_step_0(service, store):
    made = await committed(service, 10)
    entry = await store.get(keys.of_name(keys.CHECKPOINTS, made.name))
    newer = pb.Checkpoint.FromString(entry.value)
    newer.state = 99
    await store.commit(Put(entry.key, newer.SerializeToString()))
    with pytest.raises(FailedPrecondition, match="newer version"):
        await service.FindRestorable(pb.FindRestorableRequest(job=JOB), None)


async def test_a_later_job_of_the_same_name_keeps_what_it_commits(service, store):
    await fence(store, 1, "before")
    for step in (1000, 1010, 1020):
        await committed(service, step, keep=2, job_uid="before")
    await fence(store, 2, "now")
    made = await committed(service, 10, epoch=2, keep=2, job_uid="now")
    found = await service.FindRestorable(restorable(job_uid="now"), None)
    assert found.name == made.name


async def test_an_attempt_that_went_back_keeps_what_it_commits_beside_what_it_could_not_read(service, store):
    before = [(await committed(service, step, keep=2)).name for step in (90, 100)]
    await fence(store, 2)  # its node reached neither, and goes on from an earlier one
    for step in (50, 60, 70):
        await committed(service, step, epoch=2, keep=2)
    tried = [before[1]]
    found = []
    for _ in range(2):
        found.append(await service.FindRestorable(restorable(exclude=tried), None))
        tried.append(found[-1].name)
    assert [(one.step, one.epoch) for one in found] == [(70, 2), (60, 2)]
    assert (await service.FindRestorable(restorable(), None)).name == before[1]


async def test_a_report_that_is_repeated_for_fewer_ranks_takes_nothing_back(service):
    """An agent that died while it struck off what was delivered says the rest of it again."""
    made = await service.BeginCheckpoint(begin(10, world_size=3), None)
    await service.ReportPieces(report(made.name, 0, 1), None)
    await service.ReportPieces(report(made.name, 0), None)
    done = (await service.ReportPieces(report(made.name, 2), None)).checkpoint
    assert (done.state, done.size_bytes, len(done.pieces)) == (pb.CHECKPOINT_STATE_COMMITTED, 30, 0)
    found = await service.FindRestorable(restorable(), None)
    assert [piece.rank for piece in found.pieces] == [0, 1, 2]


async def test_a_record_that_cannot_be_read_is_no_sign_that_nothing_was_saved(service, store):
    await store.commit(Put(keys.of_name(keys.CHECKPOINTS, f"{JOB}/checkpoints/s1-e1-n000000"), b"\xff broken"))
    with pytest.raises(FailedPrecondition) as refused:
        await service.FindRestorable(restorable(), None)
    assert refused.value.reason == "RECORD_UNREADABLE"
    made = await committed(service, 10)
    assert (await service.FindRestorable(restorable(), None)).name == made.name


# who can read it


@pytest.mark.parametrize(
    ("said", "files", "settled"),
    [
        (pb.RESHARDING_ANY_SPLIT, (".metadata",), pb.RESHARDING_ANY_SPLIT),
        (pb.RESHARDING_SAME_SPLIT, (".metadata",), pb.RESHARDING_SAME_SPLIT),
        (pb.RESHARDING_SAME_RANKS, (".metadata",), pb.RESHARDING_SAME_RANKS),
        (pb.RESHARDING_UNSPECIFIED, (".metadata",), pb.RESHARDING_UNSPECIFIED),
        (pb.RESHARDING_ANY_SPLIT, (), pb.RESHARDING_SAME_RANKS),
        (pb.RESHARDING_UNSPECIFIED, (), pb.RESHARDING_SAME_RANKS),
        (pb.RESHARDING_ANY_SPLIT, ("old.metadata",), pb.RESHARDING_SAME_RANKS),
    ],
)
async def test_who_can_read_a_checkpoint_is_settled_by_what_was_written(service, said, files, settled):
    made = await service.BeginCheckpoint(begin(10, resharding=said), None)
    reported = report(made.name, 0, 1)
    reported.pieces.extend(pb.Piece(rank=0, path=path, size_bytes=1, checksum="xxh3-128:2") for path in files)
    await service.ReportPieces(reported, None)
    assert (await service.FindRestorable(restorable(), None)).resharding == settled


async def test_what_only_a_newer_program_says_of_its_readers_is_not_known(service):
    made = await service.BeginCheckpoint(begin(10, resharding=99), None)
    reported = report(made.name, 0, 1)
    reported.pieces.add(rank=0, path=".metadata", size_bytes=1, checksum="xxh3-128:2")
    await service.ReportPieces(reported, None)
    assert (await service.FindRestorable(restorable(), None)).resharding == pb.RESHARDING_UNSPECIFIED
