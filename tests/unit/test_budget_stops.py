"""Budgets that stop new work: what the console notes in their records, and what a scheduler starts, and says, by that."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scheduler_world import World, node, until
from tests.support.virtual_time import LoopClock
from whaleflux import names
from whaleflux.events.publisher import EntryChange
from whaleflux.manifests.job_fields import Spec
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.store.election import elect
from whaleflux.trust.ownership import Access
from whaleflux.v1 import console_pb2, events_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_console import news
from whaleflux_console.budgets import Budgets, BudgetWatch
from whaleflux_console.forecasts import Spent
from whaleflux_scheduler.core.budget_stops import BudgetStop, admit, over_at
from whaleflux_scheduler.core.model import Job, JobState

USD = 1_000_000
MINUTE_S = 60.0


class Console:
    """Declares budgets and holds them against what is spent: the console's own parts, beside a ledger that says what the test says."""

    def __init__(self, store, clock):
        self.store, self.clock, self.micros = store, clock, 0
        self.budgets = Budgets(store, clock, lambda _: Access())

    async def spent(self, where):
        return Spent(self.micros, round(self.clock.now().timestamp() * 1000))

    async def set(self, name="b", usd=100, stop=True, **scope):
        one = console_pb2.Budget(micros_per_month=usd * USD, stop=stop, **scope)
        with auth.acting_as(auth.Identity("operator", "olga")):
            return await self.budgets.set(console_pb2.SetBudgetRequest(budget_id=name, budget=one))

    async def spends(self, usd):
        self.micros = usd * USD
        await self.look()

    async def look(self):
        async with elect(self.store, "console-budgets", "here") as leader:
            await BudgetWatch(self.store, self, self.clock).round(leader)

    async def record(self, name="b"):
        return console_pb2.Budget.FromString((await self.store.get(keys.BUDGETS + name)).value)


@pytest.fixture
async def world():
    async with World(clock=LoopClock(datetime(2026, 1, 31, 23, 0, tzinfo=UTC))) as world:
        await world.add(node("onprem/n", 8), node("edge/n", 8))
        world.console = Console(world.store, world.clock)
        yield world


async def waits(world, name, words):
    async def said():
        return words in (await world.job(name)).state_message

    await until(said, words)


async def explained(world, name):
    return (await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=name), None)).decision


class TestScheduler:
    async def test_what_has_begun_goes_on_and_what_is_new_waits_and_is_told_by_whom_it_is_kept(self, world):
        runs = await world.submit(4)
        await world.reaches(runs, "RUNNING")
        await world.console.set(queue="queues/default")
        await world.console.spends(120)
        waiting = await world.submit(4)
        await waits(world, waiting, "budget b is spent ($120.00 of $100.00 in 2026-01 by 2026-01-31 23:00 UTC)")
        told = await explained(world, waiting)
        assert "so nothing new of queue default starts before 2026-02-01 00:00 UTC" in told.summary
        assert "whaleflux budget set b --queue default --usd N" in told.smallest_change
        assert not told.placed and not told.reasons
        planned = (await world.create(4, dry=True)).decision
        assert "budget b is spent" in planned.summary
        await asyncio.sleep(10 * MINUTE_S)
        assert (await world.job(runs)).state == pb.JOB_STATE_RUNNING
        assert (await world.job(waiting)).state == pb.JOB_STATE_QUEUED

    @pytest.mark.parametrize("change", ["raised", "not to stop", "for another", "forgotten", "its bill became less"])
    async def test_it_starts_when_the_budget_admits_it(self, world, change):
        await world.console.set(user="user/ada")
        await world.console.spends(100)
        waiting = await world.submit(1)
        await waits(world, waiting, "nothing new of user/ada starts")
        match change:
            case "raised":
                await world.console.set(user="user/ada", usd=101)
            case "not to stop":
                await world.console.set(user="user/ada", stop=False)
            case "for another":
                await world.console.set(user="user/bob")
            case "forgotten":
                with auth.acting_as(auth.Identity("operator", "olga")):
                    await world.console.budgets.delete("budgets/b", "")
            case _:
                await world.console.spends(99)
        await world.reaches(waiting, "RUNNING")

    async def test_a_stop_is_over_with_its_month_though_the_console_is_away(self, world):
        await world.console.set()
        await world.console.spends(100)
        waiting = await world.submit(1)
        await waits(world, waiting, "nothing new of the fleet starts before 2026-02-01")
        await asyncio.sleep(50 * MINUTE_S)
        assert (await world.job(waiting)).state == pb.JOB_STATE_QUEUED
        told = await explained(world, waiting)
        assert "has not held budgets against what is spent since 2026-01-31 23:00 UTC" in told.reasons[0]
        await asyncio.sleep(11 * MINUTE_S)
        assert (await world.job(waiting)).state == pb.JOB_STATE_RUNNING

    async def test_another_leader_knows_it_before_it_decides(self, world):
        await world.console.set()
        await world.console.spends(100)
        waiting = await world.submit(1)
        await waits(world, waiting, "budget b is spent")
        await world.restart()
        await asyncio.sleep(MINUTE_S)
        assert (await world.job(waiting)).state == pb.JOB_STATE_QUEUED
        await waits(world, waiting, "budget b is spent")

    async def test_a_failed_job_that_had_begun_goes_on(self, world):
        name = await world.submit(1)
        await world.reaches(name, "RUNNING")
        await world.console.set()
        await world.console.spends(100)
        (task,) = (await world.job(name)).attempt.tasks
        agent = world.agents[task.node]
        agent.exit(1)
        await until(lambda: _epoch(world, name, 2), "it runs again")
        await world.reaches(name, "RUNNING")

    async def test_of_a_site_others_are_free(self, world):
        await world.console.set(site="sites/onprem")
        await world.console.spends(100)
        anywhere, there = await world.submit(4), await world.submit(4, sites=["sites/onprem"])
        await world.reaches(anywhere, "RUNNING")
        assert {task.node for task in (await world.job(anywhere)).attempt.tasks} == {"sites/edge/nodes/n"}
        await waits(world, there, "nothing new of site onprem starts")
        large = await world.submit(8, wait_for_capacity=True)
        told = await explained(world, large)
        assert "it may not start in site onprem: budget b is spent" in "\n".join(told.reasons)
        planned = (await world.create(8, dry=True)).decision
        assert "it may not start in site onprem: budget b is spent" in "\n".join(planned.reasons)
        await world.add(node("new/n", 8))
        await world.reaches(large, "RUNNING")
        assert list((await world.job(large)).spec.sites) == []

    async def test_a_record_that_cannot_be_read_is_as_it_was_known_last(self, world):
        await world.console.set()
        await world.console.spends(100)
        waiting = await world.submit(1)
        await waits(world, waiting, "budget b is spent")
        await world.store.commit(Put(keys.BUDGETS + "b", b"\xff\xff"))
        await asyncio.sleep(MINUTE_S)
        assert (await world.job(waiting)).state == pb.JOB_STATE_QUEUED
        assert "budget b is spent" in (await explained(world, waiting)).summary


