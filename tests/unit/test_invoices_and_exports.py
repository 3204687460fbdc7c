"""Adjustments of invoices over closed hours, at whatever step the keeper stops; and what is exported, which sums to the bill."""

import csv
import io

import pytest

from tests.unit.test_bookkeeper import LATE, MINUTE, T, World, price
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.rpc import auth
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger.manifest import Kind

HOURS = 3
DONE = T + HOURS * HOUR_MS + 30 * MINUTE
AGAIN = 20 * MINUTE  # after which an hour may be closed anew


async def adjust(world, micros=-1_000_001, name="a", hours=HOURS, **fields):
    one = pb.Adjustment(micros=micros, reason="invoice 7", **fields)
    one.start_time.FromMilliseconds(T)
    one.end_time.FromMilliseconds(T + hours * HOUR_MS)
    await world.ask("CreateAdjustment", pb.CreateAdjustmentRequest(adjustment_id=name, adjustment=one))


async def state(world):
    found = (await world.ask("ListAdjustments", pb.ListAdjustmentsRequest())).adjustments
    return [one.state for one in found]


async def by_adjustment(world):
    """adjustment -> micro-dollars, of the rows in force."""
    found = {}
    for n in range(HOURS):
        for row in await world.ledger.rows(T + n * HOUR_MS):
            found[row.adjustment] = found.get(row.adjustment, 0) + row.bill_micros
    return found


async def rounds(world, first=DONE, count=3):
    for n in range(count):
        await world.until(first + n * AGAIN)
        await world.tick()


@pytest.fixture
async def closed(tmp_path):
    """Three closed hours of two GPUs."""
    async with World(tmp_path).running() as world:
        world.fleet()
        world.run(T)
        await world.until(DONE - MINUTE)
        await world.tick()
        await world.tick()
        yield world


async def test_it_waits_for_its_hours_then_sums_over_them_to_the_micro_dollar_and_can_be_taken_back(tmp_path):
    async with World(tmp_path).running() as world:
        world.fleet()
        world.run(T)
        await adjust(world)
        await world.until(LATE)
        await world.tick()
        assert await state(world) == [pb.ADJUSTMENT_STATE_WAITING]
        await rounds(world)
        assert await state(world) == [pb.ADJUSTMENT_STATE_SPREAD]
        assert await by_adjustment(world) == {"": 12_000_000, "adjustments/a": -1_000_001}
        await world.ask("DeleteAdjustment", pb.DeleteAdjustmentRequest(name="adjustments/a"))
        assert await state(world) == [pb.ADJUSTMENT_STATE_TAKING_BACK]
        await rounds(world, DONE + 4 * AGAIN)
        assert await state(world) == []
        assert await by_adjustment(world) == {"": 12_000_000}


async def test_who_declares_one_of_closed_hours_sees_it_in_them_at_once(closed):
    await adjust(closed)
    await closed.until(DONE)
    await closed.tick()
    assert await by_adjustment(closed) == {"": 12_000_000, "adjustments/a": -1_000_001}


async def test_one_for_a_class_that_is_not_there_is_in_the_bill_all_the_same(closed):
    await adjust(closed, 5, gpu_class="H200")
    await rounds(closed)
    assert (await by_adjustment(closed))["adjustments/a"] == 5


async def test_one_whose_window_is_too_old_to_be_billed_anew_says_so_and_bills_nothing(closed):
    one = pb.Adjustment(micros=5, reason="invoice 7")
    one.start_time.FromMilliseconds(T - 100 * 24 * HOUR_MS)
    one.end_time.FromMilliseconds(T)
    await closed.ask("CreateAdjustment", pb.CreateAdjustmentRequest(adjustment_id="a", adjustment=one))
    await rounds(closed, count=1)
    assert await state(closed) == [pb.ADJUSTMENT_STATE_TOO_OLD]
    await closed.ask("DeleteAdjustment", pb.DeleteAdjustmentRequest(name="adjustments/a"))
    assert await state(closed) == []


