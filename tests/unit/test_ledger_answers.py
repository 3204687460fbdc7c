"""Answers about cost: they sum to the whole, say what is not in them, and refuse what cannot be answered with the fix."""

import asyncio
import contextlib
import threading

import pytest

from tests.support.ledger_world import BEGIN_MS, MINUTE_MS, leading, row
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.store.memory import MemoryStore
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.rows import CostClass
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.ledger import HourInput
from whaleflux_console.ledger.manifest import DAY_MS
from whaleflux_console.ledger.question import Question


async def close(ledger, rows, made_of=1_000_000):
    hour_ms = rows[0].hour_ms
    made = HourInput(hour_ms, ledger.state.number)
    return await ledger.close(made, rows)


@contextlib.asynccontextmanager
async def answering(tmp_path, store, **more):
    engine = Engine()
    try:
        answers = Answers(LocalFolder(tmp_path), store, engine, **more)
        await answers.follow()
        yield answers
    finally:
        engine.close()


def hour(n):
    return BEGIN_MS + n * HOUR_MS


def fleet(hour_ms):
    return [
        row(hour_ms, "gpu-0", bill=10, kind=CostClass.USEFUL),
        row(hour_ms, "gpu-1", bill=4, kind=CostClass.BUBBLE),
        row(hour_ms, "gpu-2", job="queues/q/jobs/k", user="user/bob", bill=5, kind=CostClass.LOST),
        row(hour_ms, "gpu-3", job="", queue="", user="", node="sites/s/nodes/m", bill=3, kind=CostClass.IDLE),
    ]


def keys_and_bills(answer):
    return {each.keys: each.bill_micros for each in answer.rows}


