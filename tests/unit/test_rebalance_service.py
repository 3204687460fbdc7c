"""Moves through the service: asked for, made by itself, told in events, and undone when they fail half-way."""

import asyncio

import pytest
from google.protobuf import duration_pb2

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
                lasts = duration_pb2.Duration(seconds=8 * 3600)
                names.append(await self.submit(gpus, job_id=f"j{number}-{gpus}", checkpoint=SAVES, expected=lasts))
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
        checked = pb.ApplyRebalanceRequest(etag=plan.etag, validate_only=True)
        assert (await world.scheduler.ApplyRebalance(checked, None)).proposals == plan.proposals
        with pytest.raises(Aborted, match="this leader did not make it"):
            await world.scheduler.ApplyRebalance(pb.ApplyRebalanceRequest(etag="bad", validate_only=True), None)
        await asyncio.sleep(5)
        assert (await world.job(world.gang)).state == pb.JOB_STATE_QUEUED
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


async def half_way(world):
    """The plan is ordered, and those who move save and stop: what happens next is the test's."""
    plan = await world.plan()
    world.slow()
    await world.apply(plan.etag)
    moves = plan.proposals[0].moves
    for move in moves:
        await world.reaches(move.job, "SUSPENDING")
    (target,) = {part.node for move in moves for part in move.to}
    return moves, target


def ordered(world, proposal):
    async def all_are():
        jobs = [await world.job(name) for name in (*(move.job for move in proposal.moves), proposal.starts)]
        return all(job.HasField("claim") for job in jobs)

    return all_are


async def run_where_they_were(world, moves, attempt):
    for move in moves:
        again = await world.attempt(move.job, attempt)
        assert where(again) == {part.node for part in getattr(move, "from")}
    await asyncio.sleep(300)
    assert (await world.job(world.gang)).state == pb.JOB_STATE_QUEUED
    await world.nobody_twice()


async def test_the_gang_starts_only_when_those_who_moved_run():
    async with Fragmented() as world:
        await world.fragment()
        moves, target = await half_way(world)
        world.agents[target].obey = False
        world.slow(slow=False)
        world.die()
        for move in moves:
            assert where(await world.reaches(move.job, "STARTING")) == {target}
        await asyncio.sleep(10)
        assert (await world.job(world.gang)).state == pb.JOB_STATE_QUEUED, "they may have to come back"
        world.agents[target].obey = True
        for task in list(world.agents[target].tasks):
            world.agents[target].report(task, pb.TASK_PHASE_ACCEPTED, rendezvous="10.0.0.1:29500")
        await world.reaches(world.gang, "RUNNING")
        await world.nobody_twice()


async def test_those_whom_the_new_node_refuses_run_where_they_were():
    bus = MemoryBus()
    async with Fragmented(bus=bus) as world:
        await world.fragment()
        moves, target = await half_way(world)
        world.agents[target].refuse = "no room for its image"
        world.slow(slow=False)
        world.die()
        await run_where_they_were(world, moves, 3)
        told = await events_of(bus, {"MOVE_UNDONE"}, len(moves))
        assert {event.resource for event in told} == {move.job for move in moves}


async def test_those_whose_new_node_is_lost_while_they_start_run_where_they_were():
    async with Fragmented() as world:
        await world.fragment()
        moves, target = await half_way(world)
        world.agents[target].obey = False
        world.slow(slow=False)
        world.die()
        for move in moves:
            await world.reaches(move.job, "STARTING")
        world.phase(target, health_pb2.NODE_PHASE_UNREACHABLE, "SILENT_TOO_LONG")
        await run_where_they_were(world, moves, 3)


async def test_a_leader_that_dies_right_after_the_order_is_gone_on_from():
    async with Fragmented() as world:
        await world.fragment()
        plan = await world.plan()
        await world.apply(plan.etag)
        await until(ordered(world, plan.proposals[0]), "all claims are stored")
        await world.restart()
        for move in plan.proposals[0].moves:
            assert where(await world.attempt(move.job, 2)) == {part.node for part in move.to}
        await world.reaches(world.gang, "RUNNING")
        await world.nobody_twice()


async def test_an_order_that_cannot_be_written_leaves_the_job_where_it_is():
    """Somebody cancels one of those who were to move before its claim is stored: nothing of it is kept."""
    async with Fragmented() as world:
        await world.fragment()
        plan = await world.plan()
        gone, *others = plan.proposals[0].moves
        await asyncio.gather(
            world.scheduler.CancelJob(pb.CancelJobRequest(name=gone.job), None), world.apply(plan.etag)
        )
        await world.reaches(gone.job, "CANCELLED")
        for move in others:
            await world.reaches(move.job, "RUNNING")
        await world.reaches(world.gang, "RUNNING")
        for name in world.small:
            assert (await world.job(name)).claim.purpose == pb.CLAIM_PURPOSE_UNSPECIFIED
        await world.nobody_twice()
