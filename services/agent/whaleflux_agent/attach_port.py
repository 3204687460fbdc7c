"""One session with a port of this node: one connection of the caller's, carried to 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib

from whaleflux.rpc.window import CHUNK_BYTES
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_agent.attach_link import Link, Refused, side_by_side

_CONNECT_S = 5.0


async def carry_connection(link: Link, port: int, begun: pb.AttachOpened) -> pb.AttachResult:
    """Until both sides have said that nothing more comes, or one has broken off. Raises Refused, CallerGone."""
    try:
        async with asyncio.timeout(_CONNECT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=CHUNK_BYTES)
    except OSError:  # a timeout is one
        raise Refused(f"nothing answers on 127.0.0.1:{port} of {begun.node}") from None
    try:
        await link.send(pb.AttachJobResponse(opened=begun))
        await side_by_side(_to_port(link, writer), _from_port(link, reader))
    except ConnectionError:
        raise Refused(f"127.0.0.1:{port} of {begun.node} broke the connection off") from None
    finally:
        writer.transport.abort()
    return pb.AttachResult()


async def _to_port(link: Link, writer: asyncio.StreamWriter) -> None:
    async for data in link.input():
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):  # it has ended already
        writer.write_eof()


async def _from_port(link: Link, reader: asyncio.StreamReader) -> None:
    while data := await reader.read(CHUNK_BYTES):
        await link.send(pb.AttachJobResponse(data=data))
    await link.send(pb.AttachJobResponse(end={}))
