"""The leader is killed (SIGKILL) while it places a burst of jobs: how long until its successor decides, and is anything lost or done twice.

Real etcd, two scheduler processes, mTLS. 2,000 jobs wait; then the agents of 1,000 nodes come, as streams through one connection for each
replica, as the front door brings them. When a third of the jobs are placed, the leader is killed; more jobs are submitted at that moment.
Afterwards the store's own history is read: what each record said, revision by revision.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.control_plane_suite import Agent, Suite, machine, request
from whaleflux.retry import Backoff
from whaleflux.rpc.auth import XFCC
from whaleflux.store import keys
from whaleflux.store.api import KeyEvent
from whaleflux.store.election import TTL_S
from whaleflux.store.etcd import EtcdStore
from whaleflux.v1 import agent_pb2
from whaleflux.v1.agent_pb2_grpc import TaskServiceStub
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub
from whaleflux_scheduler import convert
from whaleflux_scheduler.core.model import Job, JobState
from whaleflux_scheduler.leader_session import ELECTION

DECIDES_S = 3.0  # after the kill, the successor has placed a job
RUN_S = 0.5  # of each job
AT_ONCE = 32  # submissions under way
SIZES = (1, 2, 4, 8, 8, 16)  # GPUs of the jobs, in turn
LATE = 0.05  # of the jobs, submitted when the leader is killed
_LEADER = keys.LEADERS + ELECTION
_AGENTS_RETRY = Backoff()  # as agents do


@dataclass(slots=True)
class Seen:
    """What the store's watch showed, and when it was seen (monotonic)."""

    placed: int = 0  # decisions so far
    decided: dict[int, float] = field(default_factory=dict)  # revision of a decision -> when
    over: set[str] = field(default_factory=set)  # jobs that ended
    leaders: dict[int, float] = field(default_factory=dict)  # revision of a leadership -> when it began
    expired_s: list[float] = field(default_factory=list)  # when leaderships ended
    held: dict[str, str] = field(default_factory=dict)  # GPU -> job
    holds: dict[str, list[str]] = field(default_factory=dict)  # the same, by job
    wrong: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)  # jobs whose attempt was given up, and why
    jobs: dict[str, tuple[JobState, int]] = field(default_factory=dict)  # name -> state, epoch


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds from the kill, and what was wrong, in sentences."""

    jobs: int
    nodes: int
    placed_before: int
    expired_s: float
    leads_s: float
    decides_s: float
    all_over_s: float
    again: tuple[str, ...]
    wrong: tuple[str, ...]


class RoamingAgent(Agent):
    """An agent behind the front door: its stream goes to any replica, and to another when that one does not lead."""

    def use(self, channels: list[grpc.aio.Channel], site: str, node_id: str) -> RoamingAgent:
        self.channels = channels
        self.metadata = ((XFCC, f"URI=spiffe://whaleflux/agent/{site}/{node_id}"),)
        return self

    async def run(self) -> None:
        for failures in itertools.count():
            if failures:
                await asyncio.sleep(_AGENTS_RETRY.pause_s(min(failures, 4)))
            with contextlib.suppress(grpc.RpcError):
                await self._sync(self.channels[failures % len(self.channels)])

    async def _sync(self, channel: grpc.aio.Channel) -> None:
        outbox = self.outbox = asyncio.Queue()
        hello = agent_pb2.SyncHello(node=self.node, boot_id="boot", tasks=self.reports.values())
        outbox.put_nowait(agent_pb2.SyncRequest(hello=hello))
        call = TaskServiceStub(channel).Sync(metadata=self.metadata)
        sending = asyncio.create_task(self._send(call, outbox))
        try:
            while (answer := await call.read()) is not grpc.aio.EOF:
                self._take(answer)
        finally:
            sending.cancel()
            call.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, call: Any, outbox: asyncio.Queue[agent_pb2.SyncRequest]) -> None:
        async for message in self._requests(outbox):
            await call.write(message)


class Fleet:
    """The agents of a suite's nodes, as streams of two connections."""

    def __init__(self, suite: Suite, run_s: float) -> None:
        self.suite, self.run_s, self.agents = suite, run_s, list[RoamingAgent]()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        suite = self.suite
        async with contextlib.AsyncExitStack() as stack:
            ports = (suite.scheduler_port, *suite.follower_ports)
            opened = [suite.plain_channel("frontdoor", "edge", port) for port in ports]
            channels = [await stack.enter_async_context(channel) for channel in opened]
            for node in suite.played.nodes:
                site, node_id = node.name.split("/")[1::2]
                agent = RoamingAgent(channel=None, node=node.name, run_s=self.run_s)  # type: ignore[arg-type]  # it has its own
                self.agents.append(agent.use(channels, site, node_id))
            tasks = [asyncio.create_task(agent.run()) for agent in self.agents]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def begun_twice(self) -> list[str]:
        """Jobs that agents were told to start in two attempts, and tasks that they were told to start twice."""
        begun = Counter(task for agent in self.agents for task in agent.started)
        attempts = {task.rpartition(".")[0] for task in begun}  # a task is queue.job.epoch.rank
        jobs = Counter(attempt.rpartition(".")[0] for attempt in attempts)
        return sorted(one for counted in (begun, jobs) for one, times in counted.items() if times > 1)


