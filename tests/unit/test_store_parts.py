"""What services build on a store, each piece against the model in memory: no sockets, no real time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from whaleflux.clock import VirtualClock
from whaleflux.errors import Compacted, InvalidArgument, PermissionDenied, Unavailable
from whaleflux.store import Absent, ConditionFailed, Delete, Fenced, Present, Put, Unchanged, Unknown, Write
from whaleflux.store.batching import GroupCommit
from whaleflux.store.cache import Cache
from whaleflux.store.codec import Codec, merge_repeated
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux.store.once import commit_once


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


class SlowStore(MemoryStore):
    """Commits wait at a gate, as at an fsync; `commits` records what was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.commits: list[tuple[Write, ...]] = []

    async def commit(self, *writes: Write, when: Sequence[Any] = ()) -> int:
        self.commits.append(writes)
        await self.gate.wait()
        return await super().commit(*writes, when=when)


def keys(commit: Sequence[Write]) -> list[str]:
    return [write.key for write in commit]


class TestGroupCommit:
    async def test_what_waits_at_the_same_time_travels_together(self) -> None:
        slow = SlowStore()
        store = GroupCommit(slow, in_flight=1)
        tasks = [asyncio.create_task(store.commit(Put(f"{n}", b""))) for n in range(6)]
        await settle()
        assert [keys(commit) for commit in slow.commits] == [["0"]]  # the first one does not wait for company
        slow.gate.set()
        first, *others = await asyncio.gather(*tasks)
        assert [keys(commit) for commit in slow.commits] == [["0"], ["1", "2", "3", "4", "5"]]
        assert set(others) == {first + 1}

    async def test_a_group_stays_within_one_transaction(self) -> None:
        slow = SlowStore()
        store = GroupCommit(slow, in_flight=1)
        puts = [[Put(f"{n}/{part}", b"") for part in range(50)] for n in range(6)]
        big = [Put(f"big{n}", bytes(1_000_000)) for n in range(2)]
        tasks = [asyncio.create_task(store.commit(*commit)) for commit in [*puts, *([each] for each in big)]]
        await settle()
        slow.gate.set()
        await asyncio.gather(*tasks)
        assert max(map(len, slow.commits)) <= 128
        assert len(slow.commits) < len(tasks)
        assert sorted(key for commit in slow.commits for key in keys(commit)) == sorted(
            [put.key for commit in puts for put in commit] + [put.key for put in big]
        )

    async def test_writes_of_one_key_keep_their_order(self) -> None:
        slow = SlowStore()
        store = GroupCommit(slow, in_flight=1)
        tasks = [asyncio.create_task(store.commit(Put("a", b"%d" % n))) for n in range(5)]
        await settle()
        slow.gate.set()
        revisions = await asyncio.gather(*tasks)
        assert revisions == sorted(set(revisions))
        entry = await slow.get("a")
        assert entry is not None
        assert entry.value == b"4"

    async def test_one_that_depends_on_an_earlier_one_comes_after_it(self) -> None:
        slow = SlowStore()
        store = GroupCommit(slow, in_flight=1)
        made = [asyncio.create_task(store.commit(Put(key, b""))) for key in ("first", "a")]
        needs = asyncio.create_task(store.commit(Put("b", b""), when=[Present("a")]))
        excluded = asyncio.create_task(store.commit(Put("c", b""), when=[Absent("a")]))
        await settle()
        slow.gate.set()
        await asyncio.gather(*made, needs)
        with pytest.raises(ConditionFailed):
            await excluded

    async def test_all_of_an_unanswered_group_are_told_so(self) -> None:
        class Silent(SlowStore):
            async def commit(self, *writes: Write, when: Sequence[Any] = ()) -> int:
                await super().commit(*writes, when=when)
                raise Unknown("no answer")

        silent = Silent()
        store = GroupCommit(silent, in_flight=1)
        tasks = [asyncio.create_task(store.commit(Put(f"{n}", b""))) for n in range(5)]
        await settle()
        silent.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [Unknown] * 5
        assert len({id(result) for result in results}) == 5

    async def test_a_caller_that_gives_up_does_not_disturb_the_others(self) -> None:
        slow = SlowStore()
        store = GroupCommit(slow, in_flight=1)
        tasks = [asyncio.create_task(store.commit(Put(f"{n}", b""))) for n in range(4)]
        await settle()
        tasks[0].cancel()
        tasks[2].cancel()
        slow.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, int) for result in results] == [False, True, False, True]
        assert await store.commit(Put("later", b"")) > 0  # no slot was lost

    async def test_the_queue_is_bounded(self) -> None:
        slow = SlowStore()
        store = GroupCommit(slow, in_flight=1, waiting=3)
        tasks = [asyncio.create_task(store.commit(Put(f"{n}", b""))) for n in range(4)]
        await settle()
        with pytest.raises(Unavailable, match="3 commits wait"):
            await store.commit(Put("one too many", b""))
        slow.gate.set()
        assert len(await asyncio.gather(*tasks)) == 4

    async def test_closing_answers_all_who_wait(self) -> None:
        slow = SlowStore()
        store = GroupCommit(slow, in_flight=1)
        first = asyncio.create_task(store.commit(Put("0", b"")))
        await settle()
        others = [asyncio.create_task(store.commit(Put(f"{n}", b""))) for n in range(1, 4)]
        await settle()
        await store.close()
        assert {type(r) for r in await asyncio.gather(*others, return_exceptions=True)} == {Unavailable}
        first.cancel()
        await asyncio.wait([first])


