"""The store on etcd 3.4 or later, by the stubs of aetcd; nothing else in the suite knows etcd.

aetcd's client itself is not used: it knows one host and no TLS, its watch ends with the first broken stream, hands out
events without their revision and cannot tell a quiet server from a stopped one. The whole adapter is one file because
it alone may import the stubs: connection, conversions, watch, lease, store, in this order.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from aetcd import rpc

from whaleflux.errors import (
    Compacted,
    Denied,
    FieldViolation,
    Invalid,
    NotFound,
    OverLimit,
    Refusal,
    Unauthenticated,
    Unavailable,
    WrongState,
)
from whaleflux.store.api import (
    Absent,
    Batch,
    Condition,
    ConditionFailed,
    Entry,
    Equals,
    Event,
    Held,
    Lease,
    Present,
    Put,
    Snapshot,
    Unchanged,
    Unknown,
    Write,
    check,
    conflict,
    holds,
)

log = logging.getLogger(__name__)

Entries: TypeAlias = list[Entry]  # `list` means the method inside the store's class
LOST_AFTER = 0.8  # of the TTL since the last answered keepalive was sent: stop before others may start
_PAGE_ENTRIES = 1000  # a long listing is read in pages of one revision, so that no single answer is huge
_CONNECT_S = 1.0
_PROGRESS_S, _SILENCE_S = 1.0, 3.0  # ask an open watch for a sign of life; without any it counts as broken
_ORDERED_PROGRESS = (3, 5, 8)  # older servers' answers to that question overtake events still under way
_BEHIND_LIMIT = 5  # streams in a row from members that know less than was told: no lag, but lost history
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.1, 1.0
_REQUIRE_LEADER = (("hasleader", "true"),)  # a member cut off from its quorum ends the stream
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # the default of 4 MB ends a watch that catches up
    ("grpc.use_local_subchannel_pool", 1),  # else a fresh channel gets the stuck connection back
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also the limit on one connection attempt
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),  # finds hosts that vanished; etcd refuses less than 5 s
    ("grpc.keepalive_timeout_ms", 3_000),
)
_TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
}


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of a client, read again for each new connection, so that renewed certificates are picked up."""

    ca: Path
    certificate: Path
    key: Path

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), self.key.read_bytes(), self.certificate.read_bytes())


