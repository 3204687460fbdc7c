"""What would save money: each kind by its trigger, what all save together, what people decide, and what that really saved."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_bookkeeper import N, T, World
from whaleflux.errors import InvalidArgument, NotFound, PermissionDenied
from whaleflux.store import keys
from whaleflux.trust.ownership import OPEN, Access
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.budgets import Budgets
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.recommend import tracking
from whaleflux_console.core.recommend.evidence import MONTH_MS, Part, Spent, Window
from whaleflux_console.core.recommend.joint import recommend
from whaleflux_console.core.recommend.recommendation import Kind
from whaleflux_console.core.recommend.tracking import After, Before
from whaleflux_console.core.rows import CLASSES, Basis, LedgerRow
from whaleflux_console.prices import Adjustments, Prices
from whaleflux_console.recommendations import Recommendations
from whaleflux_console.servicer import CostServicer

DAY_MS = 24 * HOUR_MS
JOB = "queues/q/jobs/j"
WEEK = Window(0, 7 * DAY_MS)
USD = 1_000_000


def micros(**classes):
    return tuple(classes.get(kind, 0) for kind in CLASSES)


def part(gpus=8, hours=24, **classes):
    return Part(gpus * hours * HOUR_MS, micros(**classes))


def job(*parts, gpus=8, **more):
    return Spent(JOB, parts, gpus=gpus, **more)


def pool(*parts):
    return Spent("a/H100", parts, cash_ppm=1_000_000)


def found(window_jobs=(), pools=(), trust=None, window=WEEK):
    made = recommend(Window(window.start_ms, window.end_ms, tuple(window_jobs), tuple(pools)), trust)
    return {one.kind: one for one in made.found}, made


class TestKinds:
    def test_what_holds_gpus_and_does_nothing_is_released_less_the_grace_that_is_waited(self):
        kinds, _ = found([job(part(useful=96 * USD, allocated_idle=96 * USD))])
        one = kinds[Kind.RELEASE_IDLE]
        assert one.saved_micros == 96 * USD - 8 * USD // 2  # 8 GPUs at 1 USD wait half an hour
        assert one.command == f"whaleflux requeue --hold {JOB}"
        assert not found([job(part(useful=190 * USD, allocated_idle=2 * USD))])[0]

    def test_what_serves_a_model_is_changed_by_its_file_since_a_cancelled_replica_would_come_again(self):
        one = found([job(part(allocated_idle=96 * USD), model="models/m")])[0][Kind.RELEASE_IDLE]
        assert one.command == "whaleflux deploy FILE"
        assert "replicas.min" in one.change

    def test_low_is_what_the_worst_day_supports(self):
        days = (part(allocated_idle=192 * USD), part(useful=96 * USD, allocated_idle=96 * USD))
        one = found([job(*days)])[0][Kind.RELEASE_IDLE]
        assert one.low_ppm == pytest.approx(500_000 * 1_000_000 / 750_000, abs=2)

    def test_a_spread_job_is_moved_where_that_is_worth_more_than_one_more_start(self):
        one = found([job(part(useful=100 * USD, comm_avoidable=20 * USD, startup=2 * USD))])[0][Kind.ONE_ISLAND]
        assert one.saved_micros == 18 * USD
        assert not found([job(part(useful=100 * USD, comm_avoidable=20 * USD, startup=21 * USD))])[0]

    @pytest.mark.parametrize(
        ("save", "lost", "saved", "word"), [(16, 4, 4, "2.00 times as seldom"), (4, 36, 16, "3.00 times as often")]
    )
    def test_an_interval_is_best_where_saves_cost_what_is_lost(self, save, lost, saved, word):
        kinds, _ = found([job(part(useful=100 * USD, save=save * USD, lost=lost * USD))])
        one = kinds[Kind.CHECKPOINT_INTERVAL]
        assert saved * USD - 2 <= one.saved_micros <= saved * USD
        assert word in one.change

    @pytest.mark.parametrize(("save", "lost"), [(0, 30), (30, 0), (10, 10), (10, 12)])
    def test_an_interval_without_failures_without_measured_saves_or_near_the_best_stays(self, save, lost):
        assert not found([job(part(useful=100 * USD, save=save * USD, lost=lost * USD))])[0]

    def test_half_the_gpus_save_half_of_the_communication_that_no_place_saves(self):
        one = found([job(part(useful=60 * USD, comm_structural=30 * USD, comm_in_node=10 * USD))])[0][Kind.FEWER_GPUS]
        assert one.saved_micros == 20 * USD
        assert "4 instead of 8 GPUs do its work for less, in 1.60 times the time" in one.change
        assert not found([job(part(useful=60 * USD, comm_structural=40 * USD), gpus=1)])[0]

    def test_gpus_that_were_free_in_nine_hours_of_ten_are_handed_back(self):
        hours = [part(gpus=6, hours=1, idle=6 * USD)] * 150 + [part(gpus=2, hours=1, idle=2 * USD)] * 18
        one = found(pools=[pool(*hours)])[0][Kind.HAND_BACK]
        assert one.saved_micros == 168 * 2 * USD
        assert one.change.startswith("2 GPUs")
        assert one.low_ppm == 1_000_000
        gone = found(pools=[pool(*hours[:140])])[0]  # nothing was free in the other 28 hours
        assert Kind.HAND_BACK not in gone

    def test_a_fragmented_pool_is_moved_together_once_it_lasts(self):
        hour = part(gpus=4, hours=1, fragmented=4 * USD)
        assert found(pools=[pool(hour, hour, hour)])[0][Kind.DEFRAGMENT].saved_micros == 12 * USD
        assert not found(pools=[pool(hour, hour)])[0]


AMOUNTS = st.lists(st.integers(0, 10**9), min_size=len(CLASSES), max_size=len(CLASSES)).map(tuple)
PARTS = st.lists(st.builds(Part, st.integers(1, 10**9), AMOUNTS), min_size=1, max_size=30).map(tuple)


class TestTogether:
    @given(st.lists(PARTS, max_size=4), st.lists(PARTS, max_size=3), st.integers(1, 64))
    def test_all_together_never_save_more_than_their_waste_costs_nor_that_more_than_the_bill(self, jobs, pools, gpus):
        window = Window(
            0,
            30 * HOUR_MS,
            tuple(Spent(f"queues/q/jobs/j{n}", one, gpus=gpus) for n, one in enumerate(jobs)),
            tuple(Spent(f"s/c{n}", one) for n, one in enumerate(pools)),
        )
        made = recommend(window)
        assert 0 <= made.total_micros <= made.targeted_micros <= made.bill_micros
        paid = {}
        for one in made.found:
            assert 0 < one.saved_micros <= sum(one.evidence.values()) <= one.bill_micros
            assert 0 <= one.low_ppm <= 1_000_000
            for kind, saved in one.saved.items():
                paid[one.subject, kind] = paid.get((one.subject, kind), 0) + saved
        for spent in (*window.jobs, *window.pools):
            assert all(paid.get((spent.subject, kind), 0) <= spent.whole.of(kind) for kind in CLASSES)
        assert [one.saved_micros for one in made.found] == sorted((o.saved_micros for o in made.found), reverse=True)

    def test_a_kind_that_is_trusted_less_promises_less(self):
        idle = job(part(useful=96 * USD, allocated_idle=96 * USD))
        whole = found([idle])[0][Kind.RELEASE_IDLE].saved_micros
        assert found([idle], trust={Kind.RELEASE_IDLE: 500_000})[0][Kind.RELEASE_IDLE].saved_micros == whole // 2


class TestTracking:
    BEFORE = Before(Kind.ONE_ISLAND, 730, 100 * USD, 20 * USD, 18 * USD)

    def test_what_goes_on_is_judged_by_its_share_of_the_bill_and_what_ends_by_money(self):
        after = After(0, MONTH_MS // 10, 50 * USD, 1 * USD)
        assert tracking.realised_micros_per_month(self.BEFORE, after) == 18 * USD  # 20 % became 2 %
        gone = After(0, MONTH_MS // 10, 0, 0)
        assert tracking.realised_micros_per_month(self.BEFORE, gone) is None
        released = Before(Kind.RELEASE_IDLE, 730, 100 * USD, 20 * USD, 18 * USD)
        assert tracking.realised_micros_per_month(released, gone) == 20 * USD

    def test_within_a_day_nobody_knows(self):
        assert tracking.realised_micros_per_month(self.BEFORE, After(0, HOUR_MS, USD, 0)) is None

    def test_ten_cases_that_keep_less_than_nine_tenths_lower_their_kind(self):
        nine = [(Kind.HAND_BACK, 100, 50)] * 9
        assert tracking.records(nine)[Kind.HAND_BACK].trust_ppm == 1_000_000
        assert tracking.records([*nine, nine[0]])[Kind.HAND_BACK].trust_ppm == 500_000
        assert tracking.records([(Kind.HAND_BACK, 100, 95)] * 10)[Kind.HAND_BACK].trust_ppm == 1_000_000


def rows(hour, **classes):
    """A job's hour, and a free GPU's."""
    held = micros(**(classes or {"useful": USD, "allocated_idle": USD}))
    common = {"hour_ms": hour, "node": N, "site": "a", "gpu_class": "H100", "basis": Basis.MEASURED}
    common |= {"gpu_ms": HOUR_MS, "price_kind": "on_demand", "price_source": "list", "model": "", "attempt": 1}
    yield LedgerRow(
        card="g0", queue="queues/q", user="user/ann", job=JOB, uid="u", bill_micros=sum(held), micros=held, **common
    )
    free = micros(idle=2 * USD)
    yield LedgerRow(card="g1", queue="", user="", job="", uid="", bill_micros=2 * USD, micros=free, **common)


@contextlib.asynccontextmanager
async def week(tmp_path, hours=30):
    async with World(tmp_path).running() as world:
        world.rpc = servicer(world)
        await fill(world, 0, hours)
        yield world


def servicer(world):
    """What the world asks, with recommendations."""
    store, clock = world.store, world.clock
    told = Recommendations(store, world.answers, lambda queue: world.access.get(queue, OPEN), clock)
    return CostServicer(
        Prices(store, clock), Adjustments(store, clock), Budgets(store, clock, lambda _: OPEN), None, told
    )


async def fill(world, first, until, **classes):
    for hour in range(T + first * HOUR_MS, T + until * HOUR_MS, HOUR_MS):
        await world.ledger.tell(hour, (await world.ledger.inputs(hour)).facts)
        await world.ledger.close(await world.ledger.inputs(hour), tuple(rows(hour, **classes)))
    await world.ledger.advance(T + until * HOUR_MS)
    await world.until(T + until * HOUR_MS)
    await world.answers.follow()


def listed(**more):
    return pb.ListRecommendationsRequest(**more)


class TestAsked:
    async def test_a_week_of_the_ledger_says_what_to_do_and_what_it_saves_a_month(self, tmp_path):
        async with week(tmp_path) as world:
            answer = await world.ask("ListRecommendations", listed())
            by_kind = {one.kind: one for one in answer.recommendations}
            idle = by_kind[pb.RECOMMENDATION_KIND_RELEASE_IDLE]
            assert (idle.subject, idle.owner, idle.cash_ppm) == (JOB, "user/ann", 1_000_000)
            assert idle.expected_micros_per_month == 28 * USD * 730 // 30  # half an hour of grace on each of two days
            back = by_kind[pb.RECOMMENDATION_KIND_HAND_BACK]
            assert (back.subject, back.expected_micros_per_month) == ("a/H100", 2 * 730 * USD)
            assert answer.total_micros_per_month <= answer.targeted_micros_per_month <= answer.bill_micros_per_month
            assert answer.bill_micros_per_month == 4 * 730 * USD

    async def test_pages_together_are_the_list(self, tmp_path):
        async with week(tmp_path) as world:
            one = await world.ask("ListRecommendations", listed(page_size=1))
            two = await world.ask("ListRecommendations", listed(page_size=1, page_token=one.next_page_token))
            both = await world.ask("ListRecommendations", listed())
            assert [*one.recommendations, *two.recommendations] == [*both.recommendations]
            assert not two.next_page_token

    async def test_what_is_in_queues_that_one_may_not_see_is_not_there(self, tmp_path):
        async with week(tmp_path) as world:
            world.access["q"] = Access(members=frozenset({"users/bob"}))
            seen = await world.ask("ListRecommendations", listed(), role="user", name="eve")
            assert [one.subject for one in seen.recommendations] == ["a/H100"]
            name = await self.name(world, pb.RECOMMENDATION_KIND_RELEASE_IDLE)
            with pytest.raises(NotFound):
                await world.ask(
                    "AcceptRecommendation", pb.AcceptRecommendationRequest(name=name), role="user", name="eve"
                )

    async def test_a_job_is_its_owners_and_free_gpus_are_operators(self, tmp_path):
        async with week(tmp_path) as world:
            idle = pb.AcceptRecommendationRequest(name=await self.name(world, pb.RECOMMENDATION_KIND_RELEASE_IDLE))
            back = pb.AcceptRecommendationRequest(name=await self.name(world, pb.RECOMMENDATION_KIND_HAND_BACK))
            for request, who in ((idle, "eve"), (back, "ann")):
                with pytest.raises(PermissionDenied):
                    await world.ask("AcceptRecommendation", request, role="user", name=who)
            assert not (await world.store.list(keys.RECOMMENDATIONS)).entries
            done = await world.ask("AcceptRecommendation", idle, role="user", name="ann")
            assert (done.state, done.last_change.actor) == (pb.RECOMMENDATION_STATE_ACCEPTED, "user/ann")
            assert (await world.ask("AcceptRecommendation", back)).state == pb.RECOMMENDATION_STATE_ACCEPTED

    async def test_an_accepted_one_is_tracked_to_what_it_saved(self, tmp_path):
        async with week(tmp_path) as world:
            name = await self.name(world, pb.RECOMMENDATION_KIND_RELEASE_IDLE)
            await world.ask("AcceptRecommendation", pb.AcceptRecommendationRequest(name=name))
            await fill(world, 30, 90, useful=2 * USD)
            answer = await world.ask("ListRecommendations", listed(include_decided=True))
            (one,) = (one for one in answer.recommendations if one.name == name)
            assert one.realised_micros_per_month == 730 * USD
            (record,) = answer.records
            assert (record.cases, record.trust_ppm) == (1, 1_000_000)
            assert record.realised_micros_per_month >= record.promised_micros_per_month * 0.9

    async def test_a_dismissed_one_comes_again_after_thirty_days(self, tmp_path):
        async with week(tmp_path) as world:
            name = await self.name(world, pb.RECOMMENDATION_KIND_RELEASE_IDLE)
            request = pb.DismissRecommendationRequest(name=name, reason="a launch is near")
            assert (await world.ask("DismissRecommendation", request)).last_change.reason == "a launch is near"
            assert name not in await self.names(world)
            assert name in await self.names(world, include_decided=True)
            await world.until(T + 31 * DAY_MS + 30 * HOUR_MS)
            await fill(world, 31 * 24, 31 * 24 + 40)
            assert (await self.names(world, include_decided=True)).count(name) == 1
            (one,) = (
                await world.ask("ListRecommendations", listed(kind=pb.RECOMMENDATION_KIND_RELEASE_IDLE))
            ).recommendations
            assert one.name == name
            done = await world.ask("AcceptRecommendation", pb.AcceptRecommendationRequest(name=name))
            assert (done.start_time, done.end_time) == (one.start_time, one.end_time)  # of what is shown now

    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (listed(window_hours=841), "window_hours"),
            (listed(window_hours=-1), "window_hours"),
            (listed(kind=99), "kind"),
            (listed(page_size=-1), "page_size"),
            (listed(page_token="x"), "page_token"),
        ],
    )
    async def test_what_cannot_be_asked_names_its_field(self, tmp_path, request_, field):
        async with World(tmp_path).running() as world:
            world.rpc = servicer(world)
            with pytest.raises(InvalidArgument) as caught:
                await world.ask("ListRecommendations", request_)
            assert [violation.field for violation in caught.value.violations] == [field]

    async def test_what_the_ledger_does_not_show_cannot_be_accepted(self, tmp_path):
        async with week(tmp_path) as world:
            request = pb.AcceptRecommendationRequest(name="recommendations/absent")
            with pytest.raises(NotFound, match="cost recommendations"):
                await world.ask("AcceptRecommendation", request)

    async def names(self, world, **more):
        return [one.name for one in (await world.ask("ListRecommendations", listed(**more))).recommendations]

    async def name(self, world, kind):
        return (await world.ask("ListRecommendations", listed(kind=kind))).recommendations[0].name


def test_every_kind_has_its_number_in_the_contract():
    names = {name.removeprefix("RECOMMENDATION_KIND_").lower() for name in dict(pb.RecommendationKind.items())}
    assert names == {*Kind, "unspecified"}
