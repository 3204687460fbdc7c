"""What must hold of any history: the ledger conserves every micro-dollar and every millisecond, however it is told."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ledger_lab.histories import START_MS, adjustments, history, told_otherwise
from whaleflux_console.core import checks
from whaleflux_console.core.adjustments import by_hour, matches
from whaleflux_console.core.bill import rows_of_hour
from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM, Adjustment, Facts, Holding, Presence, PriceKind, PriceSpan
from whaleflux_console.core.rows import CLASSES, CostClass

SEEDS = st.integers(0, 2**64)
INNER = [kind for kind in CLASSES if kind not in {CostClass.IDLE, CostClass.FRAGMENTED, CostClass.UNAVAILABLE}]


def bills(rows):
    """What each card costs each holder."""
    found = {}
    for row in rows:
        key = row.card, row.uid, row.attempt, row.price_source, row.micros_per_hour
        found[key] = found.get(key, 0) + row.bill_micros
    return found


@settings(deadline=None, max_examples=60)
@given(SEEDS)
def test_rows_cells_holders_and_every_grouping_sum(seed):
    made = history(Random(seed))
    for hour in made.hours:
        assert checks.faults(made.facts, hour, rows_of_hour(made.facts, hour)) == ()


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_order_and_repetition_change_nothing(seed):
    made = history(Random(seed))
    again = told_otherwise(Random(seed + 1), made.facts)
    for hour in made.hours:
        assert rows_of_hour(again, hour) == rows_of_hour(made.facts, hour)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(0, HOUR_MS))
def test_presence_and_holdings_told_in_pieces_are_the_same(seed, after):
    facts = history(Random(seed)).facts
    at = START_MS + after
    pieces = {
        name: tuple(
            piece
            for one in getattr(facts, name)
            for piece in (replace(one, end_ms=min(one.end_ms, at)), replace(one, start_ms=max(one.start_ms, at)))
            if piece.start_ms < piece.end_ms
        )
        for name in ("presences", "holdings", "fragmented")
    }
    whole, cut = rows_of_hour(facts, START_MS), rows_of_hour(replace(facts, **pieces), START_MS)
    assert bills(cut) == bills(whole)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_signals_that_come_late_move_money_between_classes_only(seed):
    facts = history(Random(seed)).facts
    before = rows_of_hour(replace(facts, steps=(), samples=()), START_MS)
    after = rows_of_hour(facts, START_MS, version=2)
    assert bills(after) == bills(before)
    assert {row.version for row in after} <= {2}


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_without_signals_nothing_but_lost_and_startup_is_known_of_work(seed):
    facts = history(Random(seed)).facts
    told = {CostClass.LOST, CostClass.STARTUP, CostClass.UNKNOWN, CostClass.UNAVAILABLE}
    for row in rows_of_hour(replace(facts, steps=(), samples=()), START_MS):
        assert not any(row.of(kind) for kind in INNER if kind not in told)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_invoices_sum_over_their_hours(seed):
    random = Random(seed)
    made = history(random)
    invoices = adjustments(random, made.hours)
    usage = {hour: rows_of_hour(made.facts, hour) for hour in made.hours}
    parts = []
    for one in invoices:
        of_hours = {hour: [row.bill_micros for row in rows if matches(one, row)] for hour, rows in usage.items()}
        parts += by_hour(one, {hour: sum(found) for hour, found in of_hours.items() if found})
    rows = []
    for hour in made.hours:
        mine = tuple(part for part in parts if hour <= part.start_ms < hour + HOUR_MS)
        rows += rows_of_hour(replace(made.facts, adjustments=mine), hour)
    assert list(checks.invoice_faults(invoices, rows)) == []
    assert sum(row.bill_micros for row in rows if not row.adjustment) == sum(
        row.bill_micros for of in usage.values() for row in of
    )
    assert not list(checks.row_faults(rows))


class TestTheChecksSee:
    """A ledger that is wrong is found out."""

    FACTS = Facts(
        presences=(Presence("GPU-1", "GPU-1", "sites/a/nodes/n", "H200", WHOLE_PPM, 0, HOUR_MS),),
        holdings=(Holding("GPU-1", "queues/q/jobs/j", "u", 1, WHOLE_PPM, 0, HOUR_MS // 2),),
        prices=(PriceSpan("GPU-1", 0, HOUR_MS, 3_600_000, PriceKind.SPOT, "a list"),),
    )

    def faults(self, change):
        return checks.faults(self.FACTS, 0, change(list(rows_of_hour(self.FACTS, 0))))

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda row: replace(row, bill_micros=row.bill_micros + 1),
            lambda row: replace(row, bill_micros=row.bill_micros + 1, micros=(row.micros[0] + 1, *row.micros[1:])),
            lambda row: replace(row, micros=(row.micros[0] - 10**12, row.micros[1] + 10**12, *row.micros[2:])),
            lambda row: replace(row, gpu_ms=row.gpu_ms - 50),
            lambda row: replace(row, gpu_ms=HOUR_MS + 1),
            lambda row: replace(row, uid="another"),
        ],
        ids=["residual", "money made", "negative", "gap", "more than an hour", "another's time"],
    )
    def test_a_row_that_is_wrong(self, wrong):
        assert not self.faults(lambda rows: rows)
        assert self.faults(lambda rows: [rows[0], wrong(rows[1])])

    def test_a_row_that_is_missing_or_there_twice(self):
        assert self.faults(lambda rows: rows[1:])
        assert self.faults(lambda rows: [*rows, rows[0]])

    def test_an_invoice_that_does_not_sum(self):
        one = Adjustment("adjustments/a", 7, 0, HOUR_MS)
        rows = rows_of_hour(replace(self.FACTS, adjustments=(one,)), 0)
        assert list(checks.invoice_faults([one], rows)) == []
        assert list(checks.invoice_faults([replace(one, micros=8)], rows))
