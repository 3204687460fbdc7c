"""How long the store takes is shown by call, also where it fails; what it answers is passed on."""

import pytest
from prometheus_client import REGISTRY

from whaleflux.clock import VirtualClock
from whaleflux.errors import Unavailable
from whaleflux.store.api import Put
from whaleflux.store.memory import MemoryStore
from whaleflux.store.timed import TimedStore


class Slow(MemoryStore):
    """Takes `seconds`; then it answers, or fails while `down` is set."""

    def __init__(self):
        super().__init__(VirtualClock())
        self.now_s, self.seconds, self.down = 0.0, 0.0, False

    async def get(self, key):
        self.now_s += self.seconds
        if self.down:
            raise Unavailable("no member answers")
        return await super().get(key)


def counted(call, le=None):
    name = "whaleflux_store_duration_seconds" + ("_bucket" if le else "_count")
    return REGISTRY.get_sample_value(name, {"call": call} | ({"le": le} if le else {}))


@pytest.fixture
def inner():
    return Slow()


@pytest.fixture
def store(inner):
    return TimedStore(inner, lambda: inner.now_s)


async def test_calls_are_shown_before_the_first(store):
    assert counted("get") is not None and counted("commit") is not None


async def test_each_get_and_commit_is_observed_and_answered_as_by_the_store_itself(inner, store):
    gets, commits, quick = counted("get"), counted("commit"), counted("get", "0.25")
    revision = await store.commit(Put("/k", b"v"))
    inner.seconds = 0.4
    entry = await store.get("/k")
    assert (entry.value, entry.revision) == (b"v", revision)
    assert (counted("get"), counted("commit"), counted("get", "0.25")) == (gets + 1, commits + 1, quick)
    assert (await store.list("/")).entries == (entry,)
    assert await store.extent("/") == await inner.extent("/")


async def test_a_store_that_does_not_answer_is_a_slow_one(inner, store):
    inner.seconds, inner.down = 5.0, True
    all_, within = counted("get"), counted("get", "2.5")
    with pytest.raises(Unavailable):
        await store.get("/k")
    assert (counted("get"), counted("get", "2.5")) == (all_ + 1, within)
