"""What would save money: each kind by its trigger, what all save together, what people decide, and what that really saved."""

import contextlib
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.ledger_world import reports, row, step
from tests.unit.test_bookkeeper import MINUTE, N, T, World
from whaleflux.errors import InvalidArgument, NotFound, PermissionDenied
from whaleflux.store import keys
from whaleflux.trust.ownership import OPEN, Access
from whaleflux.v1 import console_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_console.budgets import Budgets
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.recommend import tracking
from whaleflux_console.core.recommend.evidence import MONTH_MS, Pace, Part, Rented, Reserved, Spent, Window
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


def found(window_jobs=(), pools=(), trust=None, window=WEEK, **more):
    made = recommend(Window(window.start_ms, window.end_ms, tuple(window_jobs), tuple(pools), **more), trust)
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

    def test_half_a_gpu_more_that_was_free_is_not_handed_back_with_it(self):
        hours = [Part(4 * HOUR_MS, micros(idle=2_500_000, fragmented=1_500_000))] * 168
        assert found(pools=[pool(*hours)])[0][Kind.HAND_BACK].saved_micros == 168 * 2 * USD

    def test_no_less_than_whole_nodes_are_handed_back(self):
        hours = [part(gpus=7, hours=1, idle=7 * USD)] * 168
        eights = Spent("a/H100", tuple(hours), node_gpus=8)
        assert not found(pools=[eights])[0]
        one = found(pools=[replace(eights, node_gpus=3)])[0][Kind.HAND_BACK]
        assert one.saved_micros == 168 * 6 * USD
        assert one.change.startswith("6 GPUs, as many as 2 nodes have")

    def test_a_fragmented_pool_is_moved_together_once_it_lasts(self):
        hour = part(gpus=4, hours=1, fragmented=4 * USD)
        assert found(pools=[pool(hour, hour, hour)])[0][Kind.DEFRAGMENT].saved_micros == 12 * USD * 60 // 100
        assert not found(pools=[pool(hour, hour)])[0]


def pace(job, node="sites/a/nodes/slow", own=120, hour=0, bill=100 * USD):
    """Of steps that take 200 us, 100 of them a median rank's own."""
    return Pace(hour, f"queues/q/jobs/{job}", f"u{job}", node, own, 100, 200, bill)


def waiting(job, **more):
    return Spent(
        f"queues/q/jobs/{job}", (part(useful=100 * USD, comm_in_node=60 * USD, comm_structural=20 * USD, **more),)
    )


class TestSlowNodes:
    def test_a_node_that_two_jobs_wait_for_is_mended_and_saves_what_they_waited_above_the_median(self):
        kinds, made = found([waiting("a")], others=(waiting("b"),), paces=(pace("a"), pace("b", own=140)))
        one = kinds[Kind.SLOW_NODE]
        assert (one.subject, one.command) == ("sites/a/nodes/slow", "whaleflux drain sites/a/nodes/slow")
        assert one.saved_micros == 10 * USD + 20 * USD
        assert one.saved == {"comm_in_node": 22_500_000, "comm_structural": 7_500_000, "comm_avoidable": 0}
        assert one.low_ppm == pytest.approx(1_000_000 * 10 / 15, abs=10)
        assert made.total_micros <= made.targeted_micros <= made.bill_micros

    @pytest.mark.parametrize("paces", [(pace("a"),), (pace("a"), pace("a", hour=1)), (pace("a"), pace("b", own=100))])
    def test_one_job_alone_may_be_uneven_by_itself(self, paces):
        assert Kind.SLOW_NODE not in found([waiting("a"), waiting("b")], paces=paces)[0]

    def test_who_is_on_it_still_starts_once_more(self):
        two = (pace("a"), pace("b"))
        one = found([waiting("a", startup=4 * USD)], others=(waiting("b", startup=4 * USD),), paces=two)[0]
        assert one[Kind.SLOW_NODE].saved_micros == (10 - 4) * USD + 10 * USD

    def test_two_slow_nodes_of_a_job_promise_together_no_more_than_the_slowest_above_the_median(self):
        both = [
            pace(job, node, own) for job in "ab" for node, own in (("sites/a/nodes/m", 120), ("sites/a/nodes/n", 140))
        ]
        made = found([waiting("a"), waiting("b")], paces=tuple(both))[1]
        saved = {one.subject: one.saved_micros for one in made.found if one.kind is Kind.SLOW_NODE}
        assert saved == {"sites/a/nodes/m": 20 * USD, "sites/a/nodes/n": 20 * USD}

    def test_never_more_than_the_jobs_paid_for_waiting(self):
        dear = (pace("a", bill=10_000 * USD), pace("b", bill=10_000 * USD))
        one = found([waiting("a"), waiting("b")], paces=dear)[0][Kind.SLOW_NODE]
        assert one.saved_micros == 160 * USD

    def test_what_half_the_gpus_would_save_already_is_not_promised_again(self):
        jobs = [replace(waiting("a"), gpus=8), replace(waiting("b"), gpus=8)]
        paces = (pace("a", own=180), pace("b", own=180))
        kinds, made = found(jobs, paces=paces)
        assert made.total_micros == 2 * 80 * USD
        assert kinds[Kind.SLOW_NODE].saved_micros == 80 * USD


