"""Sessions with jobs (AttachJob): two streams that are joined, the caller's and one that the agent opens for it.

The agent's stream of reports carries only the order to open one. What a session carries never waits for reports, nor they for it:
each direction holds a few messages, and a side that does not read stops its own session alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from typing import Any

from whaleflux import names, telemetry
from whaleflux.clock import Clock
from whaleflux.errors import (
    PermissionDenied,
    ResourceExhausted,
    StatusError,
    Unavailable,
)
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth
from whaleflux.rpc.pipe import Pipe
from whaleflux.telemetry import Event
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.agent_sessions import AgentSessions
from whaleflux_scheduler.attach_checks import check_message, check_open, shown
from whaleflux_scheduler.core.attach_target import last_task, running_task
from whaleflux_scheduler.core.model import Attempt, Job, Task
from whaleflux_scheduler.first_message import first_message
from whaleflux_scheduler.session_news import SessionNews

OPEN_S = 10.0  # for the first message
CLOSE_S = 5.0  # from the last word to the caller's end of the stream
CONNECT_S = 10.0  # from the order to the agent's stream
SESSIONS, SESSIONS_PER_NODE, SESSIONS_PER_JOB = 512, 128, 64
_log = telemetry.get_logger("whaleflux.scheduler")


class AttachSession:
    """One caller and one agent."""

    def __init__(self, order: agent_pb2.AttachOrder, node: str) -> None:
        self.order, self.node = order, node
        self.up: Pipe[pb.AttachJobRequest] = Pipe()  # to the agent
        self.down: Pipe[pb.AttachJobResponse] = Pipe()  # to the caller
        self.joined = asyncio.Event()
        self.carried_bytes = 0

    def end(self, error: StatusError | None = None) -> None:
        """Ends both streams."""
        self.up.close()
        self.down.close(error)
        self.joined.set()

    async def from_caller(self, requests: AsyncIterator[pb.AttachJobRequest]) -> None:
        """What the caller sends, on to the agent."""
        await self._until_it_stops("the caller", self._take_requests(requests))

    async def from_agent(self, requests: AsyncIterator[agent_pb2.AttachRequest]) -> None:
        """What the agent sends, on to the caller."""
        await self._until_it_stops(f"the agent of {self.node}", self._take_responses(requests))

    async def _take_requests(self, requests: AsyncIterator[pb.AttachJobRequest]) -> None:
        async for request in requests:
            check_message(request)
            self.carried_bytes += len(request.data)
            await self.up.put(request)

    async def _take_responses(self, requests: AsyncIterator[agent_pb2.AttachRequest]) -> None:
        async for request in requests:
            response = request.response
            self.carried_bytes += len(response.data) + len(response.error_data)
            await self.down.put(response)
            if response.HasField("result"):
                self.down.close()

    async def _until_it_stops(self, who: str, taking: Coroutine[Any, Any, None]) -> None:
        """The session ends with either side."""
        try:
            await taking
        except StatusError as error:
            self.end(error)
        except Exception:  # the transport's own errors: that side is gone
            pass
        self.end(lost(who))

    async def responses(self) -> AsyncGenerator[pb.AttachJobResponse, None]:
        """For the caller, until the agent's last word."""
        try:
            async with asyncio.timeout(CONNECT_S):
                await self.joined.wait()
        except TimeoutError:
            raise Unavailable(
                f"the agent of {self.node} did not open the session within {CONNECT_S:g} s",
                reason=ErrorReason.NODES_UNREACHABLE,
            ) from None
        begun = False
        try:
            async for response in self.down:
                begun = begun or response.HasField("opened")
                yield response
        except StatusError as error:
            if not begun:
                raise
            # As a message behind the others: a proxy may drop those when a stream ends before its caller has ended it.
            yield pb.AttachJobResponse(result=pb.AttachResult(error=error.message, reason=error.reason))


