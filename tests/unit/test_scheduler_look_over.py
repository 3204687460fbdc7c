"""Those who wait are tried again within minutes even where what should have woken them was missed."""

import pytest

from tests.support.scheduler_world import World, node
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.plan import Plan
from whaleflux_scheduler.reconciler import LOOK_OVER_S


@pytest.fixture
def deaf(monkeypatch):
    """A fault: plans hear of nothing that comes free."""
    monkeypatch.setattr(Plan, "_take_in_gains", lambda plan: plan._fleet.holdings.eased.clear())
    monkeypatch.setattr(Plan, "_slack_rose", lambda plan: None)


async def test_who_would_fit_starts_within_a_minute(deaf):
    async with World() as world:
        await world.add(node("s/a"))
        first, second = await world.submit(4), await world.submit(4)
        await world.reaches(first, "RUNNING")
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=first), None)
        await world.reaches(first, "CANCELLED")
        await world.clock.sleep(LOOK_OVER_S * 1.5)
        assert (await world.job(second)).state == pb.JOB_STATE_RUNNING


async def test_who_was_kept_back_by_a_limit_starts_within_a_minute(deaf):
    async with World() as world:
        await world.add(node("s/a"))
        await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="few", queue=pb.Queue(max_gpus=1)), None)
        first, second = await world.submit(1, queue="few"), await world.submit(1, queue="few")
        await world.reaches(first, "RUNNING")
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=first), None)
        await world.reaches(first, "CANCELLED")
        await world.clock.sleep(LOOK_OVER_S * 1.5)
        assert (await world.job(second)).state == pb.JOB_STATE_RUNNING
