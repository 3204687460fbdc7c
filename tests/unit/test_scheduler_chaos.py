"""Random lives of a small fleet: whatever happens, no GPU is given twice, and in the end every job has its end."""

import asyncio
import random

import pytest

from tests.support.scheduler_world import World, node, until
from whaleflux.errors import Refusal
from whaleflux.store import keys
from whaleflux.v1 import health_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import machine
from whaleflux_scheduler.core.model import JobState

NODES = ("s/a", "s/b", "t/c")


class History:
    """Every stored state of every job, checked as it is written."""

    def __init__(self, store):
        self.states, self.epochs, self.wrong = {}, {}, []
        self._store = store
        self._holders = {}

    async def watch(self):
        async for batch in self._store.watch(keys.JOBS, after=1):
            for event in batch.events:
                if event.entry is not None:
                    self.check(convert.JOBS.decode(event.entry).value)

    def check(self, job):
        before = self.states.get(job.name)
        if before is not None and job.state is not before and job.state not in machine.NEXT[before]:
            self.wrong.append(f"{job.name}: {before.name} -> {job.state.name}")
        if job.epoch < self.epochs.get(job.name, 0):
            self.wrong.append(f"{job.name}: epoch {self.epochs[job.name]} -> {job.epoch}")
        self.states[job.name], self.epochs[job.name] = job.state, job.epoch
        self._holders = {gpu: holder for gpu, holder in self._holders.items() if holder != job.name}
        for _, task in job.holding():
            for gpu in task.gpus:
                other = self._holders.setdefault((task.node, gpu), job.name)
                if other != job.name:
                    self.wrong.append(f"{task.node} GPU {gpu} is held by {other} and {job.name}")


async def shake(world, random_, jobs):
    """One random thing happens."""
    agents = list(world.agents.values())
    agent = random_.choice(agents)
    connected = agent.node in world.service.hub.connected
    match random_.randrange(12):
        case 0 | 1 | 2:
            gpus = random_.choice([1, 1, 2, 4, 6, 8])
            kind = pb.JOB_KIND_SERVICE if random_.random() < 0.1 else pb.JOB_KIND_TRAINING
            retry = {"max_restarts": 100, "backoff": {"nanos": 1}}
            jobs.append(await world.submit(gpus, priority=random_.choice([0, 0, 5]), kind=kind, retry=retry))
        case 3 | 4 if agent.tasks:
            task = random_.choice(list(agent.tasks))
            if agent.tasks[task].start:
                agent.exit(random_.choice([0, 0, 1]), task)
        case 5 if connected:
            await agent.disconnect()
        case 6 if not connected:
            await agent.connect()
        case 7:
            world.phase(agent.node, random_.choice([2, 3, 4]), "TEST")
        case 8:
            intents = [inventory_pb2.NODE_INTENT_ACTIVE, inventory_pb2.NODE_INTENT_DRAINING]
            world.intend(agent.node, random_.choice(intents), "test")
        case 9 if jobs:
            try:
                await world.scheduler.CancelJob(pb.CancelJobRequest(name=random_.choice(jobs)), None)
            except Refusal:
                pass
        case 10 if random_.random() < 0.3:
            await world.restart()
        case 11 if connected:
            agent.refuse = "" if agent.refuse else "test"


async def heal(world):
    for agent in world.agents.values():
        agent.refuse = ""
        world.phase(agent.node, health_pb2.NODE_PHASE_READY)
        world.intend(agent.node, inventory_pb2.NODE_INTENT_ACTIVE)
        if agent.node not in world.service.hub.connected:
            await agent.connect()


@pytest.mark.parametrize("seed", range(6))
async def test_no_gpu_is_given_twice_and_every_job_ends(seed):
    random_ = random.Random(seed)
    async with World() as world:
        history = History(world.store)
        watching = asyncio.create_task(history.watch())
        await world.add(*(node(name) for name in NODES))
        jobs = []
        for _ in range(120):
            await shake(world, random_, jobs)
            await asyncio.sleep(random_.choice([0, 0, 0.003]))
        await heal(world)

        async def all_ended():
            for agent in world.agents.values():
                for name, task in list(agent.tasks.items()):
                    last = agent.reports.get(name)
                    if task.start and (last is None or last.phase == pb.TASK_PHASE_RUNNING):
                        if task.spec.kind == pb.JOB_KIND_SERVICE:
                            await world.scheduler.CancelJob(pb.CancelJobRequest(name=task.job), None)
                        else:
                            agent.exit(0, name)
            return all(history.states.get(name, JobState.QUEUED) >= JobState.SUCCEEDED for name in jobs)

        async with asyncio.timeout(60):
            while not await all_ended():
                await asyncio.sleep(0.005)

        async def all_free():
            await all_ended()  # agents go on: a task that came late has to end too
            return not world.brain._planner.held()

        await until(all_free, "all GPUs are free", 20)
        world.brain._planner.check()
        watching.cancel()
        assert history.wrong == []
        assert len(jobs) > 10
