"""The Store over etcd: reads, commits, watches and leases, put together from the parts beside it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeAlias

import grpc
from aetcd import rpc

from whaleflux.errors import Compacted
from whaleflux.rpc.tls_files import TlsFiles
from whaleflux.store.api import Batch, Condition, Entry, Extent, Lease, Snapshot, Unknown, Write, check
from whaleflux.store.etcd import lease as leases
from whaleflux.store.etcd.connection import TRANSIENT, Endpoints, EtcdConnection, status_error
from whaleflux.store.etcd.messages import condition_failed, entry_of, range_of, raw_of, transaction
from whaleflux.store.etcd.watch import Watch
from whaleflux.store.etcd.watch_stream import WatchStreams

Entries: TypeAlias = list[Entry]  # `list` means the method inside the store's class
_PAGE_ENTRIES = 1000  # a long listing is read in pages of one revision, so that no single answer is huge


class EtcdStore:
    """A Store over the members at `endpoints` ("host:port"); `timeout_s` bounds each call as a whole.

    Made inside a running event loop; connects with its first call.
    """

    def __init__(self, endpoints: Sequence[str], *, tls: TlsFiles | None = None, timeout_s: float = 5.0) -> None:
        reachable = Endpoints(endpoints, tls)
        self._connection = EtcdConnection(reachable, timeout_s)
        self._watch_streams = WatchStreams(reachable)
        self._keepalive = leases.KeepAlive(self._connection)
        self._leases: tuple[leases.EtcdLease, ...] = ()

    async def get(self, key: str) -> Entry | None:
        answer = await self._connection.ask(lambda link: link.kv.Range, rpc.RangeRequest(key=raw_of(key)))
        return entry_of(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str, *, after: str = "", limit: int = 0, at: int = 0) -> Snapshot:
        start, range_end = range_of(prefix)
        start = max(start, raw_of(after) + b"\0") if after else start
        entries: Entries = []
        revision, more = at, True
        while more:
            page = min(_PAGE_ENTRIES, limit - len(entries)) if limit else _PAGE_ENTRIES
            answer = await self._range(start, range_end, page, revision)
            revision = revision or answer.header.revision
            entries.extend(map(entry_of, answer.kvs))
            more = answer.more
            if more:
                start = answer.kvs[-1].key + b"\0"
            if len(entries) == limit:
                break
        return Snapshot(tuple(entries), revision, entries[-1].key if more else "")

    async def extent(self, prefix: str) -> Extent:
        start, range_end = range_of(prefix)
        newest = {"sort_order": rpc.RangeRequest.DESCEND, "sort_target": rpc.RangeRequest.MOD}
        request = rpc.RangeRequest(key=start, range_end=range_end, limit=1, keys_only=True, **newest)
        answer = await self._connection.ask(lambda link: link.kv.Range, request)
        return Extent(answer.header.revision, answer.count, answer.kvs[0].mod_revision if answer.kvs else 0)

    async def _range(self, start: bytes, range_end: bytes, limit: int, revision: int) -> Any:
        request = rpc.RangeRequest(key=start, range_end=range_end, limit=limit, revision=revision)
        try:
            return await self._connection.ask(lambda link: link.kv.Range, request)
        except Compacted:
            raise Compacted(revision) from None

    async def commit(self, *writes: Write, when: Sequence[Condition] = ()) -> int:
        check(writes, when)
        request = transaction(writes, when)
        async with self._connection.link(self._connection.timeout_s) as link:
            try:
                answer = await link.kv.Txn(request, timeout=self._connection.timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() not in TRANSIENT:
                    raise status_error(error) from error
                self._connection.leave(link)
                told = f"the commit was sent and not answered ({error.code().name}: {error.details()})"
                raise Unknown(f"{told}; read back before trying again") from error
        if not answer.succeeded:
            raise condition_failed(when, answer)
        return int(answer.header.revision)

    def watch(self, prefix: str, *, after: int) -> AsyncGenerator[Batch, None]:
        return Watch(self._watch_streams, prefix, after).run()

    async def lease(self, ttl_s: float) -> Lease:
        lease = await leases.grant(self._connection, self._keepalive, ttl_s)
        self._leases = (*(kept for kept in self._leases if not kept.lost.is_set()), lease)
        return lease

    async def revoke(self, lease_id: int) -> None:
        """Ends a lease with its keys; one that is gone already is no error. For operators and tests."""
        await leases.revoke(self._connection, lease_id)

    async def compact(self, revision: int) -> None:
        """Forgets the history before `revision`; for operators and tests, servers compact by themselves."""
        request = rpc.CompactionRequest(revision=revision, physical=True)
        await self._connection.ask(lambda link: link.kv.Compact, request)

    async def close(self) -> None:
        for lease in self._leases:
            lease.stop()
        self._keepalive.close()
        await self._connection.close()