async def test_an_hour_whose_file_is_damaged_is_made_again_first(closed):
    (hour,) = (file for file in closed.ledger.state.of(Kind.HOURS, T + HOUR_MS) if file.version)
    (closed.path / hour.path).write_bytes(b"not what was written")
    await adjust(closed)
    await rounds(closed, count=5)
    assert await state(closed) == [pb.ADJUSTMENT_STATE_SPREAD]
    assert await by_adjustment(closed) == {"": 12_000_000, "adjustments/a": -1_000_001}


@pytest.mark.parametrize("taken_back", [False, True])
async def test_a_crash_at_any_step_repeats_and_never_doubles(tmp_path, taken_back, monkeypatch):
    """Each write of store and ledger in turn is the last of its process."""
    for stop_at in range(1, 12):
        world = World(tmp_path / str(stop_at))
        async with world.running():
            world.fleet()
            world.run(T)
            await world.until(DONE - MINUTE)
            await world.tick()
            await world.tick()
            await adjust(world)
            if taken_back:
                await rounds(world)
                await world.ask("DeleteAdjustment", pb.DeleteAdjustmentRequest(name="adjustments/a"))
            left, commit = stop_at, world.store.commit

            async def stopping(*writes, commit=commit, **more):
                nonlocal left
                left -= 1
                if not left:
                    raise Unavailable("the process is gone")
                return await commit(*writes, **more)

            with monkeypatch.context() as patch:
                patch.setattr(world.store, "commit", stopping)
                try:
                    await rounds(world, DONE + 4 * AGAIN)
                except Unavailable:
                    pass
        async with world.running():
            world.fleet(ms=DONE + 4 * AGAIN)
            await rounds(world, DONE + 8 * AGAIN)
            expected = {"": 12_000_000} if taken_back else {"": 12_000_000, "adjustments/a": -1_000_001}
            assert await by_adjustment(world) == expected, stop_at
            assert len(await state(world)) == (0 if taken_back else 1)


async def exported(world, **fields):
    request = pb.ExportCostRequest(**fields)
    request.start_time.FromMilliseconds(T)
    with auth.acting_as(auth.Identity("operator", "olga")):
        parts = [part async for part in world.rpc.ExportCost(request, None)]
    assert [part.HasField("summary") for part in parts] == [False] * (len(parts) - 1) + [True]
    return b"".join(part.data for part in parts), parts[-1].summary


async def test_what_is_exported_sums_to_the_bill_with_restated_hours_as_corrections(closed):
    before, summary = await exported(closed)
    assert (summary.billed_micros, summary.bill_micros, summary.corrections) == (12_000_000, 12_000_000, 0)
    await adjust(closed)
    await closed.ask("CreatePrice", price(start=T + HOUR_MS))
    await rounds(closed, count=4)
    after, summary = await exported(closed)
    assert summary.billed_micros == summary.bill_micros != 12_000_000
    assert summary.corrections > 0 and not summary.faults
    assert after.startswith(before[: before.index(b"\n")])
    lines = list(csv.DictReader(io.StringIO(after.decode())))
    first = [line for line in lines if not line["ChargeClass"] and line["ChargePeriodStart"] < "2026-12-01T13"]
    assert sum(round(float(line["BilledCost"]) * 1e6) for line in first) == 12_000_000
    parquet, same = await exported(closed, format=pb.COST_FORMAT_PARQUET)
    assert parquet[:4] == b"PAR1" and same.billed_micros == summary.billed_micros


@pytest.mark.parametrize(
    ("fields", "field"), [({"format": 9}, "format"), ({"billing_account": "x" * 129}, "billing_account")]
)
async def test_what_cannot_be_exported_names_its_field(closed, fields, field):
    with pytest.raises(InvalidArgument) as caught:
        await exported(closed, **fields)
    assert [violation.field for violation in caught.value.violations] == [field]
