"""The stream to health_monitor: signs of life, and what was seen on the node, at once."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import Refusal
from whaleflux.rpc.channel import Channel
from whaleflux.telemetry import Event
from whaleflux.v1 import health_pb2, health_pb2_grpc
from whaleflux_agent.core.backoff import pause_s
from whaleflux_agent.supervisor import Supervisor
from whaleflux_agent.tasks import Task

_OBSERVATIONS = 1000  # the oldest are dropped: what is new matters more
_DETAIL_CHARS = 1000
_GOODBYE_S = 1.0
_log = telemetry.get_logger("whaleflux.agent")


class Observations:
    """What was seen and is not delivered yet. An id is {node}/{boot}/{sequence}; sequences start anew with the agent."""

    def __init__(self, node: str, boot: str, clock: Clock) -> None:
        self._node, self._boot, self._clock = node, boot, clock
        self._sequence = 0
        self._waiting: deque[health_pb2.Observation] = deque(maxlen=_OBSERVATIONS)
        self.on_news: Callable[[], None] = lambda: None

    def add(self, kind: str, task: Task | None, code: int, detail: str, *, gpu_index: int = -1) -> None:
        """Notes something that happened now."""
        self._sequence += 1
        seen = health_pb2.Observation(
            id=f"{self._node}/{self._boot}/{self._sequence}",
            kind=kind,
            task=task.work.task if task else "",
            job=task.work.job if task else "",
            gpu_index=gpu_index,
            code=code,
            detail=detail[:_DETAIL_CHARS],
        )
        seen.time.FromDatetime(self._clock.now())
        self._waiting.append(seen)
        self.on_news()

    def first(self) -> health_pb2.Observation | None:
        return self._waiting[0] if self._waiting else None

    def delivered(self, seen: health_pb2.Observation) -> None:
        if self._waiting and self._waiting[0] is seen:
            self._waiting.popleft()


class HeartbeatLoop:
    """Keeps one stream open."""

    def __init__(
        self,
        channel: Channel,
        hello: health_pb2.HeartbeatHello,
        supervisor: Supervisor,
        observations: Observations,
        clock: Clock,
        *,
        interval_s: float,
        probe: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._stub = health_pb2_grpc.HealthServiceStub(channel)
        self._hello, self._supervisor, self._observations = hello, supervisor, observations
        self._clock, self._interval_s, self._probe = clock, interval_s, probe
        self._news, self._leaving, self._said_goodbye = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._observations.on_news = self._news.set
        self.connected = False

    async def run(self) -> None:
        """Keeps the stream until cancelled; then says goodbye, so that the silence to come is known to be meant."""
        beating = asyncio.create_task(self._beat())
        try:
            await asyncio.shield(beating)
        finally:
            await self._goodbye()
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _beat(self) -> None:
        """Opens the stream again after every end."""
        failures = 0
        while not self._leaving.is_set():
            try:
                await self._once()
                failures = 0
            except Refusal as refusal:
                failures = 1 if self.connected else failures + 1
                level = _log.info if self.connected or failures % 20 == 1 else _log.debug
                level(Event.STREAM_BROKEN, stream="heartbeat", reason=refusal.message, failures=failures)
            finally:
                self.connected = False
            await self._clock.sleep(max(0.05, pause_s(failures, random.random())))

    async def _goodbye(self) -> None:
        """Waits at most a second for it to be sent."""
        self._leaving.set()
        self._news.set()
        if not self.connected:
            return
        try:
            async with asyncio.timeout(_GOODBYE_S):
                await self._said_goodbye.wait()
        except TimeoutError:
            pass

    async def _once(self) -> None:
        async with self._stub.Heartbeat(self._requests()) as responses:
            async for response in responses:
                if not self.connected:
                    self.connected = True
                    _log.info(Event.STREAM_OPENED, stream="heartbeat")
                await self._witness(response)

    async def _requests(self) -> AsyncIterator[health_pb2.HeartbeatRequest]:
        yield health_pb2.HeartbeatRequest(hello=self._hello)
        sequence, beat_at = 0, self._clock.monotonic()
        while not self._leaving.is_set():
            self._news.clear()
            while (seen := self._observations.first()) is not None:
                yield health_pb2.HeartbeatRequest(observation=seen)
                self._observations.delivered(seen)
            if self._clock.monotonic() >= beat_at:
                beat_at, sequence = self._clock.monotonic() + self._interval_s, sequence + 1
                beat = health_pb2.Beat(sequence=sequence, tasks=self._supervisor.running())
                yield health_pb2.HeartbeatRequest(beat=beat)
            await self._news_or_pause(beat_at - self._clock.monotonic())
        yield health_pb2.HeartbeatRequest(goodbye=health_pb2.Goodbye(restarting=True))
        self._said_goodbye.set()

    async def _news_or_pause(self, longest_s: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, longest_s)):
                await self._news.wait()
        except TimeoutError:
            pass

    async def _witness(self, response: health_pb2.HeartbeatResponse) -> None:
        for address in response.probe[:8] if self._probe else ():
            assert self._probe is not None
            await self._probe(address)
