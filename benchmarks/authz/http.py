"""Each HTTP path of the inference API, and paths that are none, for each kind of key: against `frontdoor.http_paths`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from whaleflux.frontdoor.http_paths import HTTP_PATHS, HttpPath

if TYPE_CHECKING:
    from benchmarks.authz.fleet import World

ENGINE_KIND = "vllm"
# What engines serve beside the API, and detours to it: nobody's, whatever the key.
NOBODYS = (
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/metrics", "/metrics", "/v1/internal/state", "/v1/start_profile",
    "/v1/chat/completions/", "/v1/chat%2fcompletions", "/v1/x/../load_lora_adapter", "/V1/chat/completions",
    "/v1/chat/completions/../../metrics", "/tokenize", "/sleep", "/reset_prefix_cache", "/collective_rpc", "/", "/v1", "/v1/",
)  # fmt: skip


@dataclass(slots=True)
class Walked:
    """Requests made, those that reached an engine or the list of models, and answers that the table does not give."""

    calls: int = 0
    let_in: int = 0
    surprises: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Engine:
    """Answers everything with 200 and remembers what came: what reaches it has passed the front door."""

    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection after another's request, until it is closed."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n"):
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                await reader.readexactly(int(headers.get("content-length", "0")))
                path = head[0].split(" ")[1]
                if path != "/health":
                    self.paths.append(path)
                    self.headers.append(headers)
                body = b'{"object":"ok","choices":[{"text":"x"}]}'  # also to who asks whether it makes tokens
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
                    + body
                )
        writer.close()


@contextlib.asynccontextmanager
async def engine() -> AsyncIterator[tuple[Engine, int]]:
    """An engine on a free port of loopback."""
    made = Engine()
    server = await asyncio.start_server(made.answer, "127.0.0.1", 0)
    async with server:
        yield made, server.sockets[0].getsockname()[1]


def wanted(row: HttpPath | None, key: str) -> frozenset[int]:
    """The statuses that are right. `key`: "none", "wrong", "ended", "other model", "own"."""
    if row is not None and row.who == "anyone":
        return frozenset({200})
    if key in ("none", "wrong", "ended"):
        return (
            frozenset({401, 429}) if row is not None else frozenset({400, 401, 404, 429})
        )  # 429: so many without a key
    if row is None:
        return frozenset({400, 404, 405})
    if row.path == "/v1/models":
        return frozenset({200})
    return frozenset({200}) if key == "own" and ENGINE_KIND in row.engines else frozenset({403, 404})


async def ask(port: int, method: str, path: str, secret: str, model: str, extra: str = "") -> int:
    """The status of one request; 0: the connection was closed without one."""
    body = (
        json.dumps({"model": model, "prompt": "x", "input": "x", "messages": []}).encode() if method == "POST" else b""
    )
    key = f"authorization: Bearer {secret}\r\n" if secret else ""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\n{key}{extra}content-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        async with asyncio.timeout(10):
            line = await reader.readline()
        return int(line.split(b" ")[1]) if line else 0
    finally:
        writer.close()


async def matrix(world: World) -> Walked:
    """Every row of the table and every path that is none, for each kind of key."""
    walked, port = Walked(), world.suite.ports["http"]
    asked: list[tuple[HttpPath | None, str, str]] = [(row, row.method, row.path) for row in HTTP_PATHS]
    asked += [(None, method, path) for path in NOBODYS for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS")]
    for row, method, path in asked:
        for kind, secret in world.api_keys.items():
            status = await ask(port, method, path, secret, world.model)
            walked.calls += 1
            walked.let_in += status == 200
            if status not in wanted(row, kind):
                walked.surprises.append(
                    f"{method} {path} with {kind} key: wanted {sorted(wanted(row, kind))}, got {status}"
                )
    rows = {row.path for row in HTTP_PATHS}
    walked.surprises += [f"the engine was asked for {path}" for path in world.engine.paths if path not in rows]
    return walked
