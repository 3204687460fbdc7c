"""The newest events first, over a model of the bus, with the number of its readings."""

import random

import pytest

from whaleflux.errors import Unavailable
from whaleflux.events.api import MAX_READ
from whaleflux.events.memory import MemoryBus
from whaleflux.events.newest import newest

RARE, COMMON = "wf.v1.hub.job.q_rare.running", "wf.v1.hub.job.q_common.running"


class Counting(MemoryBus):
    reads = given = 0

    async def read(self, subjects, **options):
        answer = await super().read(subjects, **options)
        self.reads, self.given = self.reads + 1, self.given + len(answer.events)
        return answer


async def filled(rare_at, events):
    bus = Counting()
    for n in range(events):
        await bus.publish(RARE if n in rare_at else COMMON, b"%d" % n, id=f"{n}")
    return bus


async def page_by_page(bus, filters, limit):
    found, before = [], 0
    while page := await newest(bus, filters, before=before, limit=limit):
        found += [int(event.data) for event in page]
        before = page[-1].sequence
    return found


@pytest.mark.parametrize("limit", [1, 7, 20, 1000])
async def test_pages_are_all_there_is_newest_first_and_once(limit):
    chosen = random.Random(limit)
    rare = set(chosen.sample(range(3000), 40))
    bus = await filled(rare, 3000)
    assert (await page_by_page(bus, [RARE], limit)) == sorted(rare, reverse=True)


async def test_pages_of_a_dense_stream_are_all_there_is():
    bus = await filled(set(), 2500)
    assert (await page_by_page(bus, ["wf.v1.>"], 50)) == list(range(2499, -1, -1))


async def test_a_page_costs_few_readings_whatever_the_stream_holds():
    bus = await filled({5, 1999}, 8_000)
    assert [int(e.data) for e in await newest(bus, [RARE], limit=20)] == [1999, 5]
    assert (bus.reads, bus.given) == (2, 2)
    bus.reads = bus.given = 0
    assert [int(e.data) for e in await newest(bus, [COMMON], limit=3)] == [7999, 7998, 7997]
    assert bus.reads <= 4
    assert bus.given <= MAX_READ


async def test_what_is_far_behind_and_dense_is_found():
    bus = await filled(set(range(4000)), 8_000)
    page = await newest(bus, [RARE], limit=5)
    assert [int(e.data) for e in page] == [3999, 3998, 3997, 3996, 3995]
    assert bus.reads < 20


async def test_nothing_and_no_answer_differ():
    bus = await filled(set(), 3)
    assert await newest(bus, [RARE], limit=5) == []
    bus.reachable = False
    with pytest.raises(Unavailable):
        await newest(bus, [RARE], limit=5)
