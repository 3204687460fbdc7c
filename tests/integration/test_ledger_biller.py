"""Hours are billed by the same rules wherever that is done, and one that cannot be billed is no other's trouble."""

import asyncio

import pytest

from whaleflux_console.biller import LARGE_ROWS, NotBilled, bill
from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM, Adjustment, Attempt, Facts, Holding, Presence, PriceKind
from whaleflux_console.core.price_book import Price
from whaleflux_console.ledger import schemas
from whaleflux_console.ledger.billing import Known, billed

T = 500_000 * HOUR_MS
CARDS = 40
PRICES = [Price("prices/p", PriceKind.OWNED, 2_000_001, 0, None, "a contract", "2026-01-01")]


def known(*more, samples_each=LARGE_ROWS // CARDS):
    """An hour of a job on half of the cards, with so many samples of each."""
    cards = [f"g{i:02}" for i in range(CARDS)]
    told = Facts(
        presences=tuple(Presence(c, c, "sites/a/nodes/n", "H100", WHOLE_PPM, T, T + HOUR_MS) for c in cards),
        holdings=tuple(Holding(c, "queues/q/jobs/j", "u", 1, WHOLE_PPM, T, T + HOUR_MS) for c in cards[::2]),
        attempts=(Attempt("queues/q/jobs/j", "u", 1, "queues/q", "user/a", "", T, T, None, None),),
    )
    each_ms = HOUR_MS // samples_each
    seen = [
        {"device": c, "start_ms": T + i * each_ms, "end_ms": T + (i + 1) * each_ms, "tensor_ppm": 400_000 + i}
        for c in cards
        for i in range(samples_each)
    ]
    samples = schemas.MINUTES.empty_table().from_pylist(seen, schemas.MINUTES)
    tables = tuple(schemas.facts_table(facts) for facts in (told, *more))
    return Known(T, tables, samples, schemas.WORK.empty_table(), PRICES)


class TestALargeHour:
    async def test_is_billed_as_a_small_one_is(self, tmp_path):
        hour = known()
        assert hour.size >= LARGE_ROWS
        here, there = billed(hour), await bill(hour, tmp_path)
        assert there.rows.equals(here.rows)
        assert there.rows.num_rows == CARDS
        assert (there.faults, there.residual_micros) == (here.faults, here.residual_micros) == ((), 0)
        assert list(tmp_path.iterdir()) == []

    async def test_that_cannot_be_billed_says_why(self, tmp_path):
        beyond = Facts(adjustments=(Adjustment("adjustments/a", 5, T, T + 2 * HOUR_MS),))
        with pytest.raises(NotBilled, match="reaches beyond the hour"):
            await bill(known(beyond), tmp_path)
        assert list(tmp_path.iterdir()) == []

    async def test_leaves_nothing_when_its_leader_goes(self, tmp_path):
        billing = asyncio.create_task(bill(known(), tmp_path))
        await asyncio.sleep(0)
        billing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await billing
        assert list(tmp_path.iterdir()) == []


async def test_a_small_hour_needs_no_process_and_no_folder(tmp_path):
    found = await bill(known(samples_each=1), tmp_path / "there is none")
    assert found.rows.num_rows == CARDS
