"""Watch rpcs, page tokens and etags over the memory store."""

import asyncio
import contextlib

import pytest

from tests.support.virtual_time import LoopClock
from whaleflux.clock import VirtualClock
from whaleflux.errors import Aborted, Compacted, InvalidArgument, Unavailable
from whaleflux.rpc.etags import check_etag, etag_of
from whaleflux.rpc.paging import list_page, page_size, page_token, parse_token
from whaleflux.rpc.watching import Followed, Kind, WatchMessage, fill, follow, watch_resources
from whaleflux.store import Delete, Put
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import inventory_pb2 as pb

P = "/whaleflux/v1/things/"


def text(entry):
    return entry.value.decode()


async def take(stream, count):
    async with asyncio.timeout(5):
        return [await anext(stream) for _ in range(count)]


async def test_a_watch_from_zero_lists_then_marks_then_streams_changes():
    store = MemoryStore()
    await store.commit(Put(P + "a", b"1"), Put(P + "b", b"2"))
    async with contextlib.aclosing(watch_resources(store, P, 0, text)) as watch:
        first = await take(watch, 3)
        assert first == [
            WatchMessage(Kind.ADDED, 0, P + "a", "1"),
            WatchMessage(Kind.ADDED, 0, P + "b", "2"),
            WatchMessage(Kind.BOOKMARK, 2),
        ]
        await store.commit(Put(P + "b", b"3"))
        await store.commit(Delete(P + "a"))
        await store.commit(Put(P + "c", b"4"))
        assert await take(watch, 3) == [
            WatchMessage(Kind.MODIFIED, 3, P + "b", "3"),
            WatchMessage(Kind.DELETED, 4, P + "a"),
            WatchMessage(Kind.ADDED, 5, P + "c", "4"),
        ]


async def test_a_record_that_cannot_be_read_holds_up_no_other_and_is_not_told_as_gone():
    store = MemoryStore()
    await store.commit(Put(P + "a", b"1"), Put(P + "b", b"1"))
    async with contextlib.aclosing(watch_resources(store, P, 2, text)) as watch:
        await store.commit(Put(P + "a", b"\xff"))
        await store.commit(Put(P + "a", b"\xff\xff"), Put(P + "b", b"2"))
        assert await take(watch, 1) == [WatchMessage(Kind.MODIFIED, 4, P + "b", "2")]
        await store.commit(Put(P + "a", b"3"))
        assert await take(watch, 1) == [WatchMessage(Kind.MODIFIED, 5, P + "a", "3")]


NODES = "/whaleflux/v1/nodes/"


async def test_a_first_listing_names_what_cannot_be_read():
    store = MemoryStore()
    await store.commit(Put(NODES + "s/a", b"\xff"), Put(NODES + "s/b", b"1"))
    async with contextlib.aclosing(watch_resources(store, NODES, 0, text)) as watch:
        listed = await take(watch, 2)
    assert listed[0] == WatchMessage(Kind.ADDED, 0, NODES + "s/b", "1")
    end = fill(pb.WatchNodesResponse(), listed[1])
    assert list(end.bookmark.unreadable) == ["sites/s/nodes/a"]


async def test_pages_name_what_cannot_be_read_once_each():
    store = MemoryStore()
    for n in range(6):
        await store.commit(Put(f"{NODES}s/{n}", b"\xff" if n in (1, 3) else b"%d" % n))
    first = await list_page(store, NODES, text, size=2)
    rest = await list_page(store, NODES, text, size=9, token=first.next_page_token)
    assert first.items + rest.items == ("0", "2", "4", "5")
    assert first.unreadable + rest.unreadable == ("sites/s/nodes/1", "sites/s/nodes/3")


async def test_a_follower_keeps_what_it_knows_of_a_record_that_cannot_be_read():
    again = mark(60)
    again.bookmark.unreadable.append("n2")
    scripts = [[added("n1", 0), added("n2", 0), added("n3", 0), mark(10)], [added("n1", 0), again]]
    opened = 0

    async def watch(since):
        nonlocal opened
        opened += 1
        for message in scripts[opened - 1]:
            yield message
        raise Compacted(50)

    async with contextlib.aclosing(follow(watch, clock=LoopClock())) as changes:
        told = await take(changes, 7)
    assert told[4:] == [Followed("n1", pb.Node(name="n1")), Followed("n3"), Followed(synced=True)]


async def test_resuming_after_any_message_misses_nothing_even_within_a_transaction():
    store = MemoryStore()
    await store.commit(Put(P + "x", b""))
    await store.commit(Put(P + "a", b"1"), Put(P + "b", b"2"))
    async with contextlib.aclosing(watch_resources(store, P, 2, text)) as watch:
        [first] = await take(watch, 1)
    async with contextlib.aclosing(watch_resources(store, P, first.resource_version, text)) as watch:
        again = await take(watch, 2)
    assert [c.key for c in again] == [P + "a", P + "b"]
    assert again[-1].resource_version == 3


