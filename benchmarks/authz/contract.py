"""The contract, walked: each method, how it streams, and how to call it without a generated stub."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import pkgutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message_factory import GetMessageClass

from whaleflux import v1
from whaleflux.services import BY_GRPC

UNARY_S = 10.0
TRIES = 4
CLIENTS_OWN = (
    "Internal error from Core"  # gRPC's own word in the client, when the answer came before the request was sent
)
OPEN_S = 0.25  # a stream that says nothing for so long was let in


@dataclass(frozen=True, slots=True)
class Method:
    """One rpc. `path` is "/package.Service/Name"."""

    path: str
    request: Any
    response: Any
    streams_in: bool
    streams_out: bool


def methods() -> Iterator[Method]:
    """Every rpc of the contract that the front door leads to, by walking its descriptors."""
    for module in pkgutil.iter_modules(v1.__path__):
        if not module.name.endswith("_pb2"):
            continue
        file: FileDescriptor = importlib.import_module(f"whaleflux.v1.{module.name}").DESCRIPTOR
        for service in file.services_by_name.values():
            for method in service.methods:
                if service.name not in BY_GRPC:
                    continue  # agents serve it on a port of their own
                yield Method(
                    f"/{service.full_name}/{method.name}",
                    GetMessageClass(method.input_type),
                    GetMessageClass(method.output_type),
                    method.client_streaming,
                    method.server_streaming,
                )


@dataclass(frozen=True, slots=True)
class Said:
    """How a call went: its status, its words, and the first message of an answer."""

    code: grpc.StatusCode
    details: str = ""
    response: Any = None


async def call(
    channel: grpc.aio.Channel,
    method: Method,
    request: Any,
    metadata: tuple[tuple[str, str], ...] = (),
    path: str = "",
    open_s: float = OPEN_S,
) -> Said:
    """One call to its first message; a stream that stays open for `open_s` counts as OK."""
    for attempt in range(TRIES):
        pause_s = 0.05 * 3**attempt if attempt else 0.0
        said = await _call_once(channel, method, request, metadata, path or method.path, (pause_s, open_s))
        if said.details != CLIENTS_OWN:
            break
    return said


async def _call_once(
    channel: grpc.aio.Channel,
    method: Method,
    request: Any,
    metadata: tuple[tuple[str, str], ...],
    path: str,
    times_s: tuple[float, float],
) -> Said:
    """`times_s`: before the first message of a stream, so that a refusal comes before it; and until it counts as open."""
    pause_s, open_s = times_s
    kind = ("stream" if method.streams_in else "unary") + "_" + ("stream" if method.streams_out else "unary")
    ask = getattr(channel, kind)(
        path,
        request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
        response_deserializer=method.response.FromString,
    )
    asking = ask(_once(request, pause_s) if method.streams_in else request, metadata=metadata, timeout=UNARY_S)
    try:
        if not method.streams_out:
            return Said(grpc.StatusCode.OK, response=await asking)
        async with asyncio.timeout(open_s):
            first = await asking.read()
        if first is not grpc.aio.EOF:
            return Said(grpc.StatusCode.OK, response=first)
        return Said(await asking.code(), await asking.details() or "")
    except TimeoutError:
        return Said(grpc.StatusCode.OK)
    except grpc.aio.AioRpcError as error:
        return Said(error.code(), error.details() or "")
    finally:
        with contextlib.suppress(Exception):
            asking.cancel()


async def _once(request: Any, pause_s: float) -> AsyncIterator[Any]:
    await asyncio.sleep(pause_s)
    yield request
    await asyncio.sleep(2 * OPEN_S)  # the half that the caller keeps open
