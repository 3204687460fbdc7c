"""A leaf connection to nats-server spoken by hand: what somebody sends who has a site's key and keeps to no rule of its server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Heard:
    """One message that the hub sent over the link."""

    subject: str
    reply: str
    headers: bytes
    data: bytes


class RawLeaf:
    """`async with RawLeaf.link(address, context) as leaf`. Once refused it is `closed`, and `refusals` says why."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.heard: list[Heard] = []
        self.interests: set[str] = set()  # what the hub says that it would like to hear
        self.refusals: list[str] = []
        self.closed, self._pongs, self._changed = False, 0, asyncio.Condition()

    @classmethod
    @contextlib.asynccontextmanager
    async def link(cls, address: str, tls: ssl.SSLContext | None, domain: str = "a", **connect: object):
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        await reader.readline()  # INFO, plain in any case
        if tls:
            await writer.start_tls(tls, server_hostname=host)
        leaf = cls(reader, writer)
        said = {
            "server_id": "X" * 56,
            "server_name": "x",
            "name": "x",
            "domain": domain,
            "headers": True,
            "jetstream": True,
        }
        leaf.send(b"CONNECT " + json.dumps({**said, "version": "2.15.1", "proto": 1, **connect}).encode() + b"\r\n")
        reading = asyncio.create_task(leaf.read())
        try:
            await leaf.settled()
            yield leaf
        finally:
            writer.close()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def subscribe(self, subject: str) -> None:
        self.send(f"LS+ {subject}\r\n".encode())

    def publish(self, subject: str, data: bytes = b"", *, reply: str = "", headers: bytes = b"") -> None:
        between = f"{reply} " if reply else ""
        if headers:
            self.send(
                f"HMSG {subject} {between}{len(headers)} {len(headers + data)}\r\n".encode() + headers + data + b"\r\n"
            )
        else:
            self.send(f"LMSG {subject} {between}{len(data)}\r\n".encode() + data + b"\r\n")

    async def settled(self) -> None:
        """Until the hub has dealt with all that was sent, or has closed the link."""
        wanted = self._pongs + 1
        self.send(b"PING\r\n")
        await self.until(lambda: self._pongs >= wanted or self.closed)

    async def until(self, condition: Callable[[], object], within_s: float = 45.0) -> None:
        async with asyncio.timeout(within_s), self._changed:
            await self._changed.wait_for(condition)

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def read(self) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while line := await self._reader.readline():
                await self._take(line)
                async with self._changed:
                    self._changed.notify_all()
        async with self._changed:
            self.closed = True
            self._changed.notify_all()

    async def _take(self, line: bytes) -> None:
        verb, _, rest = line.decode().strip().partition(" ")
        match verb:
            case "PING":
                self.send(b"PONG\r\n")
            case "PONG":
                self._pongs += 1
            case "LS+":
                self.interests.add(rest.split(" ")[0])
            case "-ERR":
                self.refusals.append(rest)
            case "LMSG" | "HMSG":
                words = rest.split(" ")
                numbers = 2 if verb == "HMSG" else 1
                body = (await self._reader.readexactly(int(words[-1]) + 2))[:-2]
                split = int(words[-2]) if verb == "HMSG" else 0
                reply = words[1] if len(words) > 1 + numbers else ""
                self.heard.append(Heard(words[0], reply, body[:split], body[split:]))
