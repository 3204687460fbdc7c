"""Making room while the store is slow and leaders die: who waits for one to eight victims runs in the end, or was cancelled."""

import asyncio
import contextlib
import random

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support import virtual_time
from tests.support.scheduler_world import World, node
from tests.unit.test_scheduler_chaos import History
from whaleflux.errors import StatusError, Unavailable
from whaleflux.store.api import Unknown
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.model import JobState

LONGEST_S = 300.0  # of virtual time: claims last for 150 s at most, and one that has expired is made again
DELAYS_S = (0.0, 0.005, 0.2, 1.0, 4.0)  # of a commit; etcd's client gives up after 5 s
TIMES = st.floats(0.0, 20.0)


class SlowStore:
    """One process's way to the store: commits take long, answers get lost, and what was sent is carried out though the process dies."""

    def __init__(self, store, seed, losing):
        self._store, self._random, self._losing = store, random.Random(seed), losing
        self._dead, self._leases, self._sent = False, [], set()

    def __getattr__(self, name):
        return getattr(self._store, name)

    async def commit(self, *writes, when=()):
        if self._dead:
            raise Unavailable("this process is dead")
        sent = asyncio.ensure_future(self._carry_out(writes, when))
        self._sent.add(sent)
        sent.add_done_callback(self._answered)
        return await asyncio.shield(sent)

    def _answered(self, sent):
        self._sent.discard(sent)
        if not sent.cancelled():
            sent.exception()  # who asked may have died

    async def _carry_out(self, writes, when):
        before_s, lost = self._random.choice(DELAYS_S), self._random.random() < self._losing
        await asyncio.sleep(before_s)
        revision = await self._store.commit(*writes, when=when)
        if lost:
            raise Unknown("its answer was lost")
        return revision

    async def lease(self, ttl_s):
        lease = await self._store.lease(ttl_s)
        self._leases.append(lease)
        return lease

    def die(self):
        """Nothing more is sent, leases are not kept alive, and nobody resigns."""
        self._dead = True
        for lease in self._leases:
            lease.silence()
            lease.revoke = _nothing


async def _nothing():
    pass


class Fleet(World):
    """Its scheduler dies as a killed process does. `seed`: of the delays; `losing`: the share of answers that get lost."""

    def __init__(self, seed, losing):
        super().__init__()
        self.real, self._seed, self._losing = self.store, seed, losing
        self.store = SlowStore(self.real, seed, losing)
        self._dialling = asyncio.Lock()

    async def kill(self):
        async with self._dialling:
            self.store.die()
            self._seed += 1
            self.store = SlowStore(self.real, self._seed, self._losing)
            await self.restart()

    async def keep_connected(self):
        """Agents dial again, also when a leader gave up by itself because the store did not answer it."""
        while True:
            async with self._dialling:
                for agent in self.agents.values():
                    if (
                        agent.running is not None
                        and agent.running.done()
                        and self.service.leader_session.current is not None
                    ):
                        await agent.connect()
            await self.clock.sleep(0.5)


async def make_room(victims, spread, ends_s, kills_s, cancel_s, seed, losing):
    """One life of a fleet that is full of `victims` when somebody comes for whom all of them have to stop."""
    async with Fleet(seed, losing) as world:
        history = History(world.real)
        loops = [asyncio.create_task(history.watch())]
        machines = [node(f"s/n{i}") for i in range(victims)] if spread else [node("s/n", gpus=victims)]
        loops.append(asyncio.create_task(world.keep_connected()))  # a leader may give up while they come
        agents = await world.add(*machines)
        for agent, seconds in zip(agents, ends_s, strict=False):
            agent.ends_after_s = seconds
        each = 4 if spread else 1
        low = [await world.submit(each) for _ in range(victims)]
        await reach(history, low, JobState.RUNNING)
        high = await world.submit(each * victims, priority=9)
        happens = sorted(
            [(at_s, "kill") for at_s in kills_s] + ([(cancel_s, "cancel")] if cancel_s is not None else [])
        )
        began_s = world.clock.monotonic()
        for at_s, what in happens:
            await world.clock.sleep(began_s + at_s - world.clock.monotonic())
            await (world.kill() if what == "kill" else cancel(world, high))
        await reach(history, [high], JobState.CANCELLED if cancel_s is not None else JobState.RUNNING)
        for agent in agents:
            agent.exit(0)  # the preemptor's, or of victims that go on
        await settle(world, history, agents)
        for loop in loops:
            loop.cancel()
        assert history.wrong == []
        assert {history.states[name] for name in low} == {JobState.SUCCEEDED}
        await world.planner.ask(lambda plan: plan.check())
        listed = await world.scheduler.ListJobs(pb.ListJobsRequest(show_ended=True), None)
        assert not [job.name for job in listed.jobs if job.HasField("claim")]
        return history


async def reach(history, names, state):
    """Fails when they are not all in that state in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LONGEST_S):
            while any(history.states.get(name) is not state for name in names):
                await asyncio.sleep(0.1)
    found = {name: history.states.get(name) for name in names}
    assert set(found.values()) == {state}, found


async def cancel(world, name):
    for _ in range(20):  # a new leader, or a slow store: asked again, as the command line does
        with contextlib.suppress(StatusError):
            return await world.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)
        await world.clock.sleep(1.0)
    raise AssertionError("it cannot be cancelled")


async def settle(world, history, agents):
    """Everything that runs ends well, until nothing is left to run."""
    async with asyncio.timeout(4 * LONGEST_S):
        while not all(state >= JobState.SUCCEEDED for state in history.states.values()):
            await asyncio.sleep(0.5)
            for agent in agents:
                for name, task in list(agent.tasks.items()):
                    last = agent.reports.get(name)
                    if task.start and last is not None and last.phase == pb.TASK_PHASE_RUNNING:
                        agent.exit(0, name)


@example(victims=8, spread=True, ends_s=[0.0] * 8, kills_s=[0.5], cancel_s=None, seed=1, losing=0.0)
@example(victims=8, spread=False, ends_s=[15.0] * 8, kills_s=[1.0, 8.0], cancel_s=None, seed=2, losing=0.2)
@example(victims=3, spread=True, ends_s=[0.0, 10.0, 20.0] * 3, kills_s=[5.0], cancel_s=12.0, seed=3, losing=0.2)
@given(
    victims=st.integers(1, 8),
    spread=st.booleans(),
    ends_s=st.lists(st.floats(0.0, 20.0), min_size=8, max_size=8),
    kills_s=st.lists(TIMES, max_size=2),
    cancel_s=st.none() | TIMES,
    seed=st.integers(0, 2**16),
    losing=st.sampled_from([0.0, 0.2]),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_who_waits_for_victims_runs_or_is_cancelled(victims, spread, ends_s, kills_s, cancel_s, seed, losing):
    virtual_time.run(make_room(victims, spread, ends_s, kills_s, cancel_s, seed, losing))
