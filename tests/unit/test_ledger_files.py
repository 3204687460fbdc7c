"""The ledger's files: what is in them is what was told, once, and nothing is in force that no head names."""

from tests.support.ledger_world import BEGIN_MS, MINUTE_MS, leading, reports, row, sample, step
from whaleflux.store.memory import MemoryStore
from whaleflux_console.core import facts as told
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger.manifest import Kind
from whaleflux_console.ledger.rules import HourState, state_of


async def test_what_was_appended_is_read_back_by_the_next_leader(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        await ledger.append(reports(1, 3, samples=[sample(tensor_ppm=400_000), sample("gpu-1")], steps=[step()]))
    async with leading(tmp_path, store) as ledger:
        found = (await ledger.inputs(BEGIN_MS)).facts
        assert {each.device: each.tensor_ppm for each in found.samples} == {"gpu-0": 400_000, "gpu-1": None}
        assert [(each.first_step, each.last_step) for each in found.steps] == [(1, 10)]
        assert ledger.state.position.sequence == 3
        assert ledger.notes == ()


async def test_an_hour_closed_restated(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        await ledger.append(reports(1, samples=[sample()]))
        await ledger.advance(BEGIN_MS + HOUR_MS + 14 * MINUTE_MS)
        assert ledger.due() == ()
        await ledger.advance(BEGIN_MS + HOUR_MS + 15 * MINUTE_MS)
        assert ledger.due() == (BEGIN_MS,)
        assert await ledger.close(await ledger.inputs(BEGIN_MS), [row()]) == 1
        assert ledger.due() == ()
        assert state_of(ledger.state, BEGIN_MS) is HourState.CLOSED
        assert await ledger.rows(BEGIN_MS) == (row(version=1),)
        await ledger.append(reports(2, samples=[sample(start_ms=BEGIN_MS + 10_000)], taken_ms=BEGIN_MS + 2 * HOUR_MS))
        assert ledger.due() == (BEGIN_MS,)
        assert await ledger.close(await ledger.inputs(BEGIN_MS), [row(bill=5)]) == 2
        assert state_of(ledger.state, BEGIN_MS) is HourState.RESTATED
        assert await ledger.rows(BEGIN_MS) == (row(bill=5, version=2),)
        assert await ledger.rows(BEGIN_MS, version=1) == (row(version=1),)


async def test_facts(tmp_path):
    store = MemoryStore()
    attempt = told.Attempt(
        "queues/q/jobs/j", "u1", 1, "q", "user/ada", "", 1, 2, None, None, plan=told.Plan(pipeline=4)
    )
    first = told.Facts(
        presences=(told.Presence("gpu-0", "gpu-0", "sites/s/nodes/n", "H200", 1_000_000, 0, 10),),
        attempts=(attempt,),
        prices=(told.PriceSpan("gpu-0", 0, 10, 3_000_000, told.PriceKind.OWNED, "list"),),
    )
    async with leading(tmp_path, store) as ledger:
        await ledger.tell(BEGIN_MS, first)
        assert (await ledger.inputs(BEGIN_MS)).facts == first
        longer = told.Facts(presences=(told.Presence("gpu-0", "gpu-0", "sites/s/nodes/n", "H200", 1_000_000, 0, 20),))
        await ledger.tell(BEGIN_MS, longer)
        found = (await ledger.inputs(BEGIN_MS)).facts
        assert found.presences == longer.presences
        assert found.attempts == (attempt,)
        assert len(ledger.state.of(Kind.FACTS, BEGIN_MS)) == 2
