"""What every Store promises, asked of the model in memory and of a real etcd, bare and through group commit."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.etcd_server import EtcdServer
from whaleflux.errors import Aborted, Compacted, InvalidArgument, NotFound, Unavailable
from whaleflux.store import (
    Absent,
    Batch,
    ConditionFailed,
    Delete,
    Equals,
    Fenced,
    Held,
    NoneCreated,
    Present,
    Put,
    Store,
    Unchanged,
)
from whaleflux.store.api import MAX_COMMIT_BYTES, MAX_OPERATIONS
from whaleflux.store.batching import GroupCommit
from whaleflux.store.cache import Cache, ValueChange
from whaleflux.store.election import elect, lead, leader_of
from whaleflux.store.etcd import EtcdStore
from whaleflux.store.memory import MemoryStore

_prefixes = itertools.count()


@dataclass(frozen=True)
class Case:
    """`store` is what is tested, `admin` the same state for compaction and revoking, `prefix` this test's own."""

    store: Store
    admin: Any
    prefix: str

    def key(self, name: object) -> str:
        return f"{self.prefix}{name}"

    async def now(self) -> int:
        return (await self.store.list(self.prefix, limit=1)).revision


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    asyncio.run(server.start())
    yield server
    server.kill()


ETCD = [pytest.param(name, marks=pytest.mark.integration) for name in ("etcd", "etcd-grouped")]


