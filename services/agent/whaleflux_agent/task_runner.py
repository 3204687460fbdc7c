"""The life of one task: prepare, start, watch, report, end. What may run at all is decided by `core.reconcile`."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import InvalidArgument
from whaleflux.reasons import What
from whaleflux.telemetry import Attribute, Event
from whaleflux.v1 import agent_pb2, scheduler_pb2
from whaleflux_agent import node_setup
from whaleflux_agent.core.work import ActualTask, Stage, Work
from whaleflux_agent.devices.source import DevicesUnreadable
from whaleflux_agent.exit_text import MESSAGE_CHARS, describe, error_text
from whaleflux_agent.isolation import Isolation, with_user
from whaleflux_agent.launch_plans import plan_of, setup_plan_of
from whaleflux_agent.node_setup import SetupFailed
from whaleflux_agent.reports import ReportLog
from whaleflux_agent.runtime.acting import as_user
from whaleflux_agent.runtime.api import LaunchFailed, RankExit, Running, Runtime
from whaleflux_agent.share_watch import LOOK_EVERY_S, MemoryUsed, ShareWatch
from whaleflux_agent.state import StateDir, TaskMeta
from whaleflux_agent.termination import STUCK_AFTER_S, Computing, GpuCheck, terminate

T = TypeVar("T")
_PEERS_GRACE_S = 5.0  # for local ranks whose peer has failed: their collectives are lost
_LEFTOVER_GRACE_S = 1.0  # for what ranks leave running behind themselves
_LOOKS, _LOOK_AGAIN_S = 5, 0.01  # the parent of the ranks ends by itself behind them
_log = telemetry.get_logger("whaleflux.agent")


class RestoreAccess(Protocol):
    """Knows whether this node reaches what an attempt has to restore."""

    async def check(self, work: Work) -> None:
        """Raises LaunchFailed when there is something to restore and this node does not reach it."""
        ...


class Datasets(Protocol):
    """Brings data near the ranks."""

    async def fetch(self, dataset: str, work: Work, tell: Callable[[str], Awaitable[None]]) -> str:
        """Local path of a dataset, fetched for a task when it is not there; says by `tell` what it waits for. Raises LaunchFailed."""
        ...

    async def home_of(self, dataset: str, path: str, work: Work) -> str:
        """Where the rest is of a dataset of which a part is at that path, or its one file where others are beside it; "" where just it is.

        Of one that the ranks of `work` share: the folder with the list of all of its files. Raises LaunchFailed.
        """
        ...


class Secrets(Protocol):
    """Brings what jobs may know."""

    async def bring(self, work: Work, tell: Callable[[str], Awaitable[None]]) -> None:
        """Puts the values that a task was given where its ranks find them, in memory. Raises LaunchFailed."""
        ...

    async def forget(self, work: Work) -> None:
        """Removes them: nothing of the task is left."""
        ...

    async def sweep(self, needed: frozenset[str]) -> None:
        """Removes those of all tasks but these."""
        ...

    def folder(self, task: str) -> Path:
        """Where they are."""
        ...

    def masked(self, task: str, text: str) -> str:
        """A text about a task without any of them."""
        ...


class Code(Protocol):
    """Brings the code of jobs."""

    async def unpack(self, work: Work, folder: Path, tell: Callable[[str], Awaitable[None]]) -> None:
        """Makes `folder` hold the code of a task, and nothing else; says by `tell` what it waits for. Raises LaunchFailed."""
        ...


class Sockets(Protocol):
    """Where ranks reach the agent."""

    async def open(self, task: Task) -> None:
        """Makes the socket of a task that runs as a user of its own."""
        ...

    async def close(self, task: Task) -> None:
        """Removes it."""
        ...


def own_socket(shared: Path, task: str) -> Path:
    """The path of a task's socket, beside the shared one; a socket's path is short, a task's id need not be."""
    return shared.parent / hashlib.sha256(task.encode()).hexdigest()[:8] / shared.name


@dataclass(frozen=True, slots=True)
class NodeContext:
    """What all tasks of a node share."""

    node: str  # sites/{site}/nodes/{node}
    host_address: str  # where ranks of other nodes find rendezvous and services of this one
    agent_socket: Path  # of tasks that run as the agent
    checkpoint_root: str
    pass_environment: Sequence[str]  # more names of the agent's variables that ranks find
    state: StateDir
    reports: ReportLog
    runtimes: Mapping[str, Runtime]
    datasets: Datasets
    code: Code
    secrets: Secrets
    restore_access: RestoreAccess
    clock: Clock
    simulated: bool
    computing: Computing  # pids with work on GPUs
    memory_used: MemoryUsed  # of GPUs, by process
    observe: Callable[[str, Task | None, int, str], None]  # kind, task, code, detail
    isolation: Isolation
    sockets: Sockets

    def socket_of(self, task: Task) -> Path:
        """Where its ranks find the agent: a socket of their own where they are a user of their own."""
        return own_socket(self.agent_socket, task.work.task) if task.meta.uid else self.agent_socket


