"""The life of one task: prepare, start, watch, report, end. What may run at all is decided by `core.reconcile`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import quote

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.telemetry import Attribute, Event
from whaleflux.v1 import agent_pb2, scheduler_pb2
from whaleflux_agent.core.environment import Place, rank_command, rank_environment
from whaleflux_agent.core.work import Have, Stage, Work
from whaleflux_agent.reports import ReportLog
from whaleflux_agent.runtime import logs
from whaleflux_agent.runtime.api import LaunchFailed, LaunchPlan, RankExit, RankPlan, Running, Runtime, end
from whaleflux_agent.state import StateDir, TaskMeta

T = TypeVar("T")
MESSAGE_CHARS = 2000
_PEERS_GRACE_S = 5.0  # for local ranks whose peer has failed: their collectives are lost
_LEFTOVER_GRACE_S = 1.0  # for what ranks leave running behind themselves
_log = telemetry.get_logger("whaleflux.agent")


class Datasets(Protocol):
    """Brings data near the ranks."""

    async def fetch(self, dataset: str) -> str:
        """Local path of a dataset, fetched when it is not there. Raises LaunchFailed."""
        ...


@dataclass(frozen=True, slots=True)
class Host:
    """What all tasks of a node share."""

    node: str  # sites/{site}/nodes/{node}
    host_address: str  # where ranks of other nodes find rendezvous and services of this one
    agent_socket: Path
    checkpoint_root: str
    state: StateDir
    reports: ReportLog
    runtimes: Mapping[str, Runtime]
    datasets: Datasets
    clock: Clock
    simulated: bool
    gpu_uuid: Callable[[int], str]  # "" where the GPU is only played
    observe: Callable[[str, Task | None, int, str], None]  # kind, task, code, detail


@dataclass(slots=True)
class Task:
    """One task that the agent knows."""

    work: Work
    meta: TaskMeta
    folder: Path
    stage: Stage = Stage.ACCEPTED
    running: Running | None = None
    last: agent_pb2.TaskReport | None = None  # newest report
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    restored: str = ""  # checkpoint that its ranks were told to restore
    steps: dict[int, tuple[int, float]] = field(default_factory=dict)  # by rank: step, loss

    @property
    def have(self) -> Have:
        """The task as the core sees it."""
        return Have(self.work.task, self.work.job, self.work.epoch, self.work.gpu_indices, self.stage)

    @property
    def alive(self) -> bool:
        """True while all of its processes live."""
        return self.stage is Stage.RUNNING and self.running is not None and self.running.alive()

    def log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"


class Life:
    """Carries tasks from phase to phase."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def live(self, task: Task) -> None:
        """From the start, or from the adoption by this agent, until nothing of the task is left."""
        if task.running is None and not await self._launch(task):
            return
        assert task.running is not None
        await self._watch(task, task.running)

    async def report(
        self, task: Task, phase: scheduler_pb2.TaskPhase, *, ended: RankExit | None = None, message: str = ""
    ) -> None:
        """Makes a phase known to the scheduler, durably; final ones also to later agents on this node."""
        report = self.snapshot(task, phase, message)
        if ended is not None:
            report.exit_code, report.failed_rank = ended.code, ended.rank
            report.out_of_memory = ended.out_of_memory
        task.last = report
        await self._host.reports.add(report)
        if phase in (
            scheduler_pb2.TASK_PHASE_EXITED,
            scheduler_pb2.TASK_PHASE_KILLED,
            scheduler_pb2.TASK_PHASE_REFUSED,
        ):
            await self._host.state.run(self._host.state.save_result, report)

    def snapshot(self, task: Task, phase: scheduler_pb2.TaskPhase, message: str = "") -> agent_pb2.TaskReport:
        """A report that is not sent yet."""
        report = agent_pb2.TaskReport(
            task=task.work.task,
            job=task.work.job,
            epoch=task.work.epoch,
            phase=phase,
            message=message[:MESSAGE_CHARS],
            rendezvous=task.meta.rendezvous,
            endpoint=task.meta.endpoint,
            traceparent=task.meta.traceparent,
        )
        report.time.FromDatetime(self._host.clock.now())
        return report

    async def remember(self, task: Task, **changes: object) -> None:
        """Changes what is kept about the task, durably."""
        task.meta = replace(task.meta, **changes)  # type: ignore[arg-type]
        await self._host.state.run(self._host.state.save_meta, task.work.task, task.meta)

    async def refuse(self, task: Task, reason: str) -> None:
        task.stage = Stage.REFUSED
        await self.report(task, scheduler_pb2.TASK_PHASE_REFUSED, message=reason)

    # start

    async def _launch(self, task: Task) -> bool:
        work = task.work
        known: dict[Attribute, str | int | bool] = {
            Attribute.JOB: work.job,
            Attribute.TASK: work.task,
            Attribute.EPOCH: work.epoch,
            Attribute.NODE: self._host.node,
            Attribute.GPUS: len(work.gpu_indices),
            Attribute.SIMULATED: self._host.simulated,
        }
        try:
            with telemetry.span_from(work.traceparent, "agent.launch", known):
                await self.remember(task, traceparent=telemetry.current_traceparent())
                task.running = await self._started(task)
        except (LaunchFailed, OSError) as failure:  # no memory, no disk, no processes left: this node cannot
            if task.stop.is_set():
                await self._ended(task, RankExit(work.first_rank, -signal.SIGTERM), "stopped before it ran")
            else:
                await self.refuse(task, str(failure))
            return False
        if not task.stop.is_set():
            task.stage = Stage.RUNNING
            await self.report(task, scheduler_pb2.TASK_PHASE_RUNNING)
            _log.info(Event.TASK_STARTED, task=work.task, job=work.job, epoch=work.epoch, ranks=len(work.gpu_indices))
        return True

    async def _started(self, task: Task) -> Running:
        runtime = self._host.runtimes["docker" if task.work.image else "process"]
        datasets = []
        for dataset in task.work.datasets:
            await self.report(task, scheduler_pb2.TASK_PHASE_FETCHING, message=dataset)
            datasets.append((dataset, await self._unless_stopped(task, self._host.datasets.fetch(dataset))))
        plan = await self._host.state.run(self.plan, task, tuple(datasets))
        if task.work.image:
            await self.report(task, scheduler_pb2.TASK_PHASE_PULLING, message=task.work.image)
        await self._unless_stopped(task, runtime.prepare(plan))
        await self.report(task, scheduler_pb2.TASK_PHASE_STARTING)
        return await runtime.start(plan)

    async def _unless_stopped(self, task: Task, doing: Coroutine[object, object, T]) -> T:
        """The result of `doing`; LaunchFailed as soon as the task is to stop."""
        work, stop = asyncio.ensure_future(doing), asyncio.ensure_future(task.stop.wait())
        try:
            await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise LaunchFailed("no longer desired")
            return work.result()
        finally:
            for waiting in (work, stop):
                waiting.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    def plan(self, task: Task, datasets: tuple[tuple[str, str], ...] = (), *, adopting: bool = False) -> LaunchPlan:
        """What the runtime is told; makes the folders that it needs. Blocks. Raises LaunchFailed unless `adopting`."""
        work, host = task.work, self._host
        if not work.rendezvous:
            work = replace(work, rendezvous=task.meta.rendezvous)
        place = Place(
            node=host.node,
            token=task.meta.token,
            agent_socket=str(host.agent_socket),
            gpu_uuids=tuple(filter(None, map(host.gpu_uuid, work.gpu_indices))),
            traceparent=task.meta.traceparent,
            ports=task.meta.ports,
            datasets=datasets,
        )
        work = replace(work, checkpoint_location=checkpoint_folder(work, host.checkpoint_root))
        ranks = tuple(self._rank(task, work, place, index) for index in range(len(work.ranks)))
        return LaunchPlan(
            task=work.task,
            token=task.meta.token,
            folder=task.folder,
            ranks=ranks,
            working_directory="/" if adopting else self._working_directory(work),
            image=work.image,
            cpu_millicores_per_rank=work.cpu_millicores_per_rank,
            memory_bytes_per_rank=work.memory_bytes_per_rank,
            gpu_uuids=place.gpu_uuids,
        )

    def _rank(self, task: Task, work: Work, place: Place, index: int) -> RankPlan:
        rank = work.first_rank + index
        error_file = str(task.folder / f"error-{rank}.json")
        inherited = {} if work.image else os.environ  # a container brings its own
        environment = rank_environment(work, place, index, inherited=inherited, error_file=error_file)
        return RankPlan(rank, rank_command(work, place, index), tuple(environment.items()), task.log(rank))

    def _working_directory(self, work: Work) -> str:
        if work.working_directory:
            if not work.image and not os.path.isdir(work.working_directory):
                raise LaunchFailed(f"working_directory {work.working_directory!r} is not a folder on this node")
            return work.working_directory
        folder = self._host.state.root / "work" / quote(work.job, safe="")
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    # watch and end

    async def _watch(self, task: Task, running: Running) -> None:
        """Reports the task's end as soon as it is known, then sees to it that nothing is left."""
        first: RankExit | None = None
        failed = asyncio.Event()
        ender = asyncio.create_task(self._end_when_due(task, running, failed))
        reported = task.last is not None and task.last.phase in _FINAL
        try:
            async with contextlib.aclosing(running.exits()) as exits:
                async for ended in exits:
                    first = first or ended
                    if (ended.code != 0 and not task.stop.is_set()) and not reported:
                        task.stage, reported = Stage.STOPPING, True
                        await self._failed(task, ended)
                        failed.set()
        finally:
            ender.cancel()
        assert first is not None  # a task has at least one rank
        task.stage = Stage.STOPPING
        if not reported and not task.stop.is_set():
            await self.report(task, scheduler_pb2.TASK_PHASE_EXITED, ended=RankExit(first.rank, 0))
            _log.info(Event.TASK_EXITED, task=task.work.task, job=task.work.job, epoch=task.work.epoch, code=0)
            reported = True
        await end(running, grace_s=_LEFTOVER_GRACE_S)
        await running.release()
        await self._ended(task, first, task.meta.stopping, reported=reported)

    async def _end_when_due(self, task: Task, running: Running, failed: asyncio.Event) -> None:
        """Ends the processes when the task is to stop, or when one of its ranks has failed."""
        stop, fail = asyncio.ensure_future(task.stop.wait()), asyncio.ensure_future(failed.wait())
        try:
            await asyncio.wait((stop, fail), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            fail.cancel()
        grace_s = task.work.stop_grace_s
        await end(running, grace_s=grace_s if task.stop.is_set() else min(grace_s, _PEERS_GRACE_S))

    async def _failed(self, task: Task, ended: RankExit) -> None:
        message = describe(ended, error_text(task, ended.rank))
        await self.report(task, scheduler_pb2.TASK_PHASE_EXITED, ended=ended, message=message)
        self._host.observe("TASK_EXIT", task, ended.code, message)
        now = self._host.clock.now()
        known: dict[Attribute, str | int] = {
            Attribute.JOB: task.work.job,
            Attribute.TASK: task.work.task,
            Attribute.EPOCH: task.work.epoch,
            Attribute.NODE: self._host.node,
            Attribute.RANK: ended.rank,
        }
        summary = message.partition("\n")[0]
        telemetry.emit_span("agent.exit", now, now, parent=task.meta.traceparent, error=summary, attributes=known)
        _log.warning(Event.TASK_EXITED, task=task.work.task, job=task.work.job, epoch=task.work.epoch, reason=summary)

    async def _ended(self, task: Task, first: RankExit, reason: str, *, reported: bool = False) -> None:
        """Every process is reaped; a task that was stopped says so only now, so that its GPUs are free indeed."""
        if not reported:
            await self.report(task, scheduler_pb2.TASK_PHASE_KILLED, ended=first, message=reason)
            _log.info(Event.TASK_EXITED, task=task.work.task, job=task.work.job, epoch=task.work.epoch, reason=reason)
        await self.remember(task, reaped=True)
        task.stage, task.running = Stage.ENDED, None


_FINAL = (scheduler_pb2.TASK_PHASE_EXITED, scheduler_pb2.TASK_PHASE_KILLED, scheduler_pb2.TASK_PHASE_REFUSED)


def checkpoint_folder(work: Work, root: str) -> str:
    """Where the job's checkpoints go: as the control plane says, else below the node's own root."""
    return work.checkpoint_location or os.path.join(root, quote(work.job, safe=""))


def describe(ended: RankExit, output: str) -> str:
    """How a rank ended, in one line, then its last words."""
    if not ended.known:
        how = "is gone; nobody saw how it ended"
    elif ended.out_of_memory:
        how = "was killed by the kernel: out of memory"
    elif ended.code < 0:
        how = f"was ended by {_signal_name(-ended.code)}"
    else:
        how = f"ended with exit code {ended.code}"
    head = f"rank {ended.rank} {how}"
    room = MESSAGE_CHARS - len(head) - 1
    return f"{head}\n{output[-room:]}" if output else head


def error_text(task: Task, rank: int) -> str:
    """What the program recorded about its failure (TORCHELASTIC_ERROR_FILE), else the end of its output."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        record = json.loads((task.folder / f"error-{rank}.json").read_text())["message"]
        found = record if isinstance(record, str) else record.get("message", "")
        if found:
            return str(found)
    return logs.last_text(task.log(rank), MESSAGE_CHARS)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
