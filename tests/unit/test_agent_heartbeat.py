"""The agent's stream to health_monitor: what it says at a stop, what it repeats, and how fast observations may come."""

import asyncio
import contextlib

import pytest

from tests.support.virtual_time import LoopClock
from whaleflux.clock import VirtualClock
from whaleflux.errors import Unavailable
from whaleflux.v1 import health_pb2 as pb
from whaleflux_agent.heartbeat import HeartbeatLoop
from whaleflux_agent.observations import Observations


class Monitor:
    """The other end of the channel. `deaf` streams take messages and lose them, as when a call is cancelled under way."""

    def __init__(self, *, deaf=0, acknowledges=True):
        self.deaf, self.acknowledges = deaf, acknowledges
        self.streams, self.changed = [], asyncio.Event()

    def stream_stream(self, method, **_):
        return self.open if method.endswith("/Heartbeat") else None

    def unary_unary(self, method, **_):
        return None

    unary_stream = unary_unary

    @contextlib.asynccontextmanager
    async def open(self, requests):
        taken = []
        self.streams.append(taken)
        yield self.answers(requests, taken, deaf=len(self.streams) <= self.deaf)

    async def answers(self, requests, taken, *, deaf):
        async for request in requests:
            taken.append(request)
            self.changed.set()
            kind = request.WhichOneof("message")
            if deaf and kind in {"observation", "goodbye"}:
                raise Unavailable("the connection broke")
            if kind == "observation" and self.acknowledges:
                yield pb.HeartbeatResponse(acknowledged_observation=request.observation.id)
            elif kind == "goodbye":
                yield pb.HeartbeatResponse(goodbye_stored=True)
            else:
                yield pb.HeartbeatResponse(acknowledged=1)

    def kinds(self, stream=-1):
        return [request.WhichOneof("message") for request in self.streams[stream]]

    async def until(self, done):
        async with asyncio.timeout(10):
            while not done():
                self.changed.clear()
                await self.changed.wait()


class Nothing:
    """A supervisor without tasks."""

    def running(self):
        return []


async def restart():
    return pb.STOP_KIND_AGENT_RESTART


async def unused(address):
    raise AssertionError(address)


def begin(monitor, observations, stop_kind=restart):
    loop = HeartbeatLoop(
        monitor, pb.HeartbeatHello(node="sites/s/nodes/n"), Nothing(), observations, LoopClock(),
        interval_s=0.05, stop_kind=stop_kind, probe=unused,
    )  # fmt: skip
    return loop, asyncio.create_task(loop.run())


def seen(clock=None, agent="a1"):
    return Observations("sites/s/nodes/n", "boot", agent, clock or VirtualClock())


async def test_a_goodbye_that_is_lost_is_said_again_until_it_is_on_record():
    monitor = Monitor(deaf=2)
    loop, running = begin(monitor, seen())
    await monitor.until(lambda: monitor.streams and "heartbeat" in monitor.kinds())
    async with asyncio.timeout(10):
        await loop.announce()
        await running
    assert [kinds[-1] for kinds in map(monitor.kinds, range(3))] == ["goodbye"] * 3
    assert monitor.streams[-1][-1].goodbye.kind == pb.STOP_KIND_AGENT_RESTART


async def test_what_was_seen_last_is_said_before_the_goodbye():
    async def shutdown():
        observations.add("TASK_EXIT", None, 0, "ended while the agent stops")
        return pb.STOP_KIND_AGENT_RESTART

    monitor, observations = Monitor(), seen()
    loop, running = begin(monitor, observations, shutdown)
    await monitor.until(lambda: monitor.streams and "heartbeat" in monitor.kinds())
    async with asyncio.timeout(10):
        await loop.announce()
        await running
    assert [kind for kind in monitor.kinds() if kind != "heartbeat"] == ["hello", "observation", "goodbye"]
    assert observations.after("") == []


async def test_a_host_that_goes_down_is_announced_as_that():
    async def shutdown():
        return pb.STOP_KIND_HOST_SHUTDOWN

    monitor = Monitor()
    loop, running = begin(monitor, seen(), shutdown)
    await monitor.until(lambda: monitor.streams and "heartbeat" in monitor.kinds())
    async with asyncio.timeout(10):
        await loop.announce()
        await running
    assert monitor.streams[-1][-1].goodbye.kind == pb.STOP_KIND_HOST_SHUTDOWN


async def test_an_observation_is_repeated_on_the_next_stream_until_it_is_taken_and_not_after_that():
    monitor, observations = Monitor(deaf=1), seen()
    observations.add("XID", None, 79, "fell off the bus")
    _, running = begin(monitor, observations)
    await monitor.until(lambda: len(monitor.streams) > 1 and "heartbeat" in monitor.kinds())
    ids = [[r.observation.id for r in stream if r.WhichOneof("message") == "observation"] for stream in monitor.streams]
    assert ids == [["sites/s/nodes/n/boot/a1/1"]] * 2
    await monitor.until(lambda: monitor.kinds().count("heartbeat") >= 3)
    assert monitor.kinds().count("observation") == 1
    assert observations.after("") == []
    running.cancel()


async def test_what_is_sent_and_not_acknowledged_is_not_sent_twice_on_one_stream():
    monitor, observations = Monitor(acknowledges=False), seen()
    _, running = begin(monitor, observations)
    for code in range(3):
        observations.add("TASK_EXIT", None, code, "ended")
        await monitor.until(lambda code=code: monitor.streams and monitor.kinds().count("observation") == code + 1)
    await monitor.until(lambda: monitor.kinds().count("heartbeat") >= 3)
    assert monitor.kinds().count("observation") == 3
    assert [each.code for each in observations.after("")] == [0, 1, 2]
    running.cancel()


def test_ids_do_not_repeat_after_a_restart_of_the_agent():
    first, second = seen(agent="a1"), seen(agent="a2")
    for observations in (first, second):
        observations.add("XID", None, 79, "")
    assert {o.id for o in first.after("")}.isdisjoint(o.id for o in second.after(""))


@pytest.mark.parametrize(("kind", "most"), [("GPU_LOST", 10), ("XID", 60), ("TASK_EXIT", 6500)])
async def test_observations_of_one_kind_are_bounded_in_rate_and_the_rest_is_counted(kind, most):
    clock = VirtualClock()
    observations = seen(clock)
    sent, suppressed, last = 0, 0, ""
    for _ in range(3000):  # 440 a second, for five minutes
        for _ in range(44):
            observations.add(kind, None, 0, "again")
        for each in observations.after(last):
            sent, suppressed, last = sent + 1, suppressed + each.suppressed, each.id
        await clock.advance(0.1)
    assert 1 <= sent <= most
    observations.add("OTHER", None, 0, "goes on")
    assert [each.kind for each in observations.after(last)] == ["OTHER"]
    assert suppressed > 100_000


def test_what_waits_is_bounded():
    observations = seen()
    for kind in range(2000):
        observations.add(f"KIND_{kind}", None, 0, "x")
    assert len(observations.after("")) == 1000
