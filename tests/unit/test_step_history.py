"""How trainings went: from what ranks tell to the points of a chart. Peaks stay, attempts are told apart, losses are for who reads the job."""

import contextlib
import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ledger_world import BEGIN_MS, MINUTE_MS, leading, reports, step
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.events.api import StoredEvent
from whaleflux.rpc import auth
from whaleflux.rpc.auth import Identity, Principal
from whaleflux.store.memory import MemoryStore
from whaleflux.trust import ownership
from whaleflux.trust.ownership import OPEN, Access
from whaleflux.usage_checks import wrong_steps
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import console_pb2 as pb
from whaleflux.v1.usage_pb2 import StepLosses, StepTimes, StepUsage, UsageBatch
from whaleflux_agent.core.work import Work
from whaleflux_agent.usage.steps import StepLog
from whaleflux_console.core.facts import HOUR_MS, Attempt, Facts
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.manifest import Kind
from whaleflux_console.ledger.reported import reports_of
from whaleflux_console.ledger.schemas import facts_table, rows_table
from whaleflux_console.step_history import StepHistory

JOB = "queues/team/jobs/j"
QUEUES = {"open": OPEN, "team": Access(frozenset({"groups/research", "users/carl"}))}


def who(role, name, groups=()):
    return Principal(Identity(role, name), frozenset(groups))


ANN, MATE, CARL, EVE = who("user", "ann"), who("user", "bob", ["research"]), who("user", "carl"), who("user", "eve")
OPERATOR, VIEWER = who("operator", "op"), who("viewer", "vic")


def attempt(number, epoch, job=JOB, uid="u1"):
    return Attempt(job, uid, number, "queues/team", "user/ann", "", BEGIN_MS, BEGIN_MS, BEGIN_MS, None, epoch=epoch)


def owned(made, *attempts):
    """With what owners tell of attempts."""
    return replace(made, told=(*made.told, facts_table(Facts(attempts=attempts))))


def minute(n, first, last, *, epoch=7, rank=0, loss=None, **more):
    """Steps of a rank in the minute n, evenly spread; `loss` of each of them."""
    values = [] if loss is None else [loss] * (last - first + 1) if isinstance(loss, float) else loss
    told = {}
    if values:
        told = {
            "loss_count": len(values),
            "loss_sum": math.fsum(values),
            "loss_min": min(values),
            "loss_max": max(values),
            "loss_not_finite": 0,
        }
    at = BEGIN_MS + n * MINUTE_MS
    return step(rank, at, at + MINUTE_MS, first, last, attempt=epoch, **told, **more)


