"""The rows of one hour: who held which card, at which price, and that every micro-dollar has a place."""

from dataclasses import replace

import pytest

from whaleflux_console.core.adjustments import by_hour
from whaleflux_console.core.bill import rows_of_hour
from whaleflux_console.core.facts import (
    HOUR_MS,
    WHOLE_PPM,
    Adjustment,
    Attempt,
    Facts,
    Fragmented,
    Holding,
    Presence,
    PriceKind,
    PriceSpan,
)
from whaleflux_console.core.rows import NO_CARD, NO_PRICE, OVERLAP, Basis, CostClass

MINUTE = 60_000
NODE = "sites/a/nodes/n"
RATE = 3_600_000


def there(card="GPU-1", device=None, part=WHOLE_PPM, start=0, end=HOUR_MS, **more):
    return Presence(
        card, device or card, more.pop("node", NODE), more.pop("gpu_class", "H200"), part, start, end, **more
    )


def held(device="GPU-1", job="j", attempt=1, share=WHOLE_PPM, start=0, end=HOUR_MS):
    return Holding(device, f"queues/q/jobs/{job}", f"uid-{job}", attempt, share, start, end)


def priced(card="GPU-1", rate=RATE, start=0, end=HOUR_MS, source="a list", kind=PriceKind.ON_DEMAND):
    return PriceSpan(card, start, end, rate, kind, source)


def bill(hour=0, version=1, **facts):
    return rows_of_hour(Facts(**{name: tuple(told) for name, told in facts.items()}), hour, version=version)


def by_job(rows):
    return {row.uid.removeprefix("uid-"): row.bill_micros for row in rows}


