"""TaskService: one stream per agent, and one per session with a job, served by the leader."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

import grpc
from google.protobuf.unknown_fields import UnknownFieldSet

from whaleflux import names, telemetry
from whaleflux.errors import FieldViolation, InvalidArgument, StatusError
from whaleflux.rpc import auth
from whaleflux.telemetry import Event
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import agent_pb2_grpc as rpc
from whaleflux_scheduler.agent_sessions import AgentSession
from whaleflux_scheduler.agents import Agents
from whaleflux_scheduler.attach import AttachBroker
from whaleflux_scheduler.dataset_readers import DatasetReaders
from whaleflux_scheduler.first_message import first_message
from whaleflux_scheduler.job_secrets import JobSecrets
from whaleflux_scheduler.leader_session import LeaderSession
from whaleflux_scheduler.logs import LogBroker

HELLO_S = 10.0
_log = telemetry.get_logger("whaleflux.scheduler")
_Context = grpc.aio.ServicerContext[object, object]
Request = TypeVar("Request", agent_pb2.SyncRequest, agent_pb2.AttachRequest)


class Tasks(rpc.TaskServiceServicer):
    """See the module."""

    def __init__(
        self,
        leader: LeaderSession,
        broker: LogBroker,
        attaching: AttachBroker,
        secrets: JobSecrets,
        readers: DatasetReaders,
    ) -> None:
        self._leader, self._broker, self._attaching = leader, broker, attaching
        self._secrets, self._readers = secrets, readers

    async def Sync(
        self, requests: AsyncIterator[agent_pb2.SyncRequest], context: _Context | None
    ) -> AsyncIterator[agent_pb2.SyncResponse]:
        hello = (await _first(requests)).hello
        agents = (await self._leader.leading()).agents
        session = agents.connect(hello)
        self._broker.node_connected(hello.node)
        _log.info(Event.NODE_CONNECTED, node=hello.node, tasks=len(hello.tasks))
        reading = asyncio.create_task(self._read(requests, agents, session))
        try:
            async for response in session.responses():
                yield response
        finally:
            reading.cancel()
            if agents.disconnect(session):
                self._broker.node_gone(hello.node)
            _log.info(Event.NODE_DISCONNECTED, node=hello.node)

    async def Attach(
        self, requests: AsyncIterator[agent_pb2.AttachRequest], context: _Context | None
    ) -> AsyncIterator[agent_pb2.AttachResponse]:
        await self._leader.leading()
        hello = (await _first(requests)).hello
        async with contextlib.aclosing(self._attaching.join(hello, requests)) as responses:
            async for response in responses:
                yield response

    async def OpenTaskSecrets(
        self, request: agent_pb2.OpenTaskSecretsRequest, context: _Context | None
    ) -> agent_pb2.OpenTaskSecretsResponse:
        return await self._secrets.open(request)

    async def FindDatasetReader(
        self, request: agent_pb2.FindDatasetReaderRequest, context: _Context | None
    ) -> agent_pb2.FindDatasetReaderResponse:
        return await self._readers.find(request)

    async def _read(
        self, requests: AsyncIterator[agent_pb2.SyncRequest], agents: Agents, session: AgentSession
    ) -> None:
        """What the agent sends, until it stops; ends the answers too."""
        try:
            async for request in requests:
                match request.WhichOneof("message"):
                    case "report":
                        agents.report(session, request.report)
                    case "progress":
                        for moved in request.progress.tasks:
                            agents.progress(session, moved)
                    case "data":
                        agents.data(session, request.data)
                    case "ray":
                        agents.ray(session.node, request.ray)
                    case "log":
                        await self._broker.take(session.node, request.log)
                    case _ if len(UnknownFieldSet(request)):
                        pass  # of a newer agent
                    case _:
                        raise InvalidArgument(
                            FieldViolation("message", "is not set, or a second hello; open a new stream")
                        )
            session.close()
        except StatusError as error:
            session.close(error)
        except Exception as failure:  # the transport's own errors end the stream, they are nobody's bug
            _log.info(Event.NODE_DISCONNECTED, node=session.node, reason=repr(failure)[:300])
            session.close()


async def _first(requests: AsyncIterator[Request]) -> Request:
    """The first message of a stream, which must be a hello for the caller's own node."""
    first = await first_message(requests, "hello", HELLO_S)
    names.split(first.hello.node, "sites", "nodes", field="hello.node")
    auth.require_own_node(first.hello.node)
    return first
