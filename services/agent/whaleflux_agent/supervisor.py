"""All tasks of the node: takes in what is desired, makes it so, survives restarts."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from whaleflux import telemetry
from whaleflux.errors import OverLimit, Unavailable
from whaleflux.telemetry import Event, Metric
from whaleflux.v1 import agent_pb2, health_pb2, scheduler_pb2
from whaleflux_agent import ports
from whaleflux_agent.convert import work_from_proto
from whaleflux_agent.core.reconcile import Accept, Action, Forget, Refuse, Start, Stop, defect, reconcile
from whaleflux_agent.core.work import Stage, Work
from whaleflux_agent.runtime import logs, procfs
from whaleflux_agent.runtime.api import Runtime
from whaleflux_agent.state import StateDir, TaskMeta, TaskRecord
from whaleflux_agent.tasks import Host, Life, Task

_BOUND_LOGS_EVERY_S = 5.0
_log = telemetry.get_logger("whaleflux.agent")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one node."""

    first_port: int = 20000
    last_port: int = 29999
    log_bytes_per_rank: int = logs.DEFAULT_LIMIT_BYTES
    kept_tasks: int = 20  # ended ones whose logs are kept


class Supervisor:
    """The one place that knows every task. Lives in one event loop."""

    def __init__(self, host: Host, healthy_gpus: Callable[[], frozenset[int]], limits: Limits | None = None) -> None:
        self._host, self._healthy_gpus, self._limits = host, healthy_gpus, limits or Limits()
        self._life = Life(host)
        self._desired: dict[str, agent_pb2.DesiredTask] = {}
        self._revision = 0
        self._epochs: dict[str, int] = {}
        self._fresh = False
        self._tasks: dict[str, Task] = {}
        self._forgotten: dict[str, Task] = {}  # only their logs are left
        self._wake = asyncio.Event()
        self._progress: dict[str, agent_pb2.TaskProgress] = {}

    @property
    def _state(self) -> StateDir:
        return self._host.state

    # what is asked of it

    async def desire(self, desired: agent_pb2.DesiredTasks) -> None:
        """The whole desired set, durably."""
        self._desired = {task.task.id: task for task in desired.tasks}
        self._revision, self._fresh = desired.revision, True
        await self._desires_changed()

    async def change(self, desired: agent_pb2.DesiredTask) -> None:
        """One task that is new or differs."""
        self._desired[desired.task.id] = desired
        await self._desires_changed()

    async def remove(self, task: str) -> None:
        """A task that must stop and be forgotten."""
        if self._desired.pop(task, None) is not None or task in self._tasks:
            await self._desires_changed()

    async def _desires_changed(self) -> None:
        whole = agent_pb2.DesiredTasks(tasks=self._desired.values(), revision=self._revision)
        await self._state.run(self._state.save_desired, whole)
        self._wake.set()

    # what it tells

    def reports(self) -> list[agent_pb2.TaskReport]:
        """The newest report of every task that runs here or whose result is not forgotten."""
        return [task.last for task in self._tasks.values() if task.last is not None]

    def running(self) -> list[health_pb2.RunningTask]:
        """The tasks with processes, for heartbeats."""
        return [
            health_pb2.RunningTask(
                task=task.work.task,
                job=task.work.job,
                epoch=task.work.epoch,
                step=min(task.steps.items())[1][0] if task.steps else -1,
                traceparent=task.meta.traceparent,
                alive=task.alive,
            )
            for task in self._tasks.values()
            if task.stage.holds
        ]

    def by_token(self, token: str) -> Task | None:
        """The task whose rank shows this token; None for a task that is over."""
        return next(
            (
                task
                for task in self._tasks.values()
                if task.stage.holds and secrets.compare_digest(task.meta.token, token)
            ),
            None,
        )

    def newest_of(self, job: str) -> Task | None:
        """The task of the job's newest epoch that has logs here, also when its result is forgotten."""
        known = (*self._tasks.values(), *self._forgotten.values())
        ran = [task for task in known if task.work.job == job and task.stage is not Stage.REFUSED]
        return max(ran, key=lambda task: task.work.epoch, default=None)

    def datasets_in_use(self) -> frozenset[str]:
        """Names of the datasets that tasks with processes read."""
        return frozenset(name for task in self._tasks.values() if task.stage.holds for name in task.work.datasets)

    def note_progress(self, task: Task, rank: int, step: int, loss: float) -> None:
        """A rank has completed a step; what is sent is the newest of the lowest rank here."""
        if math.isnan(loss) and rank in task.steps:
            loss = task.steps[rank][1]  # not every step has one
        task.steps[rank] = (step, loss)
        if rank != min(task.steps):
            return
        progress = agent_pb2.TaskProgress(job=task.work.job, epoch=task.work.epoch, step=step, loss=loss)
        progress.time.FromDatetime(self._host.clock.now())
        self._progress[task.work.task] = progress

    def take_progress(self) -> list[agent_pb2.TaskProgress]:
        """What moved since the last call."""
        moved, self._progress = list(self._progress.values()), {}
        return moved

    # its own work

    async def restore(self) -> None:
        """Takes over what earlier agents on this node left: desired set, epochs, tasks, living processes."""
        self._epochs = await self._state.run(self._state.load_epochs)
        desired = await self._state.run(self._state.load_desired)
        self._desired, self._revision = {task.task.id: task for task in desired.tasks}, desired.revision
        for record in await self._state.run(self._state.load_tasks):
            await self._restore(record)
        await self._report_strangers()

    async def _restore(self, record: TaskRecord) -> None:
        work = work_from_proto(record.desired)
        task = Task(work, record.meta, self._state.task_folder(work.task), last=record.result)
        if record.meta.reaped or (record.result and record.result.phase == scheduler_pb2.TASK_PHASE_REFUSED):
            refused = record.result is not None and record.result.phase == scheduler_pb2.TASK_PHASE_REFUSED
            task.stage = Stage.REFUSED if refused else Stage.ENDED
            (self._tasks if work.task in self._desired else self._forgotten)[work.task] = task
            return
        if record.meta.stopping:
            task.stop.set()
        plan = await self._state.run(self._life.plan, task, adopting=True)
        task.running = await self._runtime(work).adopt(plan)
        if task.running is not None:
            task.stage = Stage.STOPPING if record.meta.stopping or record.result else Stage.RUNNING
            _log.info(Event.TASK_ADOPTED, task=work.task, job=work.job, epoch=work.epoch)
        elif record.result is not None:
            task.stage = Stage.ENDED
        if task.last is None:
            running = task.running is not None
            phase = scheduler_pb2.TASK_PHASE_RUNNING if running else scheduler_pb2.TASK_PHASE_ACCEPTED
            task.last = self._life.snapshot(task, phase)
        self._tasks[work.task] = task

    def _runtime(self, work: Work) -> Runtime:
        """The runtime that started `work`. Raises Unavailable when it is gone: its tasks may be running all the same."""
        name = "docker" if work.image else "process"
        if name not in self._host.runtimes:
            raise Unavailable(f"task {work.task} runs in {name}, which does not answer", reason="RUNTIME_UNREACHABLE")
        return self._host.runtimes[name]

    async def _report_strangers(self) -> None:
        """Processes that claim to be of this node and are of no task that we know: left alone, and told."""
        known = {task.meta.token for task in self._tasks.values()}
        for process in await asyncio.to_thread(procfs.find, "WHALEFLUX_NODE", self._host.node):
            entries = await asyncio.to_thread(procfs.environment, process.pid)
            tokens = {e.partition(b"=")[2].decode("utf-8", "replace") for e in entries if e.startswith(_TOKEN_ENTRY)}
            if tokens and not tokens & known:
                _log.warning(Event.PROCESS_UNKNOWN, pid=process.pid)
                self._host.observe("UNKNOWN_PROCESS", None, process.pid, "has a token of no task of this agent")

    async def run(self) -> None:
        """Makes reality match, whenever either changes."""
        async with asyncio.TaskGroup() as lives:
            lives.create_task(self._bound_logs())
            for task in self._tasks.values():
                if task.running is not None:
                    lives.create_task(self._live(task))
            while True:
                await self._act(lives)
                await self._wake.wait()
                self._wake.clear()

    async def _act(self, lives: asyncio.TaskGroup) -> None:
        wanted = dict(self._desired)  # as of now: it may change while something is written to disk
        desired = {name: work_from_proto(task) for name, task in wanted.items()}
        for name, work in desired.items():
            if (known := self._tasks.get(name)) is not None and known.stage is Stage.ACCEPTED:
                known.work = work  # the rendezvous has become known, or it may start
        actual = {name: task.have for name, task in self._tasks.items()}
        for action in reconcile(desired, actual, self._epochs, fresh=self._fresh):
            await self._perform(action, wanted, lives)
        _show(self._tasks.values())

    async def _perform(
        self, action: Action, wanted: Mapping[str, agent_pb2.DesiredTask], lives: asyncio.TaskGroup
    ) -> None:
        match action:
            case Accept(name):
                await self._accept(wanted[name])
            case Refuse(name, reason):
                await self._refuse(wanted[name], reason)
            case Start(name):
                task = self._tasks[name]
                await self._state.run(self._state.save_task, wanted[name], task.meta)
                task.stage = Stage.LAUNCHING
                lives.create_task(self._live(task))
            case Stop(name, reason):
                await self._stop(self._tasks[name], reason)
            case Forget(name):
                self._forgotten[name] = self._tasks.pop(name)
                in_use = frozenset(self._tasks)
                for gone in await self._state.run(self._state.collect, self._limits.kept_tasks, in_use):
                    self._forgotten.pop(gone, None)

    async def _accept(self, wanted: agent_pb2.DesiredTask) -> None:
        """Persists the epoch before anything is promised for it."""
        work = work_from_proto(wanted)
        if reason := defect(work, self._healthy_gpus(), self._host.runtimes):
            await self._refuse(wanted, reason)
            return
        self._epochs.pop(work.job, None)
        self._epochs[work.job] = work.epoch
        await self._state.run(self._state.save_epochs, dict(self._epochs))
        try:
            meta = self._chosen(work)
        except OverLimit as full:
            await self._refuse(wanted, str(full))
            return
        await self._life.report(await self._new(wanted, meta), scheduler_pb2.TASK_PHASE_ACCEPTED)
        self._wake.set()  # it may be told to start already

    async def _refuse(self, wanted: agent_pb2.DesiredTask, reason: str) -> None:
        await self._life.refuse(await self._new(wanted, TaskMeta(secrets.token_hex(16))), reason)

    def _chosen(self, work: Work) -> TaskMeta:
        """Token, and ports where it is ours to choose them."""
        address, found = self._host.host_address, list[int]()
        wanted = (len(work.gpu_indices) if work.service else 0) + (work.group_rank == 0 and not work.rendezvous)
        for _ in range(wanted):
            taken = {*self._ports_in_use(), *found}
            found.append(ports.choose(self._limits.first_port, self._limits.last_port, taken, host=address))
        shown = f"[{address}]" if ":" in address else address
        rendezvous = f"{shown}:{found.pop()}" if work.group_rank == 0 and not work.rendezvous else ""
        endpoint = f"{shown}:{found[0]}" if work.service else ""
        return TaskMeta(secrets.token_hex(16), rendezvous, endpoint, tuple(found))

    def _ports_in_use(self) -> Iterator[int]:
        for task in self._tasks.values():
            if task.stage is not Stage.ENDED:
                yield from task.meta.ports
                if task.meta.rendezvous:
                    yield int(task.meta.rendezvous.rpartition(":")[2])

    async def _new(self, wanted: agent_pb2.DesiredTask, meta: TaskMeta) -> Task:
        folder = await self._state.run(self._state.save_task, wanted, meta)
        task = self._tasks[wanted.task.id] = Task(work_from_proto(wanted), meta, folder)
        return task

    async def _stop(self, task: Task, reason: str) -> None:
        await self._life.remember(task, stopping=reason)
        if task.stage is Stage.ACCEPTED:  # nothing of it ever ran
            task.stage = Stage.ENDED
            await self._life.report(task, scheduler_pb2.TASK_PHASE_GONE, message=reason)
            await self._life.remember(task, reaped=True)
            self._wake.set()
        else:
            task.stage = Stage.STOPPING
            task.stop.set()

    async def _live(self, task: Task) -> None:
        await self._life.live(task)
        self._wake.set()  # what waited for its GPUs or its job may go on

    async def _bound_logs(self) -> None:
        """Keeps the logs of living tasks within their bound."""
        while True:
            await self._host.clock.sleep(_BOUND_LOGS_EVERY_S)
            paths = [task.log(rank) for task in self._tasks.values() if task.stage.holds for rank in task.work.ranks]
            for path in paths:
                await asyncio.to_thread(logs.bound, path, self._limits.log_bytes_per_rank)


_TOKEN_ENTRY = f"{procfs.TASK_TOKEN}=".encode()


def _show(tasks: Iterable[Task]) -> None:
    """Counts of tasks by stage, for Prometheus."""
    counts = dict.fromkeys(Stage, 0)
    for task in tasks:
        counts[task.stage] += 1
    for stage, count in counts.items():
        telemetry.gauge(Metric.TASKS).labels(stage.value).set(count)
