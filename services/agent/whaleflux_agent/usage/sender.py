"""Delivers batches, the oldest first; what cannot be right is dropped, all else is tried again for ever."""

from __future__ import annotations

from pathlib import Path

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import InvalidArgument, StatusError
from whaleflux.retry import Backoff, worth_repeating
from whaleflux.telemetry import Event
from whaleflux.v1 import usage_pb2, usage_pb2_grpc
from whaleflux_agent.usage.outbox import UsageOutbox

RETRY = Backoff(first_s=1.0, longest_s=60.0)
NOBODY_TAKES_IT_S = 600.0  # a suite without a console
MOST_BATCHES, MOST_BYTES = 64, 480 << 10
CALL_S = 15.0
_UNIMPLEMENTED = "UNIMPLEMENTED"
_log = telemetry.get_logger("whaleflux.agent")


class UsageSender:
    """One loop."""

    def __init__(self, outbox: UsageOutbox, stub: usage_pb2_grpc.UsageServiceStub, node: str, clock: Clock) -> None:
        self._outbox, self._stub, self._node, self._clock = outbox, stub, node, clock
        self._failures, self._told, self._at_once = 0, "", MOST_BATCHES

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._outbox.filled.wait()
            pause_s = await self.deliver()
            if pause_s:
                await self._clock.sleep(pause_s)

    async def deliver(self) -> float:
        """One call; how long to wait before the next, seconds, 0 when it was taken."""
        waiting = await self._outbox.first(self._at_once, MOST_BYTES)
        whole = [(path, batch) for path, batch in waiting if batch.node == self._node]
        if len(whole) < len(waiting):  # unreadable, or of another identity that this folder had
            await self._outbox.remove([path for path, batch in waiting if batch.node != self._node])
        if not whole:
            return 0.0
        request = usage_pb2.ReportUsageRequest(node=self._node, batches=[batch for _, batch in whole])
        request.time.FromDatetime(self._clock.now())
        try:
            answer = await self._stub.ReportUsage(request, timeout=CALL_S)
        except StatusError as error:
            return await self._refused(error, whole)
        self._failures, self._at_once = 0, MOST_BATCHES
        self._say("" if not answer.refused_records else answer.refused_reason)
        await self._outbox.remove([path for path, _ in whole])
        return 0.0

    async def _refused(self, error: StatusError, sent: list[tuple[Path, usage_pb2.UsageBatch]]) -> float:
        if error.code == _UNIMPLEMENTED:
            self._say("no console takes it: it waits in the node's outbox")
            return NOBODY_TAKES_IT_S
        if error.code == InvalidArgument.code:
            self._say(error.message)
            self._at_once = max(1, len(sent) // 2)  # fewer and fewer, until the one that is wrong is alone
            if len(sent) == 1:
                await self._outbox.remove([sent[0][0]])
            return RETRY.pause_s(1)
        if not worth_repeating(error):  # who speaks is not admitted: it may be later, with another certificate
            self._say(error.message)
        self._failures += 1
        return RETRY.pause_s(self._failures, asked_s=error.retry_after_s or 0.0)

    def _say(self, reason: str) -> None:
        """Once for each reason."""
        if reason and reason != self._told:
            _log.warning(Event.USAGE_REFUSED, reason=reason)
        self._told = reason
