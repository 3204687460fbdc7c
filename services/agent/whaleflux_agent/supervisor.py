"""All tasks of the node: takes in what is desired, makes it so, survives restarts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from whaleflux import hostport, telemetry
from whaleflux.errors import ResourceExhausted, Unavailable
from whaleflux.reasons import ErrorReason, What
from whaleflux.telemetry import Event, Metric
from whaleflux.v1 import agent_pb2, health_pb2, scheduler_pb2
from whaleflux_agent import ports
from whaleflux_agent.convert import work_from_proto
from whaleflux_agent.core.environment import unreachable
from whaleflux_agent.core.reconcile import (
    Accept,
    Action,
    Forget,
    Refuse,
    Start,
    Stop,
    blockers,
    reconcile,
    rejection_reason,
)
from whaleflux_agent.core.work import Stage, Work
from whaleflux_agent.launch_plans import plan_of, setup_plan_of
from whaleflux_agent.runtime import log_times, logs
from whaleflux_agent.runtime.api import Runtime
from whaleflux_agent.state import StateDir, TaskMeta, TaskRecord
from whaleflux_agent.strangers import Stranger, find_strangers
from whaleflux_agent.task_runner import NodeContext, Task, TaskRunner
from whaleflux_agent.termination import STUCK_AFTER_S

_MARK_LOGS_EVERY_S = 0.5
_BOUND_LOGS_EVERY = 10  # marks
_log = telemetry.get_logger("whaleflux.agent")


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """Bounds of one node."""

    first_port: int = 20000
    last_port: int = 29999
    log_bytes_per_rank: int = logs.DEFAULT_LIMIT_BYTES
    kept_tasks: int = 20  # ended ones whose logs are kept
    stuck_after_s: float = STUCK_AFTER_S  # from the first SIGKILL of a task until it is reported as stuck


class Supervisor:
    """The one place that knows every task. Lives in one event loop."""

    def __init__(
        self, context: NodeContext, healthy_gpus: Callable[[], frozenset[str]], limits: NodeLimits | None = None
    ) -> None:
        self._context, self._healthy_gpus, self._limits = context, healthy_gpus, limits or NodeLimits()
        self._wake = asyncio.Event()
        self._heard = asyncio.Event()  # the control plane has spoken to this process
        self._runner = TaskRunner(context, self._wake.set, heard=self._heard, stuck_after_s=self._limits.stuck_after_s)
        self._desired: dict[str, agent_pb2.DesiredTask] = {}
        self._revision = 0
        self._epochs: dict[str, int] = {}
        self._fresh = False
        self._left_alone: frozenset[str] = frozenset()  # jobs of which nobody knows what is wanted
        self._tasks: dict[str, Task] = {}
        self._withdrawn: dict[str, agent_pb2.DesiredTask] = {}  # removed; of some nothing was begun yet
        self._forgotten: dict[str, Task] = {}  # only their logs are left
        self._progress: dict[str, agent_pb2.TaskProgress] = {}
        self._strangers: list[Stranger] = []

    @property
    def _state(self) -> StateDir:
        return self._context.state

    # what is asked of it

    async def desire(self, desired: agent_pb2.DesiredTasks) -> None:
        """The whole desired set, durably."""
        self._desired = {task.task.id: task for task in desired.tasks}
        self._revision, self._fresh = desired.revision, True
        self._heard.set()
        self._left_alone = frozenset(desired.unreadable_jobs)
        await self._desires_changed()

    async def change(self, desired: agent_pb2.DesiredTask) -> None:
        """One task that is new or differs."""
        self._desired[desired.task.id] = desired
        await self._desires_changed()

    async def remove(self, task: str) -> None:
        """A task that must stop and be forgotten."""
        wanted = self._desired.pop(task, None)
        if wanted is not None:
            self._withdrawn[task] = wanted
        if wanted is not None or task in self._tasks:
            await self._desires_changed()

    async def _desires_changed(self) -> None:
        whole = agent_pb2.DesiredTasks(
            tasks=self._desired.values(), revision=self._revision, unreadable_jobs=sorted(self._left_alone)
        )
        await self._state.run(self._state.save_desired, whole)
        self._wake.set()

    # what it reports

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

    def holding(self) -> list[Task]:
        """The tasks that may have processes."""
        return [task for task in self._tasks.values() if task.stage.holds]

    def by_token(self, token: str) -> Task | None:
        """The task whose rank shows this token; None for a task that is over."""
        return next(
            (
                task
                for task in self._tasks.values()
                if task.stage.holds and secrets.compare_digest(task.meta.token.encode(), token.encode())
            ),
            None,
        )

    def by_id(self, task: str) -> Task | None:
        """The task of this id, also when its result is forgotten; None when nothing of it is known here any more."""
        return self._tasks.get(task) or self._forgotten.get(task)

    def with_logs(self, job: str, epoch: int) -> Task | None:
        """The job's task of that epoch, also when its result is forgotten; `epoch` 0: of the newest that ran here."""
        known = (*self._tasks.values(), *self._forgotten.values())
        of_job = [task for task in known if task.work.job == job]
        if epoch:
            return next((task for task in of_job if task.work.epoch == epoch), None)
        ran = [task for task in of_job if task.stage is not Stage.REFUSED]
        return max(ran, key=lambda task: task.work.epoch, default=None)

    def datasets_in_use(self) -> frozenset[str]:
        """Names of the datasets that tasks read here or are about to: those as well that nothing but the order is known of yet."""
        works = [task.work for task in self._tasks.values() if task.stage.holds or task.stage is Stage.ACCEPTED]
        works += [work_from_proto(wanted) for name, wanted in self._desired.items() if name not in self._tasks]
        return frozenset(name for work in works for name in work.spec.datasets)

    def note_progress(self, task: Task, rank: int, step: int, loss: float | None) -> None:
        """A rank has completed a step; what is sent is the newest of the lowest rank here. Any number is a loss."""
        if loss is None and rank in task.steps:
            loss = task.steps[rank][1]  # not every step has one
        task.steps[rank] = (step, loss)
        if rank != min(task.steps):
            return
        progress = agent_pb2.TaskProgress(job=task.work.job, epoch=task.work.epoch, step=step, loss=loss)
        progress.time.FromDatetime(self._context.clock.now())
        self._progress[task.work.task] = progress

    def take_progress(self) -> list[agent_pb2.TaskProgress]:
        """What moved since the last call."""
        moved, self._progress = list(self._progress.values()), {}
        return moved

    # its own work

    async def restore(self) -> None:
        """Takes over what earlier agents on this node left: desired set, epochs, tasks, living processes."""
        records = await self._state.run(self._state.load_tasks)
        desired = await self._state.run(self._state.load_desired)
        if desired is None:  # what was desired of a task is in its own record, too
            desired = agent_pb2.DesiredTasks(tasks=[record.desired for record in records if record.result is None])
        self._desired, self._revision = {task.task.id: task for task in desired.tasks}, desired.revision
        self._left_alone = frozenset(desired.unreadable_jobs)
        self._epochs = await self._state.run(self._state.load_epochs)
        for job, epoch in ((record.desired.job, record.desired.epoch) for record in records):
            self._epochs[job] = max(epoch, self._epochs.get(job, 0))
        for record in records:
            await self._restore(record)
        await self._context.secrets.sweep(frozenset(n for n, task in self._tasks.items() if task.stage.holds))
        await self._find_strangers()

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
        plan = await self._state.run(plan_of, self._context, task, adopting=True)
        task.running = await self._runtime(work).adopt(plan)
        if task.running is not None:
            task.stage = Stage.STOPPING if record.meta.stopping or record.result else Stage.RUNNING
            _log.info(Event.TASK_ADOPTED, task=work.task, job=work.job, epoch=work.epoch)
        elif (setup := await self._state.run(setup_plan_of, self._context, task, adopting=True)) is not None:
            task.setting_up = await self._runtime(work).adopt(setup)
        if task.setting_up is not None:
            task.stage = Stage.STOPPING if record.meta.stopping or record.result else Stage.LAUNCHING
        elif task.running is None and record.result is not None:
            task.stage = Stage.ENDED
        if task.last is None:
            task.last = self._runner.snapshot(task, _phase_of(task))
        self._tasks[work.task] = task

    def _runtime(self, work: Work) -> Runtime:
        """The runtime that started `work`. Raises Unavailable when it is gone: its tasks may be running all the same."""
        name = "docker" if work.spec.image else "process"
        if name not in self._context.runtimes:
            raise Unavailable(
                f"task {work.task} runs in {name}, which does not answer", reason=ErrorReason.RUNTIME_UNREACHABLE
            )
        return self._context.runtimes[name]

    async def _find_strangers(self) -> None:
        tokens = {task.meta.token for task in self._tasks.values()}
        self._strangers = await asyncio.to_thread(find_strangers, self._context.node, tokens)
        for stranger in self._strangers:
            pid = stranger.process.pid
            _log.warning(Event.PROCESS_UNKNOWN, pid=pid, gpus=stranger.gpu_uuids)
            self._context.observe(What.UNKNOWN_PROCESS, None, pid, "has a token of no task of this agent")

    async def run(self) -> None:
        """Makes reality match, whenever either changes."""
        async with asyncio.TaskGroup() as runners:
            runners.create_task(self._keep_logs())
            runners.create_task(asyncio.to_thread(self._state.empty_trash))
            for task in self._tasks.values():
                if task.running is not None or task.setting_up is not None:
                    runners.create_task(self._run_task(task))
            while True:
                await self._act(runners)
                await self._wake.wait()
                self._wake.clear()

    async def _act(self, runners: asyncio.TaskGroup) -> None:
        await self._report_unbegun()
        wanted = dict(self._desired)  # as of now: it may change while something is written to disk
        desired = {name: work_from_proto(task) for name, task in wanted.items()}
        for name, work in desired.items():
            if (known := self._tasks.get(name)) is not None and known.stage is Stage.ACCEPTED:
                known.work = work  # the rendezvous has become known, or it may start
        await self._refuse_hopeless()
        actual = {name: task.actual for name, task in self._tasks.items()}
        for action in reconcile(desired, actual, self._epochs, fresh=self._fresh, left_alone=self._left_alone):
            await self._perform(action, wanted, runners)
        _show(self._tasks.values())

    async def _perform(
        self, action: Action, wanted: Mapping[str, agent_pb2.DesiredTask], runners: asyncio.TaskGroup
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
                runners.create_task(self._run_task(task))
            case Stop(name, reason):
                await self._stop(self._tasks[name], reason)
            case Forget(name):
                self._forgotten[name] = self._tasks.pop(name)
                in_use = frozenset(self._tasks)
                if collected := await self._state.run(self._state.collect, self._limits.kept_tasks, in_use):
                    runners.create_task(asyncio.to_thread(self._state.empty_trash))
                for gone in collected:
                    self._forgotten.pop(gone, None)

    async def _accept(self, wanted: agent_pb2.DesiredTask) -> None:
        """Persists the epoch before anything is promised for it."""
        work = work_from_proto(wanted)
        known = rejection_reason(work, self._healthy_gpus(), self._context.runtimes)
        if reason := known or self._context.isolation.refused:
            await self._refuse(wanted, reason)
            return
        self._epochs.pop(work.job, None)
        self._epochs[work.job] = work.epoch
        await self._state.run(self._state.save_epochs, dict(self._epochs))
        try:
            meta = self._chosen(work)
        except ResourceExhausted as full:
            await self._refuse(wanted, str(full))
            return
        await self._runner.report(await self._new(wanted, meta), scheduler_pb2.TASK_PHASE_ACCEPTED)
        self._wake.set()  # the control plane may have ordered its start already

    async def _refuse(self, wanted: agent_pb2.DesiredTask, reason: str) -> None:
        await self._runner.refuse(await self._new(wanted, TaskMeta(secrets.token_hex(16))), reason)

    async def _report_unbegun(self) -> None:
        """What was withdrawn before it was looked at is told to be gone: the scheduler keeps its GPUs until then."""
        withdrawn, self._withdrawn = self._withdrawn, {}
        for name, wanted in withdrawn.items():
            if name not in self._tasks and name not in self._desired:
                await self._stop(await self._new(wanted, TaskMeta(secrets.token_hex(16))), "withdrawn before it began")

    async def _refuse_hopeless(self) -> None:
        """A task whose turn may never come, or whose ranks could never meet, says so at once: it is tried elsewhere."""
        for task in [task for task in self._tasks.values() if task.stage is Stage.ACCEPTED]:
            if (
                reason := self._behind_stuck(task.work)
                or self._behind_stranger(task.work)
                or unreachable(task.work, self._context.host_address)
            ):
                await self._runner.refuse(task, reason)

    def _behind_stuck(self, work: Work) -> str:
        ahead = blockers(work, [other.actual for other in self._tasks.values()])
        stuck = next((name for name in ahead if self._tasks[name].meta.stuck), "")
        return f"{stuck} cannot be ended here: {self._tasks[stuck].meta.stuck}" if stuck else ""

    def _behind_stranger(self, work: Work) -> str:
        self._strangers = [stranger for stranger in self._strangers if stranger.process.alive()]
        found = blockers(work, [stranger.actual for stranger in self._strangers])
        return f"{found[0]} holds its GPUs, of a task whose record is damaged: end it by hand" if found else ""

    def _chosen(self, work: Work) -> TaskMeta:
        """Token, and ports where it is ours to choose them."""
        address, found = self._context.host_address, list[int]()
        wanted = (len(work.processes) if work.spec.is_service else 0) + (work.group_rank == 0 and not work.rendezvous)
        for _ in range(wanted):
            taken = {*self._ports_in_use(), *found}
            found.append(ports.choose(self._limits.first_port, self._limits.last_port, taken, host=address))
        rendezvous = hostport.join(address, found.pop()) if work.group_rank == 0 and not work.rendezvous else ""
        endpoint = hostport.join(address, found[0]) if work.spec.is_service else ""
        return TaskMeta(secrets.token_hex(16), rendezvous, endpoint, tuple(found))

    def _ports_in_use(self) -> Iterator[int]:
        for task in self._tasks.values():
            if task.stage is not Stage.ENDED:
                yield from task.meta.ports
                if task.meta.rendezvous:
                    yield hostport.parse(task.meta.rendezvous).port

    async def _new(self, wanted: agent_pb2.DesiredTask, meta: TaskMeta) -> Task:
        folder = await self._state.run(self._state.save_task, wanted, meta)
        task = self._tasks[wanted.task.id] = Task(work_from_proto(wanted), meta, folder)
        return task

    async def _stop(self, task: Task, reason: str) -> None:
        await self._runner.remember(task, stopping=reason)
        if task.stage is Stage.ACCEPTED:  # nothing of it ever ran, though an earlier agent may have been about to
            task.stage = Stage.ENDED
            await self._runner.tidy(task)
            await self._runner.report(task, scheduler_pb2.TASK_PHASE_GONE, message=reason)
            await self._runner.remember(task, reaped=True)
            self._wake.set()
        elif task.stage.holds:  # else it has ended meanwhile: taken for stopping, it would be in the way for ever
            task.stage = Stage.STOPPING
            task.stop.set()

    async def _run_task(self, task: Task) -> None:
        await self._runner.run(task)
        self._wake.set()  # what waited for its GPUs or its job may go on

    async def _keep_logs(self) -> None:
        """Notes when the logs of living tasks grow, and keeps them within their bound."""
        for look in itertools.count(1):
            await self._context.clock.sleep(_MARK_LOGS_EVERY_S)
            paths = [
                task.log(rank) for task in self._tasks.values() if task.stage.holds for rank in task.work.processes
            ]
            if paths:
                await asyncio.to_thread(self._look_at, paths, bound=look % _BOUND_LOGS_EVERY == 0)

    def _look_at(self, paths: Iterable[Path], *, bound: bool) -> None:
        for path in paths:
            with contextlib.suppress(OSError):  # a full disk; the next look tries again
                log_times.mark(path)
                if bound:
                    logs.bound(path, self._limits.log_bytes_per_rank)


def _phase_of(task: Task) -> scheduler_pb2.TaskPhase:
    """Where a task stands of which nothing was reported to the end."""
    if task.setting_up is not None:
        return scheduler_pb2.TASK_PHASE_SETTING_UP
    return scheduler_pb2.TASK_PHASE_ACCEPTED if task.running is None else scheduler_pb2.TASK_PHASE_RUNNING


def _show(tasks: Iterable[Task]) -> None:
    """Counts of tasks by stage, for Prometheus."""
    counts = dict.fromkeys(Stage, 0)
    for task in tasks:
        counts[task.stage] += 1
    for stage, count in counts.items():
        telemetry.gauge(Metric.TASKS).labels(stage.value).set(count)