@pytest.fixture(params=["memory", "memory-grouped", *ETCD])
def kind(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """(memory or etcd, grouped or not, endpoint): apart from `case`, since a server is started outside of its loop."""
    kind, _, grouped = request.param.partition("-")
    return kind, grouped, "" if kind == "memory" else request.getfixturevalue("server").endpoint


@pytest.fixture
async def case(kind: tuple[str, str, str]) -> AsyncIterator[Case]:
    admin: Any = MemoryStore() if kind[0] == "memory" else EtcdStore([kind[2]])
    store = GroupCommit(admin) if kind[1] else admin
    yield Case(store, admin, f"/test/{next(_prefixes)}/")
    await store.close()


async def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # any condition, also of other processes
            await asyncio.sleep(0.005)


async def take(store: Store, prefix: str, after: int, *, last: int) -> list[Batch]:
    """The batches with events of (after, last]."""
    taken = []
    async with asyncio.timeout(30), contextlib.aclosing(store.watch(prefix, after=after)) as batches:
        async for batch in batches:
            taken += [batch] if batch.events else []
            if batch.revision >= last:
                return taken
    raise AssertionError("the watch ended by itself")


class TestReading:
    async def test_a_key_knows_its_revisions(self, case: Case) -> None:
        """`revision` is the last write's, `created` the first one's, `version` counts."""
        key = case.key("a")
        assert await case.store.get(key) is None
        first = await case.store.commit(Put(key, b"1"))
        second = await case.store.commit(Put(key, b"2"))
        entry = await case.store.get(key)
        assert entry is not None
        assert (entry.value, entry.revision, entry.created, entry.version) == (b"2", second, first, 2)

    async def test_a_key_made_again_is_new(self, case: Case) -> None:
        key = case.key("a")
        await case.store.commit(Put(key, b"1"))
        await case.store.commit(Delete(key))
        again = await case.store.commit(Put(key, b"2"))
        entry = await case.store.get(key)
        assert entry is not None
        assert (entry.created, entry.version) == (again, 1)

    async def test_a_listing_is_the_prefix_in_key_order(self, case: Case) -> None:
        for name in ("b", "a/2", "a/1", "a0", "ä"):
            await case.store.commit(Put(case.key(name), name.encode()))
        assert [e.key for e in (await case.store.list(case.prefix)).entries] == [
            case.key(n) for n in ("a/1", "a/2", "a0", "b", "ä")
        ]
        assert [e.value for e in (await case.store.list(case.key("a/"))).entries] == [b"a/1", b"a/2"]
        assert (await case.store.list(case.key("none"))).entries == ()

    async def test_pages_show_one_state(self, case: Case) -> None:
        """What is written between two pages is in neither."""
        for n in range(5):
            await case.store.commit(Put(case.key(n), b"old"))
        first = await case.store.list(case.prefix, limit=2)
        await case.store.commit(Put(case.key(3), b"new"), Delete(case.key(4)), Put(case.key(9), b"new"))
        second = await case.store.list(case.prefix, after=first.after, limit=2, at=first.revision)
        third = await case.store.list(case.prefix, after=second.after, limit=2, at=first.revision)
        entries = first.entries + second.entries + third.entries
        assert [(e.key, e.value) for e in entries] == [(case.key(n), b"old") for n in range(5)]
        assert (second.revision, third.after) == (first.revision, "")

    async def test_the_last_full_page_says_that_it_is_the_last(self, case: Case) -> None:
        for n in range(2):
            await case.store.commit(Put(case.key(n), b""))
        assert (await case.store.list(case.prefix, limit=2)).after == ""

    async def test_a_long_listing_is_complete(self, case: Case) -> None:
        for start in range(0, 2300, 100):
            await case.store.commit(*(Put(case.key(f"{n:05}"), b"") for n in range(start, start + 100)))
        snapshot = await case.store.list(case.prefix)
        assert [e.key for e in snapshot.entries] == [case.key(f"{n:05}") for n in range(2300)]
        assert len((await case.store.list(case.prefix, limit=1700)).entries) == 1700

    async def test_an_extent_tells_whether_anything_changed(self, case: Case) -> None:
        assert (await case.store.extent(case.prefix)).keys == 0
        first = await case.store.commit(Put(case.key("a"), b"1"), Put(case.key("b"), b"1"))
        elsewhere = await case.store.commit(Put(f"/elsewhere{case.prefix}", b"1"))
        extent = await case.store.extent(case.prefix)
        assert (extent.keys, extent.written) == (2, first)
        assert extent.revision >= elsewhere
        again = await case.store.commit(Put(case.key("a"), b"2"))
        assert (await case.store.extent(case.prefix)).written == again
        await case.store.commit(Delete(case.key("a")))
        extent = await case.store.extent(case.prefix)
        assert (extent.keys, extent.written) == (1, first)

    async def test_a_compacted_state_cannot_be_listed(self, case: Case) -> None:
        old = await case.store.commit(Put(case.key("a"), b"1"))
        new = await case.store.commit(Put(case.key("a"), b"2"))
        await case.admin.compact(new)
        with pytest.raises(Compacted):
            await case.store.list(case.prefix, at=old)

    async def test_a_state_that_is_not_there_yet_is_refused(self, case: Case) -> None:
        newest = await case.store.commit(Put(case.key("a"), b""))
        with pytest.raises(InvalidArgument):
            await case.store.list(case.prefix, at=newest + 1000)


class TestCommit:
    async def test_each_condition_holds_when_it_should_and_only_then(self, case: Case) -> None:
        there, gone, probe = case.key("there"), case.key("gone"), case.key("probe")
        await case.store.commit(Put(there, b"1"))
        old = await case.store.get(there)
        await case.store.commit(Put(there, b"2"))
        now = await case.store.get(there)
        assert old is not None
        assert now is not None
        good = [Present(there), Absent(gone), Unchanged(now), Equals(there, b"2")]
        bad = [Absent(there), Present(gone), Unchanged(old), Equals(there, b"1"), Equals(gone, b"")]
        for condition in good:
            await case.store.commit(Put(probe, b""), when=[condition])
        await case.store.commit(Delete(probe), when=good)
        for condition in bad:
            with pytest.raises(ConditionFailed) as refused:
                await case.store.commit(Put(probe, b""), when=[*good, condition])
            assert refused.value.failed == (condition,)
            assert isinstance(refused.value, Aborted)
        assert await case.store.get(probe) is None

    async def test_unchanged_fails_for_a_key_made_again_with_the_same_value(self, case: Case) -> None:
        key = case.key("a")
        await case.store.commit(Put(key, b"1"))
        entry = await case.store.get(key)
        assert entry is not None
        await case.store.commit(Delete(key))
        await case.store.commit(Put(key, b"1"))
        with pytest.raises(ConditionFailed):
            await case.store.commit(Put(key, b"2"), when=[Unchanged(entry)])

    async def test_none_created_holds_until_a_key_is_made_under_the_prefix(self, case: Case) -> None:
        under, beside, probe = case.key("of/a"), case.key("oz"), case.key("probe")
        await case.store.commit(when=[NoneCreated(case.key("of/"), await case.now())])
        seen = await case.store.commit(Put(under, b"1"))
        none = NoneCreated(case.key("of/"), seen)
        await case.store.commit(Put(under, b"2"), Put(beside, b""), when=[none])
        await case.store.commit(Put(probe, b""), when=[none])
        await case.store.commit(Delete(under), when=[none])
        await case.store.commit(Put(probe, b""), when=[none])
        await case.store.commit(Put(under, b"3"), when=[none])
        with pytest.raises(ConditionFailed) as refused:
            await case.store.commit(Delete(probe), when=[Present(probe), none])
        assert refused.value.failed == (none,)
        assert await case.store.get(probe) is not None

    async def test_none_written_holds_until_a_key_is_made_or_written_again_under_the_prefix(self, case: Case) -> None:
        under, probe = case.key("of/a"), case.key("probe")
        seen = await case.store.commit(Put(under, b"1"))
        none = NoneCreated(case.key("of/"), seen, or_written=True)
        await case.store.commit(Put(case.key("oz"), b""), when=[none])
        await case.store.commit(Put(under, b"2"), when=[none])
        with pytest.raises(ConditionFailed) as refused:
            await case.store.commit(Put(probe, b""), when=[none])
        assert refused.value.failed == (none,)
        await case.store.commit(Delete(under))
        await case.store.commit(Put(probe, b""), when=[none])

    async def test_a_parent_goes_only_without_children_however_commits_are_merged(self, case: Case) -> None:
        for n in range(20):
            parent, children = case.key(f"p{n}"), case.key(f"of-{n}/")
            seen = await case.store.commit(Put(parent, b""))
            await asyncio.gather(
                *(case.store.commit(Put(case.key(f"other-{n}-{i}"), b"")) for i in range(3)),
                case.store.commit(Put(children + "a", b""), when=[Present(parent)]),
                case.store.commit(Delete(parent), when=[NoneCreated(children, seen)]),
                return_exceptions=True,
            )
            gone, child = await case.store.get(parent) is None, await case.store.get(children + "a") is not None
            assert gone is not child

    async def test_a_commit_is_one_revision(self, case: Case) -> None:
        before = await case.store.commit(Put(case.key("x"), b""))
        revision = await case.store.commit(Put(case.key("a"), b""), Put(case.key("b"), b""), Delete(case.key("x")))
        (batch,) = await take(case.store, case.prefix, before, last=revision)
        assert {e.key for e in batch.events} == {case.key(n) for n in "abx"}
        assert [e.entry for e in batch.events if e.key == case.key("x")] == [None]

    async def test_deleting_what_is_not_there_changes_nothing(self, case: Case) -> None:
        before = await case.now()
        assert await case.store.commit(Delete(case.key("a"))) == before

    async def test_a_commit_without_writes_only_asks(self, case: Case) -> None:
        await case.store.commit(when=[Absent(case.key("a"))])
        with pytest.raises(ConditionFailed):
            await case.store.commit(when=[Present(case.key("a"))])

    async def test_one_of_many_creators_wins(self, case: Case) -> None:
        key = case.key("a")
        puts = [case.store.commit(Put(key, b"%d" % n), when=[Absent(key)]) for n in range(40)]
        results = await asyncio.gather(*puts, return_exceptions=True)
        winners = [n for n, result in enumerate(results) if isinstance(result, int)]
        assert len(winners) == 1
        assert all(isinstance(result, int | ConditionFailed) for result in results)
        entry = await case.store.get(key)
        assert entry is not None
        assert entry.value == b"%d" % winners[0]

    async def test_concurrent_increments_are_not_lost(self, case: Case) -> None:
        key, done = case.key("count"), 0
        await case.store.commit(Put(key, b"0"))

        async def increment() -> None:
            nonlocal done
            for _ in range(8):
                entry = await case.store.get(key)
                assert entry is not None
                with contextlib.suppress(ConditionFailed):
                    await case.store.commit(Put(key, b"%d" % (int(entry.value) + 1)), when=[Unchanged(entry)])
                    done += 1

        await asyncio.gather(*(increment() for _ in range(16)))
        entry = await case.store.get(key)
        assert entry is not None
        assert int(entry.value) == done >= 8

    async def test_two_that_exclude_each_other_do_not_both_happen(self, case: Case) -> None:
        """Each writes what the other one wants absent: some order of the two must explain the outcome."""

        def commit(pair: int, mine: str, other: str) -> Any:
            return case.store.commit(Put(case.key(f"{pair}{mine}"), b""), when=[Absent(case.key(f"{pair}{other}"))])

        sides = [(pair, *names) for pair in range(20) for names in (("a", "b"), ("b", "a"))]
        results = await asyncio.gather(*(commit(*side) for side in sides), return_exceptions=True)
        assert sum(isinstance(result, ConditionFailed) for result in results) == 20
        assert len((await case.store.list(case.prefix)).entries) == 20

    async def test_losers_do_not_fail_others(self, case: Case) -> None:
        """Of many commits at once, exactly those whose own conditions are false fail."""
        taken = {n: case.key(f"taken/{n}") for n in range(0, 90, 3)}
        await case.store.commit(*(Put(key, b"") for key in taken.values()))

        def commit(n: int) -> Any:
            when = [Absent(taken[n]), Absent(case.key(n))] if n in taken else [Absent(case.key(n))]
            return case.store.commit(Put(case.key(n), b"%d" % n), when=when)

        results = await asyncio.gather(*(commit(n) for n in range(90)), return_exceptions=True)
        for n, result in enumerate(results):
            if n in taken:
                assert isinstance(result, ConditionFailed)
                assert result.failed == (Absent(taken[n]),)
            else:
                entry = await case.store.get(case.key(n))
                assert entry is not None
                assert (entry.value, entry.revision) == (b"%d" % n, result)

    async def test_limits_are_named(self, case: Case) -> None:
        many = [Put(case.key(n), b"") for n in range(MAX_OPERATIONS + 1)]
        await case.store.commit(*many[:-1], when=[Absent(put.key) for put in many[:-1]])
        with pytest.raises(InvalidArgument, match=str(MAX_OPERATIONS)):
            await case.store.commit(*many)
        with pytest.raises(InvalidArgument, match=str(MAX_OPERATIONS)):
            await case.store.commit(many[0], when=[Present(put.key) for put in many])
        await case.store.commit(Put(case.key("big"), bytes(MAX_COMMIT_BYTES - 200)))
        with pytest.raises(InvalidArgument, match=str(MAX_COMMIT_BYTES)):
            await case.store.commit(Put(case.key("big"), bytes(MAX_COMMIT_BYTES)))
        with pytest.raises(InvalidArgument, match="twice"):
            await case.store.commit(Put(case.key("a"), b"1"), Put(case.key("a"), b"2"))
        with pytest.raises(InvalidArgument, match="empty"):
            await case.store.commit(Put("", b""))


class TestWatch:
    async def test_it_is_ordered_unique_complete_and_whole(self, case: Case) -> None:
        """Under many writers, a watch tells each acknowledged commit once, in order, with all its keys."""
        start, acknowledged = await case.now(), dict[int, set[str]]()

        async def write(writer: int) -> None:
            for n in range(20):
                keys = [case.key(f"{writer}/{n}/{part}") for part in range(1 + n % 3)]
                revision = await case.store.commit(*(Put(key, b"") for key in keys))
                acknowledged.setdefault(revision, set()).update(keys)

        async def write_all() -> None:
            await asyncio.gather(*(write(w) for w in range(10)))
            acknowledged[await case.store.commit(Put(case.key("end"), b""))] = {case.key("end")}

        writing = asyncio.create_task(write_all())
        seen = []
        async with asyncio.timeout(30), contextlib.aclosing(case.store.watch(case.prefix, after=start)) as batches:
            async for batch in batches:
                seen.append(batch)
                if any(event.key == case.key("end") for event in batch.events):
                    break
        await writing
        revisions = [batch.revision for batch in seen]
        assert revisions == sorted(set(revisions))  # bookmarks, too, are never ahead of later events
        assert {b.revision: {e.key for e in b.events} for b in seen if b.events} == acknowledged

    async def test_it_resumes_after_any_revision(self, case: Case) -> None:
        start = await case.now()
        revisions = [await case.store.commit(Put(case.key(n), b"")) for n in range(6)]
        everything = await take(case.store, case.prefix, start, last=revisions[-1])
        assert [batch.revision for batch in everything] == revisions
        for position, revision in enumerate(revisions[:-1]):
            rest = await take(case.store, case.prefix, revision, last=revisions[-1])
            assert rest == everything[position + 1 :]

    async def test_other_prefixes_are_not_told(self, case: Case) -> None:
        start = await case.now()
        await case.store.commit(Put(case.prefix.rstrip("/") + "0/a", b""), Put(case.key("a/x"), b""))
        last = await case.store.commit(Put(case.key("b"), b""), Put(case.key("a/y"), b""))
        batches = await take(case.store, case.key("a"), start, last=last)
        assert [event.key for batch in batches for event in batch.events] == [case.key("a/x"), case.key("a/y")]

    async def test_a_bookmark_follows_what_happens_elsewhere(self, case: Case) -> None:
        """So that a quiet prefix's reader learns that nothing is missing."""
        start = await case.now()
        elsewhere = await case.store.commit(Put(f"{case.prefix[:-1]}-elsewhere", b""))
        assert await take(case.store, case.prefix, start, last=elsewhere) == []

    async def test_a_slow_watch_does_not_hold_another(self, case: Case) -> None:
        start = await case.now()
        async with contextlib.aclosing(case.store.watch(case.prefix, after=start)) as slow:
            revisions = [await case.store.commit(Put(case.key(n), b"x" * 10_000)) for n in range(50)]
            assert (await anext(slow)).revision == revisions[0]
            other = await take(case.store, case.prefix, start, last=revisions[-1])
            assert [batch.revision for batch in other] == revisions
            rest = [batch async for batch in _until(slow, revisions[-1])]
        assert [batch.revision for batch in rest if batch.events] == revisions[1:]

    async def test_compaction_does_not_disturb_an_open_watch(self, case: Case) -> None:
        start = await case.now()
        async with contextlib.aclosing(case.store.watch(case.prefix, after=start)) as batches:
            first = await case.store.commit(Put(case.key("a"), b"1"))
            assert (await anext(batches)).revision == first
            await case.admin.compact(first)
            second = await case.store.commit(Put(case.key("a"), b"2"))
            rest = [batch async for batch in _until(batches, second)]
        assert [batch.revision for batch in rest if batch.events] == [second]

    async def test_compacted_history_is_refused(self, case: Case) -> None:
        start = await case.store.commit(Put(case.key("a"), b"0"))
        for n in range(3):
            last = await case.store.commit(Put(case.key("a"), b"%d" % n))
        await case.admin.compact(last)
        with pytest.raises(Compacted) as gone:
            await take(case.store, case.prefix, start, last=last)
        assert gone.value.revision == last
        assert (await case.store.list(case.prefix)).revision >= last  # which is how the caller goes on


async def _until(batches: AsyncIterator[Batch], revision: int) -> AsyncIterator[Batch]:
    async with asyncio.timeout(30):
        async for batch in batches:
            yield batch
            if batch.revision >= revision:
                return


class TestLease:
    async def test_keys_die_with_their_lease(self, case: Case) -> None:
        lease = await case.store.lease(5)
        other = await case.store.lease(5)
        await case.store.commit(Put(case.key("a"), b"", lease), Put(case.key("b"), b"", lease))
        await case.store.commit(Put(case.key("b"), b"", other))  # changes hands
        await case.store.commit(Put(case.key("c"), b""))
        before = await case.now()
        await lease.revoke()
        assert lease.lost.is_set()
        assert [e.key for e in (await case.store.list(case.prefix)).entries] == [case.key("b"), case.key("c")]
        (batch,) = await take(case.store, case.prefix, before, last=before + 1)
        assert [(event.key, event.entry) for event in batch.events] == [(case.key("a"), None)]

    async def test_it_is_kept_alive(self, case: Case) -> None:
        lease = await case.store.lease(2)
        await case.store.commit(Put(case.key("a"), b"", lease))
        await asyncio.sleep(1.3 * lease.ttl_s)  # real time is what is tested
        assert not lease.lost.is_set()
        assert await case.store.get(case.key("a")) is not None
        await lease.revoke()

    async def test_its_loss_is_told_and_it_takes_no_more_keys(self, case: Case) -> None:
        lease = await case.store.lease(1)
        await case.admin.revoke(lease.id)
        async with asyncio.timeout(30):
            await lease.lost.wait()
        with pytest.raises(NotFound):
            await case.store.commit(Put(case.key("a"), b"", lease))
        assert await case.store.get(case.key("a")) is None

    async def test_a_lost_lease_fails_only_its_own_commit(self, case: Case) -> None:
        lease = await case.store.lease(5)
        await lease.revoke()
        commits = [case.store.commit(Put(case.key(n), b"", lease if n == 7 else None)) for n in range(15)]
        results = await asyncio.gather(*commits, return_exceptions=True)
        assert [n for n, result in enumerate(results) if isinstance(result, NotFound)] == [7]
        assert len((await case.store.list(case.prefix)).entries) == 14


class TestElection:
    async def test_a_leader_that_resigns_is_replaced_at_once(self, case: Case) -> None:
        name = case.prefix.strip("/")
        async with elect(case.store, name, "a", ttl_s=5):
            second = asyncio.create_task(self._lead_once(case, name, "b"))
            await asyncio.sleep(0.05)
            assert not second.done()
            assert await leader_of(case.store, name) == "a"
            resigned = time.monotonic()
        assert await second == "b"
        assert time.monotonic() - resigned < 3, "the lease of one that does not resign runs for five"
        assert await leader_of(case.store, name) == ""

    @staticmethod
    async def _lead_once(case: Case, name: str, identity: str) -> str:
        async with elect(case.store, name, identity, ttl_s=5):
            return await leader_of(case.store, name)

    async def test_of_two_that_believe_to_lead_the_fenced_one_writes_nothing(self, case: Case) -> None:
        """The first leader's lease ends without its knowledge: all it tries from then on is refused."""
        name, key = case.prefix.strip("/"), case.key("state")
        async with elect(case.store, name, "old", ttl_s=30) as old:
            await case.store.commit(Put(key, b"old"), when=[old.held])
            await case.admin.commit(Delete(old.key))  # what expiry does to a paused leader
            async with elect(case.store, name, "new", ttl_s=30) as new:
                late = [case.store.commit(Put(key, b"late %d" % n), when=[old.held]) for n in range(20)]
                good = [case.store.commit(Put(case.key(n), b"new"), when=[new.held]) for n in range(20)]
                results = await asyncio.gather(*late, *good, return_exceptions=True)
                assert all(isinstance(result, Fenced) for result in results[:20])
                assert all(isinstance(result, int) for result in results[20:])
                entry = await case.store.get(key)
                assert entry is not None
                assert entry.value == b"old"

    async def test_a_later_leadership_of_the_same_process_is_another_one(self, case: Case) -> None:
        name = case.prefix.strip("/")
        async with elect(case.store, name, "a", ttl_s=5) as first:
            pass
        assert first.lost.is_set()
        async with elect(case.store, name, "a", ttl_s=5) as second:
            await case.store.commit(when=[Held(second)])
            with pytest.raises(Fenced):
                await case.store.commit(when=[Held(first)])

    async def test_two_racers_never_lead_at_once(self, case: Case) -> None:
        """Each leadership adds its turns in order; no turn is written by two."""
        name, key = case.prefix.strip("/"), case.key("turns")
        await case.store.commit(Put(key, b""))

        async def race(identity: bytes) -> None:
            for _ in range(5):
                async with elect(case.store, name, identity.decode(), ttl_s=5) as leader:
                    for _ in range(3):
                        entry = await case.store.get(key)
                        assert entry is not None
                        await case.store.commit(Put(key, entry.value + identity), when=[leader.held])

        await asyncio.gather(race(b"a"), race(b"b"))
        entry = await case.store.get(key)
        assert entry is not None
        assert sorted(entry.value) == sorted(b"a" * 15 + b"b" * 15)
        turns = {entry.value[n : n + 3] for n in range(0, 30, 3)}
        assert turns == {b"aaa", b"bbb"}

    async def test_work_is_cancelled_on_loss_and_begun_afresh(self, case: Case) -> None:
        name, starts, ends = case.prefix.strip("/"), [], []

        async def work(leader: Any) -> None:
            starts.append(leader.created)
            if len(starts) == 2:
                return
            try:
                (lease,) = [lease for lease in granted if not lease.lost.is_set()]
                await case.admin.revoke(lease.id)
                await asyncio.Event().wait()
            finally:
                ends.append(leader.lost.is_set())

        granted: list[Any] = []
        spy = _LeaseSpy(case.store, granted)
        async with asyncio.timeout(30):
            await lead(spy, name, "a", work, ttl_s=1)
        assert ends == [True]
        assert starts[0] < starts[1]

    async def test_a_fenced_loop_campaigns_again(self, case: Case) -> None:
        name, starts = case.prefix.strip("/"), []

        async def work(leader: Any) -> None:
            starts.append(leader.created)
            if len(starts) == 1:
                await case.admin.commit(Delete(leader.key))
            async with asyncio.TaskGroup() as group:  # as loops do: the status error arrives in a group
                group.create_task(case.store.commit(Put(case.key("a"), b""), when=[leader.held]))

        async with asyncio.timeout(30):
            await lead(case.store, name, "a", work)
        assert len(starts) == 2

    async def test_an_outage_under_the_work_ends_that_leadership_and_not_the_loop(self, case: Case) -> None:
        name, starts = case.prefix.strip("/"), []

        async def work(leader: Any) -> None:
            starts.append(leader.created)
            if len(starts) < 3:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_unavailable())

        async def _unavailable() -> None:
            raise Unavailable("etcdserver: too many requests", reason="STORE_BUSY")

        async with asyncio.timeout(30):
            await lead(case.store, name, "a", work)
        assert len(starts) == 3
        assert starts == sorted(set(starts)), "each time as a leadership of its own"

    async def test_an_error_of_the_work_is_not_hidden(self, case: Case) -> None:
        async def work(_: Any) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await lead(case.store, case.prefix.strip("/"), "a", work)


