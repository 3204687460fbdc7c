"""Ports of a rank's node under addresses of this machine: each connection is a session of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from whaleflux.cli import output
from whaleflux.errors import FieldViolation, InvalidArgument, NotFound, StatusError
from whaleflux.reasons import ErrorReason
from whaleflux.sdk.client import AsyncClient
from whaleflux.sdk.sessions import JobSession
from whaleflux.v1 import scheduler_pb2

HOST = "127.0.0.1"
CONNECTIONS = 64  # at a time: sessions that one job takes
_READ_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Forward:
    """From a port here (0: any free one) to a port there."""

    local: int
    remote: int


def parse(text: str) -> Forward:
    """[LOCAL:]REMOTE as kubectl takes it: "8888", "9000:8888", ":8888" and "0:8888" for any free port here."""
    local, colon, remote = text.rpartition(":")
    numbers = (local if colon else remote) or "0", remote
    if not all(number.isascii() and number.isdecimal() and len(number) <= 5 for number in numbers):
        raise InvalidArgument(FieldViolation("PORT", f"{text!r} is not [LOCAL:]REMOTE, such as 8888 or 9000:8888"))
    forward = Forward(int(numbers[0]), int(numbers[1]))
    if not (0 <= forward.local <= 65535 and 1 <= forward.remote <= 65535):
        raise InvalidArgument(FieldViolation("PORT", f"{text!r}: ports are 1 to 65535, and LOCAL may be 0"))
    return forward


class Forwarding:
    """Listens until it is cancelled, or the job has ended."""

    def __init__(self, client: AsyncClient, job: str, rank: int) -> None:
        self._client, self._job, self._rank = client, job, rank
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connections = 0

    async def run(self, forwards: Sequence[Forward]) -> None:
        """Raises InvalidArgument when a port here is taken, and what ended the job's part of it."""
        async with contextlib.AsyncExitStack() as stack:
            for forward in forwards:
                server = await stack.enter_async_context(await self._listening(forward))
                host, port = server.sockets[0].getsockname()
                output.say(f"{host}:{port} -> {self._job}, rank {self._rank}, port {forward.remote}")
            output.note("Ctrl-C ends it")
            await self._over

    async def _listening(self, forward: Forward) -> asyncio.Server:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._connected(forward.remote, reader, writer)

        try:
            return await asyncio.start_server(connected, HOST, forward.local, limit=_READ_BYTES)
        except OSError as error:
            advice = f"choose another port here: 0:{forward.remote} takes any free one"
            raise InvalidArgument(
                FieldViolation("PORT", f"cannot listen on {HOST}:{forward.local} ({error.strerror}); {advice}")
            ) from None

    async def _connected(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wanted = scheduler_pb2.AttachOpen(name=self._job, rank=self._rank, port=port)
        self._connections += 1
        try:
            if self._connections > CONNECTIONS:
                output.note(f"a connection was refused: {CONNECTIONS} are open")
                return
            async with JobSession(self._client.scheduler, wanted) as session:
                await _carry(session, reader, writer)
        except StatusError as error:
            self._failed(error)
        except OSError:
            pass  # the connection here was broken off
        finally:
            self._connections -= 1
            writer.transport.abort()

    def _failed(self, error: StatusError) -> None:
        """The end of one connection; the end of all when the job has ended."""
        if isinstance(error, NotFound) or error.reason == ErrorReason.JOB_ENDED:
            if not self._over.done():
                self._over.set_exception(error)
        else:
            output.note(f"a connection ended: {error.message}")


async def _carry(session: JobSession, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Both directions; each may end before the other."""
    sending = asyncio.create_task(_send(session, reader))
    try:
        async with contextlib.aclosing(session.responses()) as responses:
            async for response in responses:
                if response.HasField("end"):
                    writer.write_eof()
                else:
                    writer.write(response.data)
                    await writer.drain()
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def _send(session: JobSession, reader: asyncio.StreamReader) -> None:
    while data := await reader.read(_READ_BYTES):
        await session.send(data)
    await session.end_input()