class TestMemoryLease:
    async def test_its_holder_knows_before_its_keys_go(self) -> None:
        """Silence at 0 s: lost is told at 80 % of the TTL, the keys go at its end."""
        clock = VirtualClock()
        store = MemoryStore(clock)
        lease: Any = await store.lease(10)
        await store.commit(Put("a", b"", lease))
        await clock.advance(95)
        assert not lease.lost.is_set()
        lease.silence()
        await clock.advance(7)
        assert not lease.lost.is_set()
        await clock.advance(1)
        assert lease.lost.is_set()
        assert await store.get("a") is not None
        await clock.advance(2)
        assert await store.get("a") is None

    async def test_a_store_that_is_down_loses_leases_and_refuses_calls(self) -> None:
        clock = VirtualClock()
        store = MemoryStore(clock)
        lease = await store.lease(10)
        store.down = True
        await clock.advance(9)
        assert lease.lost.is_set()
        for call in (store.get("a"), store.list("a"), store.commit(Put("a", b"")), store.lease(1)):
            with pytest.raises(Unavailable):
                await call
        store.down = False
        assert await store.commit(Put("a", b"")) > 0


class Granting(MemoryStore):
    """Remembers the leases that it has given."""

    def __init__(self, clock):
        super().__init__(clock)
        self.granted = []

    async def lease(self, ttl_s):
        self.granted.append(await super().lease(ttl_s))
        return self.granted[-1]


async def test_a_paused_leader_is_replaced_and_fenced() -> None:
    """Its lease expires while it believes to lead; the next leader's writes go through, its own do not."""
    clock = VirtualClock()
    store = Granting(clock)
    async with elect(store, "x", "paused", ttl_s=2) as paused:
        store.granted[-1].silence()
        second = elect(store, "x", "second", ttl_s=2)
        entering = asyncio.create_task(second.__aenter__())
        await clock.advance(1.9)
        assert not entering.done()
        assert paused.lost.is_set()
        await clock.advance(0.5)
        leader = await entering
        await store.commit(Put("a", b"second"), when=[leader.held])
        with pytest.raises(Fenced):
            await store.commit(Put("a", b"paused"), when=[paused.held])
        await second.__aexit__(None, None, None)


