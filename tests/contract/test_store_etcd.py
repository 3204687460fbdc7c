"""The etcd store while its server is killed, stopped, unreachable or demands certificates."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from aetcd import rpc
from aetcd.rpc import rpc_pb2_grpc as etcd_grpc

from tests.support.etcd_server import EtcdServer, free_ports
from tests.support.relay import Relay
from whaleflux.embedded import etcd as embedded
from whaleflux.errors import InvalidArgument, NotFound, Unavailable
from whaleflux.store import Absent, Batch, Delete, Put, Unknown
from whaleflux.store.batching import GroupCommit
from whaleflux.store.cache import Cache
from whaleflux.store.election import elect
from whaleflux.store.etcd import EtcdStore
from whaleflux.store.once import commit_once

pytestmark = pytest.mark.integration
PREFIX = "/t/"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EtcdServer]:
    async with EtcdServer(tmp_path) as server:
        yield server


@pytest.fixture
async def store(server: EtcdServer) -> AsyncIterator[EtcdStore]:
    store = EtcdStore([server.endpoint], timeout_s=2)
    yield store
    await store.close()


class Traffic:
    """Writers that never stop, each write made once; and a watch that records all it is told."""

    def __init__(self, store: EtcdStore) -> None:
        self._store, self._numbers = store, itertools.count()
        self._go, self._under_way = asyncio.Event(), 0
        self._go.set()
        self.acknowledged: dict[str, bytes] = {}
        self.seen: list[Batch] = []

    @contextlib.asynccontextmanager
    async def running(self, start: int, writers: int = 20) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._watch(start)), *(asyncio.create_task(self._write()) for _ in range(writers))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [end for end in ends if not isinstance(end, asyncio.CancelledError)] == []

    async def _write(self) -> None:
        while True:
            await self._go.wait()
            number = next(self._numbers)
            key, value = f"{PREFIX}{number:06}", random.randbytes(8)
            twin = [Put(f"{key}/twin", value)] * (number % 3 == 0)
            self._under_way += 1
            await commit_once(self._store, Put(key, value), *twin, when=[Absent(key)], key=key, within_s=30)
            self._under_way -= 1
            self.acknowledged[key] = value
            await asyncio.sleep(0.002)  # leaves room on a small machine

    async def _watch(self, start: int) -> None:
        async with contextlib.aclosing(self._store.watch(PREFIX, after=start)) as batches:
            async for batch in batches:
                self.seen.append(batch)

    async def crash(self, server: EtcdServer) -> None:
        """SIGKILL in the midst of writes, and restart. An etcd that is known to lose what it acknowledged (see
        `embedded.etcd.sound`) is killed between writes: what is tested here is our side."""
        if not embedded.sound(embedded.version(embedded.find())):
            self._go.clear()
            async with asyncio.timeout(30):
                while self._under_way:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # its tables are written each 0.1 s
        server.kill()
        self._go.set()
        await server.start()

    async def more(self, events: int, within_s: float) -> None:
        """Returns when the watch has told `events` more revisions than now."""
        enough = len(self.seen) + events
        async with asyncio.timeout(within_s):
            while len(self.seen) < enough:
                await asyncio.sleep(0.01)

    async def check(self, start: int) -> None:
        """The record against the history as read afterwards, undisturbed."""
        last = max(batch.revision for batch in self.seen)
        revisions = [batch.revision for batch in self.seen]
        assert revisions == sorted(set(revisions))
        assert [batch for batch in self.seen if batch.events] == await history(self._store, start, last)
        told = {e.key: e.entry.value for batch in self.seen for e in batch.events if e.entry}
        final = {entry.key: entry for entry in (await self._store.list(PREFIX)).entries}
        for key, value in self.acknowledged.items():
            assert final[key].value == value
            assert final[key].version == 1  # in effect exactly once
            assert final[key].revision > last or told[key] == value


async def history(store: EtcdStore, start: int, last: int) -> list[Batch]:
    found = []
    async with asyncio.timeout(45), contextlib.aclosing(store.watch(PREFIX, after=start)) as batches:
        async for batch in batches:
            if batch.revision <= last and batch.events:
                found.append(batch)
            if batch.revision >= last:
                return found
    raise AssertionError


async def test_a_watch_is_exact_through_kills(server: EtcdServer, store: EtcdStore) -> None:
    """SIGKILL and restart three times under concurrent writers: no gap, no repetition, whole transactions."""
    start = await store.commit(Put("/begin", b""))
    traffic = Traffic(store)
    async with traffic.running(start):
        for _ in range(3):
            await traffic.more(200, within_s=45)
            await traffic.crash(server)
        await traffic.more(200, within_s=45)
    await traffic.check(start)


async def test_a_watch_is_exact_through_cuts(server: EtcdServer) -> None:
    """All connections are reset six times in the midst of writes, answers under way included."""
    async with Relay(server.client_port) as relay:
        store = EtcdStore([relay.endpoint], timeout_s=2)
        start = await store.commit(Put("/begin", b""))
        traffic = Traffic(store)
        async with traffic.running(start):
            for _ in range(6):
                await traffic.more(60, within_s=45)
                relay.cut()
                relay.heal()
            await traffic.more(60, within_s=45)
        await traffic.check(start)
        await store.close()


async def test_a_watch_notices_a_stopped_server_and_resumes(
    server: EtcdServer, store: EtcdStore, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGSTOP for 5 s: noticed within 4 s though the connection stays open, resumed without a gap or a repetition."""
    caplog.set_level(logging.INFO, "whaleflux.store.etcd")
    start = await store.commit(Put("/begin", b""))
    traffic = Traffic(store)
    async with traffic.running(start):
        await traffic.more(200, within_s=45)
        caplog.clear()
        stopped = time.time()
        await server.stopped_for(5)
        await traffic.more(200, within_s=45)
    noticed = [record.created - stopped for record in caplog.records if "silent for" in record.getMessage()]
    assert noticed
    assert noticed[0] <= 4
    await traffic.check(start)


