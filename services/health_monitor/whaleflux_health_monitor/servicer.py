"""HealthService: heartbeats and reported failures go to the leader's session, reads come from the store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument, NotFound
from whaleflux.reasons import What
from whaleflux.rpc import auth
from whaleflux.rpc.paging import list_page, page_size
from whaleflux.rpc.watching import fill, watch_resources
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.store.reading import read_all
from whaleflux.trust import ownership
from whaleflux.trust.audit import Audit, AuditRecord, NoAudit
from whaleflux.trust.ownership import OPEN, Access
from whaleflux.trust.sight import Sight
from whaleflux.trust.watched import Rules, Watched
from whaleflux.v1 import health_pb2 as pb
from whaleflux.v1 import health_pb2_grpc as rpc
from whaleflux_health_monitor import convert
from whaleflux_health_monitor.campaign import Campaign
from whaleflux_health_monitor.leader_session import LeaderSession, not_leader

HELLO_WITHIN_S = 10.0
ACKNOWLEDGE_EVERY_S = 1.0
MAX_TASKS = 256
MAX_NODES = 20_000
Context = Any  # grpc.aio's, which no rpc here needs
T = TypeVar("T")


class HealthServicer(rpc.HealthServiceServicer):
    """`stopping` is set when this process goes: streams that it ends itself are no evidence."""

    def __init__(
        self,
        store: Store,
        campaign: Campaign,
        clock: Clock,
        stopping: asyncio.Event,
        access: Callable[[str], Access] = lambda _: OPEN,
        trail: Audit | None = None,
    ) -> None:
        self._trail: Audit = NoAudit() if trail is None else trail
        self._store, self._campaign, self._clock, self._stopping = store, campaign, clock, stopping
        self._access = access

    async def Heartbeat(
        self, requests: AsyncIterator[pb.HeartbeatRequest], context: Context
    ) -> AsyncIterator[pb.HeartbeatResponse]:
        session = await self._campaign.current()
        async with contextlib.aclosing(_while(requests, session)) as messages:
            hello = await _hello(messages)
            stream = session.hello(hello)
            try:
                yield pb.HeartbeatResponse()  # tells the agent that its stream stands
                async for response in self._listen(session, hello.node, stream, messages):
                    yield response
            finally:
                if not self._stopping.is_set():
                    session.stream_ended(hello.node, stream)

    async def _listen(
        self, session: LeaderSession, node: str, stream: int, messages: AsyncIterator[pb.HeartbeatRequest]
    ) -> AsyncIterator[pb.HeartbeatResponse]:
        acknowledged_s = float("-inf")
        async for message in messages:
            which = message.WhichOneof("message")
            if which == "heartbeat":
                _check_heartbeat(message.heartbeat)
                dial = session.heartbeat(node, stream, message.heartbeat)
                now_s = self._clock.monotonic()
                if dial or now_s - acknowledged_s >= ACKNOWLEDGE_EVERY_S:
                    acknowledged_s = now_s
                    yield pb.HeartbeatResponse(acknowledged=message.heartbeat.sequence, indirect_probes=dial)
            elif which == "observation":
                session.observed(node, message.observation)
                if message.observation.kind == What.RANK_REFUSED:
                    self._trail.record(_refused_rank(node, message.observation))
                yield pb.HeartbeatResponse(acknowledged_observation=message.observation.id)
            elif which == "goodbye":
                await session.goodbye(node, stream, message.goodbye.kind)
                yield pb.HeartbeatResponse(goodbye_stored=True)
                return

    async def ReportFailure(self, request: pb.ReportFailureRequest, context: Context) -> pb.Incident:
        _check_failure(request)
        session = await self._campaign.current()
        return await session.failed(convert.failure_of(request), request.traceparent)

    async def GetNodeHealth(self, request: pb.GetNodeHealthRequest, context: Context) -> pb.NodeHealth:
        names.split(request.name, "sites", "nodes")
        entry = await self._store.get(keys.of_name(keys.NODE_HEALTH, request.name))
        if entry is None:
            raise NotFound("node_health", request.name, "no node of that name has registered")
        return convert.health_of(entry)

    async def ListNodeHealth(self, request: pb.ListNodeHealthRequest, context: Context) -> pb.ListNodeHealthResponse:
        size = page_size(request.page_size, default=500, most=5000)
        page = await list_page(self._store, keys.NODE_HEALTH, convert.health_of, size=size, token=request.page_token)
        return pb.ListNodeHealthResponse(
            node_health=page.items,
            next_page_token=page.next_page_token,
            resource_version=page.revision,
            unreadable=page.unreadable,
        )

    async def WatchNodeHealth(
        self, request: pb.WatchNodeHealthRequest, context: Context
    ) -> AsyncIterator[pb.WatchNodeHealthResponse]:
        changes = watch_resources(
            self._store, keys.NODE_HEALTH, request.resource_version, convert.health_of, clock=self._clock
        )
        async for change in changes:
            yield fill(pb.WatchNodeHealthResponse(), change)

    async def GetIncident(self, request: pb.GetIncidentRequest, context: Context) -> pb.Incident:
        names.split(request.name, "incidents")
        sight = self._sight()
        entry = await self._store.get(keys.of_name(keys.INCIDENTS, request.name))
        if entry is None:
            raise NotFound("incident", request.name)
        return shown_incident(convert.incident_of(entry), sight)

    async def ListIncidents(self, request: pb.ListIncidentsRequest, context: Context) -> pb.ListIncidentsResponse:
        size, sight = page_size(request.page_size), self._sight()
        snapshot = await self._store.list(keys.INCIDENTS)  # the leader keeps at most about a thousand
        read = read_all(snapshot.entries, convert.incident_of)
        incidents = [incident for _, incident in read.values]
        incidents.sort(key=lambda i: (i.start_time.ToNanoseconds(), i.name), reverse=True)
        shown = [i for i in incidents if request.show_ended or not i.HasField("end_time")]
        page, token = _page(shown, size, request.page_token)
        unreadable = map(keys.name_of, read.unreadable)
        told = (shown_incident(incident, sight) for incident in page)
        return pb.ListIncidentsResponse(
            incidents=told, next_page_token=token, unreadable=unreadable, resource_version=snapshot.revision
        )

    async def WatchIncidents(
        self, request: pb.WatchIncidentsRequest, context: Context
    ) -> AsyncIterator[pb.WatchIncidentsResponse]:
        sight = self._sight()
        everybodys: Rules[pb.Incident] = Rules(hides=lambda _: False, names=lambda _: True, queues=sight.asked)
        seen = Watched(sight, self._clock, everybodys)
        changes = watch_resources(
            self._store, keys.INCIDENTS, request.resource_version, convert.incident_of, clock=self._clock
        )
        async with contextlib.aclosing(changes):
            async for change in changes:
                if (told := seen.as_told(change)) is not None:
                    shown = None if told.value is None else shown_incident(told.value, sight)
                    yield fill(pb.WatchIncidentsResponse(), told, shown)

    def _sight(self) -> Sight:
        ownership.note_asked()
        return Sight(auth.principal(), self._access)


def shown_incident(incident: pb.Incident, sight: Sight) -> pb.Incident:
    """What happened to nodes is everybody's to know; which jobs it hit, and the last words of a program, are not. Changes it."""
    if sight.everything:
        return incident
    incident.message = sight.cleaned(incident.message.partition("\n")[0])
    incident.action = sight.cleaned(incident.action)
    incident.jobs[:] = sight.known(incident.jobs)
    incident.ClearField("traceparents")
    for by_job in (incident.epochs, incident.failed):
        for job in [job for job in by_job if not sight.sees_named(job)]:
            del by_job[job]
    return incident


