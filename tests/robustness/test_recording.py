"""What is recorded of the traffic can be held against the store: nothing is acknowledged after the store was read."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from tests.robustness.history import History
from tests.robustness.recording import Traffic
from whaleflux.v1 import scheduler_pb2


class SlowScheduler:
    """Answers a submission when the test says so."""

    def __init__(self) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    async def CreateJob(self, request: scheduler_pb2.CreateJobRequest, timeout: float) -> scheduler_pb2.Job:
        self.asked.set()
        await self.answer.wait()
        return request.job


async def test_who_stops_submitting_waits_for_what_is_under_way():
    scheduler, history = SlowScheduler(), History()
    traffic = Traffic(SimpleNamespace(scheduler=scheduler), history, "j")
    submitting = asyncio.create_task(traffic.keep_submitting(every_s=0.0))
    await scheduler.asked.wait()
    stopping = asyncio.create_task(traffic.stop_submitting())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not stopping.done()
    scheduler.answer.set()
    await stopping
    assert [made.name for made in history.submissions if made.acknowledged] == ["queues/default/jobs/j-1"]
    await submitting
    assert len(history.submissions) == 1
