"""What the scheduler's side of the store costs: writes of large gangs, changes of nodes, taking over, listing what is held.

The service is the production one, assembled in this process. Gangs and nodes: on the store in memory, so that what is measured is the
service's own work; CPU time of its event loop from the report (or the fact) until the leader has taken in what it wrote and its agents'
messages are worked out. What is compressed in a thread beside the loop is told apart. Take-over: two replicas on a real etcd; wall time from
the second's leadership key until its first decision, in which it knows all nodes and has looked at all jobs.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import Options, Report, Row, Target, main, percentile
from benchmarks.control_plane_suite import Child, Played, free_ports, machine
from whaleflux.clock import SystemClock
from whaleflux.convert import facts_to_proto
from whaleflux.embedded import etcd
from whaleflux.fleet.model import Node
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Put, Store
from whaleflux.store.etcd import EtcdStore
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import agent_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.agent_sessions import AgentSession
from whaleflux_scheduler.bootstrap import Peers, Service, assemble
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import JobState, SchedulingDecision, TaskPhase
from whaleflux_scheduler.core.observed import Observations, Timeouts
from whaleflux_scheduler.core.observed import Report as TaskReport
from whaleflux_scheduler.planner_thread import PlannerThread

ADMIN = auth.Identity("admin", "benchmark")


class World:
    """A leading scheduler on the store in memory, its nodes, and their agents' sessions."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes, self.store = nodes, MemoryStore(SystemClock())
        self.service = assemble(self.store, None, SystemClock(), Peers(), Timeouts(accept_s=1e6), "here:1")

    @asynccontextmanager
    async def leading(self) -> AsyncIterator[World]:
        running = asyncio.create_task(self.service.loops[0]())
        try:
            while (current := self.service.leader_session.current) is None:
                await asyncio.sleep(0.01)
            self.current = current
            for node in self.nodes:
                self.service.sessions.add(AgentSession(node.name, current.agents.desired))
                self.tell(node)
            await self.settled()
            yield self
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def tell(self, node: Node) -> None:
        message = inventory_pb2.Node(
            name=node.name, facts=facts_to_proto(node), intent=inventory_pb2.NODE_INTENT_ACTIVE
        )
        self.service.nodes.set_node(node.name, message)

    async def settled(self) -> None:
        for _ in range(3):
            await self.current.view.caught_up()
            await asyncio.sleep(0.02)
        for session in self.service.sessions.connected.values():
            session.due()

    def report(self, task: str, node: str, job: str, epoch: int, sequence: int) -> None:
        message = agent_pb2.TaskReport(task=task, job=job, epoch=epoch, phase=pb.TASK_PHASE_ACCEPTED, sequence=sequence)
        self.current.agents.report(self.service.sessions.connected[node], message)

    def tell_agents(self) -> int:
        """What their streams would do now; how many were woken."""
        woken = [session for session in self.service.sessions.connected.values() if session._woken]
        return sum(bool(session.due()) or True for session in woken)


def job_on(name: str, where: list[tuple[str, tuple[str, ...]]], state: JobState) -> pb.Job:
    """A job that was placed there, STARTING or RUNNING."""
    gpus = sum(len(uuids) for _, uuids in where)
    message = pb.Job(name=name, uid=name, state=pb.JOB_STATE_QUEUED, spec=pb.JobSpec(command=["train"], gpus=gpus))
    message.create_time.FromDatetime(datetime.now(UTC))
    now = datetime.now(UTC)
    job = convert.job_of(message)
    job = lifecycle.place(job, lifecycle.GpuAssignment(tuple(where)), SchedulingDecision(now, True, "here"), now)
    if state is JobState.RUNNING:
        assert job.attempt is not None
        told = (TaskReport(t.id, TaskPhase.ACCEPTED, rendezvous="a:1", node=t.node) for t in job.attempt.tasks)
        job = lifecycle.advance(job, Observations(tuple(told)), now, Timeouts())
        job = lifecycle.advance(job, Observations(), now, Timeouts())
        assert job.attempt is not None
        runs = (TaskReport(t.id, TaskPhase.RUNNING, node=t.node) for t in job.attempt.tasks)
        job = lifecycle.advance(job, Observations(tuple(runs)), now, Timeouts())
        job = lifecycle.advance(job, Observations(), now, Timeouts())
    convert.JOBS.merge(job, message)
    return message


async def put_jobs(store: Store, jobs: list[pb.Job]) -> None:
    for at in range(0, len(jobs), 50):
        puts = (Put(keys.of_name(keys.JOBS, one.name), convert.JOBS.pack(one)) for one in jobs[at : at + 50])
        await store.commit(*puts)


