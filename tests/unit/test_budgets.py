"""Budgets: declared, changed, listed with what is spent; thresholds are told once a month, also when the keeper starts again."""

import contextlib
from datetime import UTC, datetime

import pytest
from prometheus_client import REGISTRY

from tests.unit.test_bookkeeper import LATE, World
from whaleflux.clock import VirtualClock
from whaleflux.errors import DeadlineExceeded, InvalidArgument, NotFound
from whaleflux.events.publisher import EntryChange
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.v1 import console_pb2 as pb
from whaleflux.v1 import events_pb2
from whaleflux_console import news
from whaleflux_console.budget_figures import BudgetFigures
from whaleflux_console.budgets import Budgets, BudgetWatch
from whaleflux_console.core.budget_rules import outlook
from whaleflux_console.forecasts import Forecasts

SPENT = 4_000_000  # of the world's two GPUs, by LATE: 2,000,000 an hour each; open hours beside


@contextlib.asynccontextmanager
async def spending(tmp_path):
    async with World(tmp_path).running() as world:
        world.fleet()
        world.run(LATE - 80 * 60_000)
        await world.until(LATE)
        await world.tick()
        yield world


async def set_(world, name="b", micros=10_000_000, etag="", **fields):
    one = pb.Budget(micros_per_month=micros, etag=etag, **fields)
    return await world.ask("SetBudget", pb.SetBudgetRequest(budget_id=name, budget=one))


async def listed(world, **who):
    return list((await world.ask("ListBudgets", pb.ListBudgetsRequest(), **who)).budgets)


class Busy:
    """A ledger that answers in time of everything but queues."""

    def __init__(self, forecasts):
        self.forecasts = forecasts

    async def spent(self, where):
        if "queue" in where:
            raise DeadlineExceeded("not answered within 10 s")
        return await self.forecasts.spent(where)


async def watched(world, count=1, forecasts=None):
    """Rounds of a leader that begins anew each time; what it would publish of `b`."""
    told = []
    for _ in range(count):
        before = await world.store.get(keys.BUDGETS + "b")
        async with elect(world.store, "console-budgets", "here") as leader:
            asked = forecasts or Forecasts(world.answers, world.clock)
            await BudgetWatch(world.store, asked, world.clock).round(leader)
        after = await world.store.get(keys.BUDGETS + "b")
        if after != before:
            out = news.of_budget(EntryChange(after.key, before, after, after.revision), world.clock.now())
            event = events_pb2.Event.FromString(out.data)
            told.append((event.what, event.attributes["percent"]))
    return told


async def test_what_is_spent_stands_beside_what_may_be(tmp_path):
    async with spending(tmp_path) as world:
        await set_(world)
        await set_(world, "mine", queue="queues/q")
        everything, mine = await listed(world)
        assert list(everything.alert_percents) == [50, 80, 100]
        whole = await world.cost()
        assert everything.forecast.spent_micros > whole.total.bill_micros == SPENT
        assert 0 < mine.forecast.spent_micros < everything.forecast.spent_micros
        assert not everything.forecast.HasField("expected_micros")
        world.access["q"] = Access(members=frozenset({"users/bob"}))
        assert [one.name for one in await listed(world, role="user", name="ann")] == ["budgets/b"]
        asked = pb.GetForecastRequest(queue="queues/q")
        assert (await world.ask("GetForecast", asked, role="user", name="ann")).spent_micros == 0
        assert (await world.ask("GetForecast", asked, role="user", name="bob")).spent_micros > 0


@pytest.mark.parametrize("named", [{"queue": "queues/q"}, {"job": "queues/q/jobs/j"}])
async def test_what_is_asked_for_by_a_name_that_one_may_not_see_cost_nothing(tmp_path, named):
    async with spending(tmp_path) as world:
        world.access["q"] = Access(members=frozenset({"users/bob"}))
        asked = pb.GetCostRequest(filter=pb.CostFilter(**named))
        told = await world.ask("GetCost", asked, role="user", name="ann")
        assert (told.total, told.HasField("hidden")) == (pb.CostGroup(), False)
        assert (await world.ask("GetCost", asked, role="user", name="bob")).total.bill_micros > 0


async def test_a_threshold_is_told_once_a_month_whoever_leads(tmp_path):
    async with spending(tmp_path) as world:
        await set_(world, micros=2 * SPENT, alert_percents=[30, 50, 100])
        assert await watched(world, 3) == [("BUDGET_REACHED", "50")]
        await set_(world, micros=SPENT, alert_percents=[50, 100])
        assert await watched(world, 3) == [("BUDGET_REACHED", "100")]
        await world.clock.advance((datetime(2027, 1, 1, tzinfo=UTC) - world.clock.now()).total_seconds())
        assert await watched(world) == []
        assert (await listed(world))[0].forecast.spent_micros == 0


async def looked_ms(world):
    """As of when budgets are known to be held; None: never."""
    entry = await world.store.get(keys.BUDGET_LOOK)
    return entry and pb.BudgetLook.FromString(entry.value).time.ToMilliseconds()


async def test_a_look_at_a_ledger_that_stands_still_is_as_of_then(tmp_path):
    async with spending(tmp_path) as world:
        await set_(world, stop=True)
        await watched(world)
        then_ms = (await world.cost()).watermark.ToMilliseconds()
        assert 0 < await looked_ms(world) == then_ms <= LATE
        await world.clock.advance(3600)
        await watched(world)
        assert await looked_ms(world) == then_ms