class Submitter:
    """Submits to any replica, again until it is acknowledged, as the command line does."""

    def __init__(self, stubs: list[SchedulerServiceStub]) -> None:
        self._stubs = stubs
        self.acknowledged: set[str] = set()

    async def submit(self, number: int) -> None:
        asked = request(SIZES[number % len(SIZES)])
        asked.job_id, asked.request_id = f"burst-{number}", f"burst-{number}"
        async with asyncio.timeout(60):
            for attempt in itertools.count():
                with contextlib.suppress(grpc.RpcError):
                    stub = self._stubs[(number + attempt) % len(self._stubs)]
                    self.acknowledged.add((await stub.CreateJob(asked, timeout=5)).name)
                    return
                await asyncio.sleep(_AGENTS_RETRY.pause_s(min(attempt + 1, 4)))

    async def all_of(self, numbers: Iterable[int]) -> None:
        """So many at a time."""
        left = iter(numbers)

        async def some() -> None:
            for number in left:
                await self.submit(number)

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))


async def _look(endpoint: str, after: int, told: Connection) -> None:
    store = EtcdStore([endpoint])
    async with contextlib.aclosing(store.watch(keys.ROOT, after=after)) as batches:
        async for batch in batches:
            at_s = time.monotonic()
            told.send((batch.revision, at_s, [e for e in batch.events if e.key.startswith((keys.JOBS, _LEADER))]))


def _look_on(endpoint: str, after: int, told: Connection) -> None:
    """A process of its own: this one is busy with its agents, and would see late."""
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        asyncio.run(_look(endpoint, after, told))


