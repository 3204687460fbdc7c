"""Asking an engine over HTTP whether it serves, and what."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol
from urllib.parse import quote

import orjson

from whaleflux import hostport

PROBE_S = 1.0
FIRST_TOKEN_S = 120.0  # cold kernels and graphs are made by the first request
ONE_TOKEN = (
    ("/v1/completions", {"prompt": "1"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1"}]}),
)
MAX_ANSWER_BYTES, MAX_METRICS_BYTES = 256 << 10, 2 << 20


class EngineProbe(Protocol):
    """What the manager asks of an engine; every question has a deadline."""

    async def is_well(self, address: str, path: str) -> bool:
        """Whether GET `path` is answered with 200."""
        ...

    async def served_models(self, address: str) -> frozenset[str] | None:
        """Names in its list of models; None where it keeps no such list, or does not tell."""
        ...

    async def metrics(self, address: str) -> str:
        """What it exports of itself at /metrics; "" where that is nothing, or too much to read."""
        ...

    async def first_token(self, address: str, model: str) -> str:
        """What is wrong with a completion of one token; "" when it was answered, or when the engine makes no completions."""
        ...


class HttpProbe:
    """Over one connection a question: a health check that shares connections says little about new ones."""

    async def is_well(self, address: str, path: str) -> bool:
        status, _ = await _get(address, path, body=False)
        return status == 200

    async def served_models(self, address: str) -> frozenset[str] | None:
        status, body = await _get(address, "/v1/models", body=True)
        return _names(body) if status == 200 else None

    async def metrics(self, address: str) -> str:
        status, body = await _get(address, "/metrics", body=True, most=MAX_METRICS_BYTES)
        return body.decode("utf-8", "replace") if status == 200 and len(body) < MAX_METRICS_BYTES else ""

    async def first_token(self, address: str, model: str) -> str:
        for path, asked in ONE_TOKEN:
            body = orjson.dumps({"model": model, "max_tokens": 1, **asked})
            status, answer = await _ask(address, path, body, FIRST_TOKEN_S)
            if status == 200:
                return "" if _has_choices(answer) else f"its answer to {path} is no completion"
            if status not in _NO_SUCH and (not 400 <= status < 500 or status in _BUSY):
                return (
                    f"its first completion ({path}) was answered {status}"
                    if status
                    else "its first completion was not answered"
                )
        return ""  # embeddings, reranking: there is nothing to complete


_BUSY = (408, 425, 429)
_NO_SUCH = (501,)  # of servers that know no such method


def _has_choices(body: bytes) -> bool:
    try:
        return bool(orjson.loads(body)["choices"])
    except (ValueError, KeyError, TypeError):
        return False


def _names(body: bytes) -> frozenset[str] | None:
    try:
        listed = orjson.loads(body)["data"]
        names = frozenset(str(model["id"]) for model in listed)
    except (ValueError, KeyError, TypeError):
        return None
    return names or None


async def _get(address: str, path: str, *, body: bool, most: int = MAX_ANSWER_BYTES) -> tuple[int, bytes]:
    """Status (0: no answer within `PROBE_S`) and body."""
    return await _ask(address, path, None, PROBE_S, most=most if body else 0)


async def _ask(
    address: str, path: str, sent: bytes | None, within_s: float, *, most: int = MAX_ANSWER_BYTES
) -> tuple[int, bytes]:
    """The same, of a GET or with a body; HTTP/1.0, so that the answer's body ends with the connection."""
    try:
        async with asyncio.timeout(within_s):
            reader, writer = await asyncio.open_connection(*hostport.parse(address))
            try:
                head = (
                    f"{'GET' if sent is None else 'POST'} {quote(path)} HTTP/1.0\r\nhost: {address}\r\naccept: */*\r\n"
                )
                if sent is not None:
                    head += f"content-type: application/json\r\ncontent-length: {len(sent)}\r\n"
                writer.write(head.encode("latin-1") + b"\r\n" + (sent or b""))
                line = await reader.readline()
                return _status(line), (await _body(reader, most)) if most else b""
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
        return 0, b""


def _status(line: bytes) -> int:
    parts: list[Any] = line.split(b" ")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0


async def _body(reader: asyncio.StreamReader, most: int) -> bytes:
    """As long as its head says, else to the end: some engines keep the connection whatever they are told."""
    while line := (await reader.readline()).strip().lower():
        if line.startswith(b"content-length:"):
            most = min(most, int(line.partition(b":")[2]))
    found = b""
    while len(found) < most and (more := await reader.read(most - len(found))):
        found += more
    return found
