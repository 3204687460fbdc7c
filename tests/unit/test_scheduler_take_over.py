"""Taking over: who followed knows the fleet already, and goes on with exactly what is held."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.scheduler_world import World, node, plan_with_queues, until
from whaleflux.store.api import Delete
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.bootstrap import Peers, assemble
from whaleflux_scheduler.core.model import Job, JobState, Spec
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News
from whaleflux_scheduler.planner_thread import PlannerThread


@pytest.fixture
async def world():
    async with World() as world:
        yield world


@pytest.fixture
async def follower(world):
    """Another replica on the same store, told of the same nodes."""
    peers = Peers(world.inventory, world.health, world.checkpoint)
    service = assemble(world.store, None, world.clock, peers, world.timeouts, "there:1")
    running = asyncio.create_task(service.loops[0]())
    yield service
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def tell(world, service):
    for name, message in world.nodes.items():
        service.nodes.set_node(name, message)
    for name, phase in world.phases.items():
        service.nodes.set_health(name, phase)


async def held(service):
    return await service.leader_session.current.planner.ask(lambda plan: plan.held())


async def test_who_follows_knows_the_nodes_before_it_leads(world, follower, monkeypatch):
    agents = await world.add(*(node(f"s/n{i}") for i in range(12)))
    tell(world, follower)
    names = [await world.submit(4) for _ in range(8)]
    for name in names:
        await world.reaches(name, "RUNNING")
    await world.clock.sleep(5)
    await world.scheduler.CancelJob(pb.CancelJobRequest(name=names[0]), None)
    await until(lambda: all(agent.heard for agent in agents), "its end is reported")
    await world.reaches(names[0], "CANCELLED")

    async def free():
        return names[0] not in await world.held()

    await until(free, "the plan has heard of it")
    follower.nodes.set_node(agents[11].node, None)  # shortly before: it is not in the prepared plan
    before = {job: dict(gpus) for job, gpus in (await world.held()).items()}
    steps = []
    step = PlannerThread.step

    async def watched(self, news, now):
        steps.append(news)
        return await step(self, news, now)

    monkeypatch.setattr(PlannerThread, "step", watched)
    await world.stop()
    await until(lambda: follower.leader_session.current is not None, "it leads")
    await until(lambda: bool(steps), "it decides")
    assert steps[0].nodes == (), "it knew them"
    assert steps[0].removed == (agents[11].node,)
    assert set(steps[0].closed) >= {agent.node for agent in agents[:11]}, "whether they take work it looks at now"
    assert {job: dict(gpus) for job, gpus in (await held(follower)).items()} == before
    planner = follower.leader_session.current.planner
    await planner.ask(lambda plan: plan.check())


@pytest.mark.parametrize("many", [3, 120])
def test_reasons_that_were_given_before_the_fleet_was_known_come_to_be_true(many):
    """A few at once, however many wait; and none is said again when nothing about the fleet is other than it was."""
    now, plan = datetime(2026, 5, 1, tzinfo=UTC), plan_with_queues()
    spec = Spec(command=("x",), gpus=64)
    jobs = [Job(f"queues/q/jobs/j{at}", spec, JobState.QUEUED, now + timedelta(seconds=at)) for at in range(many)]
    first = plan.step(News(candidates={job.name: Candidate(job) for job in jobs}), now)
    assert all("the fleet has no nodes" in move.decision.summary for move in first)
    known = [node(f"s/n{at}") for at in range(4)]
    news, told, looks = News(nodes=tuple(known), closed={one.name: "" for one in known}), {}, 0
    at = now + timedelta(seconds=10)
    while news is not None:
        moves = plan.step(news, at)
        assert len(moves) <= 50
        told |= {move.job: move.decision.summary for move in moves}
        news, at, looks = (News() if plan.next_look else None), plan.next_look, looks + 1
    assert looks == -(-many // 50)
    assert told.keys() == {job.name for job in jobs}
    assert not any("no nodes" in summary for summary in told.values())


async def test_a_replica_that_leads_again_begins_anew(world):
    """What an earlier leadership of the process decided and did not write is nobody's."""
    await world.add(node("s/a"), node("s/b"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    first = world.service.leader_session.current
    await world.planner.ask(lambda plan: plan.take_in(News(gone=(name,)), world.clock.now()))
    assert not await world.held()
    leaders = await world.store.list("/whaleflux/v1/leaders/")
    await world.store.commit(*(Delete(entry.key) for entry in leaders.entries))
    await world.submit(1)  # its write is refused: another leads, as far as the store knows
    await until(lambda: world.service.leader_session.current not in (None, first), "it leads again")
    await world.caught_up()
    assert set(await world.held()) >= {name}
