"""Jobs that make room or move, through the whole suite on four played machines; and a scheduler or an agent that dies (SIGKILL) in the midst.

Whoever dies: who was to start starts, who was stopped for it goes on from its last checkpoint, no GPU is given twice, no claim is left.
All moments of all of them: WHALEFLUX_TEST_MOVES=1, or `make soak`.
"""

import asyncio
import os
import signal
from contextlib import aclosing

import pytest

from tests.robustness import validate
from tests.robustness.recording import state_of, truth_of
from tests.support.moving_world import FULL, GANG, ROOM, Jobs, moving_suite, nodes, whaleflux
from tests.support.suite import ready_nodes, until
from whaleflux.errors import Aborted
from whaleflux.store import keys
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
ALL = bool(os.environ.get("WHALEFLUX_TEST_MOVES"))
URGENT = GANG + "priority: 50\n"
RUNNING, STARTING, QUEUED = pb.JOB_STATE_RUNNING, pb.JOB_STATE_STARTING, pb.JOB_STATE_QUEUED
MOMENTS = {  # of who leaves and of who waits for it, by their records
    "claimed": lambda leaves, waits: (
        (leaves.state, waits.HasField("claim")) == (RUNNING, True) and asked(leaves, waits)
    ),
    "stops": lambda leaves, _: leaves.state == pb.JOB_STATE_SUSPENDING,
    "stopped": lambda leaves, _: (leaves.state, leaves.attempt.number) == (QUEUED, 1),
    "goes on": lambda leaves, _: (leaves.state, leaves.attempt.number) == (STARTING, 2),
    "room is used": lambda _, waits: waits.state == STARTING,
}


def asked(leaves, waits):
    """Whether it has to leave, by a claim of its own or of the other."""
    return leaves.claim.purpose == pb.CLAIM_PURPOSE_MOVE or leaves.name in waits.claim.victims


@pytest.fixture(scope="module")
def suite():
    with moving_suite() as started:
        yield started


@pytest.fixture
async def jobs(suite, tmp_path):
    async with suite.client() as client:
        yield (jobs := Jobs(client, tmp_path))
        await jobs.cancel_all()


async def test_trainings_move_and_go_on_from_their_checkpoints_so_that_a_gang_starts(suite, jobs):
    await jobs.fragment("one", "two")
    assert {*nodes(await jobs.job("one")), *nodes(await jobs.job("two"))} == {"a", "b"}
    await jobs.submit("gang", GANG, QUEUED)
    etag = (await jobs.plan()).etag
    code, table, _ = await whaleflux(suite, "rebalance", "plan")
    assert code == 0
    for word in ("queues/default/jobs/one", "queues/default/jobs/two", "queues/default/jobs/gang", etag):
        assert word in table
    code, _, error = await whaleflux(suite, "rebalance", "apply", etag, "--yes")
    assert (code, "2 jobs will go on elsewhere" in error) == (0, True), error
    assert nodes(await jobs.reaches("gang", RUNNING)) == {"a", "b"}
    for name in ("one", "two"):
        moved = await jobs.reaches(name, RUNNING, attempt=2)
        assert (nodes(moved) <= {"c", "d"}, moved.restarts) == (True, 0)
        await jobs.went_on(name, moved)
    with pytest.raises(Aborted, match="does not hold any more"):
        await jobs.apply(etag)


