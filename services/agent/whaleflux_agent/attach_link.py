"""The agent's side of one session: its stream to the scheduler, input within the window, keepalives, and the news that the caller left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

from whaleflux.errors import StatusError
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.pipe import Pipe
from whaleflux.rpc.window import WINDOW_BYTES
from whaleflux.v1 import agent_pb2, agent_pb2_grpc
from whaleflux.v1 import scheduler_pb2 as pb

KEEP_ALIVE_S = 30.0
SILENT_S = 120.0  # then the caller is taken for gone: it says something each 30 s
_SAID_BYTES = WINDOW_BYTES // 4  # taken, and not said yet
_INPUT_MESSAGES = 16_384  # that wait: a key each, where a program takes none
_TRIES, _AGAIN_S = 5, 0.3  # a scheduler that does not lead may be dialled first


class CallerGone(Exception):  # named for what happened
    """Nobody wants the answer any more."""


class Refused(Exception):  # named for what happened
    """It is not done; the text says why, for people."""

    def __init__(self, text: str, reason: ErrorReason = ErrorReason.WRONG_STATE) -> None:
        super().__init__(text)
        self.reason = reason


class Link:
    """See the module. `on_control` is given resizes and signals, at once, whatever input waits."""

    def __init__(self, order: agent_pb2.AttachOrder, node: str) -> None:
        self._hello = agent_pb2.AttachHello(node=node, session=order.session, secret=order.secret)
        self._out: Pipe[pb.AttachJobResponse] = Pipe()
        self._input: Pipe[bytes] = Pipe(_INPUT_MESSAGES)  # bounded in bytes by the window
        self._waiting_bytes = self._unsaid_bytes = 0
        self.on_control: Callable[[pb.AttachJobRequest], None] = lambda _: None
        self.joined, self.gone = asyncio.Event(), asyncio.Event()  # the caller's side is there; is not any more

    async def until_joined(self) -> None:
        """Returns once the caller's side is there. Raises CallerGone when it will not be."""
        waiting = [asyncio.create_task(event.wait()) for event in (self.joined, self.gone)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        if not self.joined.is_set():
            raise CallerGone

    # towards the caller

    async def send(self, response: pb.AttachJobResponse) -> None:
        """At the pace of the caller. Raises CallerGone."""
        if not await self._out.put(response):
            raise CallerGone

    def finish(self) -> None:
        """Nothing more is sent."""
        self._out.close()

    async def keep_alive(self) -> None:
        """Runs beside; forever."""
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            if not len(self._out):
                await self._out.put(pb.AttachJobResponse(keep_alive={}))

    async def _requests(self, out: Pipe[pb.AttachJobResponse]) -> AsyncIterator[agent_pb2.AttachRequest]:
        """Of one dial: what of another goes on waiting when its call has failed must take nothing of the next."""
        yield agent_pb2.AttachRequest(hello=self._hello)
        await self.joined.wait()
        async for response in out:
            yield agent_pb2.AttachRequest(response=response)

    # from the caller

    async def input(self) -> AsyncGenerator[bytes, None]:
        """What the caller sends until it says that nothing more comes. Raises CallerGone when it never does."""
        async for data in self._input:
            yield data
            self._waiting_bytes -= len(data)
            self._unsaid_bytes += len(data)
            if self._unsaid_bytes >= _SAID_BYTES:
                said, self._unsaid_bytes = self._unsaid_bytes, 0
                await self.send(pb.AttachJobResponse(taken_bytes=said))

    async def listen(self, stub: agent_pb2_grpc.TaskServiceStub) -> None:
        """Takes what comes until the stream ends, which is the end of the session."""
        try:
            for _ in range(_TRIES):
                if not await self._dial(stub):
                    return
                self._out.close()
                self._out = Pipe()
                await asyncio.sleep(_AGAIN_S)
        finally:
            self.gone.set()
            self._out.close()
            self._input.close(CallerGone())

    async def _dial(self, stub: agent_pb2_grpc.TaskServiceStub) -> bool:
        """True: another scheduler may lead, dial again."""
        try:
            async with stub.Attach(self._requests(self._out)) as responses:
                while True:
                    async with asyncio.timeout(SILENT_S):
                        response = await anext(responses, None)
                    if response is None:
                        return False
                    self.joined.set()
                    await self._take(response.request)
        except StatusError as error:
            return error.reason == ErrorReason.NOT_LEADER and not self.joined.is_set()
        except TimeoutError:
            return False

    async def _take(self, request: pb.AttachJobRequest) -> None:
        match request.WhichOneof("message"):
            case "data":
                self._waiting_bytes += len(request.data)
                # It does not keep to what it was told, or sends so many of a byte each that they take far more than the window.
                if self._waiting_bytes > WINDOW_BYTES or len(self._input) >= _INPUT_MESSAGES:
                    raise TimeoutError
                await self._input.put(request.data)
            case "end":
                self._input.close()
            case "resize" | "signal":
                self.on_control(request)
            case _:
                pass


async def side_by_side(*works: Coroutine[Any, Any, None]) -> None:
    """Returns when all have ended; the first failure ends the others and is raised as it is."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