def rented(*parts, usd=0.6, node_gpus=1):
    return Rented(
        Spent("a/H100/on_demand", parts, node_gpus=node_gpus),
        Reserved("prices/r", round(usd * USD), "quote, 2026-11-30"),
    )


class TestCommit:
    HOURS = (
        *[part(gpus=8, hours=1, useful=8 * USD)] * 150,
        *[part(gpus=2, hours=1, useful=2 * USD)] * 18,
    )  # a tenth are fewer

    def test_what_works_in_nine_hours_of_ten_is_reserved_and_paid_in_all_of_them(self):
        one = found(rented=(rented(*self.HOURS),))[0][Kind.COMMIT]
        assert one.saved_micros == 168 * 2 * 400_000
        assert "2 GPUs" in one.change
        assert "0.60 (prices/r, quote, 2026-11-30) instead of 1.00 USD" in one.change
        assert one.low_ppm == 1_000_000

    def test_whole_nodes_are_reserved_and_none_where_that_is_dearer_or_a_week_is_not_known(self):
        assert not found(rented=(rented(*self.HOURS, node_gpus=4),))[0]
        assert not found(rented=(rented(*self.HOURS, usd=1.0),))[0]
        assert not found(rented=(rented(*self.HOURS[:160]),), window=Window(0, 167 * HOUR_MS))[0]

    def test_what_is_idle_or_waits_is_not_committed_to(self):
        hours = [part(gpus=8, hours=1, useful=2 * USD, allocated_idle=3 * USD, comm_in_node=2 * USD, idle=USD)] * 168
        one = found(rented=(rented(*hours),))[0][Kind.COMMIT]
        assert one.saved_micros == 168 * 2 * 400_000

    def test_what_nobody_knows_of_is_not_in_what_it_saves_at_least(self):
        one = found(rented=(rented(*[part(gpus=8, hours=1, useful=6 * USD, unknown=2 * USD)] * 168),))[0][Kind.COMMIT]
        assert one.saved_micros == 168 * 8 * 400_000
        assert one.low_ppm == 1_000_000 * (6 * 10 - 8 * 6) // (8 * 4)


AMOUNTS = st.lists(st.integers(0, 10**9), min_size=len(CLASSES), max_size=len(CLASSES)).map(tuple)
PARTS = st.lists(st.builds(Part, st.integers(1, 10**9), AMOUNTS), min_size=1, max_size=30).map(tuple)

PACES = st.lists(
    st.builds(
        Pace,
        st.integers(0, 2),
        st.sampled_from([f"queues/q/jobs/j{n}" for n in range(5)]),
        st.sampled_from(["u", "v"]),
        st.sampled_from(["sites/a/nodes/m", "sites/a/nodes/n"]),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.integers(0, 10**9),
    ),
    max_size=12,
).map(tuple)


class TestTogether:
    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
    @given(st.lists(PARTS, max_size=4), st.lists(PARTS, max_size=3), st.integers(1, 64), PACES)
    def test_all_together_never_save_more_than_their_waste_costs_nor_that_more_than_the_bill(
        self, jobs, pools, gpus, paces
    ):
        window = Window(
            0,
            30 * HOUR_MS,
            tuple(Spent(f"queues/q/jobs/j{n}", one, gpus=gpus) for n, one in enumerate(jobs)),
            tuple(Spent(f"s/c{n}", one) for n, one in enumerate(pools)),
            paces=paces,
            rented=tuple(rented(*one, usd=0.0) for one in pools[:1]),
            all_micros=sum(Spent("", one).whole.bill_micros for one in (*jobs, *pools, *pools[:1])),
        )
        made = recommend(window)
        assert 0 <= made.total_micros <= made.targeted_micros <= made.bill_micros
        paid = {}
        for one in made.found:
            assert 0 < one.saved_micros <= sum(one.evidence.values()) <= one.bill_micros
            assert 0 <= one.low_ppm <= 1_000_000
            for subject, piece in one.pieces.items():
                for kind, saved in piece.items():
                    paid[subject, kind] = paid.get((subject, kind), 0) + saved
            assert sum(sum(piece.values()) for piece in one.pieces.values()) == one.saved_micros
        for spent in (*window.jobs, *window.pools, *(one.spent for one in window.rented)):
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
    common = {"hour_ms": hour, "site": "a", "gpu_class": "H100", "basis": Basis.MEASURED}
    common |= {"gpu_ms": HOUR_MS, "price_kind": "on_demand", "price_source": "list", "model": "", "attempt": 1}
    yield LedgerRow(
        card="g0",
        node=N,
        queue="queues/q",
        user="user/ann",
        job=JOB,
        uid="u",
        bill_micros=sum(held),
        micros=held,
        **common,
    )
    free = micros(idle=2 * USD)
    yield LedgerRow(
        card="g1",
        node="sites/a/nodes/free",
        queue="",
        user="",
        job="",
        uid="",
        bill_micros=2 * USD,
        micros=free,
        **common,
    )