class _LeaseSpy:
    """Passes everything through and remembers the leases."""

    def __init__(self, store: Store, granted: list[Any]) -> None:
        self._store, self._granted = store, granted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def lease(self, ttl_s: float) -> Any:
        self._granted.append(await self._store.lease(ttl_s))
        return self._granted[-1]


class TestCache:
    async def test_it_holds_the_prefix_and_follows(self, case: Case) -> None:
        await case.store.commit(Put(case.key("a"), b"1"), Put(case.key("b"), b"1"))
        async with Cache(case.store, case.prefix, lambda entry: entry.value) as cache:
            assert dict(cache.values) == {case.key("a"): b"1", case.key("b"): b"1"}
            revision = await case.store.commit(Put(case.key("a"), b"2"), Delete(case.key("b")))
            await cache.at_least(revision)
            assert dict(cache.values) == {case.key("a"): b"2"}
            assert cache.revision >= revision

    async def test_it_reaches_revisions_made_elsewhere(self, case: Case) -> None:
        async with Cache(case.store, case.prefix, lambda entry: entry.value) as cache:
            elsewhere = await case.store.commit(Put(f"{case.prefix[:-1]}-elsewhere", b""))
            await cache.at_least(elsewhere)
            last = await case.store.commit(Put(case.key("a"), b""))
            await cache.at_least(last)
            assert case.key("a") in cache.values

    async def test_changes_lead_from_the_first_state_to_the_last(self, case: Case) -> None:
        """Played onto an empty dict they give the same as the store, whatever was merged on the way."""
        await case.store.commit(Put(case.key(0), b"0"))
        mirror: dict[str, bytes] = {}

        async def mirrored(cache: Cache[bytes]) -> None:
            async for group in cache.changes():
                for change in group:
                    assert mirror.get(change.key) == change.old
                    self._play(change, mirror)

        async with Cache(case.store, case.prefix, lambda entry: entry.value) as cache:
            following = asyncio.create_task(mirrored(cache))
            for n in range(60):
                write = Delete(case.key(n % 7)) if n % 5 == 4 else Put(case.key(n % 7), b"%d" % n)
                last = await case.store.commit(write)
            await cache.at_least(last)
            await until(lambda: mirror == dict(cache.values))
            truth = {entry.key: entry.value for entry in (await case.store.list(case.prefix)).entries}
            assert mirror == truth
        await asyncio.wait_for(following, 30)  # it ends with the cache

    @staticmethod
    def _play(change: ValueChange[bytes], mirror: dict[str, bytes]) -> None:
        if change.new is None:
            del mirror[change.key]
        else:
            mirror[change.key] = change.new

    async def test_an_unreadable_value_is_named_and_its_last_known_one_stays(self, case: Case) -> None:
        await case.store.commit(Put(case.key("good"), b"1"), Put(case.key("bad"), b"x"))
        async with Cache(case.store, case.prefix, lambda entry: int(entry.value)) as cache:
            assert dict(cache.values) == {case.key("good"): 1}
            assert list(cache.unreadable) == [case.key("bad")]
            await cache.at_least(await case.store.commit(Put(case.key("bad"), b"2")))
            assert cache.get(case.key("bad")) == 2
            assert not cache.unreadable
            await cache.at_least(await case.store.commit(Put(case.key("bad"), b"y"), Put(case.key("good"), b"3")))
            assert dict(cache.values) == {case.key("good"): 3, case.key("bad"): 2}, "not known is not gone"
            assert list(cache.unreadable) == [case.key("bad")]
            await cache.at_least(await case.store.commit(Delete(case.key("bad"))))
            assert dict(cache.values) == {case.key("good"): 3}
            assert not cache.unreadable
