"""What tools like grpcurl ask before they call: which services there are, and what their messages look like.

Each server answers for itself. Behind the front door one of them (`Service.reflects`) answers for all, since a tool asks once, at the
one address that it knows. Both versions of the protocol are served: v1, and v1alpha, which has the same messages.
"""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from whaleflux import v1
from whaleflux.services import BY_GRPC, REFLECTION


def enable(server: Any, names: Iterable[str], *, whole_contract: bool = False) -> None:
    """Adds both versions to a `grpc.aio` server; `whole_contract`: for every service that the front door routes to."""
    servicer: Any = _WholeContract() if whole_contract else ReflectionServicer((*names, *REFLECTION))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for version in REFLECTION:
        handlers = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(version, handlers),))


class _WholeContract(ReflectionServicer):  # type: ignore[misc]  # grpc_reflection has no types
    """The whole contract. Its files are loaded at the first question, which may never come."""

    def __init__(self) -> None:
        super().__init__((*(f"whaleflux.v1.{name}" for name in BY_GRPC), *REFLECTION))

    async def ServerReflectionInfo(self, request_iterator: Any, unused_context: Any) -> Any:
        await asyncio.to_thread(_load_contract)
        async for answer in super().ServerReflectionInfo(request_iterator, unused_context):
            yield answer


def _load_contract() -> None:
    for module in pkgutil.iter_modules(v1.__path__):
        if module.name.endswith("_pb2"):
            importlib.import_module(f"{v1.__name__}.{module.name}")
