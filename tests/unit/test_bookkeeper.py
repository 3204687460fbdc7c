"""The ledger as it is kept: facts are told, hours closed, prices changed behind it; and what those who ask are answered."""

import contextlib
from datetime import UTC, datetime

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import FailedPrecondition, InvalidArgument
from whaleflux.rpc import auth
from whaleflux.store import Put, keys
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux.trust.ownership import OPEN, Access
from whaleflux.v1 import console_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_console.biller import LARGE_ROWS
from whaleflux_console.bookkeeper import Bookkeeper, Progress
from whaleflux_console.budgets import Budgets
from whaleflux_console.core.chronicle import Chronicle, Device, JobFacts, NodePrice
from whaleflux_console.core.facts import HOUR_MS, Attempt, Facts, Fragmented, Holding, PriceKind
from whaleflux_console.costs import Costs
from whaleflux_console.invoicing import Invoicing
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.ledger import open_ledger
from whaleflux_console.ledger.manifest import Kind
from whaleflux_console.prices import Adjustments, Prices
from whaleflux_console.pricing import Pricing
from whaleflux_console.retelling import Retelling
from whaleflux_console.servicer import CostServicer

N = "sites/a/nodes/n"
T = int(datetime(2026, 12, 1, 10, tzinfo=UTC).timestamp() * 1000)
MINUTE = 60_000
LATE = T + 80 * MINUTE  # the hour of T is closed by then


def millis(clock):
    return round(clock.now().timestamp() * 1000)


class World:
    """One replica that keeps the ledger and answers, on a store and a folder that outlive it."""

    def __init__(self, path, store=None):
        self.path, self.store = path, store or MemoryStore()
        self.clock = VirtualClock(datetime.fromtimestamp(T / 1000, UTC))
        self.access, self.jobs = {}, []

    async def until(self, ms):
        await self.clock.advance((ms - millis(self.clock)) / 1000)

    @contextlib.asynccontextmanager
    async def running(self):
        engine = Engine(memory_bytes=64 << 20, threads=1)
        folder = LocalFolder(self.path)
        async with elect(self.store, "console-ledger", "here") as leader:
            ledger = await open_ledger(folder, self.store, leader, engine=engine)
            self.chronicle, progress = Chronicle(), Progress()
            invoicing, pricing = Invoicing(self.store, ledger, leader), Pricing(self.store)
            self.keeper = Bookkeeper(
                ledger,
                leader,
                self.chronicle,
                pricing,
                invoicing,
                self.clock,
                progress,
                Retelling(ledger, self.know, pricing),
            )
            await self.keeper.resume()
            self.answers = Answers(folder, self.store, engine)
            costs = Costs(self.answers, lambda queue: self.access.get(queue, OPEN), self.clock, progress)
            self.rpc = CostServicer(
                Prices(self.store, self.clock),
                Adjustments(self.store, self.clock),
                Budgets(self.store, self.clock, lambda queue: self.access.get(queue, OPEN)),
                costs,
            )
            self.ledger, self.progress = ledger, progress
            try:
                yield self
            finally:
                engine.close()

    async def know(self, hour_ms):
        """What owners know."""
        return self.chronicle.known_of(hour_ms, self.jobs, millis(self.clock))

    async def tick(self):
        now = millis(self.clock)
        await self.ledger.advance(now)
        await self.keeper.tick()
        await self.answers.follow()

    def fleet(self, ms=T, gpus=2, micros=2_000_000):
        devices = [Device(f"g{i}", f"g{i}", N, "H100", 1_000_000, True, 80) for i in range(gpus)]
        self.chronicle.node(N, devices, NodePrice(micros, PriceKind.OWNED), ms, T)

    def run(self, start, end=None, queue="q", device="g0"):
        name = f"queues/{queue}/jobs/j"
        one = Attempt(name, "u", 1, f"queues/{queue}", "user/ann", "", start, start, None, end)
        held = Holding(device, name, "u", 1, 1_000_000, start, end or start + 1)
        self.jobs.append(JobFacts(name, (one,), (held,)))
        self.chronicle.job(self.jobs[-1])

    async def ask(self, method, request, role="operator", name="olga", groups=()):
        with auth.acting_as(auth.Identity(role, name)):
            return await getattr(self.rpc, method)(request, None)

    async def cost(self, *by, **more):
        asked = pb.CostFilter()
        asked.start_time.FromMilliseconds(T)
        asked.end_time.FromMilliseconds(T + HOUR_MS)
        return await self.ask("GetCost", pb.GetCostRequest(filter=asked, group_by=by), **more)


