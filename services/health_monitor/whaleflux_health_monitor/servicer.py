"""HealthService: heartbeats and reported failures go to the leader's watch, reads come from the store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, TypeVar

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, Invalid, NotFound
from whaleflux.rpc import auth
from whaleflux.rpc.paging import list_page, page_size
from whaleflux.rpc.watching import Kind, watch_resources
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.v1 import health_pb2 as pb
from whaleflux.v1 import health_pb2_grpc as rpc
from whaleflux_health_monitor import convert
from whaleflux_health_monitor.leading import Leading, Watch, not_leader

HELLO_WITHIN_S = 10.0
ACKNOWLEDGE_EVERY_S = 1.0
MAX_TASKS = 256
MAX_NODES = 20_000
Context = Any  # grpc.aio's, which no rpc here needs
T = TypeVar("T")


class HealthServicer(rpc.HealthServiceServicer):
    """`stopping` is set when this process goes: streams that it ends itself are no evidence."""

    def __init__(self, store: Store, leading: Leading, clock: Clock, stopping: asyncio.Event) -> None:
        self._store, self._leading, self._clock, self._stopping = store, leading, clock, stopping

    async def Heartbeat(
        self, requests: AsyncIterator[pb.HeartbeatRequest], context: Context
    ) -> AsyncIterator[pb.HeartbeatResponse]:
        watch = await self._leading.leading()
        async with contextlib.aclosing(_while(requests, watch)) as messages:
            hello = await _hello(messages)
            stream = watch.hello(hello)
            try:
                yield pb.HeartbeatResponse()  # tells the agent that its stream stands
                async for response in self._listen(watch, hello.node, stream, messages):
                    yield response
            finally:
                if not self._stopping.is_set():
                    watch.stream_ended(hello.node, stream)

    async def _listen(
        self, watch: Watch, node: str, stream: int, messages: AsyncIterator[pb.HeartbeatRequest]
    ) -> AsyncIterator[pb.HeartbeatResponse]:
        acknowledged_s = float("-inf")
        async for message in messages:
            which = message.WhichOneof("message")
            if which == "beat":
                _check_beat(message.beat)
                dial = watch.beat(node, stream, message.beat)
                now_s = self._clock.monotonic()
                if dial or now_s - acknowledged_s >= ACKNOWLEDGE_EVERY_S:
                    acknowledged_s = now_s
                    yield pb.HeartbeatResponse(acknowledged=message.beat.sequence, probe=dial)
            elif which == "observation":
                watch.observed(node, message.observation)
            elif which == "goodbye":
                watch.goodbye(node, stream, restarting=message.goodbye.restarting)
                return

    async def ReportFailure(self, request: pb.ReportFailureRequest, context: Context) -> pb.Incident:
        _check_failure(request)
        watch = await self._leading.leading()
        return await watch.failed(convert.failure_of(request), request.traceparent)

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
            node_health=page.items, next_page_token=page.next_page_token, resource_version=page.revision
        )

    async def WatchNodeHealth(
        self, request: pb.WatchNodeHealthRequest, context: Context
    ) -> AsyncIterator[pb.WatchNodeHealthResponse]:
        changes = watch_resources(
            self._store, keys.NODE_HEALTH, request.resource_version, convert.health_of, clock=self._clock
        )
        async for change in changes:
            response = pb.WatchNodeHealthResponse(resource_version=change.resource_version)
            if change.kind is Kind.BOOKMARK:
                response.bookmark.SetInParent()
            elif change.kind is Kind.DELETED:
                site, node = change.key.removeprefix(keys.NODE_HEALTH).split("/")
                response.deleted = names.node(site, node)
            elif change.value is not None:
                getattr(response, change.kind.value).CopyFrom(change.value)
            yield response

    async def GetIncident(self, request: pb.GetIncidentRequest, context: Context) -> pb.Incident:
        names.split(request.name, "incidents")
        entry = await self._store.get(keys.of_name(keys.INCIDENTS, request.name))
        if entry is None:
            raise NotFound("incident", request.name)
        return convert.incident_of(entry)

    async def ListIncidents(self, request: pb.ListIncidentsRequest, context: Context) -> pb.ListIncidentsResponse:
        size = page_size(request.page_size)
        snapshot = await self._store.list(keys.INCIDENTS)  # the leader keeps at most about a thousand
        incidents = [convert.incident_of(entry) for entry in snapshot.entries]
        incidents.sort(key=lambda i: (i.start_time.ToNanoseconds(), i.name), reverse=True)
        shown = [i for i in incidents if request.show_ended or not i.HasField("end_time")]
        page, token = _page(shown, size, request.page_token)
        return pb.ListIncidentsResponse(incidents=page, next_page_token=token)


async def _while(requests: AsyncIterator[T], watch: Watch) -> AsyncGenerator[T, None]:
    """The requests, until the leadership ends: then NOT_LEADER."""
    ended = asyncio.ensure_future(watch.ended.wait())
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


async def _hello(messages: AsyncIterator[pb.HeartbeatRequest]) -> pb.HeartbeatHello:
    try:
        async with asyncio.timeout(HELLO_WITHIN_S):
            first = await anext(messages, pb.HeartbeatRequest())
    except TimeoutError:
        first = pb.HeartbeatRequest()
    if first.WhichOneof("message") != "hello":
        raise Invalid(FieldViolation("hello", f"must be the first message, within {HELLO_WITHIN_S:g} s"))
    names.split(first.hello.node, "sites", "nodes", field="hello.node")
    auth.require_own_node(first.hello.node)
    if len(first.hello.boot_id) > 64 or len(first.hello.probe_address) > 253:
        raise Invalid(FieldViolation("hello", "boot_id has at most 64 characters, probe_address 253"))
    return first.hello


def _check_beat(beat: pb.Beat) -> None:
    if len(beat.tasks) > MAX_TASKS:
        raise Invalid(FieldViolation("beat.tasks", f"{len(beat.tasks)} tasks; a node runs at most {MAX_TASKS}"))
    if any(len(t.job) > 256 or len(t.task) > 256 or len(t.traceparent) > 128 for t in beat.tasks):
        raise Invalid(FieldViolation("beat.tasks", "names have at most 256 characters, traceparents 128"))


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
        raise Invalid(wrong)


def _page(incidents: Sequence[pb.Incident], size: int, token: str) -> tuple[Sequence[pb.Incident], str]:
    """A token is the name of the last incident shown; newer ones that came meanwhile are before it."""
    start = 0
    if token:
        at = next((i for i, incident in enumerate(incidents) if incident.name == token), None)
        if at is None:
            raise Invalid(FieldViolation("page_token", "is no longer in the list; start again without one"))
        start = at + 1
    page = incidents[start : start + size]
    return page, page[-1].name if start + size < len(incidents) else ""