async def test_before_anything_is_in_the_ledger_no_look_is_noted(tmp_path):
    async with World(tmp_path).running() as world:
        await world.until(LATE)
        await world.answers.follow()
        await set_(world, stop=True)
        await watched(world)
        assert await looked_ms(world) is None


async def test_a_budget_that_cannot_be_looked_at_keeps_no_other_from_it_and_schedulers_are_not_told_of_a_look(tmp_path):
    async with spending(tmp_path) as world:
        await set_(world, "a", micros=1, queue="queues/q")
        await set_(world, "b", micros=SPENT, stop=True, alert_percents=[100])
        assert await watched(world, forecasts=Busy(Forecasts(world.answers, world.clock))) == [
            ("BUDGET_REACHED", "100")
        ]
        assert await looked_ms(world) is None
        await watched(world)
        assert await looked_ms(world)


async def test_of_a_budget_that_is_raised_thresholds_are_told_when_they_are_reached_again(tmp_path):
    async with spending(tmp_path) as world:
        await set_(world, micros=SPENT // 4, alert_percents=[50, 100, 400])
        assert await watched(world) == [("BUDGET_REACHED", "400")]
        await set_(world, micros=100 * SPENT, alert_percents=[1, 50, 100])
        assert await watched(world) == [("BUDGET_REACHED", "1")]
        await set_(world, micros=SPENT * 3 // 4, alert_percents=[1, 50, 100])
        assert await watched(world, 2) == [("BUDGET_REACHED", "100")]


async def test_a_budget_for_another_user_is_told_of_anew(tmp_path):
    async with spending(tmp_path) as world:
        await set_(world, micros=SPENT // 4, alert_percents=[50])
        assert await watched(world) == [("BUDGET_REACHED", "50")]
        await set_(world, micros=1, alert_percents=[50], queue="queues/q")
        assert await watched(world) == [("BUDGET_REACHED", "50")]


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("ListBudgets", pb.ListBudgetsRequest()),
        ("GetForecast", pb.GetForecastRequest()),
        ("GetUnitCosts", pb.GetUnitCostsRequest()),
        ("GetCost", pb.GetCostRequest()),
    ],
)
async def test_of_nothing_too_it_is_asked_who_may_see_it(tmp_path, method, request_):
    """The boundary refuses an answer for which nobody asked."""
    async with World(tmp_path).running() as world:
        await world.until(LATE)
        await world.tick()
        asked = ownership.watch_questions()
        await world.ask(method, request_)
        assert asked.yes


async def test_it_is_changed_under_its_etag_and_forgotten(tmp_path):
    async with spending(tmp_path) as world:
        first = await set_(world)
        second = await set_(world, micros=7, etag=first.etag)
        assert second.micros_per_month == 7
        await world.ask("DeleteBudget", pb.DeleteBudgetRequest(name="budgets/b"))
        assert await listed(world) == []
        with pytest.raises(NotFound):
            await world.ask("DeleteBudget", pb.DeleteBudgetRequest(name="budgets/b"))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"micros": 0}, "budget.micros_per_month"),
        ({"queue": "q"}, "budget.queue"),
        ({"user": "ann"}, "budget.user"),
        ({"queue": "queues/q", "site": "sites/a"}, "budget.site"),
        ({"alert_percents": [0]}, "budget.alert_percents"),
        ({"alert_percents": [50, 50]}, "budget.alert_percents"),
        ({"alert_percents": list(range(1, 10))}, "budget.alert_percents"),
    ],
)
async def test_what_is_wrong_names_its_field_and_changes_nothing(tmp_path, fields, field):
    async with spending(tmp_path) as world:
        with pytest.raises(InvalidArgument) as caught:
            await set_(world, **fields)
        assert [violation.field for violation in caught.value.violations] == [field]
        assert await listed(world) == []


async def test_without_a_ledger_too_budgets_of_queues_that_are_not_ones_own_stay_unseen():
    store, clock = MemoryStore(), VirtualClock()
    budgets = Budgets(store, clock, lambda _: Access(members=frozenset({"users/bob"})))
    one = pb.Budget(micros_per_month=7, queue="queues/q")
    with auth.acting_as(auth.Identity("operator", "olga")):
        await budgets.set(pb.SetBudgetRequest(budget_id="b", budget=one))
    seen = {}
    for name in ("ann", "bob"):
        with auth.acting_as(auth.Identity("user", name)):
            seen[name] = [b.name for b in (await budgets.page(pb.ListBudgetsRequest(), None)).budgets]
    assert seen == {"ann": [], "bob": ["budgets/b"]}


def budgets_shown():
    return [REGISTRY.get_sample_value("whaleflux_budgets", {"forecast": one}) for one in ("within", "over", "unknown")]


async def test_how_many_budgets_will_hold_is_shown_without_their_names(tmp_path):
    async with spending(tmp_path) as world:
        figures = BudgetFigures(world.store, Forecasts(world.answers, world.clock), world.clock)
        await figures.show()
        assert budgets_shown() == [0, 0, 0]
        await set_(world, "small", SPENT // 2)
        await set_(world, "large", SPENT * 1000)
        await figures.show()
        assert budgets_shown() == [0, 1, 1], "what is spent is known, the month needs three days"


@pytest.mark.parametrize(
    ("spent", "expected", "found"),
    [
        (5, 9, "within"),
        (5, 10, "within"),
        (5, 11, "over"),
        (11, None, "over"),
        (5, None, "unknown"),
        (10, None, "unknown"),
    ],
)
def test_a_budget_is_over_where_the_month_is_expected_to_cost_more(spent, expected, found):
    assert outlook(spent, expected, 10).value == found