async def test_an_empty_listing_is_marked_too_and_a_compacted_start_is_refused():
    store = MemoryStore()
    async with contextlib.aclosing(watch_resources(store, P, 0, text)) as watch:
        assert await take(watch, 1) == [WatchMessage(Kind.BOOKMARK, 1)]
    for n in range(5):
        await store.commit(Put(P + "a", b"%d" % n))
    await store.compact(5)
    async with contextlib.aclosing(watch_resources(store, P, 2, text)) as watch:
        with pytest.raises(Compacted):
            await take(watch, 1)
    with pytest.raises(InvalidArgument):
        await anext(watch_resources(store, P, -1, text))


async def test_bookmarks_of_other_prefixes_are_thinned_out():
    store, clock = MemoryStore(), VirtualClock()
    async with contextlib.aclosing(watch_resources(store, P, 1, text, clock=clock)) as watch:
        pending = asyncio.ensure_future(anext(watch))
        await store.commit(Put("/whaleflux/v1/other", b""))
        await clock.advance(9)
        assert not pending.done()
        await clock.advance(2)
        await store.commit(Put("/whaleflux/v1/other", b""))
        assert (await asyncio.wait_for(pending, 5)).kind is Kind.BOOKMARK


async def test_pages_show_one_state_and_cover_everything_once():
    store = MemoryStore()
    for n in range(7):
        await store.commit(Put(f"{P}{n}", b"%d" % n))
    first = await list_page(store, P, text, size=3)
    await store.commit(Delete(P + "5"))
    second = await list_page(store, P, text, size=3, token=first.next_page_token)
    third = await list_page(store, P, text, size=3, token=second.next_page_token)
    assert first.items + second.items + third.items == tuple("0123456")
    assert third.next_page_token == "" and first.revision == second.revision == third.revision


async def test_filtered_pages_are_full_and_end():
    store = MemoryStore()
    for n in range(20):
        await store.commit(Put(f"{P}{n:02}", b"%d" % n))
    even = {"keep": lambda t: int(t) % 2 == 0, "size": 4}
    pages, token = [], ""
    while True:
        page = await list_page(store, P, text, token=token, **even)
        pages.append(page.items)
        if not (token := page.next_page_token):
            break
    assert [len(p) for p in pages] == [4, 4, 2]
    assert sum(pages, ()) == tuple(str(n) for n in range(0, 20, 2))


@pytest.mark.parametrize("token", ["x", "!!", page_token("/elsewhere/k", 3), "a" * 5000, page_token(P + "a", 10**30)])
def test_foreign_tokens_are_refused(token):
    with pytest.raises(InvalidArgument):
        parse_token(token, P)


def test_page_sizes():
    assert (page_size(0), page_size(7), page_size(10**9)) == (100, 7, 1000)
    with pytest.raises(InvalidArgument):
        page_size(-1)


async def test_etags():
    store = MemoryStore()
    await store.commit(Put(P + "a", b""))
    entry = await store.get(P + "a")
    check_etag("", entry)
    check_etag(etag_of(entry), entry)
    with pytest.raises(Aborted) as refused:
        check_etag('"99"', entry)
    assert refused.value.reason == "ETAG_MISMATCH"


def added(name, revision):
    return pb.WatchNodesResponse(added=pb.Node(name=name), resource_version=revision)


def mark(revision):
    response = pb.WatchNodesResponse(resource_version=revision)
    response.bookmark.SetInParent()
    return response


async def test_a_follower_resumes_after_breaks_and_tells_what_vanished_meanwhile():
    scripts = [
        ([added("n1", 0), added("n2", 0), mark(10), added("n3", 11)], Unavailable("gone")),
        ([pb.WatchNodesResponse(deleted="n2", resource_version=12)], Compacted(50)),
        ([added("n1", 0), mark(60)], None),
    ]
    opened, broken = [], []

    async def watch(since):
        opened.append(since)
        if len(opened) > len(scripts):
            await asyncio.Event().wait()
        messages, error = scripts[len(opened) - 1]
        for message in messages:
            yield message
        if error:
            raise error

    clock = VirtualClock()
    heard = []

    async def hear():
        async for told in follow(watch, clock=clock, on_broken=broken.append):
            heard.append((told.name, told.value is not None, told.synced))

    task = asyncio.create_task(hear())
    await clock.advance(30)
    task.cancel()
    assert opened == [0, 11, 0, 60]
    assert heard == [
        ("n1", True, False), ("n2", True, False), ("", False, True), ("n3", True, False),
        ("n2", False, False),
        ("n1", True, False), ("n3", False, False), ("", False, True),
    ]  # fmt: skip
    assert [type(b) for b in broken] == [Unavailable, Compacted]
    assert Followed(synced=True).synced
