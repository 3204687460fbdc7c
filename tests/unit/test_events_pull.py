"""The pull loop against a feed that misbehaves on purpose; silences are shortened to milliseconds."""

import asyncio
import contextlib
from datetime import UTC, datetime

import pytest

from whaleflux.errors import FailedPrecondition, Unavailable
from whaleflux.events.api import Delivery
from whaleflux.events.pull import Notice, Out, PullSubscription, Said, Window, pull

SILENCE_S = 0.05


class ScriptedFeed:
    """Notes what it is asked; delivers what the test puts into `arrivals`."""

    stream = "EVENTS"

    def __init__(self, refuse=()):
        self.arrivals = asyncio.Queue()
        self.ensured, self.asked, self.settled, self.closed_with = 0, [], {}, None
        self._refuse = list(refuse)

    async def ensure(self):
        self.ensured += 1
        if self._refuse:
            raise self._refuse.pop(0)

    async def ask(self, request, batch):
        self.asked.append((request, batch))

    async def close(self, unseen=()):
        self.closed_with = [event.sequence for event in unseen]

    def event(self, sequence):
        async def settle(delay_s):
            self.settled[sequence] = delay_s

        return Delivery(
            "wf.v1.a.b.c.d", b"", "", {}, self.stream, sequence, datetime(2026, 1, 1, tzinfo=UTC), 1, settle
        )


@contextlib.asynccontextmanager
async def pulling(feed, capacity=4, hold_s=30.0):
    out = Out()
    task = asyncio.create_task(pull(feed, out, Window(capacity, hold_s), SILENCE_S))
    try:
        yield out
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # lists tell nobody
            await asyncio.sleep(0.001)


async def test_silence_means_the_request_is_gone():
    feed = ScriptedFeed()
    async with pulling(feed):
        await until(lambda: len(feed.asked) >= 2)
    assert feed.ensured >= 2
    assert [request for request, _ in feed.asked] == list(range(1, len(feed.asked) + 1))


async def test_heartbeats_keep_a_request_alive():
    feed = ScriptedFeed()
    async with pulling(feed):
        for _ in range(8):
            await asyncio.sleep(SILENCE_S / 2)
            feed.arrivals.put_nowait(Notice(Said.HEARTBEAT, 1))
    assert feed.asked == [(1, 4)]


async def test_a_request_that_ran_out_is_renewed_without_making_sure_of_the_consumer():
    feed = ScriptedFeed()
    async with pulling(feed):
        await until(lambda: feed.asked)
        feed.arrivals.put_nowait(Notice(Said.ENDED, 1))
        await until(lambda: len(feed.asked) == 2)
        assert feed.ensured == 1


async def test_a_renewed_connection_ends_the_wait_at_once():
    feed = ScriptedFeed()
    async with pulling(feed):
        await until(lambda: feed.asked)
        feed.arrivals.put_nowait(Notice(Said.LOST, reason="the connection was renewed"))
        await until(lambda: len(feed.asked) == 2)
        assert feed.ensured == 2


async def test_what_older_requests_say_is_not_for_the_present_one():
    feed = ScriptedFeed()
    async with pulling(feed):
        await until(lambda: feed.asked)
        feed.arrivals.put_nowait(Notice(Said.ENDED, 1))
        await until(lambda: len(feed.asked) == 2)
        feed.arrivals.put_nowait(Notice(Said.ENDED, 1))
        feed.arrivals.put_nowait(Notice(Said.LOST, 1))
        await until(feed.arrivals.empty)
        await asyncio.sleep(0.01)
        assert len(feed.asked) == 2


async def test_outages_are_waited_out_and_status_errors_are_not():
    feed = ScriptedFeed(refuse=[Unavailable("away"), Unavailable("away")])
    async with pulling(feed):
        await until(lambda: feed.asked)
    assert feed.ensured >= 3
    with pytest.raises(FailedPrecondition):
        await pull(ScriptedFeed(refuse=[FailedPrecondition("no")]), Out(), Window(1, 1), SILENCE_S)


async def test_no_more_is_asked_for_than_the_reader_may_hold():
    feed = ScriptedFeed()
    async with pulling(feed, capacity=3) as out:
        await until(lambda: feed.asked == [(1, 3)])
        held = []
        for sequence in (1, 2, 3):
            feed.arrivals.put_nowait(feed.event(sequence))
            held.append(await out.ready.get())
        await asyncio.sleep(2 * SILENCE_S)
        assert len(feed.asked) == 1
        await held[1].ack()
        await until(lambda: feed.asked[1:] == [(2, 1)])
    assert feed.settled == {2: None}


async def test_a_reader_that_never_settles_gets_room_when_the_server_gives_up_on_it():
    feed = ScriptedFeed()
    async with pulling(feed, capacity=1, hold_s=0.1) as out:
        feed.arrivals.put_nowait(feed.event(1))
        await out.ready.get()
        await until(lambda: len(feed.asked) == 2)
    assert feed.asked[1] == (2, 1)


async def test_settling_twice_frees_one_place():
    feed, window = ScriptedFeed(), Window(2, 30)
    first, second = window.hold(feed.event(1)), window.hold(feed.event(2))
    await first.ack()
    await first.nak()
    assert await window.room() == 1
    await second.nak(2.5)
    assert await window.room() == 2
    assert feed.settled == {1: 0.0, 2: 2.5}


async def test_closing_gives_back_what_nobody_has_seen():
    feed, closed = ScriptedFeed(), []
    news = PullSubscription([feed], 10, 30, closed.append)
    for sequence in (1, 2, 3):
        feed.arrivals.put_nowait(feed.event(sequence))
    assert (await anext(news)).sequence == 1
    await until(feed.arrivals.empty)
    await news.aclose()
    assert sorted(feed.closed_with) == [2, 3]
    assert closed == [news]
    assert [event async for event in news] == []


async def test_a_status_error_reaches_the_reader_and_closes():
    news = PullSubscription([ScriptedFeed(refuse=[FailedPrecondition("no such thing")])], 1, 30, lambda _: None)
    with pytest.raises(FailedPrecondition, match="no such thing"):
        await anext(news)
    with pytest.raises(StopAsyncIteration):
        await anext(news)
