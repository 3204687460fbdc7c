"""A deadline holds also for who swallows a cancellation, as `wait_for` of Python 3.11 does."""

import asyncio

import pytest

from whaleflux.events.deadline import within


async def test_what_is_done_in_time_is_returned():
    assert await within(1, asyncio.sleep(0.5, "done")) == "done"


async def test_its_own_error_is_raised():
    with pytest.raises(ZeroDivisionError):
        await within(1, _divides())


async def _divides():
    raise ZeroDivisionError


@pytest.mark.parametrize("times", [0, 1, 5])
async def test_who_swallows_its_cancellation_is_ended_all_the_same(times):
    swallowed, ended = [], asyncio.Event()

    async def stubborn():
        try:
            while True:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    if len(swallowed) == times:
                        raise
                    swallowed.append(1)
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        await within(1, stubborn())
    assert (len(swallowed), ended.is_set()) == (times, True)


async def test_the_callers_own_cancellation_ends_it_too():
    begun, ended = asyncio.Event(), asyncio.Event()

    async def works():
        try:
            begun.set()
            await asyncio.sleep(3600)
        finally:
            ended.set()

    waiting = asyncio.create_task(within(60, works()))
    await begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()
