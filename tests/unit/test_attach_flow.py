"""Sessions with a job from the caller to the agent and back, in memory: order, pace, silence, limits, and every kind of end."""

import asyncio
from datetime import UTC, datetime

import pytest

from tests.support.virtual_time import LoopClock
from whaleflux.errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    StatusError,
    Unavailable,
)
from whaleflux.events.memory import MemoryBus
from whaleflux.manifests.job_fields import Spec
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.auth import Identity, act_as
from whaleflux.rpc.window import CHUNK_BYTES, WINDOW_BYTES
from whaleflux.sdk.sessions import JobSession, SessionOver
from whaleflux.v1 import agent_pb2, events_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_agent.attach_link import CallerGone, Link
from whaleflux_scheduler.agent_sessions import AgentSession, AgentSessions
from whaleflux_scheduler.attach import SESSIONS_PER_JOB, AttachBroker, opening
from whaleflux_scheduler.attach_checks import check_message, check_open, shown
from whaleflux_scheduler.core.attach_target import last_task, running_task
from whaleflux_scheduler.core.model import Attempt, Job, JobState, Task, TaskPhase
from whaleflux_scheduler.session_news import SessionNews

JOB, NODE = "queues/q/jobs/j", "sites/s/nodes/n"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
COMMAND = pb.AttachOpen(name=JOB, command=pb.AttachCommand(argv=["/usr/bin/env", "SECRET=1"]))


def job(state=JobState.RUNNING, phase=TaskPhase.RUNNING, node=NODE):
    tasks = (Task("t0", node, ("a", "b"), 0, 0, phase=phase), Task("t1", "sites/s/nodes/m", ("c",), 2, 1, phase=phase))
    return Job(JOB, Spec(), state, NOW, attempt=Attempt(1, tasks, NOW), uid="u")


class Call:
    """What a stub gives: a call whose answers an async generator makes."""

    def __init__(self, answers):
        self._answers = answers

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await anext(self._answers)

    async def aclose(self):
        await self._answers.aclose()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.aclose()


class World:
    """A broker with one connected agent, whose job runs."""

    def __init__(self):
        act_as(Identity("user", "ann"))
        self.job, self.clock, self.bus = job(), LoopClock(), MemoryBus(LoopClock())
        self.agents = AgentSessions()
        self.agent = self.agents.connected[NODE] = AgentSession(NODE, lambda node: ({}, 0))
        self.broker = AttachBroker(self.agents, self.clock, SessionNews(self.bus, self.clock))
        self.links = []

    async def AttachJobOf(self, requests):
        opened = await opening(requests)
        async for response in self.broker.serve(self.job, opened, requests):
            yield response

    def AttachJob(self, requests):
        return Call(self.AttachJobOf(requests))

    async def AttachOf(self, requests):
        hello = (await anext(requests)).hello
        async for response in self.broker.join(hello, requests):
            yield response

    def Attach(self, requests):
        return Call(self.AttachOf(requests))

    def session(self, wanted=COMMAND):
        return JobSession(self, wanted)

    def order(self):
        (order,) = [response.attach for response in self.agent.due() if response.HasField("attach")]
        return order

    async def agent_does(self, work):
        """The agent opens the stream that it is asked for, and does `work(link)` there."""
        while not (orders := [r.attach for r in self.agent.due() if r.HasField("attach")]):
            await asyncio.sleep(0.01)
        link = Link(orders[0], NODE)
        self.links.append(link)
        beside = [asyncio.create_task(link.listen(self)), asyncio.create_task(link.keep_alive())]
        try:
            await link.joined.wait()
            await link.send(pb.AttachJobResponse(opened=pb.AttachOpened(node=NODE, epoch=1)))
            await work(link)
            link.finish()
            await link.gone.wait()
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)


async def result(link, **fields):
    await link.send(pb.AttachJobResponse(result=pb.AttachResult(**fields)))


async def test_input_output_and_the_result_come_through_in_order():
    world, heard = World(), []

    async def echo(link):
        link.on_control = lambda request: heard.append(request.signal or request.resize.rows)
        async for data in link.input():
            await link.send(pb.AttachJobResponse(data=data.upper()))
        await result(link, exit_code=7)

    agent = asyncio.create_task(world.agent_does(echo))
    async with world.session() as session:
        await session.send(b"ab")
        await session.signal(15)
        await session.resize(40, 120)
        await session.send(b"cd")
        await session.end_input()
        got = [response.data async for response in session.responses()]
    await agent
    assert (got, heard, session.result.exit_code, session.opened.node) == ([b"AB", b"CD"], [15, 40], 7, NODE)
    (told,) = world.bus.events
    event = events_pb2.Event.FromString(told.data)
    assert (event.what, event.cause.actor, event.resource) == ("SESSION_OPENED", "user/ann", JOB)
    assert event.message == f"command env at rank 0, on {NODE}"
    assert "SECRET" not in str(event)


