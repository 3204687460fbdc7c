"""Random lives of a small fleet: whatever happens, no GPU is given twice, and in the end every job has its end."""

import asyncio
import random
from collections import defaultdict
from dataclasses import replace

import pytest

from tests.support.scheduler_world import GB, World, node, until
from whaleflux.errors import StatusError
from whaleflux.store import keys
from whaleflux.v1 import health_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import state_machine
from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.core.observed import Timeouts

NODES = ("s/a", "s/b", "t/c")
GPU_BYTES = 80 * GB


class History:
    """Every stored state of every job, checked as it is written."""

    def __init__(self, store):
        self.states, self.epochs, self.wrong = {}, {}, []
        self._store = store
        self._holders = defaultdict(dict)  # by GPU: jobs with their share of its memory, 0 for all of it

    async def watch(self):
        async for batch in self._store.watch(keys.JOBS, after=1):
            for event in batch.events:
                if event.entry is not None:
                    self.check(convert.JOBS.decode(event.entry).value)

    def check(self, job):
        before = self.states.get(job.name)
        if before is not None and job.state is not before and job.state not in state_machine.NEXT[before]:
            self.wrong.append(f"{job.name}: {before.name} -> {job.state.name}")
        if job.epoch < self.epochs.get(job.name, 0):
            self.wrong.append(f"{job.name}: epoch {self.epochs[job.name]} -> {job.epoch}")
        self.states[job.name], self.epochs[job.name] = job.state, job.epoch
        for holders in self._holders.values():
            holders.pop(job.name, None)
        for _, task in job.holding():
            for gpu in task.gpus:
                shares = self._holders[gpu]
                shares[job.name] = task.share_bytes
                if len(shares) > 1 and not (all(shares.values()) and sum(shares.values()) <= GPU_BYTES):
                    self.wrong.append(f"{gpu} on {task.node} is held by {shares}")


WEIGHTS = {
    "submit": 3, "end a task": 2, "cut an agent off": 1, "connect an agent": 1, "change a node's phase": 1,
    "change a node's intent": 1, "cancel": 1, "restart": 0.3, "explain": 1, "dry run": 1, "renumber gpus": 1, "refuse": 1,
}  # fmt: skip


class Chaos:
    """Things that happen, by name and weight, each said with its time; pytest shows what was said when the test fails."""

    def __init__(self, world, seed):
        self.world, self.random, self.jobs = world, random.Random(seed), []
        print(f"seed {seed}")

    async def step(self):
        name = self.random.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        agent = self.random.choice([*self.world.agents.values()])
        said = await getattr(self, name.replace(" ", "_").replace("'", ""))(agent)
        print(f"{self.world.clock.monotonic() % 1000:8.3f} s  {name}: {said}")

    def connected(self, agent):
        return agent.node in self.world.service.sessions.connected

    async def submit(self, _):
        gpus, priority = self.random.choice([1, 1, 2, 4, 6, 8]), self.random.choice([0, 0, 5])
        kind = pb.JOB_KIND_SERVICE if self.random.random() < 0.1 else pb.JOB_KIND_TRAINING
        retry = {"max_restarts": 100, "backoff": {"nanos": 1}}
        gb = self.random.choice([0, 0, 20, 45]) if gpus < 4 else 0
        gpu = pb.GpuRequirement(share_memory_bytes=gb * GB)
        self.jobs.append(await self.world.submit(gpus, priority=priority, kind=kind, retry=retry, gpu=gpu))
        return f"{self.jobs[-1]}, {gpus} GPUs, {gb} GB of each (0: all), priority {priority}"

    async def end_a_task(self, agent):
        started = [name for name, task in agent.tasks.items() if task.start]
        if not started:
            return "none runs there"
        task, code = self.random.choice(started), self.random.choice([0, 0, 1])
        agent.exit(code, task)
        return f"{task} with {code}"

    async def cut_an_agent_off(self, agent):
        if self.connected(agent):
            await agent.disconnect()
        return agent.node

    async def connect_an_agent(self, agent):
        if not self.connected(agent):
            await agent.connect()
        return agent.node

    async def change_a_nodes_phase(self, agent):
        phase = self.random.choice([2, 3, 4])
        self.world.phase(agent.node, phase, "TEST")
        return f"{agent.node} {health_pb2.NodePhase.Name(phase)}"

    async def change_a_nodes_intent(self, agent):
        intent = self.random.choice([inventory_pb2.NODE_INTENT_ACTIVE, inventory_pb2.NODE_INTENT_DRAINING])
        self.world.intend(agent.node, intent, "test")
        return f"{agent.node} {inventory_pb2.NodeIntent.Name(intent)}"

    async def cancel(self, _):
        if not self.jobs:
            return "no job yet"
        name = self.random.choice(self.jobs)
        try:
            await self.world.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)
        except StatusError as refused:
            return f"{name}: {refused.message}"
        return name

    async def restart(self, _):
        await self.world.restart()
        return "another process leads"

    async def explain(self, _):
        if not self.jobs:
            return "no job yet"
        name = self.random.choice(self.jobs)
        await give_up(self.world.scheduler.ExplainJob(pb.ExplainJobRequest(name=name), None), self.random)
        return name

    async def dry_run(self, _):
        await give_up(self.world.create(8, priority=9, dry=True), self.random)
        return "8 GPUs, priority 9"

    async def renumber_gpus(self, agent):
        machine = rearranged(self.world.machines[agent.node], self.random)
        self.world.reports(machine)
        return f"{agent.node}: {', '.join(gpu.uuid for gpu in machine.gpus)}"

    async def refuse(self, agent):
        if self.connected(agent):
            agent.refuse = "" if agent.refuse else "test"
        return f"{agent.node} {'refuses' if agent.refuse else 'takes'} tasks"


async def give_up(question, random_):
    """Asks, and stops waiting for the answer some time."""
    asking = asyncio.create_task(question)
    for _ in range(random_.randrange(8)):
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


def rearranged(machine, random_):
    """Some of its GPUs, in another order: the driver counts them anew."""
    gpus = random_.sample(machine.gpus, random_.randrange(2, len(machine.gpus) + 1))
    gpus = tuple(replace(gpu, index=index) for index, gpu in enumerate(gpus))
    links = tuple(link for link in machine.links if link.b < len(gpus))
    return replace(machine, gpus=gpus, links=links)


async def heal(world):
    for agent in world.agents.values():
        agent.refuse = ""
        world.phase(agent.node, health_pb2.NODE_PHASE_READY)
        world.intend(agent.node, inventory_pb2.NODE_INTENT_ACTIVE)
        world.reports(world.machines[agent.node])
        if agent.node not in world.service.sessions.connected:
            await agent.connect()


@pytest.mark.parametrize("seed", range(20))
async def test_no_gpu_is_given_twice_and_every_job_ends(seed):
    async with World(timeouts=Timeouts(avoid_s=1.0)) as world:
        history = History(world.store)
        watching = asyncio.create_task(history.watch())
        await world.add(*(node(name) for name in NODES))
        chaos = Chaos(world, seed)
        for _ in range(120):
            await chaos.step()
            await asyncio.sleep(chaos.random.choice([0, 0, 0.003]))
        jobs = chaos.jobs
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
            return not await world.held()

        await until(all_free, "all GPUs are free", 20)
        await world.planner.ask(lambda planner: planner.check())
        watching.cancel()
        assert history.wrong == []
        assert len(jobs) > 10