def gpus_of(node: Node) -> tuple[str, ...]:
    return tuple(gpu.uuid for gpu in node.gpus)


def fleet(nodes: int) -> list[Node]:
    """With UUIDs as drivers give them."""
    made = (machine(f"site/node-{i}") for i in range(nodes))
    return [_renamed(node) for node in made]


def _renamed(node: Node) -> Node:
    gpus = tuple(replace(gpu, uuid=f"GPU-{uuid.uuid4()}") for gpu in node.gpus)
    return replace(node, gpus=gpus)


async def _cpu_until(done: Callable[[], Awaitable[bool]]) -> float:
    """CPU seconds of this thread until it is so."""
    begun = time.thread_time()
    while not await done():
        await asyncio.sleep(0.001)
    return time.thread_time() - begun


async def gang_write(fleet_nodes: int, gang_nodes: int, rounds: int) -> Row:
    """Three agents of a gang that starts report; the record is written, taken in, and those agents' streams are told."""
    nodes = fleet(fleet_nodes)
    world = World(nodes)
    name = "queues/default/jobs/gang"
    await put_jobs(world.store, [job_on(name, [(n.name, gpus_of(n)) for n in nodes[:gang_nodes]], JobState.STARTING)])
    took, woken, sequences = [], 0, itertools.count(1)
    async with world.leading():
        cache, key = world.service.jobs.cache, keys.of_name(keys.JOBS, name)
        for round_ in range(rounds):
            before = cache.values[key]
            tasks = before.value.attempt.tasks[3 * round_ + 1 : 3 * round_ + 4]  # type: ignore[union-attr]
            begun = time.thread_time()
            for task in tasks:
                world.report(task.id, task.node, name, 1, next(sequences))

            async def written(before: object = before) -> bool:
                return cache.values[key] is not before

            await _cpu_until(written)
            await world.current.view.caught_up()
            woken += world.tell_agents()
            took.append(time.thread_time() - begun)
    steady = took[1:]
    return {
        "what": f"a write of a gang of {gang_nodes:,} nodes x 8 GPUs",
        "nodes": fleet_nodes,
        "events": len(steady),
        "median_ms": percentile(steady, 50) * 1e3,
        "worst_ms": max(steady) * 1e3,
        "agents told": woken / rounds,
        "record kB": len(convert.JOBS.pack(cache.values[key].message)) / 1e3,
    }


async def node_change(fleet_nodes: int, rounds: int) -> Row:
    """A node with a running job reports other facts; the planner has taken them in."""
    nodes = fleet(fleet_nodes)
    world = World(nodes)
    jobs = [job_on(f"queues/default/jobs/j{i}", [(n.name, gpus_of(n))], JobState.RUNNING) for i, n in enumerate(nodes)]
    await put_jobs(world.store, jobs)
    took = []
    async with world.leading():
        for round_ in range(rounds):
            node = nodes[(round_ * 37) % fleet_nodes]
            changed = replace(
                node, labels=(("rack", str(round_)),), price=replace(node.price, usd_per_gpu_hour=round_ + 1.0)
            )
            begun = time.thread_time()
            world.tell(changed)
            await world.current.view.caught_up()
            asked = await world.current.planner.ask(lambda plan: plan.nodes)
            took.append(time.thread_time() - begun)
            assert asked == fleet_nodes
    steady = took[1:]
    return {
        "what": "a node's facts change, each node runs a job",
        "nodes": fleet_nodes,
        "events": len(steady),
        "median_ms": percentile(steady, 50) * 1e3,
        "worst_ms": max(steady) * 1e3,
    }


async def allocations(jobs: int) -> Row:
    """A page of 500 of what is held, in the middle of it."""
    nodes = fleet(jobs // 8)
    world = World(nodes)
    held = [(n.name, (gpu,)) for n in nodes for gpu in gpus_of(n)]
    made = [job_on(f"queues/default/jobs/j{i}", [one], JobState.RUNNING) for i, one in enumerate(held)]
    await put_jobs(world.store, made)
    took, token = [], ""
    async with world.leading():
        scheduler = world.service.servicers[0][1]
        with auth.acting_as(ADMIN):
            while True:
                begun = time.thread_time()
                page = await scheduler.ListAllocations(pb.ListAllocationsRequest(page_size=500, page_token=token), None)
                took.append(time.thread_time() - begun)
                if not (token := page.next_page_token):
                    break
    return {
        "what": f"a page of 500 allocations of {len(held):,}",
        "nodes": len(nodes),
        "events": len(took),
        "median_ms": percentile(took, 50) * 1e3,
        "worst_ms": max(took) * 1e3,
    }


class Stub:
    """A played service as a stub."""

    def __init__(self, played: Any) -> None:
        self._played = played

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._played, name)
        return lambda request, **_: method(request, None)


