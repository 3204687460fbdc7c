"""The planner has one owner: whoever stops waiting for its answer, nothing of a question is seen by a decision."""

import asyncio
import threading
from datetime import UTC, datetime

import pytest

from tests.support.scheduler_world import World, node, plan_with_queues, until
from tests.support.virtual_time import LoopClock
from whaleflux.errors import ResourceExhausted, Unavailable
from whaleflux.v1 import health_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Job, JobState, Spec
from whaleflux_scheduler.core.observed import NodeCondition, Observations, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.plan import News, Plan
from whaleflux_scheduler.planner_thread import MOST_QUESTIONS, PlannerThread

NOW = datetime(2026, 5, 1, tzinfo=UTC)


class Gate:
    """Work that has come to it waits there until it is opened."""

    def __init__(self):
        self.reached, self._open = threading.Event(), threading.Event()

    def wait(self):
        self.reached.set()
        assert self._open.wait(20), "nobody opened the gate"

    def open(self):
        self._open.set()


@pytest.fixture
def in_the_question(monkeypatch):
    """A gate inside the placement engine for the next request of 8 GPUs, unless the event loop's own thread makes it."""
    gate, place, armed = Gate(), Engine.place, [True]

    def gated(engine, request):
        if request.units == 8 and armed and threading.current_thread() is not threading.main_thread():
            armed.clear()
            gate.wait()
        return place(engine, request)

    yield lambda: (monkeypatch.setattr(Engine, "place", gated), gate)[1]
    gate.open()


async def a_gang_that_waits_while_its_remains_hold_a_node(world):
    """Its task on one node has failed, the other is slow to die; the first node takes no work, so it cannot start again."""
    quick, slow = await world.add(node("s/a"), node("s/b"))
    gang = await world.submit(8, retry={"max_restarts": 9, "backoff": {"nanos": 1}})
    await world.reaches(gang, "RUNNING")
    slow.slow_to_die = True
    world.phase(quick.node, health_pb2.NODE_PHASE_SUSPECT)
    quick.exit(1)
    await world.reaches(gang, "QUEUED")
    await until(lambda: not slow.tasks, "its other task is to stop")
    return gang, slow


async def records_hold_each_gpu_once(world):
    listed = await world.scheduler.ListAllocations(pb.ListAllocationsRequest(page_size=100), None)
    gpus = [uuid for allocation in listed.allocations for uuid in allocation.task.gpu_uuids]
    assert len(gpus) == len(set(gpus)), f"given twice: {sorted(gpus)}"


def planner_with_remains():
    """A job that waits while a task of its last attempt holds the only node."""
    planner = plan_with_queues()
    planner.apply(News(nodes=(node("s/a"),), closed={"sites/s/nodes/a": ""}))
    (choice,) = start(planner, "gang", 4)
    placed = lifecycle.place(job_of("gang", 4), choice.assignment, choice.decision, NOW)
    drained = Observations(nodes={"sites/s/nodes/a": NodeCondition(draining="x")})
    waiting = lifecycle.requeue(lifecycle.advance(placed, drained, NOW, Timeouts()), "drained")
    planner.apply(News(jobs=(waiting,)))
    return planner, waiting


def job_of(name, gpus):
    return Job(f"queues/q/jobs/{name}", Spec(command=("x",), gpus=gpus), JobState.QUEUED, NOW)


def start(planner, name, gpus):
    waiting = job_of(name, gpus)
    planner.apply(News(jobs=(waiting,), candidates={waiting.name: Candidate(waiting)}))
    return planner.decide(NOW)


async def test_a_cancelled_question_is_not_seen_by_the_decisions_that_follow(in_the_question):
    async with World() as world:
        gang, slow = await a_gang_that_waits_while_its_remains_hold_a_node(world)
        await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=gang), None)  # nothing else is under way
        gate = in_the_question()
        asking = asyncio.create_task(world.scheduler.ExplainJob(pb.ExplainJobRequest(name=gang), None))
        await until(gate.reached.is_set, "the question is under way")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        other = await world.submit(4)
        told = asyncio.create_task(world.reaches(other, "STARTING", 0.3))
        await asyncio.gather(told, return_exceptions=True)
        await records_hold_each_gpu_once(world)
        gate.open()
        await records_hold_each_gpu_once(world)
        await world.planner.ask(lambda planner: planner.check())
        slow.slow_to_die = False
        (left,) = slow.reports
        slow.report(left, pb.TASK_PHASE_KILLED, -15)
        await world.reaches(other, "RUNNING")


