"""What a history does to a world: named actions, chosen by weight from one seed, each written into the action log."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.robustness.random_histories.jobs import Submitted, chosen_job, spec_of
from tests.robustness.random_histories.machines import Machine
from tests.robustness.random_histories.world import World
from whaleflux.errors import FailedPrecondition, NotFound, StatusError
from whaleflux.sdk.client import AsyncClient
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Put, Unchanged
from whaleflux.v1 import scheduler_pb2
from whaleflux_scheduler import convert

PAUSE_S = (0.0, 0.6)
UNREADABLE_S = 1.5
UNKNOWN_STATE = 99  # as a record would have that a newer scheduler wrote
KILLED_SERVICES = ("scheduler", "scheduler", "health_monitor", "inventory", "checkpoint", "etcd", "nats")


@dataclass
class History:
    """One seed's story."""

    world: World
    client: AsyncClient
    seed: int
    actions: int = 12
    log: list[str] = field(default_factory=list)
    jobs: dict[str, Submitted] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # what an action itself saw that must not be

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._began_s = time.monotonic()
        self.bytes_were_lost = False  # what is written where the mount was is covered when it is back
        self._backup: Path | None = None
        self._aliases = 0
        self._side: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        names, weights = zip(*WEIGHTS.items(), strict=True)
        await self.submit()
        for _ in range(self.actions):
            action = self.random.choices(names, weights)[0]
            await self._say(action, getattr(self, action)())
            await asyncio.sleep(self.random.uniform(*PAUSE_S))
        await asyncio.gather(*self._side)

    async def _say(self, action: str, work: Awaitable[str]) -> None:
        at_s = time.monotonic() - self._began_s
        try:
            outcome = await work
        except (StatusError, TimeoutError) as error:
            outcome = f"{type(error).__name__}: {error}"[:160]
        self.log.append(f"{at_s:7.2f} s  {action:<16} {outcome}")

    # what users do

    async def submit(self, priority: int = 0) -> str:
        id_ = f"h{self.seed}-{len(self.jobs)}-{self.world.timeline}"
        name = f"queues/default/jobs/{id_}"
        chosen = chosen_job(self.random, name, self.world.timeline, list(self.jobs.values()))
        spec = spec_of(self.random, chosen, self.world.state / "jobs")
        spec.priority = priority
        request = scheduler_pb2.CreateJobRequest(
            parent="queues/default", job_id=id_, request_id=id_, job=scheduler_pb2.Job(spec=spec)
        )
        await self.client.scheduler.CreateJob(request, timeout=4)
        self.jobs[id_] = chosen
        size = f"{spec.gpus} GPUs" if spec.gpus else f"{spec.ranks} ranks"
        return f"{id_}: {size}, priority {priority}, {chosen}{', sets up' if spec.setup else ''}"

    async def preempt(self) -> str:
        return await self.submit(priority=900)

    async def cancel(self) -> str:
        job = self._any_job()
        job.cancelled = True  # before the answer: an unanswered cancel may have been done
        await self.client.scheduler.CancelJob(scheduler_pb2.CancelJobRequest(name=job.name), timeout=4)
        return job.name

    async def hold(self) -> str:
        job = self._any_job()
        await self.client.scheduler.HoldJob(scheduler_pb2.HoldJobRequest(name=job.name), timeout=4)
        return job.name

    async def release(self) -> str:
        job = self._any_job()
        await self.client.scheduler.ReleaseJob(scheduler_pb2.ReleaseJobRequest(name=job.name), timeout=4)
        return job.name

    async def release_all(self) -> None:
        """At the end: what is held does not end."""
        for job in self.jobs.values():
            with contextlib.suppress(FailedPrecondition, NotFound):
                await self.client.scheduler.ReleaseJob(scheduler_pb2.ReleaseJobRequest(name=job.name), timeout=10)

    async def requeue(self) -> str:
        job, hold = self._any_job(), self.random.random() < 0.3
        await self.client.scheduler.RequeueJob(scheduler_pb2.RequeueJobRequest(name=job.name, hold=hold), timeout=4)
        return f"{job.name}{' and held' if hold else ''}"

    async def set_priority(self) -> str:
        job, priority = self._any_job(), self.random.choice((0, 5, 950))
        request = scheduler_pb2.SetJobPriorityRequest(name=job.name, priority=priority)
        await self.client.scheduler.SetJobPriority(request, timeout=4)
        return f"{job.name}: {priority}"

    async def give_up(self, job: Submitted) -> None:
        """Its user reads that no node reaches its checkpoints, knows that the bytes are lost, and does not wait."""
        job.cancelled = True
        self.log.append(f"{job.name} was given up: its checkpoints lie below the mount")
        with contextlib.suppress(StatusError):
            await self.client.scheduler.CancelJob(scheduler_pb2.CancelJobRequest(name=job.name), timeout=4)

    async def explain(self) -> str:
        """Given up at any instant: what was asked for goes on behind it, or does not."""
        job, patience_s = self._any_job(), self.random.choice((0.001, 0.003, 0.01, 4))
        await self.client.scheduler.ExplainJob(scheduler_pb2.ExplainJobRequest(name=job.name), timeout=patience_s)
        return job.name

    async def dry_run(self) -> str:
        job = scheduler_pb2.Job(
            spec=scheduler_pb2.JobSpec(command=["true"], gpus=self.random.randint(1, 8), priority=900)
        )
        request = scheduler_pb2.CreateJobRequest(parent="queues/default", job_id="dry", job=job, validate_only=True)
        await self.client.scheduler.CreateJob(request, timeout=self.random.choice((0.002, 0.01, 4)))
        return f"{job.spec.gpus} GPUs"

    # what happens to machines

    async def stop_agent(self) -> str:
        return self._each(lambda machine: machine.end(signal.SIGTERM))

    async def kill_agent(self) -> str:
        return self._each(lambda machine: machine.end(signal.SIGKILL))

    async def start_agent(self) -> str:
        down = [machine for machine in self.world.machines if machine.agent is None or machine.agent.poll() is not None]
        for machine in down:
            await machine.start(self.client)
        return ", ".join(machine.node for machine in down) or "none was down"

    async def pause_agent(self) -> str:
        machine = self.random.choice(self.world.machines)
        if not machine.pause():
            return f"{machine.node} was down"
        self._later(self.random.uniform(0.5, 7), machine.go_on)
        return machine.node

    async def power_cut(self) -> str:
        machine = self.random.choice(self.world.machines)
        await asyncio.to_thread(machine.power_cut)
        return machine.node

    async def rename(self) -> str:
        """The same machine joins under another name, while its tasks of before run on."""
        machine = self.random.choice(self.world.machines)
        before = machine.node
        await asyncio.to_thread(machine.end, signal.SIGTERM)
        self._aliases += 1
        machine.alias = "" if machine.alias else f"{machine.id}{self.seed}-{self._aliases}"
        await machine.start(self.client)
        return f"{before} -> {machine.node}"

    async def renumber(self) -> str:
        """After a reboot of the driver the GPUs come in another order; the agent starts again and reads them."""
        machine = self.random.choice(self.world.machines)
        await asyncio.to_thread(machine.end, self.random.choice((signal.SIGTERM, signal.SIGKILL)))
        machine.turned = self.random.randrange(4)
        await machine.start(self.client)
        return f"{machine.node}: {[gpu[-1] for gpu in machine.gpus]}"

    async def lose_gpu(self) -> str:
        machine = self.random.choice(self.world.machines)
        machine.lost.add(self.random.choice(machine.gpus))
        machine.write_hardware()
        return f"{machine.node}: {sorted(machine.lost)}"

    async def find_gpus(self) -> str:
        for machine in self.world.machines:
            machine.lost.clear()
            machine.write_hardware()
        return "all are back"

    # what happens to the control plane and to storage

    async def kill_service(self) -> str:
        name = self.random.choice(KILLED_SERVICES)
        try:
            self.world.suite.send(name, signal.SIGKILL)
        except ProcessLookupError:
            return f"{name} was being started again"
        return name

    async def unreadable_record(self) -> str:
        """A job's record as something newer wrote it, for a while; nobody may act as if the job were gone."""
        job = self._any_job()
        store, key = self.world.store(), keys.of_name(keys.JOBS, job.name)
        try:
            async with asyncio.timeout(5):
                entry = await store.get(key)
                if entry is None:
                    return f"{job.name} is not there"
                message = convert.JOBS.read(entry.value)
                message.state = UNKNOWN_STATE  # type: ignore[assignment]
                revision = await store.commit(Put(key, message.SerializeToString()), when=[Unchanged(entry)])
                await asyncio.sleep(UNREADABLE_S)
                now = await store.get(key)
                if now is None or now.revision != revision:
                    self.wrong.append(f"the unreadable record of {job.name} was changed or deleted by somebody")
                else:
                    await store.commit(Put(key, entry.value), when=[Unchanged(now)])
        except ConditionFailed:
            return f"{job.name} changed at that instant"
        finally:
            await store.close()
        return job.name

    async def lose_mount(self) -> str:
        if self.world.mount.there:
            empty = self.random.random() < 0.5
            self.world.mount.vanish(leave_empty=empty)
            self.bytes_were_lost = True
            self._later(self.random.uniform(0.5, 5), self.world.mount.come_back)
            return "an empty mount point is left" if empty else "nothing is left"
        return "it was away"

    async def back_up(self) -> str:
        self._backup = await asyncio.to_thread(self.world.back_up)
        return "etcd's files were copied"

    async def restore_backup(self) -> str:
        if self._backup is None:
            return "there is none"
        await asyncio.to_thread(self.world.restore, self._backup)
        return f"timeline {self.world.timeline}"

    # helpers

    def _any_job(self) -> Submitted:
        if not self.jobs:
            raise NotFound("job", "any", "none was acknowledged yet")
        return self.random.choice(list(self.jobs.values()))

    def _each(self, end: Callable[[Machine], bool]) -> str:
        machine = self.random.choice(self.world.machines)
        return machine.node if end(machine) else f"{machine.node} was down"

    def _later(self, seconds: float, work: Callable[[], object]) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            work()

        self._side.append(asyncio.create_task(wait()))


WEIGHTS = {
    "submit": 30, "preempt": 8, "cancel": 8, "explain": 8, "dry_run": 6,
    "hold": 3, "release": 4, "requeue": 5, "set_priority": 4,
    "stop_agent": 3, "kill_agent": 4, "start_agent": 10, "pause_agent": 2, "power_cut": 3,
    "rename": 2, "renumber": 4, "lose_gpu": 3, "find_gpus": 3,
    "kill_service": 4, "unreadable_record": 3, "lose_mount": 4, "back_up": 1, "restore_backup": 1,
}  # fmt: skip