class Endpoints:
    """The members of one cluster ("host:port"); each `open` dials the next one.

    One address per channel: behind several, gRPC stays with a member that accepts connections and answers nothing.
    """

    def __init__(self, hosts: Sequence[str], tls: Tls | None) -> None:
        if not hosts:
            raise Invalid(FieldViolation("etcd.endpoints", 'is empty; give at least one "host:port"'))
        self.count, self._hosts, self._tls = len(hosts), itertools.cycle(hosts), tls

    def open(self) -> grpc.aio.Channel:
        host = next(self._hosts)
        if self._tls is None:
            return grpc.aio.insecure_channel(host, options=_CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(host, self._tls.credentials(), options=_CHANNEL_OPTIONS)


class _Link:
    """One channel with its stubs, closed when it was left and nobody uses it any more.

    gRPC raises usage errors and cancellations in calls whose channel is closed under them.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.kv, self.leases = rpc.KVStub(channel), rpc.LeaseStub(channel)
        self.users = 0

    async def ready(self, timeout_s: float) -> bool:
        try:
            if self.channel.get_state() is grpc.ChannelConnectivity.READY:  # as nearly always: spares a timer
                return True
            async with asyncio.timeout(timeout_s):
                while (state := self.channel.get_state(try_to_connect=True)) != grpc.ChannelConnectivity.READY:
                    await self.channel.wait_for_state_change(state)
        except (TimeoutError, grpc.aio.UsageError):  # the latter when the store is closed meanwhile
            return False
        return True


class _Connection:
    """The unary calls' current link; a member that fails or stays silent is left for the next one."""

    def __init__(self, endpoints: Endpoints, timeout_s: float) -> None:
        self._endpoints, self.timeout_s = endpoints, timeout_s
        self._attempt_s = timeout_s / min(endpoints.count, 3)
        self._link = _Link(endpoints.open())
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    @contextlib.asynccontextmanager
    async def link(self, timeout_s: float) -> AsyncGenerator[_Link, None]:
        """A connected link; Unavailable when there is none, and then nothing was sent."""
        end_s = _now_s() + timeout_s
        while (left_s := end_s - _now_s()) > 0 and not self._closed:
            link = self._link
            link.users += 1
            try:
                if await link.ready(min(_CONNECT_S, left_s)):
                    yield link
                    return
                self.leave(link)
            finally:
                link.users -= 1
                self._close_unused(link)
        if self._closed:
            raise Unavailable("this store was closed", reason="STORE_CLOSED")
        raise Unavailable(f"no etcd member could be reached within {timeout_s:g} s")

    def leave(self, link: _Link) -> None:
        """The next call uses the next member; calls under way on this link keep it until their deadline."""
        if link is self._link:
            self._link = _Link(self._endpoints.open())

    def _close_unused(self, link: _Link) -> None:
        if link is not self._link and not link.users:
            closing = asyncio.get_running_loop().create_task(link.channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def ask(self, method: Callable[[_Link], Any], request: Any) -> Any:
        """A call that may be repeated: tries member after member until one answers or the time is up."""
        end_s = _now_s() + self.timeout_s
        while True:
            async with self.link(end_s - _now_s()) as link:
                try:
                    left_s = max(0.001, end_s - _now_s())
                    return await method(link)(request, timeout=min(self._attempt_s, left_s))
                except grpc.aio.AioRpcError as error:
                    if error.code() not in _TRANSIENT or _now_s() >= end_s:
                        raise _refusal(error) from error
                    self.leave(link)
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        self._closed = True
        await self._link.channel.close(grace=1.0)
        await asyncio.gather(*self._closing)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _refusal(error: grpc.aio.AioRpcError, asked_revision: int = 0) -> Refusal:
    code, text = error.code(), error.details() or error.code().name
    match code:
        case grpc.StatusCode.OUT_OF_RANGE if "compacted" in text:
            return Compacted(asked_revision)
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.OUT_OF_RANGE:
            return Invalid(FieldViolation("store", text))
        case grpc.StatusCode.NOT_FOUND if "lease" in text:
            return NotFound("lease", "of the write", "it expired or was revoked")
        case grpc.StatusCode.PERMISSION_DENIED:
            return Denied(f"etcd: {text}")
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated(f"etcd: {text}")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return OverLimit(f"etcd: {text}", reason="STORE_FULL" if "space" in text else "STORE_BUSY")
        case _:
            return Unavailable(f"etcd: {text}")


def _text(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")  # a stranger's key must not break a listing


def _raw(key: str) -> bytes:
    return key.encode(errors="surrogateescape")


def _entry(kv: Any) -> Entry:
    return Entry(_text(kv.key), kv.value, kv.mod_revision, kv.create_revision, kv.version)


_DELETED = rpc.Event.EventType.DELETE


def _event(event: Any) -> Event:
    if event.type == _DELETED:
        return Event(_text(event.kv.key), None)
    entry = _entry(event.kv)
    return Event(entry.key, entry)


def _span(prefix: str) -> tuple[bytes, bytes]:
    """First key and end of a prefix's range. UTF-8 never ends in 0xff, so one more than the last byte exists."""
    raw = _raw(prefix)
    return (raw, raw[:-1] + bytes([raw[-1] + 1])) if raw else (b"\0", b"\0")


def _transaction(writes: Sequence[Write], when: Sequence[Condition]) -> Any:
    """Filled in place: parts made apart are copied into it, and this runs for every commit.

    The compared keys are read when the comparison fails, to tell afterwards which condition failed.
    """
    request = rpc.TxnRequest()
    for write in writes:
        operation = request.success.add()
        if isinstance(write, Put):
            put = operation.request_put
            put.key, put.value = _raw(write.key), write.value
            if write.lease:
                put.lease = write.lease.id
        else:
            operation.request_delete_range.key = _raw(write.key)
    for condition in when:
        _compare(condition, request.compare.add())
        look = request.failure.add().request_range
        look.key, look.keys_only = _raw(condition.key), not isinstance(condition, Equals)
    return request


_CREATED, _CHANGED, _VALUE = rpc.Compare.CREATE, rpc.Compare.MOD, rpc.Compare.VALUE
_EQUAL, _GREATER = rpc.Compare.EQUAL, rpc.Compare.GREATER


def _compare(condition: Condition, compare: Any) -> None:
    compare.key, compare.result, compare.target = _raw(condition.key), _EQUAL, _CREATED
    match condition:
        case Absent():
            compare.create_revision = 0
        case Present():
            compare.create_revision, compare.result = 0, _GREATER
        case Unchanged(entry):
            compare.mod_revision, compare.target = entry.revision, _CHANGED
        case Equals(_, value):
            compare.value, compare.target = value, _VALUE
        case Held(leader):
            compare.create_revision = leader.created


def _failed(when: Sequence[Condition], answer: Any) -> ConditionFailed:
    found = [response.response_range.kvs for response in answer.responses]
    entries = [_entry(kvs[0]) if kvs else None for kvs in found]
    return conflict([c for c, entry in zip(when, entries, strict=True) if not holds(c, entry)])


class _BrokenError(Exception):
    """Only one stream is over, the watch is not."""


class _Watch:
    """A watch that survives its server: every revision exactly once, in order, whole.

    It resumes with the last *delivered* revision, which must come again as it was: a server that forgot what it told (a
    restored backup, or one before 3.5.5 that was killed) has another history, and then the caller lists again. Progress
    proves that the server lives; it becomes a bookmark only when it came in order with the events (see `_bookmark`),
    and never moves the resume point.
    """

    def __init__(self, endpoints: Endpoints, prefix: str, after: int) -> None:
        self._endpoints = endpoints
        key, range_end = _span(prefix)
        # Fragments bound a message; an answer counts only when its last part is there.
        self._create = rpc.WatchCreateRequest(key=key, range_end=range_end, fragment=True, progress_notify=True)
        self._after = self._told = after
        self._last: Batch | None = None  # with events
        self._cluster_id = self._times_behind = 0

    async def run(self) -> AsyncGenerator[Batch, None]:
        delay_s = _SHORTEST_RETRY_S
        while True:
            try:
                async with contextlib.aclosing(self._stream()) as stream:
                    async for batch in stream:
                        delay_s = _SHORTEST_RETRY_S
                        self._told = batch.revision
                        self._last = batch if batch.events else self._last
                        yield batch
            except _BrokenError as reason:
                log.info("watch of %s broke after revision %d: %s", self._create.key, self._told, reason)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(2 * delay_s, _LONGEST_RETRY_S)

    async def _stream(self) -> AsyncGenerator[Batch, None]:
        async with self._endpoints.open() as channel:
            ordered = await _progress_is_ordered(channel)
            call = rpc.WatchStub(channel).Watch(metadata=_REQUIRE_LEADER)
            asking = asyncio.create_task(self._ask(call))
            try:
                async with contextlib.aclosing(self._responses(call)) as responses:
                    repeated = self._last
                    async for response, batches in responses:
                        if not batches and self._bookmark(response, ordered=ordered):
                            batches = (Batch(response.header.revision),)
                        if batches and repeated:  # what was delivered last comes again, before all else
                            self._check_repeated(repeated, batches[0])
                            batches, repeated = batches[1:], None
                        for batch in batches:
                            yield batch
            finally:
                asking.cancel()
                call.cancel()

    async def _responses(self, call: Any) -> AsyncGenerator[tuple[Any, tuple[Batch, ...]], None]:
        """Each whole answer with its revisions; the parts of a fragmented one are put together."""
        events: list[Any] = []
        while True:
            response = await self._read(call)
            events.extend(response.events)
            if not response.fragment:
                groups = itertools.groupby(events, lambda event: event.kv.mod_revision)
                yield response, tuple(Batch(revision, tuple(map(_event, group))) for revision, group in groups)
                events = []

    async def _ask(self, call: Any) -> None:
        """Creates the watch, then asks for a sign of life at each interval."""
        start = self._last.revision if self._last else self._after + 1
        create = rpc.WatchCreateRequest(start_revision=start)
        create.MergeFrom(self._create)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # _read reports it
            await call.write(rpc.WatchRequest(create_request=create))
            while True:
                await asyncio.sleep(_PROGRESS_S)
                await call.write(rpc.WatchRequest(progress_request=rpc.WatchProgressRequest()))

    async def _read(self, call: Any) -> Any:
        try:
            async with asyncio.timeout(_SILENCE_S):  # wait_for loses cancellations in 3.11
                response = await call.read()
        except TimeoutError:
            raise _BrokenError(f"silent for {_SILENCE_S:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise _broken_or_refused(error) from error
        if response is grpc.aio.EOF:
            raise _BrokenError("ended by the server")
        self._check_cluster(response.header.cluster_id)
        if response.compact_revision:
            raise Compacted(response.compact_revision)
        if response.created:
            self._check_position(response.header.revision)
        if response.canceled:
            if "permission denied" in response.cancel_reason:
                raise Denied(f"etcd: {response.cancel_reason}")
            raise _BrokenError(response.cancel_reason)
        return response

    def _check_cluster(self, cluster_id: int) -> None:
        self._cluster_id = self._cluster_id or cluster_id
        if cluster_id != self._cluster_id:
            told = f"the endpoints belong to cluster {cluster_id:x}, the watch began on {self._cluster_id:x}"
            raise WrongState(f"{told}; restart on one cluster", reason="STORE_REPLACED")

    def _check_position(self, revision: int) -> None:
        """A member may lag behind what another one has told, but not for long."""
        self._times_behind = self._times_behind + 1 if revision < self._told else 0
        if self._times_behind > _BEHIND_LIMIT:
            log.error("etcd is at revision %d and has told %d before: it lost history", revision, self._told)
            raise Compacted(revision)
        if self._times_behind:
            raise _BrokenError(f"this member is at revision {revision}, {self._told} is known")

    def _check_repeated(self, last: Batch, again: Batch) -> None:
        if again != last:
            log.error("etcd tells revision %d otherwise than before: it lost history", last.revision)
            raise Compacted(again.revision)

    def _bookmark(self, response: Any, *, ordered: bool) -> bool:
        """Whether this answer proves that all events up to its revision have been read.

        Periodic notices (under the watch's own id) come in order with events. Answers to our questions (id -1) do so
        only since 3.5.8: before, they have been seen thousands of revisions ahead of events not yet delivered.
        """
        in_order = ordered if response.watch_id == -1 else not response.created
        return in_order and bool(response.header.revision > self._told)


async def _progress_is_ordered(channel: grpc.aio.Channel) -> bool:
    """Asks the member for its version; also the first sign of life of a new stream."""
    if not await _Link(channel).ready(_CONNECT_S):
        raise _BrokenError(f"not reachable within {_CONNECT_S:g} s")
    try:
        status = await rpc.MaintenanceStub(channel).Status(rpc.StatusRequest(), timeout=_SILENCE_S)
    except grpc.aio.AioRpcError as error:
        raise _broken_or_refused(error) from error
    numbers = status.version.partition("-")[0].split(".")
    return tuple(int(number) for number in numbers) >= _ORDERED_PROGRESS


def _broken_or_refused(error: grpc.aio.AioRpcError) -> Exception:
    if error.code() in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}:
        return _refusal(error)
    return _BrokenError(f"{error.code().name}: {error.details()}")


class _EtcdLease:
    """Renewed four times per TTL; `lost` when no renewal sent within the last 0.8 TTL was answered."""

    def __init__(self, store: EtcdStore, lease_id: int, ttl_s: float, sent_s: float) -> None:
        self.id, self.ttl_s, self.lost = lease_id, ttl_s, asyncio.Event()
        self._store, self._lost_at_s = store, sent_s + LOST_AFTER * ttl_s
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def revoke(self) -> None:
        self.stop()
        with contextlib.suppress(Refusal):
            await self._store.revoke(self.id)
        self.lost.set()

    def stop(self) -> None:
        self._task.cancel()

    async def _keep(self) -> None:
        while (left_s := self._lost_at_s - _now_s()) > 0:
            sent_s = _now_s()
            # Short attempts: one stuck member must leave time enough to ask the others, also during an election.
            if (ttl_s := await self._renew(min(left_s, self.ttl_s / 6))) is None:
                await asyncio.sleep(min(0.05, left_s))
            elif ttl_s <= 0:  # the server has already ended it
                break
            else:
                self._lost_at_s = sent_s + LOST_AFTER * ttl_s
                await asyncio.sleep(ttl_s / 4)
        log.warning("lease %x is lost", self.id)
        self.lost.set()

    async def _renew(self, timeout_s: float) -> float | None:
        try:
            return await self._store.renew(self.id, timeout_s)
        except Refusal:
            return None


class EtcdStore:
    """A Store over the members at `endpoints` ("host:port"); `timeout_s` bounds each call as a whole.

    Made inside a running event loop; connects with its first call.
    """

    def __init__(self, endpoints: Sequence[str], *, tls: Tls | None = None, timeout_s: float = 5.0) -> None:
        self._endpoints = Endpoints(endpoints, tls)
        self._connection = _Connection(self._endpoints, timeout_s)
        self._leases: tuple[_EtcdLease, ...] = ()

    async def get(self, key: str) -> Entry | None:
        answer = await self._connection.ask(lambda link: link.kv.Range, rpc.RangeRequest(key=_raw(key)))
        return _entry(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str, *, after: str = "", limit: int = 0, at: int = 0) -> Snapshot:
        start, range_end = _span(prefix)
        start = max(start, _raw(after) + b"\0") if after else start
        entries: Entries = []
        revision, more = at, True
        while more:
            page = min(_PAGE_ENTRIES, limit - len(entries)) if limit else _PAGE_ENTRIES
            answer = await self._range(start, range_end, page, revision)
            revision = revision or answer.header.revision
            entries.extend(map(_entry, answer.kvs))
            more = answer.more
            if more:
                start = answer.kvs[-1].key + b"\0"
            if len(entries) == limit:
                break
        return Snapshot(tuple(entries), revision, entries[-1].key if more else "")

    async def _range(self, start: bytes, range_end: bytes, limit: int, revision: int) -> Any:
        request = rpc.RangeRequest(key=start, range_end=range_end, limit=limit, revision=revision)
        try:
            return await self._connection.ask(lambda link: link.kv.Range, request)
        except Compacted:
            raise Compacted(revision) from None

    async def commit(self, *writes: Write, when: Sequence[Condition] = ()) -> int:
        check(writes, when)
        request = _transaction(writes, when)
        async with self._connection.link(self._connection.timeout_s) as link:
            try:
                answer = await link.kv.Txn(request, timeout=self._connection.timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _TRANSIENT:
                    raise _refusal(error) from error
                self._connection.leave(link)
                told = f"the commit was sent and not answered ({error.code().name}: {error.details()})"
                raise Unknown(f"{told}; read back before trying again") from error
        if not answer.succeeded:
            raise _failed(when, answer)
        return int(answer.header.revision)

    def watch(self, prefix: str, *, after: int) -> AsyncGenerator[Batch, None]:
        return _Watch(self._endpoints, prefix, after).run()

    async def lease(self, ttl_s: float) -> Lease:
        sent_s = _now_s()
        request = rpc.LeaseGrantRequest(TTL=max(1, -int(-ttl_s // 1)))
        answer = await self._connection.ask(lambda link: link.leases.LeaseGrant, request)
        lease = _EtcdLease(self, answer.ID, float(answer.TTL), sent_s)
        self._leases = (*(kept for kept in self._leases if not kept.lost.is_set()), lease)
        return lease

    async def renew(self, lease_id: int, timeout_s: float) -> float:
        """One keepalive; the seconds that the lease has now, 0 when it is gone."""
        answer: Any = grpc.aio.EOF
        end_s = _now_s() + timeout_s
        async with self._connection.link(timeout_s) as link:
            left_s = max(0.001, end_s - _now_s())
            call = link.leases.LeaseKeepAlive(timeout=left_s, metadata=_REQUIRE_LEADER)
            try:
                await call.write(rpc.LeaseKeepAliveRequest(ID=lease_id))
                answer = await call.read()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                raise Unavailable(f"etcd did not renew the lease: {error}") from error
            finally:
                call.cancel()
                if answer is grpc.aio.EOF:
                    self._connection.leave(link)
        if answer is grpc.aio.EOF:
            raise Unavailable("etcd ended the stream instead of renewing the lease")
        return float(answer.TTL)

    async def revoke(self, lease_id: int) -> None:
        """Ends a lease with its keys; one that is gone already is no error."""
        with contextlib.suppress(NotFound):
            await self._connection.ask(lambda link: link.leases.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease_id))

    async def compact(self, revision: int) -> None:
        """Forgets the history before `revision`; for operators and tests, servers compact by themselves."""
        request = rpc.CompactionRequest(revision=revision, physical=True)
        await self._connection.ask(lambda link: link.kv.Compact, request)

    async def close(self) -> None:
        for lease in self._leases:
            lease.stop()
        await self._connection.close()