@contextlib.asynccontextmanager
async def asking(tmp_path, *steps, attempts=(), interim=False):
    """A history of closed hours with these steps."""
    store, engine = MemoryStore(), Engine()
    async with leading(tmp_path, store) as ledger:
        await ledger.append(reports(1, steps=steps, taken_ms=BEGIN_MS + 3 * HOUR_MS))
        for hour_ms in sorted({one["start_ms"] // HOUR_MS * HOUR_MS for one in steps}):
            made = await ledger.inputs(hour_ms)
            await ledger.close_with(
                owned(made, *(attempts or [attempt(1, 7)])),
                rows_table([]),
                interim=interim,
            )
        try:
            answers = Answers(LocalFolder(tmp_path), store, engine)
            await answers.follow()
            yield Asking(StepHistory(answers, lambda queue: QUEUES[queue]), ledger, store)
        finally:
            engine.close()


class Asking:
    def __init__(self, history, ledger, store):
        self.history, self.ledger, self.store = history, ledger, store

    async def __call__(self, caller=ANN, job=JOB, **asked):
        with auth.acting_as(caller):
            watched = ownership.watch_questions()
            answer = await self.history.of_job(pb.GetStepHistoryRequest(job=job, **asked))
        assert watched.yes
        return answer


async def test_a_point_says_what_steps_took_and_were_made_of(tmp_path):
    steps = [
        minute(0, 1, 60, loss=4.0, tokens=6000, data_us=6_000_000),
        minute(0, 1, 30, rank=1, loss=2.0, tokens=3000),  # it says nothing of its waits, and is twice as slow
    ]
    async with asking(tmp_path, *steps) as ask:
        answer = await ask()
        billed = (await ask.ledger.inputs(BEGIN_MS)).facts.steps
    assert [(one.last_step, one.tokens) for one in billed] == [(60, 6000), (30, 3000)], "losses are no part of the bill"
    (point,) = answer.points
    assert (point.attempt, point.first_step, point.last_step, point.ranks) == (1, 1, 60, 2)
    assert (point.step_s, point.fastest_step_s, point.slowest_step_s) == pytest.approx((120 / 90, 1.0, 2.0))
    assert (point.data_s, point.HasField("save_s"), point.tokens_per_s) == (
        pytest.approx(0.1),
        False,
        pytest.approx(150),
    )
    assert (point.loss.mean, point.loss.min, point.loss.max) == (pytest.approx(300 / 90), 2.0, 4.0)
    assert (point.start_time.ToMilliseconds(), point.end_time.ToMilliseconds()) == (BEGIN_MS, BEGIN_MS + MINUTE_MS)
    assert answer.watermark.ToMilliseconds() == BEGIN_MS + 3 * HOUR_MS


async def test_the_same_hour_so_far_is_shown_before_it_is_closed_and_once_after(tmp_path):
    async with asking(tmp_path, minute(0, 1, 60, loss=1.0), interim=True) as ask:
        assert (await ask()).points[0].last_step == 60
        made = await ask.ledger.inputs(BEGIN_MS)
        await ask.ledger.close_with(owned(made, attempt(1, 7)), rows_table([]))
        assert [file.version for file in ask.ledger.state.of(Kind.PROGRESS, BEGIN_MS)] == [1]
        await ask.history.answers.follow()
        assert len((await ask()).points) == 1


async def test_steps_across_an_hour_are_in_one_of_them(tmp_path):
    over = minute(59, 1, 60) | {"start_ms": BEGIN_MS + HOUR_MS - 30_000, "end_ms": BEGIN_MS + HOUR_MS + 30_000}
    async with asking(tmp_path, over, minute(61, 61, 120)) as ask:
        assert [(p.first_step, p.last_step) for p in (await ask()).points] == [(1, 60), (61, 120)]


async def test_attempts_are_apart_and_what_was_done_again_is_told(tmp_path):
    steps = [minute(0, 1, 60), minute(1, 61, 120), minute(3, 101, 160, epoch=9), minute(5, 41, 90, epoch=12)]
    async with asking(tmp_path, *steps, attempts=[attempt(1, 7), attempt(2, 9), attempt(3, 12)]) as ask:
        answer = await ask()
    assert [(one.attempt, one.first_step, one.last_step) for one in answer.attempts] == [
        (1, 1, 120),
        (2, 101, 160),
        (3, 41, 90),
    ]
    again = [one.done_again_after_step if one.HasField("done_again_after_step") else None for one in answer.attempts]
    assert again == [40, 100, None]
    assert [point.attempt for point in answer.points] == [1, 1, 2, 3]


async def test_of_a_name_that_was_used_twice_the_last_job_is_shown(tmp_path):
    steps = [minute(0, 1, 60, uid="old"), minute(2, 1, 30, uid="new")]
    attempts = [attempt(1, 7, uid="old"), attempt(1, 7, uid="new")]
    async with asking(tmp_path, *steps, attempts=attempts) as ask:
        assert [one.last_step for one in (await ask()).attempts] == [30]


@settings(max_examples=15, deadline=None)
@given(
    losses=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60),
    points=st.integers(1, 40),
)
async def test_fewer_points_keep_every_peak_and_the_mean(tmp_path_factory, losses, points):
    steps = [minute(n, n + 1, n + 1, loss=loss) for n, loss in enumerate(losses)]
    async with asking(tmp_path_factory.mktemp("ledger"), *steps) as ask:
        found = (await ask(points=points)).points
    assert len(found) <= points + 1
    assert (min(p.loss.min for p in found), max(p.loss.max for p in found)) == (min(losses), max(losses))
    weighed = math.fsum(p.loss.mean * (p.last_step - p.first_step + 1) for p in found)
    assert weighed == pytest.approx(math.fsum(losses), abs=1e-3)
    assert found[-1].last_step == len(losses), "the last point is there"


async def test_a_range_of_steps_is_shown_in_more_detail(tmp_path):
    async with asking(tmp_path, *(minute(n, 10 * n + 1, 10 * n + 10) for n in range(50))) as ask:
        found = (await ask(points=5, first_step=101, last_step=150)).points
    assert [(p.first_step, p.last_step) for p in found] == [(n, n + 9) for n in range(101, 150, 10)]


@pytest.mark.parametrize(
    ("caller", "sees", "reads"),
    [
        (ANN, True, True),
        (MATE, True, True),
        (CARL, True, False),
        (VIEWER, True, False),
        (OPERATOR, True, True),
        (EVE, False, False),
    ],
)
async def test_losses_are_for_who_reads_the_job_and_steps_for_who_sees_it(tmp_path, caller, sees, reads):
    async with asking(tmp_path, minute(0, 1, 60, loss=4.0)) as ask:
        answer, absent = await ask(caller), await ask(caller, job="queues/team/jobs/none")
    assert [len(answer.points), len(answer.attempts)] == [sees, sees]
    assert [point.HasField("loss") for point in answer.points] == [reads] * sees
    assert answer.losses_hidden == (sees and not reads)
    assert sees or answer == absent, "what is hidden looks like what is not there"


async def test_losses_that_are_no_numbers_are_counted(tmp_path):
    nothing = {"loss_count": 0, "loss_sum": 0.0, "loss_min": 0.0, "loss_max": 0.0, "loss_not_finite": 3}
    async with asking(tmp_path, minute(0, 1, 60, loss=4.0), step(0, BEGIN_MS + MINUTE_MS, BEGIN_MS + 2 * MINUTE_MS, 61, 63, attempt=7, **nothing)) as ask:  # fmt: skip
        one, other = (await ask()).points
        whole = (await ask(points=1)).points[0]
    assert (one.loss.not_finite, other.loss.not_finite, other.loss.HasField("mean")) == (0, 3, False)
    assert (whole.loss.min, whole.loss.mean, whole.loss.not_finite) == (4.0, 4.0, 3), "nothing is no loss of 0"


@pytest.mark.parametrize(
    ("field", "asked"),
    [("points", {"points": -1}), ("points", {"points": 2001}), ("first_step", {"first_step": 9, "last_step": 8}), ("first_step", {"first_step": -3}),
     ("job", {"job": "team/j"})],
)  # fmt: skip
async def test_what_cannot_be_asked_is_refused_with_the_field(tmp_path, field, asked):
    async with asking(tmp_path, minute(0, 1, 60)) as ask:
        with pytest.raises(InvalidArgument) as refused:
            await ask(**asked)
    assert refused.value.violations[0].field == field


async def test_before_the_ledger_was_read_nobody_is_told_that_there_is_nothing(tmp_path):
    engine = Engine()
    history = StepHistory(Answers(LocalFolder(tmp_path), MemoryStore(), engine), lambda _: OPEN)
    with contextlib.closing(engine), auth.acting_as(ANN), pytest.raises(Unavailable):
        await history.of_job(pb.GetStepHistoryRequest(job=JOB))


async def test_a_damaged_hour_is_named_and_the_others_are_shown(tmp_path):
    async with asking(tmp_path, minute(0, 1, 60), minute(60, 61, 120)) as ask:
        file = ask.ledger.state.newest(Kind.PROGRESS, BEGIN_MS)
        (tmp_path / file.path).write_bytes(b"not it")
        engine = Engine()
        with contextlib.closing(engine):
            answers = Answers(LocalFolder(tmp_path), ask.store, engine)
            await answers.follow()
            fresh = Asking(StepHistory(answers, lambda queue: QUEUES[queue]), ask.ledger, ask.store)
            assert [point.first_step for point in (await fresh()).points] == [61]
            assert answers.damaged == (file.path,)


class TestOnTheWay:
    """From a rank's report over its agent and the stream into the ledger's columns."""

    def times(self, first, last, *losses, not_finite=0):
        made = StepTimes(first_step=first, last_step=last)
        if losses or not_finite:
            made.loss.CopyFrom(
                StepLosses(
                    count=len(losses),
                    sum=sum(losses),
                    min=min(losses, default=0),
                    max=max(losses, default=0),
                    not_finite=not_finite,
                )
            )
        return made

    def test_reports_of_an_interval_become_one_and_a_step_without_a_loss_is_no_gap(self):
        log, work = StepLog(), Work("t", JOB, 7, ("GPU-0",), job_uid="u")
        for place, times in enumerate(
            [self.times(1, 10, 2.0, 3.0), self.times(11, 20), self.times(21, 30, -1.0, not_finite=4)]
        ):
            request = agent_pb2.ReportStepsRequest(rank=0, times=times)
            request.start_time.FromMilliseconds(BEGIN_MS + place * 1000)
            request.end_time.FromMilliseconds(BEGIN_MS + place * 1000 + 1000)
            log.add(work, request)
        ((record,), _) = log.take()
        assert record.times == self.times(1, 30, 2.0, 3.0, -1.0, not_finite=4)

    def test_the_stream_s_losses_are_columns(self):
        steps = [StepUsage(epoch=7, times=times) for times in (self.times(1, 10, 2.0, 3.0), self.times(11, 20))]
        data = UsageBatch(node="sites/s/nodes/n", steps=steps).SerializeToString()
        table = reports_of([StoredEvent(1, "s", data, "i", {}, datetime(2026, 12, 1, tzinfo=UTC))]).steps.to_pydict()
        found = [table[f"loss_{name}"] for name in ("count", "sum", "min", "max", "not_finite")]
        assert found == [[2, None], [5.0, None], [2.0, None], [3.0, None], [0, None]]

    @pytest.mark.parametrize(
        ("loss", "word"),
        [
            (StepLosses(count=11, min=1, max=1, sum=11), "loss.count"),
            (StepLosses(count=-1), "loss.count"),
            (StepLosses(count=6, not_finite=5, min=1, max=1, sum=6), "loss.count"),
            (StepLosses(count=1, min=math.nan, max=1, sum=1), "loss.min"),
            (StepLosses(count=1, min=1, max=math.inf, sum=1), "loss.max"),
            (StepLosses(count=2, min=1, max=2, sum=7), "loss.sum"),
        ],
    )
    def test_what_cannot_be_true_is_refused(self, loss, word):
        assert word in wrong_steps(StepTimes(first_step=1, last_step=10, loss=loss), 1_000_000)

    def test_what_can_be_true_is_taken(self):
        for loss in (
            StepLosses(count=10, min=-2, max=1, sum=0.5),
            StepLosses(not_finite=10),
            StepLosses(count=3, min=0.1, max=0.1, sum=0.1 + 0.1 + 0.1),
        ):
            assert wrong_steps(StepTimes(first_step=1, last_step=10, loss=loss), 1_000_000) == ""
