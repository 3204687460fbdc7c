"""Asking an engine over HTTP whether it serves, and what."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol
from urllib.parse import quote

import orjson

from whaleflux import hostport

PROBE_S = 1.0
MAX_ANSWER_BYTES = 256 << 10


class EngineProbe(Protocol):
    """What the manager asks of an engine; every question has a deadline."""

    async def is_well(self, address: str, path: str) -> bool:
        """Whether GET `path` is answered with 200."""
        ...

    async def served_models(self, address: str) -> frozenset[str] | None:
        """Names in its list of models; None where it keeps no such list, or does not tell."""
        ...


class HttpProbe:
    """Over one connection a question: a health check that shares connections says little about new ones."""

    async def is_well(self, address: str, path: str) -> bool:
        status, _ = await _get(address, path, body=False)
        return status == 200

    async def served_models(self, address: str) -> frozenset[str] | None:
        status, body = await _get(address, "/v1/models", body=True)
        return _names(body) if status == 200 else None


def _names(body: bytes) -> frozenset[str] | None:
    try:
        listed = orjson.loads(body)["data"]
        names = frozenset(str(model["id"]) for model in listed)
    except (ValueError, KeyError, TypeError):
        return None
    return names or None


async def _get(address: str, path: str, *, body: bool) -> tuple[int, bytes]:
    """Status (0: no answer within `PROBE_S`) and body; HTTP/1.0, so that the body ends with the connection."""
    try:
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(*hostport.parse(address))
            try:
                head = f"GET {quote(path)} HTTP/1.0\r\nhost: {address}\r\naccept: application/json\r\n\r\n"
                writer.write(head.encode("latin-1"))
                line = await reader.readline()
                return _status(line), (await _body(reader)) if body else b""
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
        return 0, b""


def _status(line: bytes) -> int:
    parts: list[Any] = line.split(b" ")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0


async def _body(reader: asyncio.StreamReader) -> bytes:
    while (await reader.readline()).strip():
        pass
    return await reader.read(MAX_ANSWER_BYTES)
