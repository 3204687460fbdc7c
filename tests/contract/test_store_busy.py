"""An etcd that answers "not now": too many requests, no space. Nothing that waits out an outage ends by it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from aetcd import rpc

from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.events.memory import MemoryBus
from whaleflux.events.publisher import Publisher
from whaleflux.store import Absent, Put
from whaleflux.store.cache import Cache
from whaleflux.store.election import elect
from whaleflux.store.etcd import EtcdStore
from whaleflux.store.once import commit_once

pytestmark = pytest.mark.integration
TOO_MANY = "etcdserver: too many requests"
NO_SPACE = "etcdserver: mvcc: database space exceeded"


class BusyEtcd(grpc.GenericRpcHandler):
    """Answers RESOURCE_EXHAUSTED `refusals` times, then as an empty etcd does to what loops ask first."""

    def __init__(self, text: str, refusals: int) -> None:
        self.text, self.refusals, self.port = text, refusals, 0

    def service(self, call: Any) -> Any:
        answers = {
            "/etcdserverpb.KV/Range": (rpc.RangeRequest, rpc.RangeResponse(header={"revision": 7, "cluster_id": 1})),
            "/etcdserverpb.KV/Txn": (
                rpc.TxnRequest,
                rpc.TxnResponse(header={"revision": 8, "cluster_id": 1}, succeeded=True),
            ),
            "/etcdserverpb.Lease/LeaseGrant": (rpc.LeaseGrantRequest, rpc.LeaseGrantResponse(ID=3, TTL=60)),
            "/etcdserverpb.Lease/LeaseRevoke": (rpc.LeaseRevokeRequest, rpc.LeaseRevokeResponse()),
        }
        if call.method not in answers:
            return None
        request, answer = answers[call.method]

        async def handle(_: Any, context: grpc.aio.ServicerContext) -> Any:
            self.refusals -= 1
            if self.refusals >= 0:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, self.text)
            return answer

        return grpc.unary_unary_rpc_method_handler(
            handle, request_deserializer=request.FromString, response_serializer=type(answer).SerializeToString
        )


@contextlib.asynccontextmanager
async def busy(text: str, refusals: int) -> AsyncIterator[EtcdStore]:
    server, etcd = grpc.aio.server(), BusyEtcd(text, refusals)
    server.add_generic_rpc_handlers((etcd,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    store = EtcdStore([f"127.0.0.1:{port}"])
    try:
        yield store
    finally:
        await store.close()
        await server.stop(0)


async def test_a_company_proxy_in_the_environment_is_not_the_way_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with asyncio.timeout(45), busy("", 0) as store:
        assert (await store.list("a")).revision == 7


@pytest.mark.parametrize(("text", "reason"), [(TOO_MANY, "STORE_BUSY"), (NO_SPACE, "STORE_FULL")])
async def test_not_now_is_said_as_such_with_when_to_come_again(text: str, reason: str) -> None:
    async with busy(text, 99) as store:
        calls = (store.get, store.list, lambda key: store.commit(Put(key, b"")), lambda _: store.lease(5))
        for call in calls:
            with pytest.raises(Unavailable) as refused:
                await call("a")
            assert (refused.value.reason, type(refused.value)) == (reason, Unavailable), "nothing is unknown of it"
            assert refused.value.retry_after_s


async def test_what_will_never_be_taken_is_told_from_what_is_not_taken_now() -> None:
    async with busy("grpc: received message larger than max (9 vs. 8)", 99) as store:
        with pytest.raises(InvalidArgument):
            await store.commit(Put("a", b""))


async def test_a_commit_a_campaign_a_cache_and_a_publisher_come_again() -> None:
    async with asyncio.timeout(45), busy(TOO_MANY, 2) as store:
        assert await commit_once(store, Put("a", b"1"), when=[Absent("a")], key="a") == 8
    async with asyncio.timeout(45), busy(TOO_MANY, 3) as store, elect(store, "x", "me", ttl_s=60) as leader:
        assert leader.created == 8
    async with asyncio.timeout(45), busy(NO_SPACE, 3) as store, Cache(store, "/p/", lambda entry: entry) as cache:
        assert cache.revision == 7
    async with asyncio.timeout(45), busy(TOO_MANY, 3) as store:
        publisher = Publisher(store, MemoryBus(), "/p/", lambda _: None, name="test")
        running = asyncio.create_task(publisher.run())
        while publisher.revision < 7:
            assert not running.done()
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