async def test_history_compacted_while_the_watch_was_cut_is_listed_again(server: EtcdServer, store: EtcdStore) -> None:
    """A cache whose watch cannot resume ends with the right contents, deletions included."""
    await store.commit(Put(PREFIX + "kept", b"1"), Put(PREFIX + "gone", b"1"), Put(PREFIX + "changed", b"1"))
    relay = Relay(server.client_port)
    async with relay, Cache(cut_off := EtcdStore([relay.endpoint]), PREFIX, lambda entry: entry.value) as cache:
        relay.cut()
        await store.commit(Put(PREFIX + "changed", b"2"))
        await store.commit(Put(PREFIX + "new", b"1"))
        await store.commit(Delete(PREFIX + "gone"))
        for _ in range(3):
            last = await store.commit(Put(PREFIX + "changed", b"3"))
        await store.compact(last)
        relay.heal()
        await cache.at_least(last, timeout_s=45)
        assert dict(cache.values) == {PREFIX + "kept": b"1", PREFIX + "new": b"1", PREFIX + "changed": b"3"}
        await cut_off.close()


@pytest.mark.parametrize("overtaken", [False, True])
async def test_a_server_that_forgot_what_it_told_is_noticed(
    server: EtcdServer, store: EtcdStore, overtaken: bool
) -> None:
    """An older backup comes back under a cache: what only the lost history had is gone, what is there is known.

    Also when the new history is already longer than the lost one, so that no revision looks odd.
    """
    await store.commit(Put(PREFIX + "kept", b"1"), Put(PREFIX + "deleted", b"1"))
    server.kill()
    server.back_up()
    await server.start()
    async with (
        Relay(server.client_port) as relay,
        Cache(behind := EtcdStore([relay.endpoint]), PREFIX, lambda entry: entry.value) as cache,
    ):
        await store.commit(Put(PREFIX + "lost", b"1"))
        await store.commit(Delete(PREFIX + "deleted"))
        await cache.at_least(await store.commit(Put(PREFIX + "kept", b"lost")))
        relay.cut()
        server.kill()
        server.restore()
        await server.start()
        for n in range(9 if overtaken else 1):
            await store.commit(Put(PREFIX + "new", b"%d" % n))
        relay.heal()
        truth = {entry.key: entry.value for entry in (await store.list(PREFIX)).entries}
        assert set(truth) == {PREFIX + "kept", PREFIX + "deleted", PREFIX + "new"}
        async with asyncio.timeout(45):
            while dict(cache.values) != truth:
                await asyncio.sleep(0.01)
        await behind.close()