async def test_totals_by_everything(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        for n in (0, 1, 30):
            await close(ledger, fleet(hour(n)))
        await ledger.advance(hour(31))
    async with answering(tmp_path, store) as answers:
        whole = Question(BEGIN_MS, BEGIN_MS + 2 * DAY_MS)
        assert (await answers.ask(whole)).total.bill_micros == 66

        async def ask(*by, **more):
            return await answers.ask(Question(BEGIN_MS, BEGIN_MS + 2 * DAY_MS, by, **more))

        assert keys_and_bills(await ask("user")) == {("user/ada",): 42, ("user/bob",): 15, ("",): 9}
        assert keys_and_bills(await ask("day")) == {(str(BEGIN_MS),): 44, (str(BEGIN_MS + DAY_MS),): 22}
        assert keys_and_bills(await ask("class")) == {("useful",): 30, ("bubble",): 12, ("lost",): 15, ("idle",): 9}
        assert keys_and_bills(await ask("job", "class", where={"user": ("user/ada",)})) == {
            ("queues/q/jobs/j", "useful"): 30,
            ("queues/q/jobs/j", "bubble"): 12,
        }
        top = await ask("job", order="lost", limit=1)
        assert keys_and_bills(top) == {("queues/q/jobs/k",): 15}
        assert top.others.bill_micros == 51
        assert top.total.of(CostClass.IDLE) == top.others.of(CostClass.IDLE) == 9
        assert [each.keys for each in (await ask("hour", where={"user": ("user/bob",)})).rows] == [
            (str(hour(n)),) for n in (0, 1, 30)
        ]
        nothing = await ask("job", where={"user": ("user/nobody",)})
        assert (nothing.rows, nothing.total.bill_micros) == ((), 0)
        assert top.as_of_ms == hour(31)


async def test_restatements_and_later_hours_are_followed(tmp_path):
    store = MemoryStore()
    whole = Question(BEGIN_MS, BEGIN_MS + DAY_MS)
    async with leading(tmp_path, store) as ledger:
        await close(ledger, fleet(hour(0)))
        async with answering(tmp_path, store) as answers:
            assert (await answers.ask(whole)).total.bill_micros == 22
            await close(ledger, fleet(hour(1)))
            await close(ledger, [row(hour(0), bill=1)])
            assert (await answers.ask(whole)).total.bill_micros == 22
            assert await answers.follow()
            assert (await answers.ask(whole)).total.bill_micros == 23
            assert not await answers.follow()


async def test_what_could_not_be_read_at_first_is_read_at_the_next_look(tmp_path):
    store, folder, engine = MemoryStore(), LocalFolder(tmp_path), Engine()
    whole, rows_away = Question(BEGIN_MS, BEGIN_MS + DAY_MS), []
    read = folder.read

    def reading(path):
        if path.startswith("hours/") and rows_away:
            raise Unavailable("out of reach")
        return read(path)

    folder.read = reading
    async with leading(tmp_path, store) as ledger:
        await close(ledger, fleet(hour(0)))
        answers = Answers(folder, store, engine)
        await answers.follow()
        await close(ledger, fleet(hour(1)))
        await ledger.advance(hour(3))
        rows_away.append(True)
        with pytest.raises(Unavailable):
            await answers.follow()
        found = await answers.ask(whole)
        assert (found.total.bill_micros, found.as_of_ms) == (22, 0)
        rows_away.clear()
        assert await answers.follow()
        found = await answers.ask(whole)
        assert (found.total.bill_micros, found.as_of_ms) == (44, hour(3))
    engine.close()


async def test_a_look_that_is_cancelled_leaves_no_other_beside_the_next(tmp_path):
    store, folder, engine = MemoryStore(), LocalFolder(tmp_path), Engine()
    begun, goes_on, at_once = threading.Event(), threading.Event(), []
    read, reading = folder.read, set()

    def slowly(path):
        if path.startswith("hours/"):
            reading.add(threading.get_ident())
            at_once.append(len(reading))
            begun.set()
            goes_on.wait(30)
            reading.discard(threading.get_ident())
        return read(path)

    folder.read = slowly
    async with leading(tmp_path, store) as ledger:
        await close(ledger, fleet(hour(0)))
    answers = Answers(folder, store, engine)
    first = asyncio.create_task(answers.follow())
    assert await asyncio.to_thread(begun.wait, 30)
    first.cancel()
    second = asyncio.create_task(answers.follow())
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(at_once) == 1
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert max(at_once) == 1
    assert (await answers.ask(Question(BEGIN_MS, BEGIN_MS + DAY_MS))).total.bill_micros == 22
    engine.close()


async def test_the_state_changes_where_it_is_asked(tmp_path):
    """Who walks through it on the event loop never finds it half changed."""
    store, threads = MemoryStore(), set()
    async with leading(tmp_path, store) as ledger:
        await close(ledger, fleet(hour(0)))
        async with answering(tmp_path, store) as answers:

            class Watched(dict):
                def __setitem__(self, path, file):
                    threads.add(threading.get_ident())
                    super().__setitem__(path, file)

            answers.state.files = Watched(answers.state.files)
            await close(ledger, fleet(hour(1)))
            await answers.follow()
    assert threads == {threading.get_ident()}


async def test_days_before_the_last_weeks_are_kept_by_day(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        for n in (0, 5, 24, 49):
            await close(ledger, fleet(hour(n)))
        await ledger.advance(hour(75))
        async with answering(tmp_path, store, hot_days=1) as answers:
            by_day = Question(BEGIN_MS, BEGIN_MS + 4 * DAY_MS, ("day",))
            expected = {(str(BEGIN_MS),): 44, (str(BEGIN_MS + DAY_MS),): 22, (str(BEGIN_MS + 2 * DAY_MS),): 22}
            assert keys_and_bills(await answers.ask(by_day)) == expected
            await ledger.keep_house(hour(75))
            await answers.follow()
            assert keys_and_bills(await answers.ask(by_day)) == expected
            await close(ledger, [row(hour(0), bill=1)])
            await ledger.advance(hour(100))
            await answers.follow()
            assert keys_and_bills(await answers.ask(by_day)) == expected | {(str(BEGIN_MS),): 23}
            with pytest.raises(InvalidArgument, match="by day"):
                await answers.ask(Question(hour(1), hour(30)))
            with pytest.raises(InvalidArgument, match="by day"):
                await answers.ask(Question(BEGIN_MS, BEGIN_MS + DAY_MS, ("hour",)))
    async with answering(tmp_path, store, hot_days=1) as answers:
        assert keys_and_bills(await answers.ask(by_day)) == expected | {(str(BEGIN_MS),): 23}


@pytest.mark.parametrize(
    ("question", "field", "fix"),
    [
        (Question(BEGIN_MS + 1, BEGIN_MS + HOUR_MS), "window", "whole hours"),
        (Question(BEGIN_MS + HOUR_MS, BEGIN_MS), "window", "later end"),
        (Question(0, BEGIN_MS * 2 // HOUR_MS * HOUR_MS), "window", "five years"),
        (Question(BEGIN_MS, BEGIN_MS + 40 * DAY_MS, ("hour",)), "window", "by day"),
        (Question(BEGIN_MS, BEGIN_MS + HOUR_MS, ("team; drop table",)), "by", "use of site"),
        (Question(BEGIN_MS, BEGIN_MS + HOUR_MS, ("day", "hour")), "by", "one of hour and day"),
        (Question(BEGIN_MS, BEGIN_MS + HOUR_MS, ("job", "user", "site", "node")), "by", "up to 3"),
        (Question(BEGIN_MS, BEGIN_MS + HOUR_MS, where={"card": ("x",)}), "where", "use of site"),
        (Question(BEGIN_MS, BEGIN_MS + HOUR_MS, where={"job": ()}), "where.job", "leave the filter out"),
        (Question(BEGIN_MS, BEGIN_MS + HOUR_MS, where={"job": ("x" * 301,)}), "where.job", "300 characters"),
        (Question(BEGIN_MS, BEGIN_MS + HOUR_MS, order="money"), "order", "cost class"),
        (Question(BEGIN_MS, BEGIN_MS + HOUR_MS, limit=0), "limit", "1 to 10000"),
    ],
)
async def test_what_cannot_be_answered_is_refused_by_field(tmp_path, question, field, fix):
    async with answering(tmp_path, MemoryStore()) as answers:
        with pytest.raises(InvalidArgument, match=fix) as refused:
            await answers.ask(question)
        assert refused.value.violations[0].field == field


async def test_values_of_filters_are_no_sql(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        await close(ledger, fleet(hour(0)))
    async with answering(tmp_path, store) as answers:
        asked = Question(BEGIN_MS, BEGIN_MS + DAY_MS, ("job",), {"job": ("'); DROP TABLE cache.hourly; --",)})
        assert (await answers.ask(asked)).rows == ()
        assert (await answers.ask(Question(BEGIN_MS, BEGIN_MS + DAY_MS))).total.bill_micros == 22


async def test_an_hour_whose_file_is_damaged_is_named_beside_the_sum_of_the_others(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        await close(ledger, fleet(hour(0)))
        await close(ledger, fleet(hour(1)))
        await ledger.advance(hour(2) + 20 * MINUTE_MS)
    torn = next((tmp_path / "hours").glob("date=*/hour=01/*.parquet"))
    torn.write_bytes(torn.read_bytes()[:-7])
    async with answering(tmp_path, store) as answers:
        found = await answers.ask(Question(BEGIN_MS, BEGIN_MS + DAY_MS))
        assert found.total.bill_micros == 22
        assert found.damaged == (str(torn.relative_to(tmp_path)),)
        later = await answers.ask(Question(BEGIN_MS + DAY_MS, BEGIN_MS + 2 * DAY_MS))
        assert later.damaged == ()