def price(micros=3_600_000, start=T, name="p"):
    one = pb.GpuPrice(kind=types_pb2.PRICE_KIND_ON_DEMAND, micros_per_gpu_hour=micros, source="contract")
    one.start_time.FromMilliseconds(start)
    return pb.CreatePriceRequest(price_id=name, price=one)


class TestKeeping:
    async def test_an_hour_is_told_as_it_goes_on_and_closed_when_it_is_over(self, tmp_path):
        async with World(tmp_path).running() as world:
            world.fleet()
            world.run(T + 30 * MINUTE)
            await world.until(T + 40 * MINUTE)
            await world.tick()
            so_far = await world.cost()
            assert so_far.total.bill_micros == 2 * 2_000_000 * 40 // 60
            assert so_far.open_since.ToMilliseconds() == T
            await world.until(LATE)
            await world.tick()
            whole = await world.cost(pb.COST_GROUPING_QUEUE)
            assert whole.total.bill_micros == 4_000_000
            assert {one.keys[0]: one.bill_micros for one in whole.groups} == {"": 3_000_000, "queues/q": 1_000_000}
            assert (await world.ask("GetLedger", pb.GetLedgerRequest())).closed_hours == 1

    async def test_groups_and_classes_sum_to_the_bill(self, tmp_path):
        async with World(tmp_path).running() as world:
            world.fleet(gpus=3, micros=1_234_567)
            world.run(T + 11 * MINUTE, T + 47 * MINUTE)
            await world.until(LATE)
            await world.tick()
            for by in (pb.COST_GROUPING_JOB, pb.COST_GROUPING_NODE, pb.COST_GROUPING_DAY, pb.COST_GROUPING_GPU_CLASS):
                found = await world.cost(by)
                assert sum(one.bill_micros for one in found.groups) == found.total.bill_micros
                for one in [*found.groups, found.total]:
                    assert sum(part.micros for part in one.classes) == one.bill_micros

    async def test_a_restart_loses_no_time(self, tmp_path):
        world = World(tmp_path)
        async with world.running():
            world.fleet()
            world.run(T)
            await world.until(T + 5 * MINUTE)
            await world.tick()
        await world.until(LATE)
        async with world.running():
            world.fleet(ms=LATE)
            world.run(T)
            await world.tick()
            assert (await world.cost()).total.bill_micros == 4_000_000

    async def test_a_restart_closes_no_hour_again(self, tmp_path):
        world = World(tmp_path)
        async with world.running():
            world.fleet()
            world.run(T, T + 30 * MINUTE)
            await world.until(LATE)
            await world.tick()
        await world.until(LATE + HOUR_MS)
        async with world.running():
            world.fleet(ms=LATE + HOUR_MS)
            world.run(T, T + 30 * MINUTE)
            await world.tick()
            await world.until(LATE + 2 * HOUR_MS)
            await world.tick()
            assert (await world.ask("GetLedger", pb.GetLedgerRequest())).restated_hours == 0

    async def test_a_restart_while_work_goes_on_closes_no_hour_again_either(self, tmp_path):
        world = World(tmp_path)
        async with world.running():
            world.fleet()
            world.run(T)
            await world.until(LATE)
            await world.tick()
        await world.until(LATE + MINUTE)
        async with world.running():
            world.fleet(ms=LATE + MINUTE)
            world.run(T)
            await world.until(LATE + 20 * MINUTE)
            await world.tick()
            told = await world.ask("GetLedger", pb.GetLedgerRequest())
            assert (told.closed_hours, told.restated_hours, told.waiting_hours) == (1, 0, 0)

    async def test_that_nothing_is_taken_in_any_more_is_said_by_whoever_answers(self, tmp_path):
        async with World(tmp_path).running() as world:
            world.fleet()
            await world.until(T + 10 * MINUTE)
            await world.tick()
            assert (await world.ask("GetLedger", pb.GetLedgerRequest())).trouble == ""
            await world.clock.advance(300)
            assert "nothing was taken in for 5 min" in (await world.ask("GetLedger", pb.GetLedgerRequest())).trouble

    async def test_an_hour_in_which_nothing_changes_is_told_of_no_more(self, tmp_path):
        async with World(tmp_path).running() as world:
            world.fleet()
            told = []
            for minute in (5, 10, 15):
                await world.until(T + minute * MINUTE)
                await world.tick()
                told.append(len(world.ledger.state.of(Kind.FACTS, T)))
            assert told[0] == told[-1] > 0
            assert (await world.cost()).total.bill_micros == 2 * 2_000_000 * 15 // 60

    async def test_what_was_wrong_is_said_until_it_is_right(self, tmp_path):
        async with World(tmp_path).running() as world:
            world.fleet()
            world.progress.trouble = "it was"
            await world.until(T + MINUTE)
            await world.tick()
            assert (await world.ask("GetLedger", pb.GetLedgerRequest())).trouble == ""

    async def test_an_hour_that_takes_too_long_stays_as_it_was_and_others_are_closed(self, tmp_path):
        many = tuple(Fragmented(f"g{i}", T, T + 1) for i in range(LARGE_ROWS))  # time jumps while its process works
        async with World(tmp_path).running() as world:
            world.fleet(T - HOUR_MS)
            await world.until(T + 40 * MINUTE)
            await world.tick()
            await world.ledger.tell(T, Facts(fragmented=many))
            await world.until(LATE + HOUR_MS)
            await world.tick()
            assert f"the hour {T} took more than" in world.progress.trouble
            state = world.ledger.state
            closed = [hour for kind, hour in state.spans if kind is Kind.HOURS and state.newest(kind, hour).version]
            assert T not in closed
            assert T + HOUR_MS in closed

    @pytest.mark.parametrize(
        "harm", [lambda file: file.write_bytes(file.read_bytes()[:-9] + b"another!?"), lambda file: file.unlink()]
    )
    async def test_facts_that_are_damaged_are_told_again_by_their_owners(self, tmp_path, harm):
        async with World(tmp_path).running() as world:
            world.fleet()
            world.run(T + 30 * MINUTE, T + 50 * MINUTE)
            await world.until(LATE)
            await world.tick()
            before, closed = (await world.cost(pb.COST_GROUPING_QUEUE)).groups, world.ledger.state.newest(Kind.HOURS, T)
            for file in world.ledger.state.of(Kind.FACTS, T):
                harm(tmp_path / file.path)
            await world.until(LATE + 2 * HOUR_MS)
            await world.tick()
            await world.until(LATE + 2 * HOUR_MS + 20 * MINUTE)
            await world.tick()
            assert await world.ledger.damaged_facts(T) == ()
            assert world.ledger.state.newest(Kind.HOURS, T).commit > closed.commit, "it is closed again"
            assert T not in world.ledger.state.unsettled
            assert (await world.cost(pb.COST_GROUPING_QUEUE)).groups == before
            assert any(note.startswith("the ledger's file facts/") for note in world.ledger.notes), "people are told"

    async def test_facts_that_owners_no_longer_know_leave_the_hour_as_it_was(self, tmp_path):
        async with World(tmp_path).running() as world:
            world.fleet()
            world.run(T + 30 * MINUTE, T + 50 * MINUTE)
            await world.until(LATE)
            await world.tick()
            before = (await world.cost(pb.COST_GROUPING_QUEUE)).groups
            world.jobs.clear()  # its record is deleted
            await world.until(LATE + HOUR_MS)
            await world.tick()  # and is forgotten here
            for file in world.ledger.state.of(Kind.FACTS, T):
                (tmp_path / file.path).write_bytes(b"no facts")
            await world.until(LATE + 3 * HOUR_MS)
            await world.tick()
            await world.tick()
            assert "no longer know of g0 for u" in world.progress.trouble
            assert world.ledger.state.newest(Kind.HOURS, T).version == 1
            assert (await world.cost(pb.COST_GROUPING_QUEUE)).groups == before

    async def test_a_price_record_that_cannot_be_read_after_a_restart_changes_no_bill_either(self, tmp_path):
        world = World(tmp_path)
        async with world.running():
            await world.ask("CreatePrice", price())
            world.fleet()
            await world.until(LATE)
            await world.tick()
        await world.store.commit(Put(keys.PRICES + "p", b"\xff\xff"))
        async with world.running():
            world.fleet(ms=LATE)
            await world.until(LATE + 20 * MINUTE)
            await world.tick()
            assert (await world.cost()).total.bill_micros == 7_200_000
            assert (await world.ask("GetLedger", pb.GetLedgerRequest())).restated_hours == 0

    async def test_a_price_that_is_declared_later_closes_its_hours_again(self, tmp_path):
        async with World(tmp_path).running() as world:
            world.fleet()
            await world.until(LATE)
            await world.tick()
            await world.ask("CreatePrice", price())
            await world.until(LATE + 20 * MINUTE)
            await world.tick()
            assert (await world.cost()).total.bill_micros == 7_200_000
            told = await world.ask("GetLedger", pb.GetLedgerRequest())
            assert (told.closed_hours, told.restated_hours) == (1, 1)
            await world.ask("DeletePrice", pb.DeletePriceRequest(name="prices/p"))
            await world.until(LATE + 40 * MINUTE)
            await world.tick()
            assert (await world.cost()).total.bill_micros == 4_000_000

    async def test_a_price_that_begins_within_an_hour_counts_from_then_on(self, tmp_path):
        async with World(tmp_path).running() as world:
            await world.ask("CreatePrice", price(start=T + 30 * MINUTE))
            world.fleet(gpus=1)
            await world.until(LATE)
            await world.tick()
            assert (await world.cost()).total.bill_micros == 1_000_000 + 1_800_000

    async def test_what_has_no_price_is_shown_as_hours_that_count_nothing(self, tmp_path):
        async with World(tmp_path).running() as world:
            devices = [Device("g0", "g0", N, "H100", 1_000_000, True, 80)]
            world.chronicle.node(N, devices, None, T, T)
            await world.until(LATE)
            await world.tick()
            found = await world.cost()
            assert (found.total.bill_micros, found.unpriced_gpu_hours) == (0, 1.0)

    async def test_a_price_record_that_cannot_be_read_changes_no_bill(self, tmp_path):
        async with World(tmp_path).running() as world:
            await world.ask("CreatePrice", price())
            world.fleet()
            await world.until(LATE)
            await world.tick()
            await world.store.commit(Put(keys.PRICES + "p", b"\xff\xff"))
            await world.until(LATE + 20 * MINUTE)
            await world.tick()
            assert (await world.cost()).total.bill_micros == 7_200_000