class AttachBroker:
    """The open sessions by id. Lives in one replica; only the leader has any."""

    def __init__(self, sessions: AgentSessions, clock: Clock, news: SessionNews | None = None) -> None:
        self._agents, self._clock, self._news = sessions, clock, news or SessionNews(None, clock)
        self._open: dict[str, AttachSession] = {}

    async def serve(
        self, job: Job, opened: pb.AttachOpen, requests: AsyncIterator[pb.AttachJobRequest], submitter: str = ""
    ) -> AsyncGenerator[pb.AttachJobResponse, None]:
        """One call of AttachJob, from its first message on. Raises why there is no such session, or why it ended early."""
        check_open(opened)
        files = opened.WhichOneof("what") in ("read", "write")
        attempt, task = (last_task if files else running_task)(job, opened.rank)
        with self._session(job, attempt, task, opened) as session:
            self._tell(session, submitter)
            taking = asyncio.create_task(session.from_caller(requests))
            try:
                async with contextlib.aclosing(session.responses()) as responses:
                    async for response in responses:
                        yield response
                await asyncio.wait((taking,), timeout=CLOSE_S)
            finally:
                taking.cancel()

    async def join(
        self, hello: agent_pb2.AttachHello, requests: AsyncIterator[agent_pb2.AttachRequest]
    ) -> AsyncGenerator[agent_pb2.AttachResponse, None]:
        """The agent's stream for a session: good for one stream of the node that was asked."""
        session = self._open.get(hello.session)
        if session is None or session.joined.is_set():
            raise Unavailable("nobody waits for this session any more", reason=ErrorReason.SESSION_LOST)
        if session.node != hello.node or not secrets.compare_digest(
            session.order.secret.encode(), hello.secret.encode()
        ):
            raise PermissionDenied(f"{hello.node} was not asked for this session", reason=ErrorReason.NOT_OWN_NODE)
        session.joined.set()
        taking = asyncio.create_task(session.from_agent(requests))
        try:
            yield agent_pb2.AttachResponse()  # that it is joined
            async for request in session.up:
                yield agent_pb2.AttachResponse(request=request)
        finally:
            taking.cancel()
            session.end(lost(f"the agent of {session.node}"))

    def end(self) -> None:
        """Ends all: sessions are served elsewhere from now on."""
        for session in list(self._open.values()):
            session.end(lost("the fleet's leader"))

    @contextlib.contextmanager
    def _session(self, job: Job, attempt: Attempt, task: Task, opened: pb.AttachOpen) -> Iterator[AttachSession]:
        """Ordered from the agent; over at the end of the block."""
        caller, began_s = auth.caller(), self._clock.monotonic()
        session = self._ordered(job, attempt, task, opened, f"{caller.role}/{caller.name}")
        known = {"who": session.order.caller, "job": job.name, "rank": opened.rank, "node": task.node}
        _log.info(Event.SESSION_OPENED, **known, what=shown(opened))
        try:
            yield session
        finally:
            del self._open[session.order.session]
            session.end()
            seconds = round(self._clock.monotonic() - began_s, 3)
            _log.info(Event.SESSION_ENDED, **known, what=shown(opened), seconds=seconds, bytes=session.carried_bytes)

    def _ordered(self, job: Job, attempt: Attempt, task: Task, opened: pb.AttachOpen, caller: str) -> AttachSession:
        agent = self._agents.connected.get(task.node)
        if agent is None or not agent.open:
            raise Unavailable(
                f"{task.node}, where rank {opened.rank} of {job.name} is, is not connected now",
                reason=ErrorReason.NODES_UNREACHABLE,
            )
        self._check_room(job.name, task.node)
        order = agent_pb2.AttachOrder(
            session=names.ulid(self._clock.now().timestamp()),
            secret=secrets.token_hex(16),
            job=job.name,
            job_uid=job.uid,
            epoch=attempt.epoch,
            task=task.id,
            open=opened,
            caller=caller,
        )
        agent.send(agent_pb2.SyncResponse(attach=order))
        session = self._open[order.session] = AttachSession(order, task.node)
        return session

    def _tell(self, session: AttachSession, submitter: str) -> None:
        others = (other.order for other in self._open.values() if other is not session)
        if not any(_alike(session.order, other) for other in others):
            self._news.opened(session.order, session.node, submitter)

    def _check_room(self, job: str, node: str) -> None:
        of_node = sum(session.node == node for session in self._open.values())
        of_job = sum(session.order.job == job for session in self._open.values())
        for number, limit, whose in (
            (len(self._open), SESSIONS, "the fleet"),
            (of_node, SESSIONS_PER_NODE, node),
            (of_job, SESSIONS_PER_JOB, job),
        ):
            if number >= limit:
                raise ResourceExhausted(
                    f"{limit} sessions with {whose} are open; end some", reason=ErrorReason.TOO_MANY_SESSIONS
                )


def _alike(one: agent_pb2.AttachOrder, other: agent_pb2.AttachOrder) -> bool:
    """Connections of one caller to one port: a browser opens many."""
    return bool(one.open.port) and (one.caller, one.open) == (other.caller, other.open)


def lost(who: str) -> Unavailable:
    """How a session ends that was not ended in order."""
    changed = "the connection to the fleet changed" if who == "the fleet's leader" else f"{who} went away"
    return Unavailable(f"{changed}; what ran in the session was ended", reason=ErrorReason.SESSION_LOST)


async def opening(requests: AsyncIterator[pb.AttachJobRequest]) -> pb.AttachOpen:
    """The first message of a caller."""
    return (await first_message(requests, "open", OPEN_S)).open
