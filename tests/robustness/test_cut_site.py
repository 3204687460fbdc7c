"""A site loses its way to the control plane: its job goes on as it was, and what it saved counts once the way is back.

The agents' own ports still answer here, as on one host they must; that a site which cannot be reached at all is not
fenced is proven under virtual time, in the tests of health_monitor.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tests.robustness import validate
from tests.robustness.training import EVERY, Training
from tests.support.relay import Relay
from tests.support.suite import RunningSuite, ready_nodes, until
from whaleflux.demo.fleet import DemoFleet, Machine
from whaleflux.v1 import scheduler_pb2

pytestmark = [pytest.mark.robustness, pytest.mark.timeout(300)]

ISLAND = (Machine("island", "a", "rtx4090x1"), Machine("island", "b", "rtx4090x1"))
CUT_S = 8.0  # longer than the silence after which a node that died is fenced
LONGEST_GAP_S = 6.0  # between steps of 50 ms: machines that are busy schedule late


@pytest.fixture
async def island(suite) -> AsyncIterator[Relay]:
    """Two nodes whose only way to the front door is a relay."""
    async with Relay(suite.port("envoy")) as uplink, suite.client() as client:
        fleet = DemoFleet(suite.state / "island", replace(suite.context, server=uplink.endpoint))
        try:
            await fleet.join(client, ISLAND)
            await until(lambda: ready_nodes(client, {m.name for m in ISLAND}), "the island is READY", 60)
            yield uplink
        finally:
            fleet.stop()


async def test_a_site_that_is_cut_off_keeps_its_job(suite: RunningSuite, island: Relay):
    async with suite.client() as client:
        training = await Training.start(suite, client, "cut-off", sites=["island"])
        await until(training.restorable, "a checkpoint is committed", 60)
        island.cut()
        before = await training.job()
        await asyncio.sleep(CUT_S)
        cut_off = await training.job()
        island.heal()
        last_during_cut = max(step.step for step in training.steps())

        async def caught_up() -> bool:
            return (await training.restorable())[0].step >= last_during_cut - EVERY

        await until(caught_up, "what was saved meanwhile is committed", 60)
        await until(lambda: ready_nodes(client, {m.name for m in ISLAND}), "the island is READY again", 60)
        steps = training.steps()
        ended = await training.finish()
    assert (before.state, cut_off.state) == (scheduler_pb2.JOB_STATE_RUNNING,) * 2, cut_off.state_message
    assert validate.training_went_on(steps, LONGEST_GAP_S) == []
    assert ended.state == scheduler_pb2.JOB_STATE_SUCCEEDED, ended.state_message
    assert (ended.epoch, ended.recoveries, ended.restarts) == (1, 0, 0)