class TestCache:
    async def test_compaction_under_it_leads_to_a_new_listing(self) -> None:
        """Its watch is held back while history goes; afterwards it holds exactly what there is."""

        class HeldBack(MemoryStore):
            gate = asyncio.Event()

            async def watch(self, prefix: str, *, after: int) -> AsyncIterator[Any]:
                await self.gate.wait()
                async with contextlib.aclosing(super().watch(prefix, after=after)) as batches:
                    async for batch in batches:
                        yield batch

        store: Any = HeldBack()
        store.gate = asyncio.Event()
        await store.commit(Put("/p/kept", b"1"), Put("/p/gone", b"1"), Put("/p/changed", b"1"))
        async with Cache(store, "/p/", lambda entry: entry.value) as cache:
            seen = cache.changes()
            assert {change.key for change in await anext(seen)} == {"/p/kept", "/p/gone", "/p/changed"}
            await store.commit(Delete("/p/gone"))
            await store.commit(Put("/p/changed", b"2"), Put("/p/new", b"1"))
            await store.compact(last := await store.commit(Put("/q", b"")))
            store.gate.set()
            await cache.at_least(last)
            assert dict(cache.values) == {"/p/kept": b"1", "/p/changed": b"2", "/p/new": b"1"}
            changes = {change.key: (change.old, change.new) for change in await anext(seen)}
            assert changes == {"/p/gone": (b"1", None), "/p/changed": (b"1", b"2"), "/p/new": (None, b"1")}
            await seen.aclose()

    async def test_a_slow_reader_holds_one_change_per_key(self) -> None:
        store = MemoryStore()
        await store.commit(Put("/p/a", b"0"))
        async with Cache(store, "/p/", lambda entry: entry.value) as cache:
            seen = cache.changes()
            await anext(seen)
            for n in range(1, 500):
                last = await store.commit(Put("/p/a", b"%d" % n), Put("/p/b", b""))
            last = await store.commit(Delete("/p/b"))
            await cache.at_least(last)
            (change,) = await anext(seen)  # b came and went
            assert (change.old, change.new) == (b"0", b"499")
            await seen.aclose()

    async def test_it_starts_when_the_store_does(self) -> None:
        store = MemoryStore()
        await store.commit(Put("/p/a", b"1"))
        store.down = True

        async def later() -> None:
            await settle()
            store.down = False

        async with asyncio.TaskGroup() as group:
            group.create_task(later())
            async with Cache(store, "/p/", lambda entry: entry.value) as cache:
                assert cache.get("/p/a") == b"1"

    async def test_what_no_retry_heals_ends_the_body(self) -> None:
        class Forbidden(MemoryStore):
            async def watch(self, prefix: str, *, after: int) -> AsyncIterator[Any]:
                raise PermissionDenied("not this prefix")
                yield

        with pytest.raises(ExceptionGroup) as ended:
            async with Cache(Forbidden(), "/p/", lambda entry: entry.value):
                await asyncio.Event().wait()
        assert ended.group_contains(PermissionDenied)

    async def test_a_revision_of_a_lost_history_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A replica waits for what it wrote itself; a restored backup has not got it, and never will."""
        monkeypatch.setattr("whaleflux.store.cache.REFRESH_AFTER_S", 0.0)
        store = MemoryStore()
        kept = await store.commit(Put("/p/a", b"1"))
        async with Cache(store, "/p/", lambda entry: entry.value) as cache:
            for n in range(5):
                wrote = await store.commit(Put("/p/a", b"lost %d" % n))
            await cache.at_least(wrote)
            await store.restore(kept)
            async with asyncio.timeout(5):
                while cache.revision > kept:  # it hears of it
                    await asyncio.sleep(0)
            await cache.at_least(wrote, timeout_s=1.0)
            assert dict(cache.values) == {"/p/a": b"1"}
            await cache.at_least(await store.commit(Put("/p/a", b"2")))
            assert dict(cache.values) == {"/p/a": b"2"}

    @pytest.mark.parametrize("behind", [False, True])
    async def test_who_waits_for_a_quiet_prefix_does_not_wait_for_its_watch(self, behind: bool) -> None:
        """etcd tells of revisions that are elsewhere only each few seconds; a watch that is behind is told from one that is quiet."""

        class Quiet(MemoryStore):
            asked = 0

            async def watch(self, prefix: str, *, after: int) -> AsyncIterator[Any]:
                await asyncio.Event().wait()
                yield

            async def extent(self, prefix: str) -> Any:
                self.asked += 1
                return await super().extent(prefix)

        store = Quiet()
        await store.commit(Put("/p/a", b"1"), Put("/p/b", b"1"))
        async with Cache(store, "/p/", lambda entry: entry.value) as cache:
            last = await store.commit(Delete("/p/b") if behind else Put("/q/a", b"1"))
            begun_s = asyncio.get_running_loop().time()
            await asyncio.gather(*(cache.at_least(last) for _ in range(20)))
            assert (asyncio.get_running_loop().time() - begun_s < 0.1) is not behind
            assert store.asked == 1, "one asks for all"
            assert dict(cache.values) == ({"/p/a": b"1"} if behind else {"/p/a": b"1", "/p/b": b"1"})

    async def test_waiting_for_what_does_not_come_is_refused(self) -> None:
        store = MemoryStore()
        async with Cache(store, "/p/", lambda entry: entry.value) as cache:
            with pytest.raises(Unavailable, match="not 99"):
                await cache.at_least(99, timeout_s=0.01)


class LosesAnswers(MemoryStore):
    """The next `lose` commits are made, or not, and stay without an answer."""

    def __init__(self, lose: Sequence[bool]) -> None:
        super().__init__()
        self.lose = list(lose)

    async def commit(self, *writes: Write, when: Sequence[Any] = ()) -> int:
        if not self.lose:
            return await super().commit(*writes, when=when)
        if self.lose.pop(0):
            with contextlib.suppress(ConditionFailed):
                await super().commit(*writes, when=when)
        raise Unknown("no answer")


class TestCommitOnce:
    @pytest.mark.parametrize("lose", [[], [True], [False], [False, True], [True, True], [True, False, True]])
    async def test_it_is_in_effect_once_however_answers_get_lost(self, lose: list[bool]) -> None:
        store = LosesAnswers(lose)
        revision = await commit_once(store, Put("a", b"1"), Put("b", b""), when=[Absent("a")], key="a")
        entry = await store.get("a")
        assert entry is not None
        assert (entry.version, entry.revision) == (1, revision)

    async def test_another_ones_write_is_not_taken_for_ours(self) -> None:
        store = LosesAnswers([False])
        await super(LosesAnswers, store).commit(Put("a", b"theirs"))
        with pytest.raises(ConditionFailed):
            await commit_once(store, Put("a", b"ours"), when=[Absent("a")], key="a")

    async def test_it_recognises_its_write_after_others_built_on_it(self) -> None:
        store = LosesAnswers([True])
        writing = asyncio.create_task(
            commit_once(store, Put("a", b"u1:new"), when=[Absent("a")], key="a", mine=lambda e: e.value[:2] == b"u1")
        )
        await settle()
        entry = await store.get("a")
        assert entry is not None
        later = await store.commit(Put("a", b"u1:started"), when=[Unchanged(entry)])
        assert await writing == later

    async def test_silence_to_the_end_stays_unknown(self) -> None:
        with pytest.raises(Unknown):
            await commit_once(LosesAnswers([True] * 99), Put("a", b""), when=[Absent("a")], key="a", within_s=0)

    async def test_a_write_that_could_apply_twice_is_refused(self) -> None:
        for when, key in (([], "a"), ([Absent("b")], "a"), ([Absent("b")], "b"), ([Present("a")], "a")):
            with pytest.raises(InvalidArgument):
                await commit_once(MemoryStore(), Put("a", b""), when=when, key=key)


def message_types() -> tuple[type[Any], type[Any]]:
    """The same message as an older and as a newer version know it; the newer has a field 3 in both levels."""
    types = []
    for version, fields in (("old", ["name", "items"]), ("new", ["name", "items", "extra"])):
        file = descriptor_pb2.FileDescriptorProto(name=f"{version}.proto", package=version, syntax="proto3")
        for message, names in (("Item", [n for n in fields if n != "items"]), ("Job", fields)):
            described = file.message_type.add(name=message)
            for name in names:
                number = {"name": 1, "items": 2, "extra": 3}[name]
                field = described.field.add(name=name, number=number, label=1, type=9)
                if name == "items":
                    field.label, field.type, field.type_name = 3, 11, f".{version}.Item"
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        types.append(message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{version}.Job")))
    return types[0], types[1]


def merge_job(value: tuple[str, tuple[str, ...]], message: Any) -> None:
    message.name = value[0]
    merge_repeated(
        message.items,
        value[1],
        message_key=lambda item: item.name,
        value_key=lambda name: name,
        merge=lambda name, item: setattr(item, "name", name),
    )


class TestCodec:
    @pytest.mark.parametrize("length", [10, 5_000])
    def test_large_values_are_packed_and_read_back(self, length):
        def merge(value: str, message: Any) -> None:
            message.name = value

        codec: Codec[Any, Any] = Codec(message_types()[0], lambda m: m.name, merge, packed_from_bytes=1_000)
        value = codec.encode("x" * length)
        assert len(value) < 200
        assert codec.read(value).name == "x" * length

    @pytest.mark.parametrize("damage", [lambda value: value[:-3], lambda value: value[:9] + b"?" * 20])
    def test_what_is_packed_and_damaged_is_no_message(self, damage):
        def merge(value: str, message: Any) -> None:
            message.name = value

        codec: Codec[Any, Any] = Codec(message_types()[0], lambda m: m.name, merge, packed_from_bytes=1)
        with pytest.raises(DecodeError, match="packed value"):
            codec.read(damage(codec.encode("x" * 1_000)))

    async def test_an_older_version_keeps_what_a_newer_one_wrote(self) -> None:
        """Unknown fields of the message and of its repeated parts survive a read, a change and a write."""
        old_type, new_type = message_types()
        old: Codec[Any, Message] = Codec(old_type, lambda m: (m.name, tuple(i.name for i in m.items)), merge_job)
        store = MemoryStore()
        newer = new_type(name="j", extra="kept")
        newer.items.add(name="a", extra="a's")
        newer.items.add(name="b", extra="b's")
        await store.commit(Put("j", newer.SerializeToString()))
        entry = await store.get("j")
        assert entry is not None
        stored = old.decode(entry)
        assert stored.value == ("j", ("a", "b"))
        await store.commit(old.put("j", ("j2", ("c", "b")), over=stored), when=[Unchanged(stored.entry)])
        entry = await store.get("j")
        assert entry is not None
        seen = new_type.FromString(entry.value)
        assert (seen.name, seen.extra) == ("j2", "kept")
        assert [(item.name, item.extra) for item in seen.items] == [("c", ""), ("b", "b's")]
        assert stored.message.SerializeToString() == newer.SerializeToString()  # what was read is not changed

    async def test_what_is_no_message_is_an_error(self) -> None:
        codec: Codec[Any, Any] = Codec(message_types()[0], lambda m: m.name, merge_job)
        store = MemoryStore()
        await store.commit(Put("j", b"\xff\xff\xff"))
        entry = await store.get("j")
        assert entry is not None
        with pytest.raises(DecodeError):
            codec.decode(entry)


async def test_memory_forgets_history_beyond_its_limit() -> None:
    store = MemoryStore(history_limit=10)
    first = await store.commit(Put("a", b""))
    for _ in range(20):
        await store.commit(Put("a", b""))
    with pytest.raises(Compacted):
        await anext(store.watch("a", after=first))
