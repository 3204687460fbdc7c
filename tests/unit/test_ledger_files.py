"""The ledger's files: what is in them is what was told, once, and nothing is in force that no head names."""

import pytest

from tests.support.ledger_world import BEGIN_MS, MINUTE_MS, leading, reports, row, sample, step
from whaleflux.store.memory import MemoryStore
from whaleflux_console.core import facts as told
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger import schemas
from whaleflux_console.ledger.cache import Cache
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.manifest import DAY_MS, Kind
from whaleflux_console.ledger.rules import HourState, Rules, state_of


async def test_what_was_appended_is_read_back_by_the_next_leader(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        await ledger.append(reports(1, 3, samples=[sample(tensor_ppm=400_000), sample("gpu-1")], steps=[step()]))
    async with leading(tmp_path, store) as ledger:
        found = (await ledger.inputs(BEGIN_MS)).facts
        assert {each.device: each.tensor_ppm for each in found.samples} == {"gpu-0": 400_000, "gpu-1": None}
        assert [(each.first_step, each.last_step) for each in found.steps] == [(1, 10)]
        assert ledger.state.position.sequence == 3
        assert ledger.notes == ()


async def test_an_hour_closed_restated(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        await ledger.append(reports(1, samples=[sample()]))
        await ledger.advance(BEGIN_MS + HOUR_MS + 14 * MINUTE_MS)
        assert ledger.due() == ()
        await ledger.advance(BEGIN_MS + HOUR_MS + 15 * MINUTE_MS)
        assert ledger.due() == (BEGIN_MS,)
        assert await ledger.close(await ledger.inputs(BEGIN_MS), [row()]) == 1
        assert ledger.due() == ()
        assert state_of(ledger.state, BEGIN_MS) is HourState.CLOSED
        assert await ledger.rows(BEGIN_MS) == (row(version=1),)
        await ledger.append(reports(2, samples=[sample(start_ms=BEGIN_MS + 10_000)], taken_ms=BEGIN_MS + 2 * HOUR_MS))
        assert ledger.due() == (BEGIN_MS,)
        assert await ledger.close(await ledger.inputs(BEGIN_MS), [row(bill=5)]) == 2
        assert state_of(ledger.state, BEGIN_MS) is HourState.RESTATED
        assert await ledger.rows(BEGIN_MS) == (row(bill=5, version=2),)
        assert await ledger.rows(BEGIN_MS, version=1) == (row(version=1),)


async def test_what_is_told_again_and_changes_nothing_is_no_new_version(tmp_path):
    store = MemoryStore()
    rows = [row(), row(card="gpu-1")]
    async with leading(tmp_path, store) as ledger:
        await ledger.append(reports(1, samples=[sample()]))
        assert await ledger.close(await ledger.inputs(BEGIN_MS), rows) == 1
        await ledger.restate([BEGIN_MS])
        assert ledger.due() == (BEGIN_MS,)
        assert await ledger.close(await ledger.inputs(BEGIN_MS), rows[::-1]) == 1
        assert (ledger.due(), len(ledger.state.of(Kind.HOURS, BEGIN_MS))) == ((), 1)
    async with leading(tmp_path, store) as ledger:
        assert (await ledger.verify(DAY_MS * (BEGIN_MS // DAY_MS)), ledger.notes) == ((), ())
        assert await ledger.close(await ledger.inputs(BEGIN_MS), [row(bill=5)]) == 2


async def test_hours_that_cannot_be_closed_keep_no_newer_one_waiting(tmp_path):
    async with leading(tmp_path, MemoryStore()) as ledger:
        hours = [BEGIN_MS + at * HOUR_MS for at in range(60)]
        for hour_ms in hours:
            await ledger.restate([hour_ms])
        await ledger.advance(hours[-1] + 2 * HOUR_MS)
        for hour_ms in ledger.due():
            ledger.put_off(hour_ms)
        assert ledger.due() == tuple(hours[48:])
        await ledger.advance(hours[-1] + 3 * HOUR_MS)
        assert ledger.due() == tuple(hours[:48])


async def test_of_many_versions_the_first_is_kept(tmp_path):
    async with leading(tmp_path, MemoryStore()) as ledger:
        for bill in range(1, 21):
            await ledger.restate([BEGIN_MS])
            await ledger.close(await ledger.inputs(BEGIN_MS), [row(bill=bill)])
        assert [file.version for file in ledger.state.of(Kind.HOURS, BEGIN_MS)] == [1, *range(14, 21)]


async def test_facts(tmp_path):
    store = MemoryStore()
    attempt = told.Attempt(
        "queues/q/jobs/j", "u1", 1, "q", "user/ada", "", 1, 2, None, None, plan=told.Plan(pipeline=4)
    )
    first = told.Facts(
        presences=(told.Presence("gpu-0", "gpu-0", "sites/s/nodes/n", "H200", 1_000_000, 0, 10),),
        attempts=(attempt,),
        prices=(told.PriceSpan("gpu-0", 0, 10, 3_000_000, told.PriceKind.OWNED, "list"),),
    )
    async with leading(tmp_path, store) as ledger:
        await ledger.tell(BEGIN_MS, first)
        assert (await ledger.inputs(BEGIN_MS)).facts == first
        longer = told.Facts(presences=(told.Presence("gpu-0", "gpu-0", "sites/s/nodes/n", "H200", 1_000_000, 0, 20),))
        await ledger.tell(BEGIN_MS, longer)
        found = (await ledger.inputs(BEGIN_MS)).facts
        assert found.presences == longer.presences
        assert found.attempts == (attempt,)
        assert len(ledger.state.of(Kind.FACTS, BEGIN_MS)) == 2


async def test_reports_that_are_damaged_are_taken_out_and_named_and_the_hour_is_made_of_the_others(tmp_path):
    async with leading(tmp_path, MemoryStore()) as ledger:
        await ledger.append(reports(1, samples=[sample("gpu-0")]))
        await ledger.append(reports(2, samples=[sample("gpu-1", sequence=2)]))
        first = ledger.state.of(Kind.RAW, BEGIN_MS)[0]
        (tmp_path / first.path).write_bytes(b"torn")
        assert [each.device for each in (await ledger.inputs(BEGIN_MS)).facts.samples] == ["gpu-1"]
        assert first.path in ledger.notes[0]
        assert ledger.state.position.again == ((1, 1),)


async def test_nothing_is_billed_by_half_of_what_owners_told(tmp_path):
    held = told.Presence("gpu-0", "gpu-0", "sites/s/nodes/n", "H200", 1_000_000, 0, 10)
    async with leading(tmp_path, MemoryStore()) as ledger:
        await ledger.tell(BEGIN_MS, told.Facts(presences=(held,)))
        (tmp_path / ledger.state.of(Kind.FACTS, BEGIN_MS)[0].path).unlink()
        with pytest.raises(Damaged, match="is gone"):
            await ledger.inputs(BEGIN_MS)


async def test_a_gap_stays_unknown_and_what_is_known_of_both_sides_is_not_its_mean(tmp_path):
    rows = [sample(start_ms=BEGIN_MS + n * 10_000, tensor_ppm=n * 100_000, sequence=n) for n in (0, 1, 4, 5)]
    rows.append(sample(start_ms=BEGIN_MS + 60_000, sequence=6))
    async with leading(tmp_path, MemoryStore()) as ledger:
        await ledger.append(reports(1, samples=[*rows, *rows]))
        found = (await ledger.inputs(BEGIN_MS)).facts.samples
        assert [(each.start_ms - BEGIN_MS, each.end_ms - BEGIN_MS, each.tensor_ppm) for each in found] == [
            (0, 20_000, 50_000),
            (40_000, 60_000, 450_000),
            (60_000, 70_000, None),
        ]


async def test_steps_told_twice_count_once_and_sums_are_exact(tmp_path):
    first = step(data_us=1_000, tokens=10)
    second = step(start_ms=BEGIN_MS + 10_000, first=11, last=20, data_us=500, tokens=10, sequence=2)
    async with leading(tmp_path, MemoryStore()) as ledger:
        await ledger.append(reports(1, steps=[first, second, first]))
        await ledger.append(reports(2, steps=[second]))
        (found,) = (await ledger.inputs(BEGIN_MS)).facts.steps
        assert (found.first_step, found.last_step, found.data_ms, found.tokens, found.save_ms) == (1, 20, 1, 20, None)


async def test_reports_that_cross_an_hour_are_of_both(tmp_path):
    async with leading(tmp_path, MemoryStore()) as ledger:
        await ledger.append(reports(1, samples=[sample(start_ms=BEGIN_MS + HOUR_MS - 5_000)]))
        for hour_ms in (BEGIN_MS, BEGIN_MS + HOUR_MS):
            made = await ledger.inputs(hour_ms)
            assert made.minutes.num_rows == len(made.facts.samples) == 1


async def test_times_that_cannot_be_right_are_left_out_and_counted(tmp_path):
    bad = [
        (-5, 5),
        (BEGIN_MS, BEGIN_MS),
        (BEGIN_MS, BEGIN_MS + HOUR_MS + 1),
        (BEGIN_MS + 2 * DAY_MS, BEGIN_MS + 2 * DAY_MS + 1),
    ]
    async with leading(tmp_path, MemoryStore()) as ledger:
        await ledger.append(reports(1, samples=[sample(), *(sample(start_ms=a, end_ms=b) for a, b in bad)]))
        assert ledger.refused_rows == 4
        assert len((await ledger.inputs(BEGIN_MS)).facts.samples) == 1


async def test_what_outlived_its_time_goes_when_it_is_rolled_up_and_late_reports_still_count(tmp_path):
    rules = Rules(raw_days=1, minute_days=3, hour_days=5)

    def kinds(ledger):
        return {kind for kind, _ in ledger.state.spans}

    async with leading(tmp_path, MemoryStore(), rules=rules) as ledger:
        await ledger.append(reports(1, samples=[sample(tensor_ppm=7)], steps=[step()]))
        await ledger.tell(
            BEGIN_MS, told.Facts(presences=(told.Presence("gpu-0", "gpu-0", "sites/s/nodes/n", "H200", 1, 0, 1),))
        )
        await ledger.advance(BEGIN_MS + 10 * DAY_MS)
        await ledger.keep_house(BEGIN_MS + 10 * DAY_MS)
        assert kinds(ledger) == {Kind.RAW, Kind.STEPS, Kind.FACTS}, "nothing goes before the hour is closed"
        await ledger.close(await ledger.inputs(BEGIN_MS), [row()])
        await ledger.keep_house(BEGIN_MS + 2 * DAY_MS)
        assert kinds(ledger) == {Kind.FACTS, Kind.MINUTES, Kind.WORK, Kind.PROGRESS, Kind.HOURS, Kind.DAYS}
        assert not list((tmp_path / "raw").rglob("*.parquet"))
        late = sample(start_ms=BEGIN_MS + 10_000, tensor_ppm=9, sequence=2)
        await ledger.append(reports(2, samples=[late], taken_ms=BEGIN_MS + 11 * DAY_MS))
        made = await ledger.inputs(BEGIN_MS)
        assert [each["tensor_ppm"] for each in made.minutes.to_pylist()] == [7, 9]
        await ledger.close(made, [row(bill=8)])
        await ledger.keep_house(BEGIN_MS + 6 * DAY_MS)
        assert kinds(ledger) == {Kind.DAYS}
        assert ledger.due() == ()


def test_money_is_whole_in_every_file():
    for schema in (schemas.HOURS, schemas.DAYS, schemas.FACTS):
        money = [field for field in schema if "micros" in field.name]
        assert {str(field.type) for field in money} <= {"int64"}
    prices = schemas.FACTS.field("prices").type
    assert str(prices.field("micros_per_hour").type) == "int64"
    assert len([name for name in schemas.HOURS.names if name.endswith("_micros")]) == 17


def test_money_stays_whole_in_what_answers_are_made_of(tmp_path):
    engine = Engine()
    try:
        Cache(LocalFolder(tmp_path), engine)
        for table in ("hourly", "daily"):
            types = dict(
                engine.cursor()
                .execute(f"SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = '{table}'")
                .fetchall()
            )
            assert {types[name] for name in types if name.endswith("_micros")} == {"BIGINT"}
            assert "DOUBLE" not in types.values()
    finally:
        engine.close()


async def test_minutes_of_rest_are_not_hidden_by_minutes_of_work(tmp_path):
    def minute(n, busy):
        seen = {"tensor_ppm": busy, "sm_active_ppm": busy, "idle_power": not busy, "sequence": n}
        return sample(start_ms=BEGIN_MS + n * MINUTE_MS, end_ms=BEGIN_MS + (n + 1) * MINUTE_MS, **seen)

    async with leading(tmp_path, MemoryStore()) as ledger:
        await ledger.append(reports(1, samples=[minute(n, 500_000 * (n < 2 or n == 8)) for n in range(9)]))
        found = [
            ((each.end_ms - each.start_ms) // MINUTE_MS, each.idle_power)
            for each in (await ledger.inputs(BEGIN_MS)).facts.samples
        ]
        assert found == [(2, False), (3, True), (3, True), (1, False)]