async def take_over(fleet_nodes: int, jobs: int) -> Row:
    """The leader resigns; its successor's first decision."""
    with tempfile.TemporaryDirectory() as folder:
        client, peer = free_ports(2)
        server = Child(
            etcd.command(etcd.find(), Path(folder) / "etcd", client_port=client, peer_port=peer), Path(folder) / "log"
        )
        try:
            await etcd.wait_ready("127.0.0.1", client)
            stores = [EtcdStore([f"127.0.0.1:{client}"]) for _ in range(3)]
            spec = pb.JobSpec(command=["train"], gpus=8, gpu=pb.GpuRequirement(any_of=["no-such-gpu"]))
            waiting = [
                pb.Job(name=f"queues/default/jobs/w{i}", uid=f"w{i}", state=pb.JOB_STATE_QUEUED, spec=spec)
                for i in range(jobs)
            ]
            for one in waiting:
                one.create_time.GetCurrentTime()
            await put_jobs(stores[2], waiting)
            played: Any = Stub(Played([machine(f"site/node-{i}") for i in range(fleet_nodes)]))
            peers = Peers(inventory=played, health=played)
            replicas = [
                assemble(store, None, SystemClock(), peers, Timeouts(), f"replica:{i}")
                for i, store in enumerate(stores[:2])
            ]
            took = await _taken_over(replicas, stores[2])
            for store in stores:
                await store.close()
        finally:
            server.kill()
    return {
        "what": f"take-over, {jobs:,} jobs wait",
        "nodes": fleet_nodes,
        "events": len(took),
        "median_ms": percentile(took, 50) * 1e3,
        "worst_ms": max(took) * 1e3,
    }


async def _taken_over(replicas: list[Service], store: EtcdStore) -> list[float]:
    """Seconds from each leadership to the first decision, in turns."""
    decided: list[float] = []
    step = PlannerThread.step

    async def timed(self: PlannerThread, *args: Any) -> Any:
        moves = await step(self, *args)
        decided.append(time.perf_counter())
        return moves

    PlannerThread.step = timed  # type: ignore[method-assign,assignment]
    tasks = [asyncio.create_task(one.loops[0]()) for one in replicas]
    took: list[float] = []
    try:
        while not any(one.leader_session.current for one in replicas):
            await asyncio.sleep(0.01)
        leader = 0 if replicas[0].leader_session.current else 1
        await asyncio.sleep(6.0)  # its first decisions are over, and both caches are quiet
        now = (await store.list(keys.LEADERS)).revision
        leads = asyncio.create_task(_next_leader(store, now))
        await asyncio.sleep(0.5)
        decided.clear()
        tasks[leader].cancel()
        begun = await leads
        while not decided:
            await asyncio.sleep(0.002)
        took.append(decided[0] - begun)
    finally:
        PlannerThread.step = step  # type: ignore[method-assign]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return took


async def _next_leader(store: EtcdStore, after: int) -> float:
    async for batch in store.watch(keys.LEADERS, after=after):
        if any(event.entry is not None for event in batch.events):
            return time.perf_counter()
    return 0.0


def measure(options: Options) -> Report:
    """What the scheduler's side of the store costs, in CPU of its loop; taking over, in wall time."""
    quick = options.quick
    report = Report(
        simulated="nodes, agents' streams, inventory and health; gangs and nodes on the store in memory, take-over on etcd"
    )

    def add(row: Row, target_ms: float, key: str = "median_ms") -> None:
        report.rows.append(row)
        print(row, file=sys.stderr)
        report.targets.append(Target(f"{row['what']}, {row['nodes']:,} nodes", row[key], target_ms, "ms", per="python"))

    size = 1_000 if quick else 5_000
    for gang in (128, size):
        add(asyncio.run(gang_write(size, gang, 5 if quick else 15)), 20.0)
    add(asyncio.run(node_change(size, 10 if quick else 50)), 5.0)
    add(asyncio.run(allocations(2_000 if quick else 10_000)), 25.0)
    add(asyncio.run(take_over(size, 500 if quick else 2_000)), 300.0)
    return report


if __name__ == "__main__":
    sys.exit(main("scheduler_store", measure))