@pytest.mark.parametrize("moment", MOMENTS if ALL else ["stopped"])
@pytest.mark.parametrize("dies", ["scheduler", "old agent", "new agent"] if ALL else ["scheduler"])
async def test_a_move_ends_though_one_of_them_dies(suite, jobs, moment, dies):
    name, gang = f"move-{moment}-{dies}".replace(" ", "-"), f"gang-{moment}-{dies}".replace(" ", "-")
    before = await state_of(suite.store())
    await jobs.fragment(name)
    old = nodes(await jobs.job(name))
    await jobs.submit(gang, GANG, QUEUED)
    plan = await jobs.plan()
    (move,) = plan.proposals[0].moves
    dying = {"old agent": old, "new agent": {part.node.rpartition("/")[2] for part in move.to}}.get(dies, set())
    async with killed_at(suite, MOMENTS[moment], (name, gang), dying):
        await jobs.apply(plan.etag)
    assert nodes(await jobs.reaches(gang, RUNNING)) == {"a", "b"}
    moved = await jobs.reaches(name, RUNNING, attempt=2)
    assert (nodes(moved) <= {"c", "d"}, moved.restarts) == (True, 0)
    await jobs.went_on(name, moved)
    await all_is_well(suite, jobs, *before)


@pytest.mark.skipif(not ALL, reason="one kill is enough for now: `make soak` runs them all")
@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if moment != "goes on"])
@pytest.mark.parametrize("dies", ["scheduler", "agent"])
async def test_a_preemption_ends_though_one_of_them_dies(suite, jobs, moment, dies):
    name, urgent = f"low-{moment}-{dies}".replace(" ", "-"), f"high-{moment}-{dies}".replace(" ", "-")
    before = await state_of(suite.store())
    low = await jobs.train(name, gpu="H100-80GB")
    async with killed_at(suite, MOMENTS[moment], (name, urgent), nodes(low) if dies == "agent" else set()):
        await jobs.submit(urgent, URGENT, state=None)
    assert nodes(await jobs.reaches(urgent, RUNNING)) == {"a", "b"}
    assert (await jobs.job(name)).state == QUEUED
    await jobs.cancel(urgent)
    again = await jobs.reaches(name, RUNNING, attempt=2)
    assert again.restarts == 0
    await jobs.went_on(name, again)
    await all_is_well(suite, jobs, *before)


async def all_is_well(suite, jobs, began, held):
    """All nodes are there, nobody claims anything, and nothing was ever given twice."""
    await until(lambda: ready_nodes(jobs.client, {one.name for one in (*FULL, *ROOM)}), "all nodes READY", 60)
    listed = (await jobs.client.scheduler.ListJobs(pb.ListJobsRequest(page_size=100), timeout=10)).jobs
    assert not [job.name for job in listed if job.HasField("claim")]
    assert validate.replay(await truth_of(suite.store(), began), held) == []


class killed_at:  # noqa: N801 - reads as a clause
    """SIGKILL to the agents of these nodes, by default to the scheduler, as soon as the store says that it is the moment; within the block."""

    def __init__(self, suite, moment, ids, agents):
        self._suite, self._moment, self._agents = suite, moment, agents
        self._names = [f"queues/default/jobs/{id_}" for id_ in ids]
        self._watching = asyncio.Event()

    async def __aenter__(self):
        self._killing = asyncio.create_task(self._watch())
        await self._watching.wait()

    async def __aexit__(self, *error):
        async with asyncio.timeout(90):
            await self._killing

    async def _watch(self):
        store = self._suite.store()
        try:
            held = await store.list(keys.JOBS)
            known = dict.fromkeys(self._names, pb.Job())
            known |= {(job := convert.JOBS.read(entry.value)).name: job for entry in held.entries}
            self._watching.set()
            async with aclosing(store.watch(keys.JOBS, after=held.revision)) as batches:
                async for batch in batches:
                    for job in (convert.JOBS.read(event.entry.value) for event in batch.events if event.entry):
                        known[job.name] = job
                        if self._moment(*(known[name] for name in self._names)):
                            return self._kill()
        finally:
            await store.close()

    def _kill(self):
        if not self._agents:
            self._suite.send("scheduler", signal.SIGKILL)  # its supervisor starts another
        for machine in (one for one in (*FULL, *ROOM) if one.node in self._agents):
            agent = self._suite.fleet.agents[machine.name]
            agent.kill()
            agent.wait()
            self._suite.fleet.restart(machine)