async def test_hours_of_silence_end_no_session():
    world = World()

    async def waits(link):
        await asyncio.sleep(3 * 3600)
        await result(link)

    agent = asyncio.create_task(world.agent_does(waits))
    async with world.session() as session:
        assert [response async for response in session.responses()] == []
    await agent


async def test_a_side_that_says_nothing_for_minutes_is_taken_for_gone():
    world = World()

    async def mute(requests):
        await anext(requests)
        yield agent_pb2.AttachResponse()
        await asyncio.sleep(1e6)

    world.Attach = lambda requests: Call(mute(requests))
    link = Link(agent_pb2.AttachOrder(), NODE)
    began_s = world.clock.monotonic()
    await link.listen(world)
    assert 100 < world.clock.monotonic() - began_s < 130
    with pytest.raises(CallerGone):
        await link.send(pb.AttachJobResponse())

    async def opened_and_mute(requests):
        await anext(requests)
        yield pb.AttachJobResponse(opened=pb.AttachOpened())
        await asyncio.sleep(1e6)

    world.AttachJob = lambda requests: Call(opened_and_mute(requests))
    async with world.session() as session:
        with pytest.raises(Unavailable, match="nothing came for 120 s"):
            await anext(session.responses())


async def test_input_that_nobody_takes_waits_and_holds_up_no_signal():
    world, heard, take = World(), asyncio.Event(), asyncio.Event()

    async def takes_late(link):
        link.on_control = lambda request: heard.set()
        await take.wait()
        size = sum([len(data) async for data in link.input()])
        await result(link, size_bytes=size)

    agent = asyncio.create_task(world.agent_does(takes_late))
    async with world.session() as session:
        receiving = asyncio.create_task(read_all(session))
        sending = asyncio.create_task(session.send(bytes(4 * WINDOW_BYTES)))
        await asyncio.sleep(10)
        assert not sending.done()
        await session.signal(2)
        await asyncio.wait_for(heard.wait(), 1)
        take.set()
        await sending
        await session.end_input()
        await receiving
    await agent
    assert session.result.size_bytes == 4 * WINDOW_BYTES


async def test_input_of_a_byte_a_message_does_not_fill_the_agent():
    world = World()

    async def takes_nothing(link):
        await link.gone.wait()

    agent = asyncio.create_task(world.agent_does(takes_nothing))
    async with asyncio.timeout(60), world.session() as session:
        receiving = asyncio.create_task(read_all(session))
        with pytest.raises(SessionOver):
            for _ in range(20_000):
                await session.send(b"x")
        with pytest.raises(Unavailable):
            await receiving
    agent.cancel()
    await asyncio.gather(agent, return_exceptions=True)


async def read_all(session):
    return b"".join([response.data async for response in session.responses()])


async def test_a_caller_that_does_not_read_stops_its_agent_and_a_gone_one_ends_it():
    world, sent = World(), []

    async def endless(link):
        while True:
            await link.send(pb.AttachJobResponse(data=bytes(CHUNK_BYTES)))
            sent.append(CHUNK_BYTES)

    agent = asyncio.create_task(world.agent_does(endless))
    async with world.session() as session:
        await anext(session.responses())
        await asyncio.sleep(60)
        assert len(sent) < 10
    with pytest.raises(CallerGone):
        await agent


async def test_the_end_of_the_leader_and_of_the_agent_are_said():
    for end, word in (
        (lambda world: world.broker.end(), "the fleet changed"),
        (lambda world: world.agent_task.cancel(), "went away"),
    ):
        world = World()

        async def waits(link):
            await asyncio.sleep(1e6)

        world.agent_task = asyncio.create_task(world.agent_does(waits))
        async with world.session() as session:
            asyncio.get_running_loop().call_later(1, end, world)
            with pytest.raises(Unavailable, match=word) as caught:
                await read_all(session)
        assert caught.value.reason == "SESSION_LOST"
        await asyncio.gather(world.agent_task, return_exceptions=True)


async def test_an_agent_that_does_not_come_is_said():
    world = World()
    with pytest.raises(Unavailable, match="did not open the session within 10 s"):
        async with world.session():
            pass
    del world.agents.connected[NODE]
    with pytest.raises(Unavailable, match="where rank 0 of queues/q/jobs/j is, is not connected now"):
        async with world.session():
            pass


async def test_only_the_agent_that_was_asked_joins_and_once():
    world = World()
    waiting = asyncio.create_task(anext(world.AttachJobOf(forever(COMMAND))))
    await asyncio.sleep(0.1)
    order = world.order()
    hello = {"node": NODE, "session": order.session, "secret": order.secret}
    for wrong in ({"secret": "guessed"}, {"node": "sites/s/nodes/m"}):
        with pytest.raises(PermissionDenied):
            await anext(world.broker.join(agent_pb2.AttachHello(**hello | wrong), forever(COMMAND)))
    first = world.broker.join(agent_pb2.AttachHello(**hello), forever(COMMAND))
    assert not (await anext(first)).HasField("request")
    for again in (hello, hello | {"session": "other"}):
        with pytest.raises(Unavailable, match="nobody waits"):
            await anext(world.broker.join(agent_pb2.AttachHello(**again), forever(COMMAND)))
    await first.aclose()
    with pytest.raises(StatusError):
        await waiting