@pytest.mark.parametrize("ask", ["explain", "dry run"])
async def test_questions_cancelled_at_every_step_change_nothing(ask):
    async with World() as world:
        gang, _ = await a_gang_that_waits_while_its_remains_hold_a_node(world)

        def question():
            if ask == "explain":
                return world.scheduler.ExplainJob(pb.ExplainJobRequest(name=gang), None)
            return world.create(8, priority=5, dry=True)

        for steps in range(25):
            asking = [asyncio.create_task(question()) for _ in range(3)]
            for _ in range(steps):
                await asyncio.sleep(0)
            for task in asking:
                task.cancel()
            other = await world.submit(4)
            await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=other), None)  # decided by then
            await records_hold_each_gpu_once(world)
            assert (await world.job(other)).state == pb.JOB_STATE_QUEUED
            await world.scheduler.CancelJob(pb.CancelJobRequest(name=other), None)
        await world.planner.ask(lambda planner: planner.check())


def test_a_question_that_fails_leaves_everything_as_it_was(monkeypatch):
    planner, waiting = planner_with_remains()
    before = planner.held()
    with monkeypatch.context() as broken:
        broken.setattr(Engine, "place", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            planner.explain(waiting, (), NOW)
    planner.check()
    assert planner.held() == before
    assert [choice for choice in start(planner, "other", 4) if choice.assignment] == []


async def test_one_at_a_time_is_inside_and_a_decision_waits_for_one_question_at_most(monkeypatch):
    thread, inside, order = PlannerThread(LoopClock()), [], []
    monkeypatch.setattr(Plan, "step", lambda *_: order.append("decision"))

    def question(number):
        def asked(_):
            inside.append(number)
            assert inside == [number]
            order.append(number)
            inside.clear()

        return asked

    gate = Gate()
    first = asyncio.create_task(thread.ask(lambda _: gate.wait()))
    await until(gate.reached.is_set)
    others = [asyncio.create_task(thread.ask(question(number))) for number in range(20)]
    await asyncio.sleep(0)
    decision = asyncio.create_task(thread.step(News(), NOW))
    await asyncio.sleep(0)
    others[3].cancel()
    first.cancel()
    gate.open()
    await asyncio.gather(first, decision, *others, return_exceptions=True)
    assert order.index("decision") <= 1
    assert [number for number in order if number != "decision"] == [n for n in range(20) if n != 3]
    thread.shutdown()


async def test_too_many_questions_are_refused():
    thread, gate = PlannerThread(LoopClock()), Gate()
    asked = [asyncio.create_task(thread.ask(lambda _: gate.wait()))]
    await until(gate.reached.is_set)
    asked += [asyncio.create_task(thread.ask(lambda planner: planner.waiting)) for _ in range(MOST_QUESTIONS)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="ask again later"):
        await thread.ask(lambda planner: planner.waiting)
    gate.open()
    assert (await asyncio.gather(*asked))[1:] == [0] * MOST_QUESTIONS
    thread.shutdown()


async def test_questions_are_refused_not_cancelled_when_the_leadership_ends():
    thread, gate = PlannerThread(LoopClock()), Gate()
    under_way = asyncio.create_task(thread.ask(lambda _: gate.wait()))
    await until(gate.reached.is_set)
    decision = asyncio.create_task(thread.step(News(), NOW))
    waiting = asyncio.create_task(thread.ask(lambda planner: planner.waiting))
    await asyncio.sleep(0)
    thread.shutdown()
    gate.open()
    await under_way
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await thread.ask(lambda planner: planner.waiting)
    await asyncio.gather(decision, return_exceptions=True)


async def test_questions_that_wait_end_no_leadership():
    """What the gauges show is a question too: refused like any other, it is asked again, and nothing else comes of it."""
    async with World() as world:
        await world.add(node("s/a"))
        await world.reaches(await world.submit(1), "RUNNING")
        gate = Gate()
        asked = [asyncio.create_task(world.planner.ask(lambda _: gate.wait()))]
        await until(gate.reached.is_set)
        asked += [
            asyncio.create_task(world.planner.ask(lambda planner: planner.waiting)) for _ in range(MOST_QUESTIONS)
        ]
        await asyncio.sleep(0)
        planner, name = world.planner, await world.submit(1)
        await asyncio.sleep(5.0)
        gate.open()
        await asyncio.gather(*asked)
        await world.reaches(name, "RUNNING")
        assert world.planner is planner, "another leadership began"