@contextlib.asynccontextmanager
async def week(tmp_path, hours=30, **classes):
    async with World(tmp_path).running() as world:
        world.rpc = servicer(world)
        await fill(world, 0, hours, **classes)
        yield world


def servicer(world):
    """What the world asks, with recommendations."""
    store, clock = world.store, world.clock
    told = Recommendations(store, world.answers, lambda queue: world.access.get(queue, OPEN), clock)
    return CostServicer(
        Prices(store, clock), Adjustments(store, clock), Budgets(store, clock, lambda _: OPEN), None, told
    )


def rank(job, node):
    """Ten steps of a second; whoever is not slow waits for the slow one for a fifth of each."""
    waited = {"comm_in_node_us": 0, "comm_cross_us": 0 if node == "slow" else 2_000_000}
    return step(0, T, T + 10_000, device=f"{job}-{node}", uid=f"u{job}", **waited)


def held(hour, job, node):
    """A card's hour of it."""
    classes = micros(useful=USD) if node == "slow" else micros(useful=800_000, comm_structural=200_000)
    return row(hour, f"{job}-{node}", f"queues/q/jobs/{job}", f"sites/a/nodes/{node}", USD, uid=f"u{job}", site="a", micros=classes,
               queue="queues/q")  # fmt: skip


async def fill(world, first, until, made=None, **classes):
    for hour in range(T + first * HOUR_MS, T + until * HOUR_MS, HOUR_MS):
        await world.ledger.tell(hour, (await world.ledger.inputs(hour)).facts)
        await world.ledger.close(await world.ledger.inputs(hour), tuple(made(hour) if made else rows(hour, **classes)))
    await world.ledger.advance(T + until * HOUR_MS)
    await world.until(T + until * HOUR_MS)
    await world.answers.follow()


