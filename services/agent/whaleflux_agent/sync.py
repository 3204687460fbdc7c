"""The stream to the scheduler: reports, progress and logs go up, desired state comes down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.retry import Backoff
from whaleflux.rpc.channel import Channel
from whaleflux.telemetry import Event
from whaleflux.v1 import agent_pb2, agent_pb2_grpc
from whaleflux_agent.data_ahead import DataAhead
from whaleflux_agent.log_streams import LogStreams
from whaleflux_agent.ray_readings import RayReadings
from whaleflux_agent.reports import ReportLog
from whaleflux_agent.runtime import procfs
from whaleflux_agent.supervisor import Supervisor

RETRY = Backoff()

PROGRESS_EVERY_S = 0.5
_QUIET_S = 30.0  # then an empty message says that the stream lives: proxies end idle ones
_log = telemetry.get_logger("whaleflux.agent")


class SyncLoop:
    """Keeps one stream open for ever; without it the node goes on with the last desired set."""

    def __init__(
        self,
        channel: Channel,
        node: str,
        boot_id: str,
        supervisor: Supervisor,
        reports: ReportLog,
        clock: Clock,
        *,
        ray: RayReadings | None = None,
        machine_id: str = "",
        data: DataAhead | None = None,
        attach: Callable[[agent_pb2.AttachOrder], None] = lambda _: None,
        refused: Callable[[StatusError], None] = lambda _: None,
    ) -> None:
        self._stub = agent_pb2_grpc.TaskServiceStub(channel)
        self._node, self._boot_id, self._machine_id = node, boot_id, machine_id
        self._supervisor, self._reports, self._clock = supervisor, reports, clock
        self._attach, self._refused, self._data = attach, refused, data
        self._ray = ray or RayReadings(clock)
        self._asked_for_data = self._asked_for_ray = False  # on this stream: an older scheduler would take none of it
        self._changed = asyncio.Event()
        self.connected = False

    async def run(self) -> None:
        """Opens the stream again after every end."""
        failures = 0
        while True:
            try:
                await self._once()
                failures = 0  # the server ended it in order
            except StatusError as error:
                self._refused(error)
                failures = 1 if self.connected else failures + 1
                level = _log.info if self.connected or failures % 20 == 1 else _log.debug
                level(Event.STREAM_BROKEN, stream="sync", reason=error.message, failures=failures)
            finally:
                self.connected = False
            await self._clock.sleep(RETRY.pause_s(failures))

    async def _once(self) -> None:
        self._asked_for_data = self._asked_for_ray = False
        logs = LogStreams(self._supervisor.with_logs, self._changed.set)
        self._reports.on_change = self._ray.on_change = self._changed.set
        self._ray.begin()
        try:
            async with self._stub.Sync(self._requests(logs)) as responses:
                async for response in responses:
                    if not self.connected:
                        self.connected = True
                        _log.info(Event.STREAM_OPENED, stream="sync")
                    await self._take(response, logs)
        finally:
            await logs.close()

    async def _requests(self, logs: LogStreams) -> AsyncIterator[agent_pb2.SyncRequest]:
        hello = agent_pb2.SyncHello(
            node=self._node,
            boot_id=self._boot_id,
            machine_id=self._machine_id,
            tasks=self._supervisor.reports(),
            network=procfs.network_stack(),
        )
        hello.time.FromDatetime(self._clock.now())
        yield agent_pb2.SyncRequest(hello=hello)
        sent, progress_at = 0, self._clock.monotonic()
        quiet_at = progress_at + _QUIET_S
        said = agent_pb2.DataReport()
        while True:
            self._changed.clear()
            for report in self._reports.after(sent):
                yield agent_pb2.SyncRequest(report=report)
                sent = report.sequence
            for reading in self._ray.take() if self._asked_for_ray else ():
                yield agent_pb2.SyncRequest(ray=reading)
            if self._clock.monotonic() >= progress_at:
                progress_at = self._clock.monotonic() + PROGRESS_EVERY_S
                moved = self._supervisor.take_progress()
                if moved or progress_at > quiet_at:
                    quiet_at = progress_at + _QUIET_S
                    yield agent_pb2.SyncRequest(progress=agent_pb2.ProgressReport(tasks=moved))
                if self._data and self._asked_for_data and (now := self._data.report()) != said:
                    said = now
                    yield agent_pb2.SyncRequest(data=now)
            if chunk := logs.take():
                yield agent_pb2.SyncRequest(log=chunk)
                continue  # one chunk, then reports again: logs never delay them
            await self._change_or_pause(progress_at - self._clock.monotonic())

    async def _change_or_pause(self, longest_s: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, longest_s)):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _take(self, response: agent_pb2.SyncResponse, logs: LogStreams) -> None:
        match response.WhichOneof("message"):
            case "desired":
                await self._supervisor.desire(response.desired)
            case "changed":
                await self._supervisor.change(response.changed)
            case "removed":
                await self._supervisor.remove(response.removed)
            case "acknowledged_sequence":
                await self._reports.acknowledge(response.acknowledged_sequence)
            case "logs":
                logs.start(response.logs)
            case "cancel_logs":
                logs.cancel(response.cancel_logs)
            case "ray":
                self._asked_for_ray = True
                self._changed.set()
                self._ray.decided(response.ray)
            case "attach":
                self._attach(response.attach)
            case "data" if self._data:
                self._asked_for_data = True
                self._data.desire(response.data)
            case _:
                pass  # of a newer scheduler; what matters is in the desired set
