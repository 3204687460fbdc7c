"""What agents report reaches the store whatever else happens at that moment."""

import pytest

from tests.support.held_commits import HeldCommits
from tests.support.scheduler_world import World, node, until
from whaleflux.v1 import health_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.agent_sessions import AgentSession
from whaleflux_scheduler.core.model import TaskPhase
from whaleflux_scheduler.core.observed import Report
from whaleflux_scheduler.job_tracking import JobTracking, PendingReport


@pytest.fixture
async def world():
    async with World() as world:
        yield world


async def held_on(world, agent):
    found = await world.scheduler.ListAllocations(pb.ListAllocationsRequest(), None)
    return [allocation.task.id for allocation in found.allocations if allocation.task.node == agent.node]


async def test_a_report_that_comes_while_its_job_is_placed_again_is_stored(world):
    """An older report, which said nothing new, is settled before the placement is written and again after it."""
    a, b = await world.add(node("s/a"), node("s/b"))
    world.intend(b.node, inventory_pb2.NODE_INTENT_CORDONED)
    a.slow_to_die = True
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    (remains,) = a.reports
    await a.disconnect()
    world.phase(a.node, health_pb2.NODE_PHASE_UNREACHABLE, "HEARTBEAT_LOST")
    await world.reaches(name, "QUEUED")
    await a.connect()
    before = a.acknowledged
    a.report(remains, pb.TASK_PHASE_RUNNING)  # known: nothing to write
    await until(lambda: a.acknowledged > before, "it is settled")
    slow = HeldCommits(world.store)
    world.intend(b.node, inventory_pb2.NODE_INTENT_ACTIVE)
    a.report(remains, pb.TASK_PHASE_RUNNING)  # once more, in the round that places the job
    await until(lambda: slow.waiting, "the placement is on its way to the store")
    a.report(remains, pb.TASK_PHASE_KILLED, -9)
    await until(lambda: a.heard, "the leader has it")
    slow.release()
    await world.reaches(name, "RUNNING")

    async def free():
        return not await held_on(world, a)

    await until(free, "the end of the old task is stored, and its GPUs are free")


async def test_settling_the_same_reports_twice_leaves_newer_ones():
    session, tracking = AgentSession("n", lambda _: ({}, 0)), JobTracking()
    old, new = (PendingReport(Report("t", TaskPhase.KILLED), session, 0) for _ in range(2))
    tracking.add_report(old)
    assert tracking.settle((old,)) == [old]
    tracking.add_report(new)
    assert tracking.settle((old,)) == []
    assert tracking.reports == (new,)