def reserved_price(name, micros, gpu_class):
    """Of a contract that begins in a year."""
    one = pb.GpuPrice(
        kind=types_pb2.PRICE_KIND_RESERVED, micros_per_gpu_hour=micros, gpu_class=gpu_class, source="quote",
        source_date="2026-11-30",
    )  # fmt: skip
    one.start_time.FromMilliseconds(T + 365 * DAY_MS)
    one.end_time.FromMilliseconds(T + 2 * 365 * DAY_MS)
    if name == "b":
        one.site = "sites/a"
    return pb.CreatePriceRequest(price_id=name, price=one)


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

    async def test_a_node_that_two_jobs_wait_for_is_found_in_what_their_ranks_told(self, tmp_path):
        async with World(tmp_path).running() as world:
            world.rpc = servicer(world)
            told = [rank(job, node) for job in "ab" for node in ("m", "n", "slow")]
            await world.ledger.append(reports(1, steps=told, taken_ms=T + MINUTE))
            await fill(world, 0, 1, made=lambda hour: [held(hour, job, n) for job in "ab" for n in ("m", "n", "slow")])
            request = listed(kind=pb.RECOMMENDATION_KIND_SLOW_NODE)
            (one,) = (await world.ask("ListRecommendations", request)).recommendations
            assert (one.subject, one.command) == ("sites/a/nodes/slow", "whaleflux drain sites/a/nodes/slow")
            assert one.expected_micros_per_month == 2 * 400_000 * 730
            assert one.bill_micros == 6 * USD
            world.access["q"] = Access(members=frozenset({"users/bob"}))
            for name in ("bob", "eve"):  # nodes are the operators'
                assert not (await world.ask("ListRecommendations", request, role="user", name=name)).recommendations
            with pytest.raises(NotFound):
                await world.ask("AcceptRecommendation", pb.AcceptRecommendationRequest(name=one.name), "user", "eve")
            done = await world.ask("AcceptRecommendation", pb.AcceptRecommendationRequest(name=one.name))
            assert done.state == pb.RECOMMENDATION_STATE_ACCEPTED
            decided = listed(include_decided=True, kind=pb.RECOMMENDATION_KIND_SLOW_NODE)
            assert len((await world.ask("ListRecommendations", decided)).recommendations) == 1
            assert not (await world.ask("ListRecommendations", decided, role="user", name="eve")).recommendations

    async def test_a_short_window_between_forgets_nothing_of_a_long_one(self, tmp_path):
        async with World(tmp_path).running() as world:
            world.rpc = servicer(world)
            told = [rank(job, node) for job in "ab" for node in ("m", "n", "slow")]
            await world.ledger.append(reports(1, steps=told, taken_ms=T + MINUTE))
            await fill(world, 0, 1, made=lambda hour: [held(hour, job, n) for job in "ab" for n in ("m", "n", "slow")])
            later = [
                rank(job, node) | {"start_ms": T + hour * HOUR_MS, "end_ms": T + hour * HOUR_MS + 10_000}
                for hour in range(1, 26) for job in "ab" for node in ("m", "n")
            ]  # fmt: skip
            await world.ledger.append(reports(2, steps=later, taken_ms=T + 26 * HOUR_MS))
            await fill(world, 1, 26, made=lambda hour: [held(hour, job, n) for job in "ab" for n in ("m", "n")])
            slow = listed(kind=pb.RECOMMENDATION_KIND_SLOW_NODE)
            await world.ask("ListRecommendations", slow)
            (one,) = (await world.ask("ListRecommendations", slow)).recommendations  # hours are read in two calls
            await world.ask("ListRecommendations", listed(window_hours=1))
            done = await world.ask("AcceptRecommendation", pb.AcceptRecommendationRequest(name=one.name))
            assert done.state == pb.RECOMMENDATION_STATE_ACCEPTED

    @pytest.mark.parametrize("last_ms", [HOUR_MS // 2, 0])
    async def test_a_node_that_came_within_the_hour_has_all_of_its_gpus(self, tmp_path, last_ms):
        """Three of four are free: no whole node is."""

        def made(hour):
            there_ms = last_ms if hour == T + 39 * HOUR_MS else HOUR_MS
            for card, job in (("g0", JOB), ("g1", ""), ("g2", ""), ("g3", "")):
                paid = USD * there_ms // HOUR_MS
                classes = micros(useful=paid) if job else micros(idle=paid)
                yield row(hour, card, job, N, paid, uid="u" if job else "", site="a", gpu_class="H100", micros=classes,
                          queue="queues/q" if job else "", gpu_ms=there_ms)  # fmt: skip

        async with World(tmp_path).running() as world:
            world.rpc = servicer(world)
            await fill(world, 0, 40, made=made)
            request = listed(kind=pb.RECOMMENDATION_KIND_HAND_BACK)
            assert not (await world.ask("ListRecommendations", request)).recommendations
            assert await world.answers.node_cards(T + 39 * HOUR_MS) == {"a/H100": 4}
            assert await world.answers.node_cards(T + 40 * HOUR_MS) == {}

    async def test_a_reserved_price_on_record_is_held_against_what_is_rented_by_the_hour_for_operators(self, tmp_path):
        async with week(tmp_path, hours=170, useful=2 * USD) as world:
            request = listed(kind=pb.RECOMMENDATION_KIND_COMMIT)
            assert not (await world.ask("ListRecommendations", request)).recommendations
            for name, micros, gpu in (("b", 700_000, "H100"), ("a", 600_000, "H100"), ("c", 100_000, "A100")):
                await world.ask("CreatePrice", reserved_price(name, micros, gpu))
            (one,) = (await world.ask("ListRecommendations", request)).recommendations
            assert (one.subject, one.cash_ppm) == ("a/H100/on_demand", 1_000_000)
            assert one.expected_micros_per_month == 730 * 1_400_000
            assert "(prices/a, quote, 2026-11-30)" in one.change
            await world.ask("AcceptRecommendation", pb.AcceptRecommendationRequest(name=one.name))
            decided = listed(include_decided=True, kind=pb.RECOMMENDATION_KIND_COMMIT)
            assert len((await world.ask("ListRecommendations", decided)).recommendations) == 1
            assert not (await world.ask("ListRecommendations", decided, role="user", name="eve")).recommendations

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
