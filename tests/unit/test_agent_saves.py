"""Checkpoint reports on their way: nothing is lost, nothing fenced is repeated, nothing foreign is deleted."""

import asyncio

import pytest

from whaleflux.clock import SystemClock, VirtualClock
from whaleflux.errors import Conflict, NotFound, OverLimit, Unavailable
from whaleflux.v1 import checkpoint_pb2
from whaleflux_agent import saves as saves_module
from whaleflux_agent.saves import Saves, checkpoint_id, delete_folder
from whaleflux_agent.state import StateDir

JOB = "queues/q/jobs/j"
NAME = f"{JOB}/checkpoints/s000000000005-e1"


class Service:
    """The checkpoint service as the agent's stub; `failures` are raised first."""

    def __init__(self):
        self.failures, self.begun, self.reports, self.deleted = [], [], [], []
        self.deletable = []

    def _fail(self):
        if self.failures:
            raise self.failures.pop(0)

    async def BeginCheckpoint(self, request, timeout):
        self._fail()
        self.begun.append(request)
        return checkpoint_pb2.Checkpoint()

    async def ReportPieces(self, request, timeout):
        self._fail()
        self.reports.append(request)
        deletable, self.deletable = self.deletable, []
        return checkpoint_pb2.ReportPiecesResponse(deletable=deletable)

    async def ConfirmDeleted(self, request, timeout):
        self._fail()
        self.deleted.extend(request.names)


def pieces(rank, checkpoint=NAME, epoch=1):
    piece = checkpoint_pb2.Piece(rank=rank, path=f"__{rank}_0.distcp", size_bytes=10)
    return checkpoint_pb2.ReportPiecesRequest(checkpoint=checkpoint, epoch=epoch, complete_ranks=[rank], pieces=[piece])


def begin(step=5):
    return checkpoint_pb2.BeginCheckpointRequest(job=JOB, epoch=1, step=step)


@pytest.fixture
def service():
    return Service()


@pytest.fixture
def state(tmp_path):
    folder = StateDir(tmp_path / "state")
    yield folder
    folder.close()


async def delivered(saves, condition):
    running = asyncio.create_task(saves.run())
    try:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def files(state):
    return list((state.root / "saves").iterdir())


async def test_ranks_that_finish_together_are_told_of_in_one_report(service, state):
    saves = Saves(state, service, [], SystemClock())
    for rank in range(4):
        await saves.put(pieces(rank))
    await delivered(saves, lambda: not len(saves))
    (report,) = service.reports
    assert list(report.complete_ranks) == [0, 1, 2, 3]
    assert [piece.rank for piece in report.pieces] == [0, 1, 2, 3]
    assert files(state) == []


async def test_what_could_not_be_delivered_is_delivered_by_the_next_agent(service, state):
    first = Saves(state, service, [], SystemClock())
    await first.put(begin())
    await first.put(pieces(0))
    second = Saves(state, service, [], SystemClock())
    await second.open()
    service.failures = [Unavailable("away"), Unavailable("away")]
    await delivered(second, lambda: not len(second))
    assert [request.step for request in service.begun] == [5]
    assert [list(report.complete_ranks) for report in service.reports] == [[0]]
    await second.put(pieces(1))
    assert len(files(state)) == 1


async def test_the_announcement_goes_before_the_pieces_and_other_checkpoints_do_not_wait(service, state):
    saves = Saves(state, service, [], VirtualClock())
    other = f"{JOB}/checkpoints/{checkpoint_id(9, 1)}"
    await saves.put(begin())
    await saves.put(pieces(0))
    await saves.put(pieces(0, other))
    service.failures = [Unavailable("away")]
    await delivered(saves, lambda: len(saves) == 2)
    assert [report.checkpoint for report in service.reports] == [other]


async def test_a_fenced_epoch_is_dropped_and_not_repeated(service, state):
    saves = Saves(state, service, [], SystemClock())
    await saves.put(pieces(0))
    service.failures = [Conflict("epoch 1 is over", reason="EPOCH_FENCED")]
    await delivered(saves, lambda: not len(saves))
    assert service.reports == []
    assert files(state) == []


async def test_an_unknown_checkpoint_is_waited_for_and_then_given_up(service, state):
    clock = VirtualClock()
    saves = Saves(state, service, [], clock)
    await saves.put(pieces(0))
    service.failures = [NotFound("checkpoint", NAME)] * 100_000
    running = asyncio.create_task(saves.run())
    await clock.advance(60)
    assert len(saves) == 1
    for _ in range(400):  # disk writes between the steps are real
        await clock.advance(2)
        await asyncio.sleep(0.001)
        if not len(saves):
            break
    assert not len(saves)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_queue_is_bounded(service, state, monkeypatch):
    monkeypatch.setattr(saves_module, "_MOST_WAITING", 2)
    saves = Saves(state, service, [], SystemClock())
    await saves.put(pieces(0))
    await saves.put(pieces(1))
    with pytest.raises(OverLimit):
        await saves.put(pieces(2))


async def test_replaced_checkpoints_are_deleted_and_confirmed(service, state, tmp_path):
    root = tmp_path / "ckpt"
    old = root / "j" / "s000000000001-e1"
    old.mkdir(parents=True)
    (old / "__0_0.distcp").write_bytes(b"x")
    service.deletable = [checkpoint_pb2.Checkpoint(name="old", location=str(old))]
    saves = Saves(state, service, [root], SystemClock())
    await saves.put(pieces(0))
    await delivered(saves, lambda: service.deleted)
    assert service.deleted == ["old"]
    assert not old.exists()
    assert root.exists()


@pytest.mark.parametrize("name", ["s1-e1", "train", "s000000000001-e1/..", ".", "s000000000001-e1x"])
def test_only_what_is_named_like_a_checkpoint_is_deleted(tmp_path, name):
    (tmp_path / "root" / "s000000000001-e1").mkdir(parents=True)
    (tmp_path / "root" / "train").mkdir()
    assert not delete_folder(tmp_path / "root" / name, [tmp_path / "root"])
    assert (tmp_path / "root" / "s000000000001-e1").exists()


def test_nothing_outside_of_the_roots_is_deleted(tmp_path):
    outside = tmp_path / "elsewhere" / "s000000000001-e1"
    outside.mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "s000000000002-e1").symlink_to(outside)
    assert not delete_folder(outside, [tmp_path / "root"])
    assert not delete_folder(tmp_path / "root" / "s000000000002-e1", [tmp_path / "root"])
    assert outside.exists()


def test_a_folder_that_is_gone_already_counts_as_deleted(tmp_path):
    (tmp_path / "root").mkdir()
    assert delete_folder(tmp_path / "root" / "s000000000001-e1", [tmp_path / "root"])
