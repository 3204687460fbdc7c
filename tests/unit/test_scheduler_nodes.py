"""Which nodes take work: unknown is never healthy, and what runs is left alone meanwhile."""

import asyncio
import contextlib
from types import SimpleNamespace

from tests.support.scheduler_world import World, node, until
from whaleflux.clock import VirtualClock
from whaleflux.convert import facts_to_proto
from whaleflux.errors import Unavailable
from whaleflux.reasons import ConditionType
from whaleflux.v1 import health_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.dataset_feed import EVERY_S
from whaleflux_scheduler.node_view import NodeView

A, B = "sites/s/nodes/a", "sites/s/nodes/b"
READY = health_pb2.NODE_PHASE_READY


async def test_a_new_leader_places_nothing_on_nodes_whose_health_it_does_not_know_yet():
    async with World() as world:
        await world.add(node("s/a"), node("s/b"))
        runs = await world.submit(4)
        placed = await world.reaches(runs, "RUNNING")
        (held,) = {task.node for task in placed.attempt.tasks}
        world.phases.clear()  # health_monitor does not answer the next leader at first
        await world.restart()
        waits = await world.submit(4)
        decision = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=waits), None)
        assert "health_monitor has not told" in decision.decision.summary
        assert (await world.job(waits)).state == pb.JOB_STATE_QUEUED
        assert (await world.job(runs)).state == pb.JOB_STATE_RUNNING
        free = B if held == A else A
        world.phase(free, health_pb2.NODE_PHASE_QUARANTINED)
        world.phase(held, READY)
        decision = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=waits), None)
        assert "quarantined" in decision.decision.summary
        world.phase(free, READY)
        await world.reaches(waits, "RUNNING")
        assert (await world.job(runs)).epoch == 1


def view(**more):
    made = NodeView({A: object()}, **more)
    facts = facts_to_proto(node("s/a"))
    made.set_node(A, inventory_pb2.Node(name=A, facts=facts, intent=inventory_pb2.NODE_INTENT_ACTIVE))
    return made


def test_what_health_monitor_forgets_is_unknown_again_and_without_one_the_agent_counts():
    watched = view()
    assert watched.closed(A) == "health_monitor has not told whether it is healthy"
    watched.set_health(A, health_pb2.NodeHealth(name=A, phase=READY))
    assert watched.closed(A) == ""
    watched.set_health(A, None)
    assert watched.closed(A) != ""
    assert watched.condition(A) is None, "nothing follows for tasks on it"
    assert view(monitored=False).closed(A) == ""


def test_each_leadership_of_a_process_is_told_of_all_nodes():
    """Who follows knows them already, and what an earlier leadership was told is not told again by the feeds."""
    watched = view()
    watched.set_health(B, health_pb2.NodeHealth(name=B, phase=READY))
    watched.occupied_by(A, "queues/q/jobs/unreadable")
    told = watched.take_changes()
    assert not watched.take_changes().touched
    watched.begin()
    again = watched.take_changes()
    assert again.nodes == told.nodes
    assert again.touched == {A, B}
    assert "runs queues/q" not in watched.closed(A), "the next one finds out for itself"


async def test_waiting_for_the_first_answer_is_said_once(capsys):
    answers = iter([Unavailable("down"), Unavailable("down"), None])

    async def watch(_):
        if (error := next(answers)) is not None:
            raise error
        yield health_pb2.WatchNodeHealthResponse(added=health_pb2.NodeHealth(name=A, phase=READY))
        yield health_pb2.WatchNodeHealthResponse(bookmark={}, resource_version=7)
        await asyncio.Event().wait()

    watched = view()
    following = asyncio.create_task(watched.follow_health(SimpleNamespace(WatchNodeHealth=watch)))
    await until(lambda: watched.closed(A) == "", "it has answered")
    said = ""

    def known():
        nonlocal said
        said += capsys.readouterr().out
        return "health_known" in said

    await until(known, "it is said that health is known")
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    assert (said.count("health_awaited"), said.count("health_known")) == (1, 1)


async def test_a_job_starts_when_the_copy_that_it_needs_has_come():
    clock = VirtualClock()
    async with World(clock=clock) as world:
        copy = inventory_pb2.DatasetCopy(node=B, present_bytes=1)
        data = inventory_pb2.Dataset(name="datasets/text", size_bytes=5, copies=[copy])
        world.inventory.datasets[data.name] = data
        adding = asyncio.create_task(world.add(node("s/a"), node("s/b")))
        while not adding.done():
            await clock.advance(0.01)
        job = await world.submit(1, datasets=["text"], require_local_data=True)

        async def state(wanted):
            while (await world.job(job)).state != wanted:
                await clock.advance(0.01)

        await asyncio.wait_for(state(pb.JOB_STATE_QUEUED), 5)
        await clock.advance(EVERY_S)
        assert (await world.job(job)).state == pb.JOB_STATE_QUEUED
        copy.present_bytes = 5
        world.inventory.datasets[data.name] = inventory_pb2.Dataset(name=data.name, size_bytes=5, copies=[copy])
        await clock.advance(EVERY_S)
        await asyncio.wait_for(state(pb.JOB_STATE_RUNNING), 5)
        assert [task.node for task in (await world.job(job)).attempt.tasks] == [B]

        del world.inventory.datasets[data.name]
        world.inventory.unreadable.append(data.name)
        await clock.advance(EVERY_S)
        job = await world.submit(1, datasets=["text"], require_local_data=True)
        await asyncio.wait_for(state(pb.JOB_STATE_RUNNING), 5)


async def test_a_new_leader_that_nobody_has_told_of_a_lost_node_does_not_take_it_for_found():
    async with World() as world:
        (agent,) = await world.add(node("s/a"))
        agent.slow_to_die = True
        job = await world.submit(4)
        await world.reaches(job, "RUNNING")
        world.phase("sites/s/nodes/a", health_pb2.NODE_PHASE_UNREACHABLE)
        await world.reaches(job, "QUEUED")
        world.phases.clear()
        await world.restart()
        await world.caught_up()
        assert [task.lost for task in (await world.job(job)).attempt.tasks] == [True]


def test_a_node_whose_machine_is_taken_away_takes_no_work_and_what_is_there_leaves():
    watched = view(monitored=False)
    leaving = inventory_pb2.Node(name=A, facts=facts_to_proto(node("s/a")), intent=inventory_pb2.NODE_INTENT_ACTIVE)
    leaving.facts.conditions.add(type=ConditionType.MACHINE_STAYS, reason="SPOT_TAKEN", message="AWS takes it away")
    watched.set_node(A, leaving)
    assert watched.closed(A) == "draining"
    assert watched.condition(A).draining == "AWS takes it away"
    leaving.facts.ClearField("conditions")
    watched.set_node(A, leaving)
    assert watched.closed(A) == "" and not watched.condition(A).draining
