"""Watch rpcs, page tokens and etags over the memory store."""

import asyncio
import contextlib

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import Compacted, Conflict, Invalid, Unavailable
from whaleflux.rpc.etags import check_etag, etag_of
from whaleflux.rpc.paging import list_page, page_size, page_token, parse_token
from whaleflux.rpc.watching import Change, Followed, Kind, follow, watch_resources
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
            Change(Kind.ADDED, 0, P + "a", "1"),
            Change(Kind.ADDED, 0, P + "b", "2"),
            Change(Kind.BOOKMARK, 2),
        ]
        await store.commit(Put(P + "b", b"3"))
        await store.commit(Delete(P + "a"))
        await store.commit(Put(P + "c", b"4"))
        assert await take(watch, 3) == [
            Change(Kind.MODIFIED, 3, P + "b", "3"),
            Change(Kind.DELETED, 4, P + "a"),
            Change(Kind.ADDED, 5, P + "c", "4"),
        ]


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
        assert await take(watch, 1) == [Change(Kind.BOOKMARK, 1)]
    for n in range(5):
        await store.commit(Put(P + "a", b"%d" % n))
    await store.compact(5)
    async with contextlib.aclosing(watch_resources(store, P, 2, text)) as watch:
        with pytest.raises(Compacted):
            await take(watch, 1)
    with pytest.raises(Invalid):
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
    with pytest.raises(Invalid):
        parse_token(token, P)


def test_page_sizes():
    assert (page_size(0), page_size(7), page_size(10**9)) == (100, 7, 1000)
    with pytest.raises(Invalid):
        page_size(-1)


async def test_etags():
    store = MemoryStore()
    await store.commit(Put(P + "a", b""))
    entry = await store.get(P + "a")
    check_etag("", entry)
    check_etag(etag_of(entry), entry)
    with pytest.raises(Conflict) as refused:
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
