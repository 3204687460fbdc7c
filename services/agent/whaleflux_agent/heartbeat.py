"""The stream to health_monitor: signs of life, and what was seen on the node, at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.retry import Backoff
from whaleflux.rpc.channel import Channel
from whaleflux.telemetry import Event
from whaleflux.v1 import health_pb2, health_pb2_grpc
from whaleflux_agent.observations import Observations
from whaleflux_agent.supervisor import Supervisor

GOODBYE_WITHIN_S = 3.0  # for its being stored: a change of leader takes about as long
_PROBES_AT_ONCE = 8
RETRY = Backoff()
_log = telemetry.get_logger("whaleflux.agent")


class HeartbeatLoop:
    """Keeps one stream open. `stop_kind` says, once the agent is to stop, what it announces."""

    def __init__(
        self,
        channel: Channel,
        hello: health_pb2.HeartbeatHello,
        supervisor: Supervisor,
        observations: Observations,
        clock: Clock,
        *,
        interval_s: float,
        stop_kind: Callable[[], Awaitable[health_pb2.StopKind]],
        probe: Callable[[str], Awaitable[None]],
        refused: Callable[[StatusError], None] = lambda _: None,
    ) -> None:
        self._stub = health_pb2_grpc.HealthServiceStub(channel)
        self._hello, self._supervisor, self._observations = hello, supervisor, observations
        self._clock, self._interval_s, self._probe = clock, interval_s, probe
        self._stop_kind, self._refused = stop_kind, refused
        self._goodbye: health_pb2.Goodbye | None = None
        self._changed, self._goodbye_stored = asyncio.Event(), asyncio.Event()
        self._probing: asyncio.Task[None] | None = None
        self._observations.on_change = self._changed.set
        self.connected = False

    async def announce(self) -> None:
        """Says that the agent stops, and waits until that is on record: a message that was only sent is lost with its stream."""
        self._goodbye = health_pb2.Goodbye(kind=await self._stop_kind())
        self._changed.set()
        try:
            async with asyncio.timeout(GOODBYE_WITHIN_S):
                await self._goodbye_stored.wait()
        except TimeoutError:
            _log.warning(Event.RPC_FAILED, method="Heartbeat", reason="the goodbye was not acknowledged in time")

    async def run(self) -> None:
        """Opens the stream again after every end, until the goodbye is on record."""
        failures = 0
        while not self._goodbye_stored.is_set():
            try:
                await self._once()
                failures = 0
            except StatusError as error:
                self._refused(error)
                failures = 1 if self.connected else failures + 1
                level = _log.info if self.connected or failures % 20 == 1 else _log.debug
                level(Event.STREAM_BROKEN, stream="heartbeat", reason=error.message, failures=failures)
            finally:
                self.connected = False
            await self._clock.sleep(RETRY.pause_s(failures))

    async def _once(self) -> None:
        async with self._stub.Heartbeat(self._requests()) as responses:
            async for response in responses:
                if not self.connected:
                    self.connected = True
                    _log.info(Event.STREAM_OPENED, stream="heartbeat")
                self._take(response)

    def _take(self, response: health_pb2.HeartbeatResponse) -> None:
        if response.acknowledged_observation:
            self._observations.acknowledged(response.acknowledged_observation)
        if response.goodbye_stored:
            self._goodbye_stored.set()
        if response.indirect_probes and (self._probing is None or self._probing.done()):
            self._probing = asyncio.create_task(self._probe_peers(response.indirect_probes[:_PROBES_AT_ONCE]))

    async def _requests(self) -> AsyncIterator[health_pb2.HeartbeatRequest]:
        self._hello.time.FromDatetime(self._clock.now())
        yield health_pb2.HeartbeatRequest(hello=self._hello)
        sequence, heartbeat_at, last_sent = 0, self._clock.monotonic(), ""
        while self._goodbye is None:
            self._changed.clear()
            for seen in self._observations.after(last_sent):  # on a new stream: also what nobody acknowledged
                yield health_pb2.HeartbeatRequest(observation=seen)
                last_sent = seen.id
            if self._clock.monotonic() >= heartbeat_at:
                heartbeat_at, sequence = self._clock.monotonic() + self._interval_s, sequence + 1
                heartbeat = health_pb2.Heartbeat(sequence=sequence, tasks=self._supervisor.running())
                yield health_pb2.HeartbeatRequest(heartbeat=heartbeat)
            await self._change_or_pause(heartbeat_at - self._clock.monotonic())
        for seen in self._observations.after(last_sent):
            yield health_pb2.HeartbeatRequest(observation=seen)
        yield health_pb2.HeartbeatRequest(goodbye=self._goodbye)
        await self._goodbye_stored.wait()  # the stream stands until that is answered

    async def _change_or_pause(self, longest_s: float) -> None:
        if self._goodbye is not None:
            return
        try:
            async with asyncio.timeout(max(0.0, longest_s)):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _probe_peers(self, addresses: Sequence[str]) -> None:
        await asyncio.gather(*map(self._probe, addresses))
