"""Which price a card has at which time."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from whaleflux_console.core.facts import PriceKind
from whaleflux_console.core.price_book import FOR_GOOD_MS, Price, PriceBook, Priced, components
from whaleflux_console.core.price_rules import Ownership

NODE, SITE = "sites/a/nodes/n", "sites/a"
CARD = Priced("GPU-1", NODE, SITE, "H200")


def price(name, micros, start=0, end=None, **fields):
    return Price(name, PriceKind.ON_DEMAND, micros, start, end, "a list", "2026-11-30", **fields)


def rates(*prices, card=CARD, start=0, end=100):
    return [(span.start_ms, span.end_ms, span.micros_per_hour) for span in PriceBook(prices).spans(card, start, end)]


class TestWhichPriceHolds:
    def test_the_narrowest_does(self):
        ladder = [
            price("said", 1, node=NODE, by_node=True),
            price("all", 2),
            price("site", 3, site=SITE),
            price("class", 4, gpu_class="H200"),
            price("both", 5, site=SITE, gpu_class="H200"),
            price("node", 6, node=NODE),
        ]
        for count in range(1, len(ladder) + 1):
            for order in (ladder[:count], ladder[:count][::-1]):
                assert rates(*order) == [(0, FOR_GOOD_MS, count)]

    def test_others_do_not(self):
        others = [price("x", 1, node="sites/a/nodes/m"), price("y", 1, site="sites/b"), price("z", 1, gpu_class="L40S")]
        assert rates(*others) == []

    def test_a_narrower_one_interrupts_a_wider_one(self):
        found = rates(price("all", 1), price("sale", 2, 10, 20, gpu_class="H200"))
        assert found == [(0, 10, 1), (10, 20, 2), (20, FOR_GOOD_MS, 1)]

    def test_time_without_price_is_a_gap(self):
        assert rates(price("a", 1, 10, 20), price("b", 2, 30, 40)) == [(10, 20, 1), (30, 40, 2)]

    def test_a_span_keeps_its_own_beginning_whatever_begins_beside_it(self):
        long = price("long", 7, 3, gpu_class="H200")
        beside = [price(f"p{i}", 1, i, i + 5) for i in range(0, 90, 5)]
        assert rates(long, *beside, start=50, end=60) == [(3, FOR_GOOD_MS, 7)]

    def test_it_says_whose_figure_it_is_and_of_which_day(self):
        (span,) = PriceBook([price("a", 1)]).spans(CARD, 0, 1)
        assert (span.card, span.source, span.kind) == ("GPU-1", "a list, 2026-11-30", PriceKind.ON_DEMAND)

    @given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50), st.integers(0, 3)), max_size=12))
    def test_spans_follow_each_other_and_cover_what_prices_cover(self, told):
        scopes = [{}, {"site": SITE}, {"gpu_class": "H200"}, {"node": NODE}]
        prices = [price(f"p{i}", i, at, at + ms, **scopes[of]) for i, (at, ms, of) in enumerate(told)]
        spans = rates(*prices)
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
        covered = {at for start, end, _ in spans for at in range(start, end)}
        assert covered == {at for one in prices for at in range(one.start_ms, one.until_ms)}


class TestWhatOwningCosts:
    def test_a_gpu_that_keeps_its_value_and_uses_nothing_costs_nothing(self):
        assert sum(part.micros_per_hour for part in components(Ownership(10**9, 36, residual_ppm=1_000_000))) == 0

    def test_without_pue_the_building_takes_what_the_gpu_takes(self):
        parts = components(Ownership(0, 1, power_w=1000, electricity_micros_per_kwh=100_000))
        assert {part.name: part.micros_per_hour for part in parts}["electricity"] == 100_000

    @given(st.integers(1, 10**13), st.integers(1, 120))
    def test_written_off_it_was_paid_once(self, capex, months):
        per_hour = components(Ownership(capex, months))[0].micros_per_hour
        hours = months * 730
        assert capex - hours < per_hour * hours <= capex
