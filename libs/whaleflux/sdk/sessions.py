"""A session with a job (AttachJob), as its caller has it: input, signals, output, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Self

from whaleflux.errors import FailedPrecondition, StatusError, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.pipe import Pipe
from whaleflux.rpc.window import CHUNK_BYTES, Window
from whaleflux.v1 import scheduler_pb2

KEEP_ALIVE_S = 30.0
SILENT_S = 120.0  # the agent says something each 30 s
_CLOSE_S = 5.0
_TRIES, _AGAIN_S = 10, 0.3  # while a leader is elected


class SessionOver(Exception):  # named for what happened
    """Nobody takes input any more; `responses` says why."""


class JobSession:
    """`async with JobSession(client.scheduler, wanted) as session`; `stub` is the scheduler's, for asyncio.

    Entering raises what the fleet refuses it with; leaving ends what ran in it.
    """

    def __init__(self, stub: Any, wanted: scheduler_pb2.AttachOpen) -> None:
        self._stub, self._wanted = stub, wanted
        self._out: Pipe[scheduler_pb2.AttachJobRequest] = Pipe()
        self._window = Window()
        self._stream: Any = None
        self._keeping: asyncio.Task[None] | None = None
        self.opened = scheduler_pb2.AttachOpened()
        self.result: scheduler_pb2.AttachResult | None = None  # once it has ended in order

    async def __aenter__(self) -> Self:
        first = await self._begun()
        if first.HasField("result"):
            await self._stream.aclose()
            raise refused(first.result)
        self.opened = first.opened
        self._keeping = asyncio.create_task(self._keep_alive())
        return self

    async def _begun(self) -> scheduler_pb2.AttachJobResponse:
        """The first answer, from whoever leads."""
        for left in reversed(range(_TRIES)):
            self._stream = self._stub.AttachJob(self._requests(self._out))
            try:
                return await self._next()
            except StatusError as error:
                self._out.close()  # ends the requests of this try
                self._out = Pipe()
                if error.reason not in (ErrorReason.NOT_LEADER, ErrorReason.DRAINING) or not left:
                    raise
            await asyncio.sleep(_AGAIN_S)
        raise AssertionError("the last try returned or raised")

    async def __aexit__(self, *_: object) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        self._out.close()
        self._window.close()
        await self._stream.aclose()

    async def _requests(
        self, out: Pipe[scheduler_pb2.AttachJobRequest]
    ) -> AsyncIterator[scheduler_pb2.AttachJobRequest]:
        """Of one try; `out` is its own, since what reads it may go on waiting when the try has failed."""
        yield scheduler_pb2.AttachJobRequest(open=self._wanted)
        async for request in out:
            yield request

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            await self._out.put(scheduler_pb2.AttachJobRequest(keep_alive={}))

    async def _next(self) -> scheduler_pb2.AttachJobResponse:
        """The next answer that is for the caller."""
        while True:
            try:
                async with asyncio.timeout(SILENT_S):
                    response = await anext(self._stream, None)
            except TimeoutError:
                raise _lost(f"nothing came for {SILENT_S:g} s") from None
            if response is None:
                raise _lost("it ended without a word")
            match response.WhichOneof("message"):
                case "taken_bytes":
                    self._window.taken(response.taken_bytes)
                case "opened" | "data" | "error_data" | "end" | "result":
                    return response  # type: ignore[no-any-return]

    async def responses(self) -> AsyncGenerator[scheduler_pb2.AttachJobResponse, None]:
        """Data, error data, and the end of data, until the session has ended. Raises why it ended early."""
        try:
            while not (response := await self._next_begun()).HasField("result"):
                yield response
            self.result = response.result
            await self._close()
            if self.result.error:
                raise refused(self.result)
        finally:
            self._out.close()
            self._window.close()

    async def _next_begun(self) -> scheduler_pb2.AttachJobResponse:
        """As `_next`: what ends a session that has begun comes as its result, so an error is the transport's own."""
        try:
            return await self._next()
        except StatusError as error:
            if error.reason == ErrorReason.SESSION_LOST:
                raise
            raise _lost("the connection to the fleet changed") from None

    async def _close(self) -> None:
        """Ends the stream from this side, and waits for the other: else proxies reset what is still under way."""
        self._out.close()
        with contextlib.suppress(StatusError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await anext(self._stream, None)

    async def send(self, data: bytes) -> None:
        """Input, at the pace at which it is taken. Raises SessionOver."""
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            if not await self._window.spend(len(chunk)) or not await self._out.put(
                scheduler_pb2.AttachJobRequest(data=chunk)
            ):
                raise SessionOver

    async def end_input(self) -> None:
        """No more input comes."""
        await self._out.put(scheduler_pb2.AttachJobRequest(end={}))

    async def signal(self, number: int) -> None:
        await self._out.put(scheduler_pb2.AttachJobRequest(signal=number))

    async def resize(self, rows: int, columns: int) -> None:
        size = scheduler_pb2.TerminalSize(rows=rows, columns=columns)
        await self._out.put(scheduler_pb2.AttachJobRequest(resize=size))


def refused(result: scheduler_pb2.AttachResult) -> StatusError:
    """What the agent said, or the scheduler for it."""
    if result.reason == ErrorReason.SESSION_LOST:
        return Unavailable(result.error, reason=result.reason)
    return FailedPrecondition(result.error, reason=result.reason or ErrorReason.WRONG_STATE)


def _lost(why: str) -> Unavailable:
    return Unavailable(f"{why}; what ran in the session was ended", reason=ErrorReason.SESSION_LOST)
