"""Checkpoint reports on their way: nothing is lost, nothing fenced is repeated."""

import asyncio

import pytest

from tests.support.virtual_time import LoopClock
from whaleflux import names
from whaleflux.clock import VirtualClock
from whaleflux.errors import Aborted, NotFound, ResourceExhausted, Unavailable
from whaleflux.v1 import checkpoint_pb2
from whaleflux_agent import checkpoint_outbox as outbox_module
from whaleflux_agent.checkpoint_outbox import CheckpointOutbox
from whaleflux_agent.state import StateDir

JOB = "queues/q/jobs/j"
NAME = f"{JOB}/checkpoints/s000000000005-e1-n000000"


class Service:
    """The checkpoint service as the agent's stub; `failures` are raised first."""

    def __init__(self):
        self.failures, self.begun, self.reports, self.deleted = [], [], [], []
        self.deletable, self.order = [], []

    def _fail(self):
        if self.failures:
            raise self.failures.pop(0)

    async def BeginCheckpoint(self, request, timeout):
        self._fail()
        self.begun.append(request)
        self.order.append("begin")
        return checkpoint_pb2.Checkpoint()

    async def ReportPieces(self, request, timeout):
        self._fail()
        self.reports.append(request)
        self.order.append("report")
        deletable, self.deletable = self.deletable, []
        return checkpoint_pb2.ReportPiecesResponse(deletable=deletable)

    async def AbandonCheckpoint(self, request, timeout):
        self._fail()
        self.order.append("abandon")


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


async def delivered(outbox, condition):
    running = asyncio.create_task(outbox.run())
    try:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def files(state):
    return list((state.root / "checkpoint-outbox").iterdir())


async def test_ranks_that_finish_together_are_told_of_in_one_report(service, state):
    outbox = CheckpointOutbox(state, service, LoopClock())
    for rank in range(4):
        await outbox.put(pieces(rank))
    await delivered(outbox, lambda: not len(outbox))
    (report,) = service.reports
    assert list(report.complete_ranks) == [0, 1, 2, 3]
    assert [piece.rank for piece in report.pieces] == [0, 1, 2, 3]
    assert files(state) == []


async def test_what_could_not_be_delivered_is_delivered_by_the_next_agent(service, state):
    first = CheckpointOutbox(state, service, LoopClock())
    await first.put(begin())
    await first.put(pieces(0))
    second = CheckpointOutbox(state, service, LoopClock())
    await second.open()
    service.failures = [Unavailable("away"), Unavailable("away")]
    await delivered(second, lambda: not len(second))
    assert [request.step for request in service.begun] == [5]
    assert [list(report.complete_ranks) for report in service.reports] == [[0]]
    await second.put(pieces(1))
    assert len(files(state)) == 1


async def test_the_announcement_goes_before_the_pieces_and_other_checkpoints_do_not_wait(service, state):
    outbox = CheckpointOutbox(state, service, VirtualClock())
    other = names.checkpoint(JOB, 9, 1, 0)
    await outbox.put(begin())
    await outbox.put(pieces(0))
    await outbox.put(pieces(0, other))
    service.failures = [Unavailable("away")]
    await delivered(outbox, lambda: len(outbox) == 2)
    assert [report.checkpoint for report in service.reports] == [other]


async def test_a_fenced_epoch_is_dropped_and_not_repeated(service, state):
    outbox = CheckpointOutbox(state, service, LoopClock())
    await outbox.put(pieces(0))
    service.failures = [Aborted("epoch 1 is over", reason="EPOCH_FENCED")]
    await delivered(outbox, lambda: not len(outbox))
    assert service.reports == []
    assert files(state) == []


async def test_what_will_never_be_taken_is_dropped_and_what_is_not_taken_now_is_repeated(service, state):
    outbox = CheckpointOutbox(state, service, LoopClock())
    await outbox.put(pieces(0))
    service.failures = [ResourceExhausted("calls too often", retry_after_s=0.1), ResourceExhausted("it is too large")]
    await delivered(outbox, lambda: not len(outbox))
    assert service.failures == []
    assert service.reports == []


async def test_reports_that_are_too_large_together_go_in_parts(service, state):
    outbox = CheckpointOutbox(state, service, LoopClock())
    for rank in range(4):
        await outbox.put(pieces(rank))
    service.failures = [ResourceExhausted("it is too large", reason="REQUEST_TOO_LARGE")]
    await delivered(outbox, lambda: not len(outbox))
    assert [list(report.complete_ranks) for report in service.reports] == [[0, 1], [2, 3]]


async def test_an_unknown_checkpoint_is_waited_for_and_then_given_up(service, state):
    clock = VirtualClock()
    outbox = CheckpointOutbox(state, service, clock)
    await outbox.put(pieces(0))
    service.failures = [NotFound("checkpoint", NAME)] * 100_000
    running = asyncio.create_task(outbox.run())
    await clock.advance(60)
    assert len(outbox) == 1
    for _ in range(400):  # disk writes between the steps are real
        await clock.advance(2)
        await asyncio.sleep(0.001)
        if not len(outbox):
            break
    assert not len(outbox)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_queue_is_bounded(service, state, monkeypatch):
    monkeypatch.setattr(outbox_module, "MOST_WAITING", 2)
    outbox = CheckpointOutbox(state, service, LoopClock())
    await outbox.put(pieces(0))
    await outbox.put(pieces(1))
    with pytest.raises(ResourceExhausted):
        await outbox.put(pieces(2))


async def test_what_may_be_deleted_is_passed_on(service, state):
    service.deletable = [checkpoint_pb2.Checkpoint(name="old", location="/c/old")]
    learnt = []
    outbox = CheckpointOutbox(state, service, LoopClock(), learnt.extend)
    await outbox.put(pieces(0))
    await delivered(outbox, lambda: learnt)
    assert [checkpoint.name for checkpoint in learnt] == ["old"]


async def test_a_save_that_failed_is_given_up_behind_what_was_said_of_it_before(service, state):
    outbox = CheckpointOutbox(state, service, LoopClock())
    await outbox.put(begin())
    await outbox.put(pieces(0))
    await outbox.put(checkpoint_pb2.AbandonCheckpointRequest(name=NAME, epoch=1, message="full"))
    later = CheckpointOutbox(state, service, LoopClock())  # the next agent on this node
    await later.open()
    service.failures = [Unavailable("away")]
    await delivered(later, lambda: not len(later))
    assert service.order == ["begin", "report", "abandon"]