@dataclass(slots=True)
class Task:
    """One task that the agent knows."""

    work: Work
    meta: TaskMeta
    folder: Path
    stage: Stage = Stage.ACCEPTED
    running: Running | None = None
    setting_up: Running | None = None  # what it does before its ranks, begun by an earlier agent
    last: agent_pb2.TaskReport | None = None  # newest report
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    restored: str = ""  # checkpoint that its ranks restore
    steps: dict[int, tuple[int, float | None]] = field(default_factory=dict)  # by rank: step, loss

    @property
    def actual(self) -> ActualTask:
        """The task as the core sees it."""
        work = self.work
        return ActualTask(work.task, work.job, work.epoch, work.gpu_uuids, self.stage, work.share_bytes)

    @property
    def alive(self) -> bool:
        """True while all of its processes live."""
        return self.stage is Stage.RUNNING and self.running is not None and self.running.alive()

    @property
    def code_folder(self) -> Path:
        """Where its code is unpacked and its ranks start; what they write there stays as long as the task's logs."""
        return self.folder / "code"

    def acting(self) -> contextlib.AbstractContextManager[None]:
        """For whoever touches what the job has made: as its user."""
        return as_user(self.meta.uid, self.meta.gid, self.meta.groups)

    def log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"


class TaskRunner:
    """Carries tasks from phase to phase."""

    def __init__(
        self,
        context: NodeContext,
        on_stuck: Callable[[], None] = lambda: None,
        *,
        heard: asyncio.Event | None = None,
        stuck_after_s: float = STUCK_AFTER_S,
    ) -> None:
        """`heard`: set once the control plane has spoken to this agent, before which no ranks are begun; None: it has."""
        self._context, self._on_stuck, self._stuck_after_s = context, on_stuck, stuck_after_s
        self._heard = heard or asyncio.Event()
        if heard is None:
            self._heard.set()

    async def run(self, task: Task) -> None:
        """From the start, or from the adoption by this agent, until nothing of the task is left."""
        if task.running is not None or await self._launch(task):
            assert task.running is not None
            await self._watch(task, task.running)
        await self._context.secrets.forget(task.work)

    async def report(
        self,
        task: Task,
        phase: scheduler_pb2.TaskPhase,
        *,
        ended: RankExit | None = None,
        message: str = "",
        ending: bool = False,
    ) -> None:
        """Makes a phase known to the scheduler, durably; final ones also to later agents on this node."""
        report = self.snapshot(task, phase, message)
        report.ending = ending
        if ended is not None:
            report.exit_code, report.failed_rank = ended.code, ended.rank
            report.out_of_memory = ended.out_of_memory
        await self._say(task, report)

    async def _say(self, task: Task, report: agent_pb2.TaskReport) -> None:
        task.last = report
        await self._context.reports.add(report)
        if report.phase in _FINAL:
            await self._context.state.run(self._context.state.save_result, report)

    async def _say_again(self, task: Task, known: agent_pb2.TaskReport, *, ending: bool) -> None:
        """The newest report as of now: what of the task is stuck or left may have changed since."""
        report = agent_pb2.TaskReport()
        report.CopyFrom(known)
        report.stuck, report.ending = task.meta.stuck, ending
        report.time.FromDatetime(self._context.clock.now())
        await self._say(task, report)

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
            stuck=task.meta.stuck[:MESSAGE_CHARS],
            isolation=task.meta.isolation,
        )
        report.time.FromDatetime(self._context.clock.now())
        return report

    async def remember(self, task: Task, **changes: object) -> None:
        """Changes what is kept about the task, durably."""
        task.meta = replace(task.meta, **changes)  # type: ignore[arg-type]
        await self._context.state.run(self._context.state.save_meta, task.work.task, task.meta)

    async def refuse(self, task: Task, reason: str, *, unfit: bool = False) -> None:
        """`unfit`: no later try on this node can go better."""
        task.stage = Stage.REFUSED
        report = self.snapshot(task, scheduler_pb2.TASK_PHASE_REFUSED, reason)
        report.unfit = unfit
        await self._say(task, report)

    # start

    async def _launch(self, task: Task) -> bool:
        work = task.work
        known: dict[Attribute, str | int | bool] = {
            Attribute.JOB: work.job,
            Attribute.TASK: work.task,
            Attribute.EPOCH: work.epoch,
            Attribute.NODE: self._context.node,
            Attribute.GPUS: len(work.gpu_uuids),
            Attribute.SIMULATED: self._context.simulated,
        }
        try:
            with telemetry.span_from(work.traceparent, "agent.launch", known):
                await self.remember(task, traceparent=telemetry.current_traceparent())
                task.running = await self._started(task)
        except SetupFailed as failure:
            await self._setup_failed(task, failure)
            return False
        except (
            LaunchFailed,
            InvalidArgument,
            OSError,
        ) as failure:  # no memory, no disk, no processes: this node cannot
            await self._clear(task, failure)
            await self.tidy(task)
            if task.stop.is_set():
                await self._ended(task, RankExit(work.ranks[0], -signal.SIGTERM), "stopped before it ran")
            else:
                await self.refuse(task, str(failure), unfit=isinstance(failure, LaunchFailed) and failure.unfit)
            return False
        if not task.stop.is_set():
            task.stage = Stage.RUNNING
            await self.report(task, scheduler_pb2.TASK_PHASE_RUNNING)
            _log.info(Event.TASK_STARTED, task=work.task, job=work.job, epoch=work.epoch, ranks=len(work.ranks))
        return True

    async def _started(self, task: Task) -> Running:
        runtime = self._context.runtimes["docker" if task.work.spec.image else "process"]
        if adopted := task.setting_up:
            await self._finish_setup(task, adopted)
            await self._unless_stopped(task, self._heard.wait())
        else:
            await self._choose_user(task)
        await self._unless_stopped(task, self._context.restore_access.check(task.work))
        preparing = asyncio.create_task(runtime.prepare(task.work.spec.image))  # comes while the data does
        try:
            return await self._begun(task, runtime, preparing, adopted=adopted is not None)
        finally:
            preparing.cancel()
            await asyncio.gather(preparing, return_exceptions=True)

    async def _begun(self, task: Task, runtime: Runtime, preparing: asyncio.Task[None], *, adopted: bool) -> Running:
        """`adopted`: its setup has ended under this agent, or under one before."""
        datasets = await self._unless_stopped(task, self._fetch_data(task))
        if task.work.spec.code and not adopted:  # else setup has worked in it already
            await self._fetch_code(task)
        bringing = self._context.secrets.bring(task.work, lambda text: self._tell(task, text))
        await self._unless_stopped(task, bringing)
        if task.work.spec.secrets:
            folder = self._context.secrets.folder(task.work.task)
            await asyncio.to_thread(self._context.isolation.folders.give_secrets, folder, task.meta)
        plan = await self._context.state.run(plan_of, self._context, task, datasets)
        if task.work.spec.image:
            await self.report(task, scheduler_pb2.TASK_PHASE_PULLING, message=task.work.spec.image)
        await self._unless_stopped(task, preparing)
        if not adopted:
            computing = await self._computing(plan.gpu_uuids)
            await self.remember(task, computing_before=computing, working_directory=plan.working_directory)
        if (
            not adopted
            and (setup := await self._context.state.run(setup_plan_of, self._context, task, datasets)) is not None
        ):
            await self.report(task, scheduler_pb2.TASK_PHASE_SETTING_UP)
            await self._context.state.run(node_setup.announce, setup, self._context.node)
            await self._finish_setup(task, await runtime.start(setup))
        await self.report(task, scheduler_pb2.TASK_PHASE_STARTING)
        return await runtime.start(plan)

    async def _fetch_data(self, task: Task) -> tuple[tuple[str, str, str], ...]:
        """Each of its datasets, where it lies, and of a part where the rest does; all of them at once."""

        async def one(dataset: str) -> tuple[str, str, str]:
            await self._tell(task, dataset)
            path = await self._context.datasets.fetch(dataset, task.work, lambda text: self._tell(task, text))
            return dataset, path, await self._context.datasets.home_of(dataset, path, task.work)

        fetches = [asyncio.create_task(one(dataset)) for dataset in task.work.spec.datasets]
        try:
            return tuple(await asyncio.gather(*fetches))
        finally:  # one has failed, or the task is to stop: the others would go on to say what it waits for
            for fetch in fetches:
                fetch.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)

    async def _finish_setup(self, task: Task, running: Running) -> None:
        """Returns when it has ended well and nothing of it is left. Raises SetupFailed, or LaunchFailed when the task was to stop."""
        ender = asyncio.create_task(self._end_when_due(task, running, asyncio.Event()))
        try:
            async with contextlib.aclosing(running.exits()) as exits:
                ended = await anext(exits)
        finally:
            ender.cancel()
        await self._terminate(task, running, grace_s=_LEFTOVER_GRACE_S)
        await running.release()
        task.setting_up = None
        if task.stop.is_set():
            raise LaunchFailed("no longer desired")
        plan = await self._context.state.run(setup_plan_of, self._context, task, adopting=True)
        assert plan is not None
        await self._context.state.run(node_setup.conclude, plan, self._context.node, ended)

    async def _setup_failed(self, task: Task, failure: SetupFailed) -> None:
        """A failure of the work, like that of a rank."""
        if task.last is None or task.last.phase not in _FINAL:
            await self._say_failed(task, failure.ended, await self._masked(task, str(failure)), ending=False)
        await self._ended(task, failure.ended, "", reported=True)

    async def _choose_user(self, task: Task) -> None:
        """As whom the attempt runs, and its folder for temporary files; known to later agents before anything is theirs."""
        context = self._context
        user = await context.state.run(context.isolation.user_for, task.work.task, task.work.job)
        folders, image = context.isolation.folders, bool(task.work.spec.image)
        tmp = folders.shm_for(task.meta.token) if image else folders.tmp_for(task.folder, task.meta.token)
        meta = with_user(task.meta, user, tmp)
        limited_by = context.runtimes["docker" if image else "process"].limited_by
        task.meta = replace(meta, isolation=context.isolation.words(meta, limited_by, image=image))
        await self.remember(task)
        await context.sockets.open(task)

    async def tidy(self, task: Task) -> None:
        """Removes what an attempt that is gone has left where others would feel it."""
        await self._context.sockets.close(task)
        await asyncio.to_thread(self._context.isolation.folders.clean, task.meta, task.folder)
        await self._context.state.run(self._context.isolation.forget, task.work.task)

    async def _fetch_code(self, task: Task) -> None:
        await self._tell(task, "code")
        unpacking = self._context.code.unpack(task.work, task.code_folder, lambda text: self._tell(task, text))
        await self._unless_stopped(task, unpacking)

        await asyncio.to_thread(self._context.isolation.folders.give_all, task.code_folder, task.meta)

    async def _tell(self, task: Task, waits_for: str) -> None:
        await self.report(task, scheduler_pb2.TASK_PHASE_FETCHING, message=waits_for)

    async def _masked(self, task: Task, text: str) -> str:
        """What is about to be told of a task, without its secrets: reports, events and spans are kept and read by others."""
        if not task.work.spec.secrets:
            return text
        return await asyncio.to_thread(self._context.secrets.masked, task.work.task, text)

    async def _clear(self, task: Task, failure: Exception) -> None:
        """Ends what a failed start has left: the refusal frees the GPUs, so nothing may be on them any more."""
        if isinstance(failure, LaunchFailed) and failure.left is not None:
            await self._terminate(task, failure.left, grace_s=0.0)
            await failure.left.release()
            await self.remember(task, stuck="")

    async def _computing(self, gpu_uuids: tuple[str, ...]) -> tuple[int, ...]:
        """Who works on the task's GPUs now; none where the driver does not say: then whoever is there later counts."""
        with contextlib.suppress(DevicesUnreadable):
            return tuple(sorted(await self._context.computing(gpu_uuids))) if gpu_uuids else ()
        return ()

    async def _unless_stopped(self, task: Task, doing: Awaitable[T]) -> T:
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

    # watch and end

    async def _watch(self, task: Task, running: Running) -> None:
        """Reports the task's end as soon as it is known, then sees to it that nothing is left."""
        first: RankExit | None = None
        living = len(task.work.processes)
        failed = asyncio.Event()
        ender = asyncio.create_task(self._end_when_due(task, running, failed))
        watch = asyncio.create_task(self._watch_share(task, running))
        reported = task.last is not None and task.last.phase in _FINAL
        if reported:  # by an agent that went before it had ended the others
            failed.set()
        try:
            async with contextlib.aclosing(running.exits()) as exits:
                async for ended in exits:
                    first, living = first or ended, living - 1
                    if (ended.code != 0 and not task.stop.is_set()) and not reported:
                        task.stage, reported = Stage.STOPPING, True
                        await self._failed(task, ended, ending=living > 0 or await self._lingers(task, running))
                        failed.set()
        finally:
            ender.cancel()
            watch.cancel()
        assert first is not None  # a task has at least one rank
        task.stage = Stage.STOPPING
        if not reported and not task.stop.is_set():
            ending = await self._lingers(task, running)
            await self.report(task, scheduler_pb2.TASK_PHASE_EXITED, ended=RankExit(first.rank, 0), ending=ending)
            _log.info(Event.TASK_EXITED, task=task.work.task, job=task.work.job, epoch=task.work.epoch, code=0)
            reported = True
        await self._terminate(task, running, grace_s=_LEFTOVER_GRACE_S)
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
        grace_s = task.work.spec.grace_s
        await self._terminate(task, running, grace_s=grace_s if task.stop.is_set() else min(grace_s, _PEERS_GRACE_S))

    async def _watch_share(self, task: Task, running: Running) -> None:
        """Ends ranks that stay above their share of a GPU's memory: they take what their neighbours were given."""
        if not task.work.share_bytes or self._context.simulated:
            return
        share = ShareWatch(task.work, task.meta.token, self._context.memory_used)
        while True:
            await self._context.clock.sleep(LOOK_EVERY_S)
            for rank, why in await share.look(self._context.clock.monotonic()):
                await running.end(rank, why)

    async def _lingers(self, task: Task, running: Running) -> bool:
        """Whether something of the task is left a moment after its last rank."""
        for _ in range(_LOOKS):
            if await running.gone() and not await self._gpus(task).remains():
                return False
            await asyncio.sleep(_LOOK_AGAIN_S)
        return True

    def _gpus(self, task: Task) -> GpuCheck:
        uuids = () if self._context.simulated else task.work.gpu_uuids
        token = task.meta.token if task.work.share_bytes else ""
        return GpuCheck(self._context.computing, uuids, frozenset(task.meta.computing_before), token)

    async def _terminate(self, task: Task, running: Running, *, grace_s: float) -> None:
        await terminate(
            running,
            self._gpus(task),
            grace_s=grace_s,
            on_stuck=lambda evidence: self._stuck(task, evidence),
            stuck_after_s=self._stuck_after_s,
        )

    async def _stuck(self, task: Task, evidence: str) -> None:
        """Its GPUs stay taken until the proof that nothing is left; meanwhile everybody can see why."""
        evidence = await self._masked(task, evidence)
        await self.remember(task, stuck=evidence[:MESSAGE_CHARS])
        known = task.last or self.snapshot(task, scheduler_pb2.TASK_PHASE_STARTING)
        await self._say_again(task, known, ending=known.ending)
        self._context.observe(What.TASK_STUCK, task, 0, evidence)
        _log.error(Event.TASK_STUCK, task=task.work.task, job=task.work.job, epoch=task.work.epoch, reason=evidence)
        self._on_stuck()

    async def _failed(self, task: Task, ended: RankExit, *, ending: bool) -> None:
        text = error_text(task.folder, task.log(ended.rank), ended.rank, task.acting())
        await self._say_failed(task, ended, describe(ended, await self._masked(task, text)), ending=ending)

    async def _say_failed(self, task: Task, ended: RankExit, message: str, *, ending: bool) -> None:
        await self.report(task, scheduler_pb2.TASK_PHASE_EXITED, ended=ended, message=message, ending=ending)
        self._context.observe(What.TASK_EXIT, task, ended.code, message)
        now = self._context.clock.now()
        known: dict[Attribute, str | int] = {
            Attribute.JOB: task.work.job,
            Attribute.TASK: task.work.task,
            Attribute.EPOCH: task.work.epoch,
            Attribute.NODE: self._context.node,
            Attribute.RANK: ended.rank,
        }
        summary = message.partition("\n")[0]
        telemetry.emit_span("agent.exit", now, now, parent=task.meta.traceparent, error=summary, attributes=known)
        _log.warning(Event.TASK_EXITED, task=task.work.task, job=task.work.job, epoch=task.work.epoch, reason=summary)

    async def _ended(self, task: Task, first: RankExit, reason: str, *, reported: bool = False) -> None:
        """Every process is reaped; a task that was stopped says so only now, so that its GPUs are free indeed."""
        await self.remember(task, stuck="")
        if not reported:
            await self.report(task, scheduler_pb2.TASK_PHASE_KILLED, ended=first, message=reason)
            _log.info(Event.TASK_EXITED, task=task.work.task, job=task.work.job, epoch=task.work.epoch, reason=reason)
        elif task.last is not None and (task.last.stuck or task.last.ending):
            await self._say_again(task, task.last, ending=False)
        await self.tidy(task)
        await self.remember(task, reaped=True)
        task.stage, task.running = Stage.ENDED, None


_FINAL = (scheduler_pb2.TASK_PHASE_EXITED, scheduler_pb2.TASK_PHASE_KILLED, scheduler_pb2.TASK_PHASE_REFUSED)