class TestAsking:
    @contextlib.asynccontextmanager
    async def world(self, tmp_path):
        async with World(tmp_path).running() as world:
            world.fleet()
            world.run(T, T + HOUR_MS)
            await world.until(LATE)
            await world.tick()
            yield world

    async def test_what_is_in_queues_that_one_may_not_see_is_one_sum_without_names(self, tmp_path):
        async with self.world(tmp_path) as world:
            world.access["q"] = Access(members=frozenset({"users/bob"}))
            found = await world.cost(pb.COST_GROUPING_JOB, role="user", name="ann")
            assert [list(one.keys) for one in found.groups] == [[""]]
            assert (found.hidden.bill_micros, found.total.bill_micros) == (2_000_000, 4_000_000)
            told = await world.ask("GetJobCost", pb.GetJobCostRequest(job="queues/q/jobs/j"), role="user", name="ann")
            assert told == pb.GetJobCostResponse(), "as of a job that is not there"
            seen = await world.cost(pb.COST_GROUPING_JOB, role="user", name="bob")
            assert ["queues/q/jobs/j"] in [list(one.keys) for one in seen.groups]
            assert not seen.HasField("hidden")

    async def test_a_job_is_told_whole_and_by_day(self, tmp_path):
        async with self.world(tmp_path) as world:
            found = await world.ask("GetJobCost", pb.GetJobCostRequest(job="queues/q/jobs/j"))
            assert (found.total.bill_micros, found.total.gpu_hours) == (2_000_000, 1.0)
            assert [(list(one.keys), one.bill_micros) for one in found.days] == [(["2026-12-01T00:00:00Z"], 2_000_000)]

    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (pb.GetCostRequest(group_by=[99]), "group_by"),
            (pb.GetCostRequest(group_by=[1, 2, 3, 4]), "by"),
            (pb.GetCostRequest(group_by=[8, 9]), "by"),
            (pb.GetCostRequest(limit=-1), "limit"),
            (pb.GetCostRequest(limit=1001), "limit"),
            (pb.GetCostRequest(order_by=99), "order_by"),
            (pb.GetCostRequest(filter=pb.CostFilter(queue="x" * 400)), "where.queue"),
        ],
    )
    async def test_what_cannot_be_asked_names_its_field(self, tmp_path, request_, field):
        async with self.world(tmp_path) as world:
            with pytest.raises(InvalidArgument) as caught:
                await world.ask("GetCost", request_)
            assert [violation.field for violation in caught.value.violations] == [field]

    async def test_a_window_that_ends_before_it_begins_is_refused(self, tmp_path):
        async with self.world(tmp_path) as world:
            asked = pb.CostFilter()
            asked.start_time.FromMilliseconds(T)
            asked.end_time.FromMilliseconds(T)
            with pytest.raises(InvalidArgument):
                await world.ask("GetCost", pb.GetCostRequest(filter=asked))

    async def test_without_a_folder_there_is_no_ledger_and_the_answer_says_what_to_do(self):
        store, clock = MemoryStore(), VirtualClock()
        servicer = CostServicer(Prices(store, clock), Adjustments(store, clock), Budgets(store, clock, lambda _: OPEN))
        with pytest.raises(FailedPrecondition, match="--ledger-folder"):
            await servicer.GetLedger(pb.GetLedgerRequest(), None)