async def forever(opened):
    yield pb.AttachJobRequest(open=opened)
    await asyncio.sleep(1e6)


async def test_sessions_of_a_job_are_limited_and_places_come_back():
    world = World()
    world.agent.send = lambda response: None
    calls = [world.AttachJobOf(forever(COMMAND)) for _ in range(SESSIONS_PER_JOB)]
    waiting = [asyncio.create_task(anext(call)) for call in calls]
    await asyncio.sleep(1)
    with pytest.raises(ResourceExhausted, match=f"{SESSIONS_PER_JOB} sessions with {JOB} are open"):
        await anext(world.AttachJobOf(forever(COMMAND)))
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    with pytest.raises(Unavailable, match="did not open"):
        await anext(world.AttachJobOf(forever(COMMAND)))


@pytest.mark.parametrize("first", [[], [pb.AttachJobRequest(data=b"x")]])
async def test_the_first_message_says_what_is_wanted(first):
    async def requests():
        for request in first:
            yield request

    with pytest.raises(InvalidArgument, match="must be the first message"):
        await opening(requests())


def test_which_task():
    assert running_task(job(), 1)[1].id == "t0"
    assert running_task(job(), 2)[1].id == "t1"
    with pytest.raises(InvalidArgument, match="3 is no rank of queues/q/jobs/j, which has 0 to 2"):
        running_task(job(), 3)
    with pytest.raises(FailedPrecondition, match=r"has ended \(SUCCEEDED\).*whaleflux cp"):
        running_task(job(JobState.SUCCEEDED, TaskPhase.EXITED), 0)
    assert last_task(job(JobState.SUCCEEDED, TaskPhase.EXITED), 0)[1].id == "t0"
    with pytest.raises(FailedPrecondition, match=r"does not run now \(FETCHING\)"):
        running_task(job(JobState.STARTING, TaskPhase.FETCHING), 0)
    with pytest.raises(FailedPrecondition, match="has not run yet"):
        last_task(job(JobState.QUEUED, TaskPhase.UNSPECIFIED), 0)


@pytest.mark.parametrize("wrong", [
    pb.AttachOpen(),
    pb.AttachOpen(port=70_000),
    pb.AttachOpen(port=-1),
    pb.AttachOpen(command=pb.AttachCommand(argv=["a\0b"])),
    pb.AttachOpen(command=pb.AttachCommand(argv=["x" * 200_000])),
    pb.AttachOpen(command=pb.AttachCommand(terminal=pb.TerminalSize(rows=-1))),
    pb.AttachOpen(read=pb.AttachPath(path="a\0b")),
    pb.AttachOpen(write=pb.AttachPath(path="a", base_name="../b")),
    pb.AttachOpen(write=pb.AttachPath(path="a")),
])  # fmt: skip
def test_what_no_agent_is_asked(wrong):
    with pytest.raises(InvalidArgument):
        check_open(wrong)


@pytest.mark.parametrize("wrong", [
    pb.AttachJobRequest(open=COMMAND), pb.AttachJobRequest(data=bytes(CHUNK_BYTES + 1)), pb.AttachJobRequest(data=b""), pb.AttachJobRequest(signal=65),
    pb.AttachJobRequest(resize=pb.TerminalSize(rows=10**6)),
])  # fmt: skip
def test_what_no_open_session_takes(wrong):
    with pytest.raises(InvalidArgument):
        check_message(wrong)


def test_the_record_has_a_commands_first_word_alone():
    assert shown(COMMAND) == "command env"
    assert shown(pb.AttachOpen(command=pb.AttachCommand())) == "shell"
    assert shown(pb.AttachOpen(port=8888)) == "port 8888"


async def test_a_dial_that_failed_takes_nothing_of_the_next_one():
    """What reads the requests of a call goes on waiting when the call has failed: nobody tells it."""
    world, waiting = World(), []

    async def follower(requests):
        async def drain():
            async for _ in requests:
                pass

        waiting.append(asyncio.create_task(drain()))
        raise Unavailable("this replica follows", reason=ErrorReason.NOT_LEADER)
        yield

    leader = world.Attach
    world.Attach = lambda requests: Call(follower(requests)) if not waiting else leader(requests)

    async def work(link):
        await result(link, exit_code=0)

    agent = asyncio.create_task(world.agent_does(work))
    async with asyncio.timeout(60), world.session() as session:
        assert [response async for response in session.responses()] == []
    await agent
    assert (len(waiting), session.opened.node) == (1, NODE)
