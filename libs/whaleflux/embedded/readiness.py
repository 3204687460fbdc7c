"""Whether a child process answers: one GET over plain HTTP on loopback, again and again until it is ready."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable

from whaleflux import hostport
from whaleflux.errors import Unavailable


async def get(address: str, path: str, timeout_s: float, tls: ssl.SSLContext | None = None) -> bytes:
    """The whole HTTP answer of host:port, b"" when there is none in time; `tls` where it asks for a certificate."""
    host, port = hostport.parse(address)
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, ssl=tls)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
                return await reader.read(65536)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


def is_ok(answer: bytes) -> bool:
    """Whether an HTTP answer has status 200."""
    return b" 200 " in answer.split(b"\r\n", 1)[0]


async def wait_for(ready: Callable[[], Awaitable[bool]], what: str, timeout_s: float, reason: str = "") -> None:
    """Returns as soon as `ready`; raises Unavailable, naming `what`, after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await ready():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise Unavailable(f"{what} is not ready after {timeout_s:g} s; read its log", reason=reason) from None
