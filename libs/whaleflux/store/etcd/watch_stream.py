"""One stream to etcd for all watches of a store, and one question a second that shows for all of them that it lives.

A stream per watch would cost a connection, a question and an answer each second for every watched prefix. Here a reader hands each answer
to the watch that it belongs to. A watch whose reader is slower than the store is ended alone, with what it has not read yet, and begins
again where it was: nobody waits for it, and what is kept for it is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from aetcd import rpc

from whaleflux.store.etcd.connection import CONNECT_S, REQUIRE_LEADER, Endpoints, EtcdLink, now_s, status_error

PROGRESS_S, SILENCE_S = 1.0, 3.0  # ask an open stream for a sign of life; without any it counts as broken
BUFFER_BYTES = 8 << 20  # of answers that one watch has not read yet
_ORDERED_PROGRESS = (3, 5, 8)  # older servers' answers to that question overtake events still under way
_PROGRESS = rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())


class BrokenError(Exception):
    """Only one stream is over, the watch is not."""


class BehindError(BrokenError):
    """This member knows less than another one has told: the stream is left for all."""


class Inbox:
    """What the stream has for one watch and the watch has not read yet. `ordered`: progress comes in order with events."""

    def __init__(self, *, ordered: bool) -> None:
        self.ordered = ordered
        self.id: int | None = None  # the server's, once it is known; the first of a stream has 0
        self._answers: deque[Any] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._end: Exception | None = None

    @property
    def ended(self) -> bool:
        return self._end is not None

    def put(self, answer: Any) -> None:
        if self._end is not None:
            return
        self._bytes += answer.ByteSize()
        self._answers.append(answer)
        self._changed.set()
        if self._bytes > BUFFER_BYTES:
            self.end(BrokenError(f"it was read too slowly: {self._bytes} bytes wait"))

    def end(self, reason: Exception) -> None:
        """Nothing more comes; `get` raises the reason after what is there."""
        self._end = self._end or reason
        self._changed.set()

    async def get(self) -> Any:
        while not self._answers:
            if self._end is not None:
                raise self._end
            self._changed.clear()
            await self._changed.wait()
        answer = self._answers.popleft()
        self._bytes -= answer.ByteSize()
        return answer


class _Stream:
    """One call on a channel of its own. Whatever ends it ends every inbox with that reason."""

    def __init__(self, channel: grpc.aio.Channel, *, ordered: bool) -> None:
        self._channel, self._ordered = channel, ordered
        self._call = rpc.WatchStub(channel).Watch(metadata=REQUIRE_LEADER)
        self._requests: asyncio.Queue[Any] = asyncio.Queue()  # bounded by the watches that begin and end
        self._asked: deque[Inbox | None] = deque()  # whose creation is not answered yet, in the order of the requests
        self._inboxes: dict[int, Inbox] = {}
        self._heard = True  # anything since the last question
        self._end: Exception | None = None
        self._running = asyncio.get_running_loop().create_task(self._run())

    @property
    def ended(self) -> bool:
        return self._end is not None

    @property
    def used(self) -> bool:
        return bool(self._inboxes or any(inbox and not inbox.ended for inbox in self._asked))

    def add(self, create: Any) -> Inbox:
        inbox = Inbox(ordered=self._ordered)
        self._create(create, inbox)
        return inbox

    def remove(self, inbox: Inbox) -> None:
        """The server is told when it knows the watch; a creation that is still under way is cancelled once it is answered."""
        inbox.end(BrokenError("left"))
        if inbox.id is not None and self._inboxes.pop(inbox.id, None) is not None:
            self._requests.put_nowait(rpc.WatchRequest(cancel_request=rpc.WatchCancelRequest(watch_id=inbox.id)))

    def fail(self, reason: Exception) -> None:
        if self._end is None:
            self._end = reason
            self._running.cancel()

    async def close(self) -> None:
        self.fail(BrokenError("closed"))
        await asyncio.wait({self._running})

    def _create(self, create: Any, inbox: Inbox | None) -> None:
        self._asked.append(inbox)
        self._requests.put_nowait(rpc.WatchRequest(create_request=create))

    async def _run(self) -> None:
        writing = asyncio.create_task(self._write())
        try:
            await self._read()
        except (BrokenError, grpc.aio.AioRpcError) as error:
            self._end = self._end or (_broken_or_refused(error) if isinstance(error, grpc.aio.AioRpcError) else error)
        finally:
            self._end = self._end or BrokenError("ended")
            for inbox in (*self._inboxes.values(), *filter(None, self._asked)):
                inbox.end(self._end)
            writing.cancel()
            self._call.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            await self._channel.close()

    async def _write(self) -> None:
        """Sends what is to be sent; and each second, when nothing is to be sent, a question. Its failures are the reader's to report."""
        while True:
            try:
                async with asyncio.timeout(PROGRESS_S - now_s() % PROGRESS_S):
                    request = await self._requests.get()
            except TimeoutError:
                request = self._question()
            await self._call.write(request)

    def _question(self) -> Any:
        """Since 3.5.14 a server does not answer for progress before the first write after a watch began.

        So after a second without anything a watch is asked for under an id that is taken: that is refused, always and at once.
        """
        if self._heard or not self._inboxes:
            self._heard = False
            return _PROGRESS
        taken = next(iter(self._inboxes.values()))
        self._asked.append(None)
        return rpc.WatchRequest(create_request=rpc.WatchCreateRequest(key=b"\0", watch_id=taken.id))

    async def _read(self) -> None:
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):  # wait_for loses cancellations in 3.11
                    answer = await self._call.read()
            except TimeoutError:
                raise BrokenError(f"silent for {SILENCE_S:g} s") from None
            if answer is grpc.aio.EOF:
                raise BrokenError("ended by the server")
            self._heard = True
            self._hand_out(answer)

    def _hand_out(self, answer: Any) -> None:
        if answer.created:
            self._created(answer)
        elif answer.watch_id == -1:  # progress, which concerns all
            for each in self._inboxes.values():
                each.put(answer)
        elif (inbox := self._inboxes.get(answer.watch_id)) is not None:
            inbox.put(answer)
            if answer.canceled:
                del self._inboxes[answer.watch_id]
            elif inbox.ended:  # full
                self.remove(inbox)

    def _created(self, answer: Any) -> None:
        inbox = self._asked.popleft()
        if inbox is None:
            return
        if not answer.canceled:
            inbox.id = answer.watch_id
            self._inboxes[inbox.id] = inbox
        inbox.put(answer)
        if inbox.ended:
            self.remove(inbox)