class TestWhoPays:
    def test_who_held_it_and_nobody_for_the_rest(self):
        rows = bill(presences=[there()], holdings=[held(end=15 * MINUTE)], prices=[priced()])
        assert by_job(rows) == {"j": 900_000, "": 2_700_000}
        nobody, job = rows
        assert nobody.of(CostClass.IDLE) == 2_700_000
        assert (job.queue, job.job, job.attempt, job.site) == ("queues/q", "queues/q/jobs/j", 1, "a")
        assert (job.basis, job.of(CostClass.UNKNOWN)) == (Basis.ALLOCATION, 900_000)

    def test_four_quarters_are_one_gpu_hour(self):
        quarters = [held(job=f"j{i}", share=250_000) for i in range(4)]
        rows = bill(presences=[there()], holdings=quarters, prices=[priced(rate=3_500_003)])
        assert sum(row.gpu_ms for row in rows) == HOUR_MS
        assert sorted(by_job(rows).values()) == [875_000, 875_001, 875_001, 875_001]

    def test_instances_pay_their_part_and_what_no_instance_covers_is_idle(self):
        parts = [there(device=f"MIG-{i}", part=142_857) for i in range(3)]
        rows = bill(
            presences=parts, holdings=[held("MIG-0", "a"), held("MIG-1", "b", share=500_000)], prices=[priced()]
        )
        assert by_job(rows)["a"] == 514_285
        assert by_job(rows)["b"] == 257_143
        assert sum(row.bill_micros for row in rows) == RATE
        assert rows[0].of(CostClass.IDLE) == rows[0].bill_micros == RATE - 514_285 - 257_143

    def test_what_was_not_there_is_not_billed(self):
        rows = bill(presences=[there(start=0, end=10 * MINUTE), there(start=50 * MINUTE)], prices=[priced()])
        (row,) = rows
        assert (row.gpu_ms, row.bill_micros) == (20 * MINUTE, RATE // 3)

    def test_nobody_could_be_given_it_and_nobody_could_use_it(self):
        broken = there(start=0, end=20 * MINUTE, available=False)
        splinter = Fragmented("GPU-1", 10 * MINUTE, 50 * MINUTE)
        (row,) = bill(presences=[there(), broken], fragmented=[splinter], prices=[priced()])
        assert row.of(CostClass.UNAVAILABLE) == 1_200_000
        assert row.of(CostClass.FRAGMENTED) == 1_800_000
        assert row.of(CostClass.IDLE) == 600_000
        assert row.basis is Basis.MEASURED

    def test_broken_under_a_job_is_that_jobs_time_and_unavailable(self):
        rows = bill(presences=[there(available=False)], holdings=[held()], prices=[priced()])
        assert [(row.uid, row.of(CostClass.UNAVAILABLE)) for row in rows] == [("uid-j", RATE)]

    def test_held_beyond_the_whole_is_scaled_said_and_billed_once(self):
        rows = bill(presences=[there()], holdings=[held(job="a"), held(job="b", start=30 * MINUTE)], prices=[priced()])
        assert by_job(rows) == {"a": 2_700_000, "b": 900_000}
        assert {row.note for row in rows} == {OVERLAP}

    def test_told_again_is_told_once(self):
        once = bill(presences=[there()], holdings=[held(end=MINUTE)], prices=[priced()])
        grown = [held(end=MINUTE), held(end=1000), held(end=MINUTE)]
        assert bill(presences=[there(), there()], holdings=grown, prices=[priced()] * 2) == once

    def test_the_attempts_record_says_for_whom(self):
        attempt = Attempt("queues/q/jobs/j", "uid-j", 1, "queues/q", "researcher/r", "models/m", 0, 0, None, None)
        (row,) = bill(presences=[there()], holdings=[held()], attempts=[attempt], prices=[priced()])
        assert (row.user, row.model) == ("researcher/r", "models/m")


class TestPrices:
    def test_a_price_that_changes_within_the_hour_has_a_row_for_each(self):
        prices = [
            priced(end=20 * MINUTE),
            priced(start=20 * MINUTE, rate=2 * RATE, kind=PriceKind.SPOT, source="market"),
        ]
        rows = bill(presences=[there()], holdings=[held(start=10 * MINUTE)], prices=prices)
        told = {(row.uid, row.price_kind, row.price_source, row.micros_per_hour): row.bill_micros for row in rows}
        assert told == {
            ("", "on_demand", "a list", RATE): 600_000,
            ("uid-j", "on_demand", "a list", RATE): 600_000,
            ("uid-j", "spot", "market", 2 * RATE): 4_800_000,
        }

    def test_without_a_price_it_is_billed_nothing_and_shown(self):
        rows = bill(presences=[there()], holdings=[held()], prices=[priced(start=30 * MINUTE)])
        assert {(row.price_source, row.bill_micros, row.gpu_ms) for row in rows} == {
            ("a list", RATE // 2, HOUR_MS // 2),
            (NO_PRICE, 0, HOUR_MS // 2),
        }

    def test_hours_of_an_odd_beginning_sum_to_the_whole(self):
        price = priced(rate=1_000_001, start=-1_234_567, end=100 * HOUR_MS)
        presences = [there(start=-1_234_567, end=100 * HOUR_MS)]
        total = sum(
            row.bill_micros
            for hour in range(-1, 100)
            for row in bill(hour * HOUR_MS, presences=presences, prices=[price])
        )
        assert total == 1_000_001 * (100 * HOUR_MS + 1_234_567) // HOUR_MS

    def test_an_instant_that_begins_no_hour_is_refused(self):
        with pytest.raises(ValueError, match="begins no clock hour"):
            bill(hour=1)


FLEET = {
    "presences": [there(), there("GPU-2", node="sites/b/nodes/m"), there("GPU-3", gpu_class="L40S")],
    "holdings": [held()],
    "prices": [priced(), priced("GPU-2", rate=2 * RATE), priced("GPU-3")],
}


class TestAdjustments:
    def rows(self, *adjustments, **fleet):
        return [row for row in bill(adjustments=adjustments, version=2, **(fleet or FLEET)) if row.adjustment]

    def test_a_credit_goes_to_what_it_is_for_in_proportion(self):
        credit = Adjustment("adjustments/c", -300_001, 0, HOUR_MS, gpu_class="H200", reason="outage")
        rows = self.rows(credit)
        assert {row.card: row.bill_micros for row in rows} == {"GPU-1": -100_000, "GPU-2": -200_001}
        assert {(row.note, row.gpu_ms, row.version) for row in rows} == {("outage", 0, 2)}
        assert all(sum(row.micros) == row.bill_micros and max(row.micros) <= 0 for row in rows)

    def test_a_site_is_one(self):
        (row,) = self.rows(Adjustment("adjustments/x", 5, 0, HOUR_MS, site="b"))
        assert (row.card, row.bill_micros, row.of(CostClass.IDLE)) == ("GPU-2", 5, 5)

    def test_cards_without_price_bear_it_by_their_time(self):
        fleet = {"presences": [there(), there("GPU-2", end=HOUR_MS // 4)]}
        rows = self.rows(Adjustment("adjustments/x", 1_000, 0, HOUR_MS), **fleet)
        assert {row.card: row.bill_micros for row in rows} == {"GPU-1": 800, "GPU-2": 200}

    def test_for_cards_that_were_not_there_it_is_a_row_of_its_own(self):
        (row,) = self.rows(Adjustment("adjustments/x", 7, 0, HOUR_MS, gpu_class="B200"))
        assert (row.card, row.note, row.of(CostClass.UNKNOWN), row.bill_micros) == ("", NO_CARD, 7, 7)

    def test_one_that_reaches_beyond_the_hour_is_cut_first(self):
        month = Adjustment("adjustments/x", -1_000_003, 0, 3 * HOUR_MS)
        with pytest.raises(ValueError, match="by_hour"):
            self.rows(month)
        parts = by_hour(month, {0: 10, HOUR_MS: 0, 2 * HOUR_MS: 20, 3 * HOUR_MS: 99})
        assert [(part.start_ms, part.micros) for part in parts] == [
            (0, -333_334),
            (HOUR_MS, 0),
            (2 * HOUR_MS, -666_669),
        ]
        assert sum(row.bill_micros for row in self.rows(parts[0])) == -333_334

    def test_hours_that_cost_nothing_bear_equal_parts_and_no_hour_the_first(self):
        one = Adjustment("adjustments/x", 10, 5, 2 * HOUR_MS)
        assert [part.micros for part in by_hour(one, {0: 0, HOUR_MS: 0})] == [5, 5]
        assert by_hour(one, {}) == (replace(one, end_ms=HOUR_MS),)
