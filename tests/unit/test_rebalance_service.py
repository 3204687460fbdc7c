"""Moves through the service: asked for, made by itself, told in events, and undone when they fail half-way."""

import asyncio

import pytest

from tests.support.scheduler_world import World, node, until
from whaleflux.errors import Aborted, InvalidArgument
from whaleflux.events.memory import MemoryBus
from whaleflux.v1 import events_pb2, health_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.rebalances import RebalanceSettings

SAVES = pb.CheckpointPolicy(every_steps=10)


class Fragmented(World):
    """Each of three nodes of four GPUs has a small job, and a gang of two whole nodes has waited for ten minutes."""

    def __init__(self, mode="off", **more):
        super().__init__(rebalancing=RebalanceSettings(mode), **more)
        self.small: list[str] = []
        self.gang = ""

    async def fragment(self):
        await self.add(*(node(f"s/{short}") for short in "abc"))
        fillers = []
        for number in range(3):
            for gpus, names in ((3, fillers), (1, self.small)):
                names.append(await self.submit(gpus, job_id=f"j{number}-{gpus}", checkpoint=SAVES))
                await self.reaches(names[-1], "RUNNING")
        for name in fillers:
            await self.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)
            await self.reaches(name, "CANCELLED")
        self.gang = await self.submit(8, job_id="gang", nodes=pb.NodeCount(max=2))
        await asyncio.sleep(600)
        return self

    async def plan(self):
        return await self.scheduler.PlanRebalance(pb.PlanRebalanceRequest(), None)

    async def apply(self, etag):
        return await self.scheduler.ApplyRebalance(pb.ApplyRebalanceRequest(etag=etag), None)

    async def attempt(self, name, number):
        async def there():
            job = await self.job(name)
            return job if job.attempt.number == number and job.state == pb.JOB_STATE_RUNNING else None

        return await until(there, f"{name} runs in attempt {number}")

    async def nobody_twice(self):
        await self.caught_up()
        await self.planner.ask(lambda planner: planner.check())

    def slow(self, slow=True):
        for agent in self.agents.values():
            agent.slow_to_die = slow

    def die(self, how=pb.TASK_PHASE_KILLED, code=-15):
        """What was stopped ends now."""
        for agent in self.agents.values():
            for task in [task for task in agent.reports if task not in agent.tasks]:
                agent.report(task, how, code)


def where(job):
    return {task.node for task in job.attempt.tasks}


async def test_a_plan_is_shown_and_carried_out():
    async with Fragmented() as world:
        await world.fragment()
        before = {name: where(await world.job(name)) for name in world.small}
        plan = await world.plan()
        (proposal,) = plan.proposals
        assert (proposal.starts, plan.mode) == (world.gang, "off")
        assert 0 < 2 * proposal.cost_gpu_s <= proposal.gain_gpu_s
        assert plan.budget_left_gpu_s == pytest.approx(0.01 * 12 * 86400)
        await world.apply(plan.etag)
        gang = await world.reaches(world.gang, "RUNNING")
        assert where(gang) == {part.node for part in proposal.room}
        for move in proposal.moves:
            moved = await world.attempt(move.job, 2)
            assert where(moved) == {part.node for part in move.to}
            assert (moved.restarts, before[move.job]) == (0, {part.node for part in getattr(move, "from")})
        await world.nobody_twice()
        with pytest.raises(Aborted, match="does not wait any more"):
            await world.apply(plan.etag)


async def test_bad_plans_are_refused():
    async with Fragmented() as world:
        with pytest.raises(InvalidArgument, match="etag"):
            await world.apply("")
        with pytest.raises(Aborted, match="whaleflux rebalance plan"):
            await world.apply("0123456789abcdef")


async def test_it_moves_by_itself_when_it_is_told_to_and_says_so():
    bus = MemoryBus()
    async with Fragmented("on", bus=bus) as world:
        await world.fragment()
        await world.reaches(world.gang, "RUNNING")
        movers = [name for name in world.small if len((await world.job(name)).past_attempts) == 1]
        for name in movers:
            await world.attempt(name, 2)
        told = await events_of(bus, {"MOVE_ORDERED", "MOVED"}, 2 * len(movers))
        assert sorted((event.resource, event.what) for event in told) == sorted(
            (name, what) for name in movers for what in ("MOVE_ORDERED", "MOVED")
        )
        assert all(f"makes room for {world.gang}: saves" in event.cause.message for event in told)
        await world.nobody_twice()


async def test_it_only_tells_what_it_would_move_unless_it_is_told_to_move():
    bus = MemoryBus()
    async with Fragmented("plan", bus=bus) as world:
        await world.fragment()
        (told,) = await events_of(bus, {"REBALANCE_PROPOSED"}, 1)
        assert told.resource == world.gang
        assert "whaleflux rebalance plan" in told.message
        assert float(told.attributes["gain_gpu_s"]) > 2 * float(told.attributes["cost_gpu_s"])
        assert (await world.job(world.gang)).state == pb.JOB_STATE_QUEUED


async def events_of(bus, what, count):
    found = []
    async with bus.subscribe(["wf.v1.>"], durable="test") as news, asyncio.timeout(60):
        async for delivery in news:
            event = events_pb2.Event.FromString(delivery.data)
            await delivery.ack()
            found += [event] if event.what in what else []
            if len(found) == count:
                return found
    return found


@pytest.mark.parametrize("how", [(pb.TASK_PHASE_KILLED, -15), (pb.TASK_PHASE_EXITED, 1)], ids=["killed", "save fails"])
@pytest.mark.parametrize("leader", ["same", "another"])
async def test_it_goes_on_where_it_was_to_whoever_leads_and_however_it_ended(how, leader):
    async with Fragmented() as world:
        await world.fragment()
        plan = await world.plan()
        world.slow()
        await world.apply(plan.etag)
        for move in plan.proposals[0].moves:
            await world.reaches(move.job, "SUSPENDING")
        if leader == "another":
            await world.restart()
        world.slow(slow=False)
        world.die(*how)
        for move in plan.proposals[0].moves:
            assert where(await world.attempt(move.job, 2)) == {part.node for part in move.to}
        await world.reaches(world.gang, "RUNNING")
        await world.nobody_twice()


async def test_a_mover_whose_new_place_is_lost_runs_where_it_was():
    bus = MemoryBus()
    async with Fragmented(bus=bus) as world:
        await world.fragment()
        plan = await world.plan()
        moves = plan.proposals[0].moves
        (target,) = {part.node for move in moves for part in move.to}
        world.slow()
        await world.apply(plan.etag)
        for move in moves:
            await world.reaches(move.job, "SUSPENDING")
        world.phase(target, health_pb2.NODE_PHASE_UNREACHABLE, "SILENT_TOO_LONG")
        world.slow(slow=False)
        world.die()
        for move in moves:
            again = await world.attempt(move.job, 2)
            assert where(again) == {part.node for part in getattr(move, "from")}
        told = await events_of(bus, {"MOVE_UNDONE"}, len(moves))
        assert {event.resource for event in told} == {move.job for move in moves}
        await asyncio.sleep(300)
        gang = await world.job(world.gang)
        assert (gang.state, gang.claim.purpose) == (pb.JOB_STATE_QUEUED, pb.CLAIM_PURPOSE_RESERVATION), "as before"
        await world.nobody_twice()
