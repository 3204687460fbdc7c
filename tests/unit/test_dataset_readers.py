"""Who is given pieces of a dataset that is for some: nodes where a job of somebody who may use it today reads it, and nobody else."""

import contextlib

import pytest

from tests.support.scheduler_world import USER, World, node, until
from whaleflux.clock import VirtualClock
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.rpc import auth
from whaleflux.v1 import agent_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_agent import dataset_readers

A, B = "sites/s/nodes/a", "sites/s/nodes/b"
C4, OTHER = "datasets/c4", "datasets/other"


def known(subject):
    """Records of people: ada is in research, eve is nobody's."""
    role, _, name = subject.partition("/")
    groups = frozenset({"research"} if name == "ada" else ())
    return auth.Principal(auth.Identity(role, name), groups) if name != "gone" else None


@contextlib.asynccontextmanager
async def world_with_data(**how):
    async with World(people=known, **how) as world:
        for name in (C4, OTHER):
            made = inventory_pb2.Dataset(
                name=name, uri="/d", size_bytes=10, owner="user/owner", members=["groups/research"]
            )
            world.inventory.datasets[name] = made
        await world.add(node("s/a"), node("s/b"))
        yield world


async def reads(world, dataset, at, job, asker="s/b"):
    request = agent_pb2.FindDatasetReaderRequest(dataset=dataset, node=at, job=job)
    with auth.acting_as(auth.Identity("agent", asker)):
        return (await world.tasks.FindDatasetReader(request, None)).reads


async def submitted(world, **spec):
    spec = pb.JobSpec(command=["x"], gpus=4, datasets=["c4"], **spec)
    request = pb.CreateJobRequest(parent="queues/default", job=pb.Job(spec=spec))
    principal = auth.Principal(USER, frozenset({"research"}))
    with auth.acting_as(principal):
        made = await world.scheduler.CreateJob(request, None)
    return (await world.reaches(made.name, "RUNNING")).attempt.tasks[0].node, made.name


async def test_where_a_task_of_theirs_reads_it_and_as_long(monkeypatch):
    async with world_with_data() as world:
        at, job = await submitted(world)
        elsewhere = B if at == A else A
        assert await reads(world, C4, at, job)
        assert not await reads(world, C4, elsewhere, job), "no task of it is there"
        assert not await reads(world, OTHER, at, job), "it names another"
        assert not await reads(world, C4, at, "queues/default/jobs/absent")
        assert not await reads(world, C4, at, job, asker="far/n"), "of another site"
        world.inventory.datasets[C4].members[:] = ["groups/clinic"]
        await until(lambda: _no_more(world, at, job), "it is asked again who may use it")
        world.inventory.datasets[C4].members[:] = ["groups/research"]
        await until(lambda: reads(world, C4, at, job))
        for agent in world.agents.values():
            agent.exit(0)
        await world.reaches(job, "SUCCEEDED")
        assert not await reads(world, C4, at, job), "it has ended"


async def _no_more(world, at, job):
    return not await reads(world, C4, at, job)


async def test_where_nobody_keeps_records_of_people_nobody_is_given_it():
    async with world_with_data() as world:
        at, job = await submitted(world)
        world.people = None
        await world.restart()
        assert not await reads(world, C4, at, job)


@pytest.mark.parametrize(
    ("bad", "field"),
    [({"dataset": "c4"}, "dataset"), ({"node": "n"}, "node"), ({"job": "j"}, "job"), ({"job": ""}, "job")],
)
async def test_what_cannot_be_asked_is_refused_by_name(bad, field):
    async with World() as world:
        request = agent_pb2.FindDatasetReaderRequest(**{"dataset": C4, "node": A, "job": "queues/q/jobs/j", **bad})
        with auth.acting_as(auth.Identity("agent", "s/b")), pytest.raises(InvalidArgument) as refused:
            await world.tasks.FindDatasetReader(request, None)
        assert refused.value.violations[0].field == field


class Scheduler:
    """Says what a test says, and counts."""

    def __init__(self):
        self.says, self.asked = True, 0

    async def FindDatasetReader(self, request, timeout):
        self.asked += 1
        if self.says is None:
            raise Unavailable("nobody answers")
        return agent_pb2.FindDatasetReaderResponse(reads=self.says)


async def test_an_agent_remembers_a_yes_for_a_while_and_a_no_for_less():
    scheduler, clock = Scheduler(), VirtualClock()
    readers = dataset_readers.DatasetReaders(scheduler, clock)
    asked = (A, C4, "queues/q/jobs/j")
    assert not await readers.reads(A, C4, ""), "who names no job is not asked about"
    assert await readers.reads(*asked) and await readers.reads(*asked)
    assert scheduler.asked == 1
    scheduler.says = None
    await clock.advance(dataset_readers.YES_S)
    assert not await readers.reads(*asked), "nobody who answers is no yes"
    scheduler.says = False
    assert not await readers.reads(*asked)
    scheduler.says = True
    assert not await readers.reads(*asked), "the no is remembered"
    await clock.advance(dataset_readers.NO_S)
    assert await readers.reads(*asked)