class Watcher:
    """The store's history as it grows."""

    def __init__(self, endpoint: str, after: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._told, telling = spawn.Pipe(duplex=False)
        self._process = spawn.Process(target=_look_on, args=(endpoint, after, telling), daemon=True)
        self._process.start()
        telling.close()
        self.seen = Seen()

    def look(self) -> Seen:
        """What was seen by now."""
        while self._told.poll():
            revision, at_s, events = self._told.recv()
            self._take(revision, at_s, events)
        return self.seen

    def _take(self, revision: int, at_s: float, events: list[KeyEvent]) -> None:
        jobs = []
        for event in events:
            if event.key == _LEADER and event.entry is None:
                self.seen.expired_s.append(at_s)
            elif event.key == _LEADER:
                self.seen.leaders[revision] = at_s
            elif event.entry is None:
                self.seen.wrong.append(f"{event.key} was deleted at revision {revision}")
            else:
                jobs.append(convert.JOBS.decode(event.entry).value)
        note(self.seen, revision, jobs, at_s)

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def note(seen: Seen, revision: int, jobs: list[Job], at_s: float = 0.0) -> None:
    """Jobs as they are from one revision on: what they leave is free before anything is taken."""
    for job in jobs:
        for gpu in seen.holds.pop(job.name, ()):
            seen.held.pop(gpu, None)
    for job in jobs:
        state, epoch = seen.jobs.get(job.name, (JobState.QUEUED, 0))
        seen.holds[job.name] = [gpu for _, task in job.holding() for gpu in task.gpus]
        for gpu in seen.holds[job.name]:
            if (other := seen.held.setdefault(gpu, job.name)) != job.name:
                seen.wrong.append(f"{gpu} was given to {job.name} while {other} held it, at revision {revision}")
        if job.state is JobState.STARTING and state is not JobState.STARTING:
            seen.placed += 1
            seen.decided[revision] = at_s
        if job.epoch < epoch:
            seen.wrong.append(f"{job.name} went from epoch {epoch} back to {job.epoch} at revision {revision}")
        if job.epoch > max(epoch, 1):
            seen.again.append(f"{job.name}: {', '.join(one.end_reason for one in job.attempts() if one.end_reason)}")
        if job.ended:
            seen.over.add(job.name)
        seen.jobs[job.name] = job.state, job.epoch


async def until(true: Callable[[], object], what: str, timeout_s: float) -> None:
    """Raises TimeoutError, which says what did not come."""
    try:
        async with asyncio.timeout(timeout_s):
            while not true():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise TimeoutError(f"{what} did not come within {timeout_s:g} s") from None


async def _revision(suite: Suite) -> int:
    store = EtcdStore([f"127.0.0.1:{suite.client_port}"])
    try:
        return (await store.list(keys.LEADERS)).revision
    finally:
        await store.close()


async def burst(folder: Path, jobs: int, nodes: int, *, run_s: float = RUN_S, patience_s: float = 120.0) -> Outcome:
    """One run, in an empty folder, of jobs that run for `run_s`. `patience_s` bounds each part of it."""
    fleet = [machine(f"site/node-{i}") for i in range(nodes)]
    async with Suite(folder, fleet, agents=False, followers=1) as suite, contextlib.AsyncExitStack() as stack:
        watcher = Watcher(f"127.0.0.1:{suite.client_port}", await _revision(suite))
        stack.callback(watcher.close)
        ports = (suite.scheduler_port, *suite.follower_ports)
        stubs = [SchedulerServiceStub(await stack.enter_async_context(suite.plain_channel(port=p))) for p in ports]
        submitter, agents, seen, look = Submitter(stubs), Fleet(suite, run_s), watcher.seen, watcher.look
        early = int(jobs * (1 - LATE))
        await submitter.all_of(range(early))
        async with agents.connected():
            await until(lambda: look().placed >= jobs // 3, "a third of the decisions", patience_s)
            assert suite.process is not None
            suite.process.kill()
            killed_s, placed = time.monotonic(), seen.placed
            late = asyncio.create_task(submitter.all_of(range(early, jobs)))
            await until(lambda: look().leaders, "another leader", patience_s)
            leader, leads_s = next(iter(seen.leaders.items()))
            await until(lambda: max(look().decided) > leader, "its first decision", patience_s)
            decides_s = next(at_s for revision, at_s in seen.decided.items() if revision > leader)
            await late
            await until(lambda: len(look().over) == jobs, "the end of all jobs", patience_s)
            over_s = time.monotonic()
        return Outcome(
            jobs,
            nodes,
            placed,
            seen.expired_s[0] - killed_s,
            leads_s - killed_s,
            decides_s - killed_s,
            over_s - killed_s,
            tuple(seen.again),
            tuple(_wrong(seen, submitter, agents, jobs)),
        )


def _wrong(seen: Seen, submitter: Submitter, agents: Fleet, jobs: int) -> list[str]:
    """All that must not be, in sentences."""
    lost = submitter.acknowledged - seen.jobs.keys()
    not_well = [name for name, (state, _) in seen.jobs.items() if state is not JobState.SUCCEEDED]
    found = [*seen.wrong, *(f"{task} was started twice" for task in agents.begun_twice())]
    found += [f"{name} was acknowledged and is not there" for name in sorted(lost)]
    found += [f"{name} did not succeed" for name in sorted(not_well)]
    if len(seen.jobs) != jobs:
        found.append(f"{jobs} jobs were submitted and {len(seen.jobs)} are there")
    return found


def row_of(outcome: Outcome) -> Row:
    return {
        "jobs": outcome.jobs,
        "nodes": outcome.nodes,
        "placed before the kill": outcome.placed_before,
        "lease expired s": outcome.expired_s,
        "another leads s": outcome.leads_s,
        "first decision s": outcome.decides_s,
        "all jobs over s": outcome.all_over_s,
        "attempts given up": len(outcome.again),
        "wrong": len(outcome.wrong),
    }


def measure(options: Options) -> Report:
    """From SIGKILL of the leader in the midst of a burst until its successor decides; what is lost or done twice."""
    sizes = (200, 100) if options.quick else (options.extra.jobs, options.extra.nodes)
    outcomes = []
    for _ in range(options.extra.rounds):
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(asyncio.run(burst(Path(folder), *sizes)))
    worst = max(outcome.decides_s for outcome in outcomes)
    after = max(outcome.decides_s - outcome.expired_s for outcome in outcomes)
    wrong = [said for outcome in outcomes for said in outcome.wrong]
    again = [said for outcome in outcomes for said in outcome.again]
    return Report(
        rows=[row_of(outcome) for outcome in outcomes],
        targets=[
            Target("the leader is killed in a burst: the next one's first decision", worst, DECIDES_S, "s"),
            Target("of that after the lease has expired", after, 0.5, "s", per="python"),
            Target("lost, placed or started twice, or otherwise wrong", len(wrong), 0, ""),
        ],
        simulated="nodes and their agents (accept and start at once, without processes), the front door, inventory and health monitor",
        notes=[
            f"the lease lives {TTL_S:g} s after the leader's last sign of life; etcd takes up to 0.5 s more",
            *wrong[:20],
            *again[:5],
        ],
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=2_000)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=1)


if __name__ == "__main__":
    sys.exit(main("leader_loss", measure, add_arguments=_arguments))
