"""TaskService: one stream per agent, served by the leader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from whaleflux import names, telemetry
from whaleflux.errors import FieldViolation, Invalid, Refusal
from whaleflux.rpc import auth
from whaleflux.telemetry import Event
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import agent_pb2_grpc as rpc
from whaleflux_scheduler.brain import Brain
from whaleflux_scheduler.hub import Connection
from whaleflux_scheduler.logs import LogDesk
from whaleflux_scheduler.term import Term

HELLO_S = 10.0
_log = telemetry.get_logger("whaleflux.scheduler")
_Context = grpc.aio.ServicerContext[object, object]


class Tasks(rpc.TaskServiceServicer):
    """See the module."""

    def __init__(self, term: Term, desk: LogDesk) -> None:
        self._term, self._desk = term, desk

    async def Sync(
        self, requests: AsyncIterator[agent_pb2.SyncRequest], context: _Context | None
    ) -> AsyncIterator[agent_pb2.SyncResponse]:
        hello = await _hello(requests)
        brain = await self._term.leading()
        connection = brain.agents.connect(hello)
        _log.info(Event.NODE_CONNECTED, node=hello.node, tasks=len(hello.tasks))
        reading = asyncio.create_task(self._read(requests, brain, connection))
        try:
            async for response in connection.responses():
                yield response
        finally:
            reading.cancel()
            if brain.agents.disconnect(connection):
                self._desk.node_gone(hello.node)
            _log.info(Event.NODE_DISCONNECTED, node=hello.node)

    async def _read(self, requests: AsyncIterator[agent_pb2.SyncRequest], brain: Brain, connection: Connection) -> None:
        """What the agent sends, until it stops; ends the answers too."""
        try:
            async for request in requests:
                match request.WhichOneof("message"):
                    case "report":
                        brain.agents.report(connection, request.report)
                    case "progress":
                        for moved in request.progress.tasks:
                            brain.agents.progress(connection, moved)
                    case "log":
                        await self._desk.take(request.log)
                    case _:
                        raise Invalid(FieldViolation("message", "is not set, or a second hello; open a new stream"))
            connection.close()
        except Refusal as refusal:
            connection.close(refusal)
        except Exception as broken:  # the transport's own errors end the stream, they are nobody's bug
            _log.info(Event.NODE_DISCONNECTED, node=connection.node, reason=repr(broken)[:300])
            connection.close()


async def _hello(requests: AsyncIterator[agent_pb2.SyncRequest]) -> agent_pb2.SyncHello:
    try:
        async with asyncio.timeout(HELLO_S):
            first = await anext(requests)
    except (TimeoutError, StopAsyncIteration):
        raise Invalid(FieldViolation("hello", f"must be the first message, within {HELLO_S:g} s")) from None
    if first.WhichOneof("message") != "hello":
        raise Invalid(FieldViolation("hello", "must be the first message of the stream"))
    names.split(first.hello.node, "sites", "nodes", field="hello.node")
    auth.require_own_node(first.hello.node)
    return first.hello