async def _while(requests: AsyncIterator[T], session: LeaderSession) -> AsyncGenerator[T, None]:
    """The requests, until the leadership ends: then NOT_LEADER."""
    ended = asyncio.ensure_future(session.ended.wait())
    following: asyncio.Future[T] | None = None
    iterator = aiter(requests)
    try:
        while True:
            following = asyncio.ensure_future(anext(iterator))
            await asyncio.wait({following, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                raise not_leader("")
            try:
                message = following.result()
            except StopAsyncIteration:
                return
            yield message
    finally:
        ended.cancel()
        if following is not None:
            following.cancel()


def _refused_rank(node: str, seen: pb.Observation) -> AuditRecord:
    """What the audit trail keeps of a process of a job that asked its agent for what is not its own, as that agent tells it."""
    call, _, rest = seen.detail.partition(" ")
    reason, _, said = rest.partition(": ")
    return AuditRecord(
        f"rank/{seen.job or '-'}",
        "",
        f"rank socket {call}",
        seen.job or node,
        "PERMISSION_DENIED",
        reason,
        node,
        after=said,
    )


async def _hello(messages: AsyncIterator[pb.HeartbeatRequest]) -> pb.HeartbeatHello:
    try:
        async with asyncio.timeout(HELLO_WITHIN_S):
            first = await anext(messages, pb.HeartbeatRequest())
    except TimeoutError:
        first = pb.HeartbeatRequest()
    if first.WhichOneof("message") != "hello":
        raise InvalidArgument(FieldViolation("hello", f"must be the first message, within {HELLO_WITHIN_S:g} s"))
    names.split(first.hello.node, "sites", "nodes", field="hello.node")
    auth.require_own_node(first.hello.node)
    if len(first.hello.boot_id) > 64 or len(first.hello.machine_id) > 64 or len(first.hello.probe_address) > 253:
        raise InvalidArgument(
            FieldViolation("hello", "boot_id and machine_id have at most 64 characters, probe_address 253")
        )
    return first.hello


def _check_heartbeat(heartbeat: pb.Heartbeat) -> None:
    if len(heartbeat.tasks) > MAX_TASKS:
        raise InvalidArgument(
            FieldViolation("heartbeat.tasks", f"{len(heartbeat.tasks)} tasks; a node runs at most {MAX_TASKS}")
        )
    if any(len(t.job) > 256 or len(t.task) > 256 or len(t.traceparent) > 128 for t in heartbeat.tasks):
        raise InvalidArgument(FieldViolation("heartbeat.tasks", "names have at most 256 characters, traceparents 128"))


def _check_failure(request: pb.ReportFailureRequest) -> None:
    names.split(request.job, "queues", "jobs", field="job")
    wrong = []
    if request.epoch < 1:
        wrong.append(FieldViolation("epoch", f"{request.epoch}: epochs start at 1"))
    if not 0 < len(request.task) <= 256:
        wrong.append(FieldViolation("task", "1 to 256 characters"))
    if len(request.message) > 10_000:
        wrong.append(FieldViolation("message", f"{len(request.message)} characters; use at most 10000"))
    if len(request.nodes) > MAX_NODES or len(request.disconnected_nodes) > MAX_NODES:
        wrong.append(FieldViolation("nodes", f"at most {MAX_NODES}"))
    if wrong:
        raise InvalidArgument(wrong)


def _page(incidents: Sequence[pb.Incident], size: int, token: str) -> tuple[Sequence[pb.Incident], str]:
    """A token is the name of the last incident shown; newer ones that came meanwhile are before it."""
    start = 0
    if token:
        at = next((i for i, incident in enumerate(incidents) if incident.name == token), None)
        if at is None:
            raise InvalidArgument(FieldViolation("page_token", "is no longer in the list; start again without one"))
        start = at + 1
    page = incidents[start : start + size]
    return page, page[-1].name if start + size < len(incidents) else ""