class WatchStreams:
    """The stream that all watches of a store share: opened with the first, replaced when it ends, closed with the last."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self._stream: _Stream | None = None
        self._opening = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def watching(self, create: Any) -> AsyncGenerator[Inbox, None]:
        """The answers to one watch. Raises BrokenError when no stream can be opened."""
        stream = await self._open()
        inbox = stream.add(create)
        try:
            yield inbox
        except BehindError as reason:
            stream.fail(reason)
            raise
        finally:
            stream.remove(inbox)
            if not stream.used:
                await stream.close()

    async def _open(self) -> _Stream:
        async with self._opening:
            if self._stream is None or self._stream.ended:
                self._stream = None
                channel = self._endpoints.open()
                try:
                    self._stream = _Stream(channel, ordered=await _progress_is_ordered(channel))
                finally:
                    if self._stream is None:
                        await channel.close()
            return self._stream


async def _progress_is_ordered(channel: grpc.aio.Channel) -> bool:
    """Asks the member for its version; also the first sign of life of a new stream."""
    if not await EtcdLink(channel).ready(CONNECT_S):
        raise BrokenError(f"not reachable within {CONNECT_S:g} s")
    try:
        status = await rpc.MaintenanceStub(channel).Status(rpc.StatusRequest(), timeout=SILENCE_S)
    except grpc.aio.AioRpcError as error:
        raise _broken_or_refused(error) from error
    numbers = status.version.partition("-")[0].split(".")
    return tuple(int(number) for number in numbers) >= _ORDERED_PROGRESS


def _broken_or_refused(error: grpc.aio.AioRpcError) -> Exception:
    if error.code() in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}:
        return status_error(error)
    return BrokenError(f"{error.code().name}: {error.details()}")
