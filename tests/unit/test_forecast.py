"""Forecasts of a month: exact where the past is regular, robust to odd days, and honest about how far off they were."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux_console.core.forecast import DAY_MS, FEWEST_DAYS, forecast

TODAY = 20_000 * DAY_MS
WEEK = (100, 100, 100, 100, 100, 20, 20)


def past(count, value=lambda day: 100):
    return {TODAY - n * DAY_MS: value(TODAY // DAY_MS - n) for n in range(1, count + 1)}


def of_week(day):
    return WEEK[day % 7] * 1_000


def ahead(days):
    return sum(of_week(TODAY // DAY_MS + n) for n in range(days))


def test_a_regular_week_goes_on():
    found = forecast(5_000, past(70, of_week), TODAY, TODAY + 12 * DAY_MS)
    assert found.expected_micros == 5_000 + ahead(12)
    assert (found.low_micros, found.high_micros, found.error) == (found.expected_micros, found.expected_micros, 0)


def test_of_today_the_rest_is_counted():
    found = forecast(0, past(30), TODAY + DAY_MS // 4, TODAY + DAY_MS)
    assert found.expected_micros == 75


def test_growth_goes_on():
    found = forecast(0, past(56, lambda day: 1_000 * (day - TODAY // DAY_MS + 60)), TODAY, TODAY + 10 * DAY_MS)
    assert found.expected_micros == pytest.approx(sum(1_000 * (60 + n) for n in range(10)), rel=0.02)


def test_a_few_odd_days_change_little():
    days = past(70, of_week)
    for n in (3, 17, 30):
        days[TODAY - n * DAY_MS] = 5_000_000
    found = forecast(0, days, TODAY, TODAY + 7 * DAY_MS)
    assert found.expected_micros == pytest.approx(ahead(7), rel=0.05)


def test_how_far_off_it_was_is_how_far_off_it_is():
    """Of 200 months of days that scatter by a fifth, four of five lie within what was said, as nearly as 60 days can tell."""
    chance, within, told = random.Random(7), 0, 200
    for _ in range(told):
        days = past(90, lambda day: round(of_week(day) * chance.uniform(0.8, 1.2)))
        real = sum(round(of_week(TODAY // DAY_MS + n) * chance.uniform(0.8, 1.2)) for n in range(10))
        found = forecast(0, days, TODAY, TODAY + 10 * DAY_MS)
        within += found.low_micros <= real <= found.high_micros
    assert 0.6 <= within / told <= 0.95


@pytest.mark.parametrize("count", range(FEWEST_DAYS))
def test_of_too_few_days_nothing_is_foretold(count):
    assert forecast(5, past(count), TODAY, TODAY + DAY_MS) is None


def test_of_few_days_nobody_knows_how_far_off_it_is():
    found = forecast(5, past(FEWEST_DAYS), TODAY, TODAY + 2 * DAY_MS)
    assert (found.expected_micros, found.low_micros, found.high_micros, found.error) == (205, None, None, None)


def test_a_day_without_anything_cost_nothing():
    assert forecast(0, {TODAY - 30 * DAY_MS: 1}, TODAY, TODAY + 9 * DAY_MS).expected_micros == 0


@given(
    st.lists(st.integers(0, 10**12), max_size=80),
    st.integers(0, DAY_MS - 1),
    st.integers(0, 30),
    st.integers(0, 10**12),
)
def test_it_is_never_less_than_what_is_spent(values, gone_ms, days, spent):
    known = {TODAY - n * DAY_MS: value for n, value in enumerate(values, 1)}
    found = forecast(spent, known, TODAY + gone_ms, TODAY + (days + 1) * DAY_MS)
    if len(values) < FEWEST_DAYS:
        expected = found is None
    else:
        expected = (
            spent
            <= (found.low_micros or spent)
            <= found.expected_micros
            <= (found.high_micros or found.expected_micros)
        )
    assert expected
