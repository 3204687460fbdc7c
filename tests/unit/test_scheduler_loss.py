"""A loss may be any number: NaN and infinity are shown, said once, and end the job if it asks for that."""

import asyncio
import math
from datetime import UTC, datetime

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tests.support.scheduler_world import World, node, until
from whaleflux.events.publisher import EntryChange
from whaleflux.store import keys
from whaleflux.store.api import Entry
from whaleflux.v1 import agent_pb2, events_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.convert import JOBS
from whaleflux_scheduler.news import of_change


@pytest.fixture
async def world():
    async with World() as world:
        yield world


async def running(world, **spec):
    name = await world.submit(4, **spec)
    await world.reaches(name, "RUNNING")
    return name


def step(agent, name, step, **loss):
    moved = agent_pb2.TaskProgress(job=name, epoch=1, step=step, **loss)
    agent.say(agent_pb2.SyncRequest(progress=agent_pb2.ProgressReport(tasks=[moved])))


async def shown(world, name, step):
    async def there():
        job = await world.job(name)
        return job if job.step == step else None

    return await until(there, f"step {step} is shown")


async def test_no_loss_is_none(world):
    (a,) = await world.add(node("s/a"))
    name = await running(world)
    step(a, name, 1)
    assert not (await shown(world, name, 1)).HasField("loss")
    step(a, name, 2, loss=0.0)
    assert (await shown(world, name, 2)).HasField("loss"), "0 is a loss"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
async def test_the_last_loss_is_shown_whatever_it_is(world, loss):
    (a,) = await world.add(node("s/a"))
    name = await running(world)
    step(a, name, 9, loss=2.5)
    step(a, name, 10, loss=loss)
    assert repr((await shown(world, name, 10)).loss) == repr(loss)
    a.exit()
    job = await world.reaches(name, "SUCCEEDED")
    assert (job.step, repr(job.loss)) == (10, repr(loss)), "not an older one"


async def test_when_the_last_step_was_completed_is_shown_and_a_step_that_is_told_again_is_no_new_one(world):
    (a,) = await world.add(node("s/a"))
    name = await running(world)
    step(a, name, 9)
    first = (await shown(world, name, 9)).step_time.ToDatetime(UTC)
    await asyncio.sleep(420.0)
    step(a, name, 9, loss=2.5)

    async def has_loss():
        job = await world.job(name)
        return job if job.HasField("loss") else None

    again = await until(has_loss, "the loss is shown")
    assert again.step_time.ToDatetime(UTC) == first
    assert (world.clock.now() - first).total_seconds() >= 420
    step(a, name, 10, time=Timestamp(seconds=2**33))
    assert (await shown(world, name, 10)).step_time.ToDatetime(UTC) <= world.clock.now(), "of a clock that is ahead"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
async def test_a_job_that_asks_for_it_ends_as_failed(world, loss):
    (a,) = await world.add(node("s/a"))
    name = await running(world, stop_on_nan=True)
    step(a, name, 9, loss=2.5)
    step(a, name, 10, loss=loss)
    job = await world.reaches(name, "FAILED")
    assert job.state_message == f"its loss is {loss} at step 10, and its on_nan says stop"
    assert job.attempt.end_reason == f"loss: {job.state_message}"
    assert (job.step, repr(job.loss)) == (10, repr(loss))
    await until(lambda: not a.tasks, "its ranks are stopped")


async def test_a_finite_loss_ends_nothing(world):
    (a,) = await world.add(node("s/a"))
    name = await running(world, stop_on_nan=True)
    step(a, name, 10, loss=1e308)
    await shown(world, name, 10)
    a.exit()
    await world.reaches(name, "SUCCEEDED")


async def test_it_is_stored_at_once_and_only_the_first_time(world):
    """Two tasks of which one alone has NaN must not make the store write at each step."""
    (a,) = await world.add(node("s/a"))
    name = await running(world)
    step(a, name, 1, loss=2.5)
    step(a, name, 2, loss=math.nan)

    async def stored():
        entry = await world.store.get(keys.of_name(keys.JOBS, name))
        return math.isnan(JOBS.decode(entry).value.loss or 0.0) and entry

    first = await until(stored, "it is stored without waiting for more")
    for n in range(3, 40):
        step(a, name, n, loss=2.5)
        step(a, name, n, loss=math.nan)
    await shown(world, name, 39)
    entry = await world.store.get(keys.of_name(keys.JOBS, name))
    assert entry.revision == first.revision


def change_of(old, new):
    def entry(job, revision):
        return Entry("/k", job.SerializeToString(), revision, 1)

    return EntryChange("/k", old and entry(old, 1), entry(new, 2), 2)


def job_with(state, **loss):
    return pb.Job(name="queues/q/jobs/j", state=state, step=10, **loss)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ({"loss": 2.5}, {"loss": math.nan}, "LOSS_NOT_FINITE"),
        ({}, {"loss": math.inf}, "LOSS_NOT_FINITE"),
        ({"loss": math.nan}, {"loss": math.nan}, ""),
        ({"loss": math.nan}, {"loss": 2.5}, ""),
        ({"loss": 2.5}, {"loss": 2.4}, ""),
        ({}, {}, ""),
    ],
)
def test_an_event_says_it_when_it_first_appears(old, new, what):
    running = pb.JOB_STATE_RUNNING
    (event,) = (
        *of_change(change_of(job_with(running, **old), job_with(running, **new)), datetime(2026, 5, 1, tzinfo=UTC)),
        None,
    )[:1]
    if not what:
        assert event is None
        return
    said = events_pb2.Event.FromString(event.data)
    assert (said.what, said.message) == (what, f"the loss is {new['loss']} at step 10")