async def test_a_bookmark_is_never_ahead_of_events(
    server: EtcdServer, store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs of life are asked for all the time while events come in fast; servers before 3.5.8 mix up their order."""
    monkeypatch.setattr("whaleflux.store.etcd.watch_stream.PROGRESS_S", 0.001)
    start = await store.commit(Put("/begin", b""))
    writers, grouped = 40, GroupCommit(store)

    async def write(writer: int) -> None:
        for n in range(100):
            await grouped.commit(Put(f"{PREFIX}{writer}/{n}", b"x" * 200))
        await grouped.commit(Put(f"{PREFIX}{writer}/end", b""))

    writing = [asyncio.create_task(write(writer)) for writer in range(writers)]
    revisions, ended = [], 0
    async with asyncio.timeout(45), contextlib.aclosing(store.watch(PREFIX, after=start)) as batches:
        async for batch in batches:
            revisions.append(batch.revision)
            ended += sum(event.key.endswith("/end") for event in batch.events)
            if ended == writers:
                break
    await asyncio.gather(*writing)
    assert revisions == sorted(set(revisions))


async def test_a_lease_is_lost_before_the_server_lets_it_expire(server: EtcdServer, store: EtcdStore) -> None:
    """A stopped server answers no keepalive: the holder knows within the TTL, with room to spare."""
    lease = await store.lease(3)
    await store.commit(Put(PREFIX + "a", b"", lease))
    await asyncio.sleep(lease.ttl_s / 3)  # not in step with the keepalives
    stopped = time.monotonic()
    server.stop()
    try:
        async with asyncio.timeout(lease.ttl_s):
            await lease.lost.wait()
    finally:
        server.resume()
    assert time.monotonic() - stopped < lease.ttl_s


async def test_a_lease_outlives_a_restart_of_the_server(server: EtcdServer, store: EtcdStore) -> None:
    lease = await store.lease(5)
    await store.commit(Put(PREFIX + "a", b"", lease))
    await server.restart()
    await asyncio.sleep(lease.ttl_s / 2)  # at least one keepalive after the restart
    assert not lease.lost.is_set()
    assert await store.get(PREFIX + "a") is not None
    await lease.revoke()


async def test_a_dead_leader_is_replaced_within_the_documented_time(server: EtcdServer, store: EtcdStore) -> None:
    """2.5 s expected with the default TTL; benchmarks.leader_loss measures it, here is room for a loaded machine."""
    dying = EtcdStore([server.endpoint])
    dead = elect(dying, "x", "dead")
    await dead.__aenter__()
    await dying.close()  # its keepalives end, its lease does not
    died = time.monotonic()
    async with asyncio.timeout(45), elect(store, "x", "next"):
        took_s = time.monotonic() - died
    assert 1 < took_s < 6
    dead.gen = None  # its process is gone: it never resigns


async def test_an_unanswered_commit_is_unknown_and_a_safe_repetition_is_in_effect_once(server: EtcdServer) -> None:
    store = EtcdStore([server.endpoint], timeout_s=1)
    await store.commit(Put(PREFIX + "warm", b""))
    stopping = asyncio.create_task(server.stopped_for(2.5))
    await asyncio.sleep(0)
    with pytest.raises(Unknown):
        await store.commit(Put(PREFIX + "a", b"1"), when=[Absent(PREFIX + "a")])
    key = PREFIX + "b"
    revision = await commit_once(store, Put(key, b"1"), when=[Absent(key)], key=key)
    entry = await store.get(key)
    assert entry is not None
    assert (entry.version, entry.revision) == (1, revision)
    await stopping
    await store.close()


async def test_an_absent_server_is_unavailable_and_nothing_was_sent() -> None:
    store = EtcdStore([f"127.0.0.1:{free_ports(1)[0]}"], timeout_s=0.5)
    for call in (store.get("a"), store.list("a"), store.commit(Put("a", b"")), store.lease(1)):
        with pytest.raises(Unavailable) as refused:
            await call
        assert not isinstance(refused.value, Unknown)
    await store.close()


async def test_calls_and_watches_go_to_the_next_endpoint(server: EtcdServer) -> None:
    store = EtcdStore([f"127.0.0.1:{free_ports(1)[0]}", server.endpoint], timeout_s=3)
    revision = await store.commit(Put(PREFIX + "a", b"1"))
    assert (await store.get(PREFIX + "a")).revision == revision
    assert [b.revision for b in await history(store, revision - 1, revision)] == [revision]
    await store.close()


async def test_calls_wait_for_a_restart(server: EtcdServer, store: EtcdStore) -> None:
    await store.commit(Put(PREFIX + "a", b"1"))
    server.kill()
    server.launch()
    entry = await store.get(PREFIX + "a")
    assert entry is not None
    assert entry.value == b"1"


def test_an_empty_list_of_endpoints_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="endpoints"):
        EtcdStore([])


def test_a_binary_that_is_no_etcd_is_refused() -> None:
    with pytest.raises(NotFound, match="version"):
        embedded.version(Path("/bin/echo"))


class QuietServer(etcd_grpc.WatchServicer, etcd_grpc.MaintenanceServicer):
    """A server to which nothing is written: as etcd since 3.5.14, it does not answer for progress then."""

    def __init__(self) -> None:
        self.streams = self.questions = 0

    async def Status(self, request: rpc.StatusRequest, context: object) -> rpc.StatusResponse:
        return rpc.StatusResponse(version="3.5.21")

    async def Watch(
        self, requests: AsyncIterator[rpc.WatchRequest], context: object
    ) -> AsyncIterator[rpc.WatchResponse]:
        self.streams += 1
        taken = set[int]()
        async for request in requests:
            self.questions += request.HasField("progress_request")
            if request.HasField("create_request"):
                duplicate = request.create_request.watch_id in taken
                new = -1 if duplicate else len(taken) + 1
                taken.add(new)
                yield rpc.WatchResponse(header={"revision": 7}, watch_id=new, created=True, canceled=duplicate)


class LateServer(QuietServer):
    """Its answer to a question about progress from before a watch began overtakes what that watch still has to hear."""

    async def Watch(
        self, requests: AsyncIterator[rpc.WatchRequest], context: object
    ) -> AsyncIterator[rpc.WatchResponse]:
        header = {"revision": 7}
        async for request in requests:
            if request.HasField("create_request"):
                yield rpc.WatchResponse(header=header, watch_id=1, created=True)
                yield rpc.WatchResponse(header=header, watch_id=-1)
                key_value = {"key": f"{PREFIX}a".encode(), "mod_revision": 6, "create_revision": 6, "version": 1}
                yield rpc.WatchResponse(header=header, watch_id=1, events=[{"kv": key_value}])


@contextlib.asynccontextmanager
async def played(servicer: QuietServer) -> AsyncIterator[str]:
    """The endpoint of a server that a test plays."""
    server = grpc.aio.server()
    etcd_grpc.add_WatchServicer_to_server(servicer, server)
    etcd_grpc.add_MaintenanceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_progress_from_before_a_watch_began_is_no_bookmark_of_it() -> None:
    async with played(LateServer()) as endpoint:
        store = EtcdStore([endpoint])
        async with asyncio.timeout(30), contextlib.aclosing(store.watch(PREFIX, after=5)) as batches:
            assert (await anext(batches)).revision == 6
        await store.close()


async def test_a_server_that_has_nothing_to_tell_is_not_taken_for_dead() -> None:
    servicer = QuietServer()
    async with played(servicer) as endpoint:
        store = EtcdStore([endpoint])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5), contextlib.aclosing(store.watch(PREFIX, after=7)) as batches:
                await anext(batches)
        assert (servicer.streams, servicer.questions >= 2) == (1, True)
        await store.close()


async def test_a_taken_watch_id_is_refused_at_once(server: EtcdServer) -> None:
    """What the sign of life of a quiet server rests on."""
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        call = rpc.WatchStub(channel).Watch()
        for _ in range(2):
            await call.write(rpc.WatchRequest(create_request=rpc.WatchCreateRequest(key=b"a", watch_id=5)))
        async with asyncio.timeout(30):
            first, second = await call.read(), await call.read()
        call.cancel()
    assert (first.created, first.canceled, first.watch_id) == (True, False, 5)
    assert (second.created, second.canceled, second.watch_id) == (True, True, -1)


async def test_all_watches_of_a_store_share_one_connection(server: EtcdServer) -> None:
    async with Relay(server.client_port) as relay:
        store = EtcdStore([relay.endpoint])
        start = await store.commit(Put("/begin", b""))
        tasks = [asyncio.create_task(first_batch(store, f"{PREFIX}{n}/", start)) for n in range(20)]
        await asyncio.sleep(0.2)
        for n in range(20):
            await store.commit(Put(f"{PREFIX}{n}/key", b"%d" % n))
        batches = await asyncio.wait_for(asyncio.gather(*tasks), 30)
        assert [batch.events[0].entry.value for batch in batches] == [b"%d" % n for n in range(20)]
        assert relay.accepted == 2  # one for calls, one for watches
        await store.close()


async def first_batch(store: EtcdStore, prefix: str, start: int) -> Batch:
    async with contextlib.aclosing(store.watch(prefix, after=start)) as batches:
        async for batch in batches:
            if batch.events:
                return batch
    raise AssertionError


async def test_a_watch_that_is_left_before_it_was_answered_ends_no_other(store: EtcdStore) -> None:
    """The first watch of a stream has the id 0, which one whose id is not known yet must not be taken for."""
    start = await store.commit(Put(f"{PREFIX}a", b"1"))
    async with contextlib.aclosing(store.watch(PREFIX, after=start)) as first:
        waiting = asyncio.ensure_future(anext(first))
        await asyncio.sleep(0)
        for number in range(50):
            async with contextlib.aclosing(store.watch(f"/other/{number}/", after=start)) as left:
                leaving = asyncio.ensure_future(anext(left))
                for _ in range(number % 7):  # at each step of its creation
                    await asyncio.sleep(0)
                leaving.cancel()
                await asyncio.gather(leaving, return_exceptions=True)
        await store.commit(Put(f"{PREFIX}b", b"2"))
        async with asyncio.timeout(30):
            while not (batch := await waiting).events:
                waiting = asyncio.ensure_future(anext(first))
        assert [event.key for event in batch.events] == [f"{PREFIX}b"]


async def test_a_slow_reader_holds_up_nobody_and_misses_nothing(
    store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for it is bounded; it begins again after what it has read."""
    monkeypatch.setattr("whaleflux.store.etcd.watch_stream.BUFFER_BYTES", 20_000)
    start = await store.commit(Put("/begin", b""))
    async with (
        contextlib.aclosing(store.watch(PREFIX, after=start)) as slow,
        contextlib.aclosing(store.watch(PREFIX, after=start)) as brisk,
    ):
        revisions = [await store.commit(Put(PREFIX + "key", b"x" * 1000))]
        async with asyncio.timeout(45):
            assert (await anext(slow)).revision == revisions[0]  # and reads no more for now
            brisk_seen = [(await anext(brisk)).revision]
            for _ in range(100):
                revisions.append(await store.commit(Put(PREFIX + "key", b"x" * 1000)))
                while brisk_seen[-1] < revisions[-1]:
                    brisk_seen.append((await anext(brisk)).revision)
            slow_seen = revisions[:1]
            while slow_seen[-1] < revisions[-1]:
                slow_seen.append((await anext(slow)).revision)
    assert slow_seen == brisk_seen == revisions