async def _epoch(world, name, epoch):
    return (await world.job(name)).attempt.epoch == epoch


class TestConsole:
    async def test_it_is_noted_once_and_told_with_the_threshold(self, world):
        await world.console.set(usd=50)
        before = await world.store.get(keys.BUDGETS + "b")
        await world.console.spends(60)
        after = await world.store.get(keys.BUDGETS + "b")
        out = news.of_budget(EntryChange(after.key, before, after, after.revision), world.clock.now())
        event = events_pb2.Event.FromString(out.data)
        assert (event.what, dict(event.attributes)) == (
            "BUDGET_REACHED",
            {"percent": "100", "month": "2026-01", "stops": "true"},
        )
        assert "no new work of it is started" in event.message
        await world.console.spends(70)
        assert await world.store.get(keys.BUDGETS + "b") == after

    async def test_it_is_told_of_a_budget_that_tells_no_100_percent(self, world):
        await world.console.set(usd=50, alert_percents=[10])
        await world.console.spends(10)
        before = await world.store.get(keys.BUDGETS + "b")
        await world.console.spends(60)
        after = await world.store.get(keys.BUDGETS + "b")
        out = news.of_budget(EntryChange(after.key, before, after, after.revision), world.clock.now())
        assert events_pb2.Event.FromString(out.data).attributes["percent"] == "100"

    async def test_what_is_set_anew_and_still_spent_stops_all_the_time(self, world):
        await world.console.set(usd=50)
        await world.console.spends(60)
        assert (await world.console.set(usd=55)).stopped_month == "2026-01"
        assert (await world.console.set(usd=61)).stopped_month == ""
        await world.console.spends(61)
        assert (await world.console.record()).stopped_month == "2026-01"

    async def test_a_stop_of_another_month_is_left_alone(self, world):
        """So a console whose clock is ahead for a while takes nothing back."""
        await world.console.set(usd=50)
        await world.console.spends(60)
        await asyncio.sleep(2 * 3600)
        await world.console.spends(0)
        assert (await world.console.record()).stopped_month == "2026-01"
        await world.console.spends(60)
        assert (await world.console.record()).stopped_month == "2026-02"

    async def test_nobody_says_from_outside_that_all_is_spent(self, world):
        made = await world.console.set(stopped_month="2026-01", stopped_micros=7)
        assert (made.stopped_month, made.stopped_micros) == ("", 0)


_SITES = ("a", "b", "c")
_STOPS = st.lists(
    st.builds(
        lambda scope, month: BudgetStop("b", month=month, micros_per_month=1, **scope),
        st.sampled_from([{}, {"queue": "q"}, {"queue": "r"}, {"user": "user/ann"}, *({"site": s} for s in _SITES)]),
        st.sampled_from(["2026-01", "2026-02", ""]),
    ),
    max_size=5,
)


@given(_STOPS, st.lists(st.sampled_from(_SITES), unique=True), st.datetimes(datetime(2026, 1, 1), datetime(2026, 3, 9)))
def test_what_is_admitted_is_in_no_stop_and_what_is_not_is_in_one(stops, sites, now):
    now = now.replace(tzinfo=UTC)
    job = Job(names.job("q", "j"), Spec(sites=tuple(sites)), JobState.QUEUED, now, submitter="user/ann")
    found = admit(job, stops, _SITES, now)
    holding = [stop for stop in stops if stop.month == f"{now:%Y-%m}"]
    closed = {stop.site for stop in holding if stop.site}
    wide = any(not stop.site and stop.queue in {"", "q"} for stop in holding)
    asked = set(sites or _SITES)
    assert (found.kept_by is not None) == (wide or asked <= closed)
    assert found.kept_by or set(found.job.spec.sites or _SITES) == asked - closed
    assert admit(job, stops, _SITES, over_at(now) + timedelta(days=62)).kept_by is None
