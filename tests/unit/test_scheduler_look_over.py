"""Those who wait are tried again within minutes even where what should have woken them was missed."""

import pytest

from tests.support.scheduler_world import World, node
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.known_fleet import KnownFleet
from whaleflux_scheduler.reconciler import LOOK_OVER_S


@pytest.fixture
def deaf(monkeypatch):
    """A fault: plans hear of nothing that comes free."""
    monkeypatch.setattr(KnownFleet, "take_gains", lambda *_: ())


async def test_who_would_fit_starts_within_a_minute(deaf):
    async with World() as world:
        await world.add(node("s/a"))
        first, second = await world.submit(4), await world.submit(4)
        await world.reaches(first, "RUNNING")
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=first), None)
        await world.reaches(first, "CANCELLED")
        await world.clock.sleep(LOOK_OVER_S * 1.5)
        assert (await world.job(second)).state == pb.JOB_STATE_RUNNING
