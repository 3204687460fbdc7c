"""What one decision costs on a full fleet while thousands wait: the whole production step, `Plan.step(news, now) -> moves`.

Events are news as the scheduler's leader gives them: a job has ended, so one GPU is free. The step takes that in, finds who may have it,
places that job, and is measured until its moves are there. Writing them to the store is not part of it (`control_plane`). Times are CPU
time of the deciding thread, so that neighbours on a shared host do not count; on an idle core it equals wall time, as nothing here waits.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from benchmarks.common import Options, Report, Row, Target, main, percentile
from benchmarks.scheduler_speed import fleet
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Job, JobState, Queue, TaskPhase
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement.api import Placement
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.plan import Move, News, Plan
from whaleflux_scheduler.core.request import place_request

NOW = datetime(2026, 5, 1, tzinfo=UTC)
BUDGET_S = 0.05  # as in the service
GB = 10**9
MODEL = "H100-80GB"


def job(name: str, gpus: int = 1, *, queue: str = "q0", at: float = 0.0, **spec: object) -> Job:
    asked = Spec(command=("x",), gpus=gpus, **spec)  # type: ignore[arg-type]
    return Job(f"queues/{queue}/jobs/{name}", asked, JobState.QUEUED, NOW + timedelta(seconds=at))


class World:
    """A plan with a full fleet of 8-GPU nodes, each GPU held by a job of its own, and records that follow its moves."""

    def __init__(self, nodes: int, queues: int = 1, *, limit: int = 0, full: bool = True) -> None:
        self.plan = Plan(time.perf_counter)
        self.jobs: dict[str, Job] = {}
        self.running: deque[str] = deque()
        made = fleet(nodes)
        known = {f"q{i}": Queue(f"queues/q{i}", 1.0, limit) for i in range(queues)} | {"full": Queue("queues/full")}
        self.plan.step(News(nodes=tuple(made), closed={n.name: "" for n in made}, queues=known), NOW)
        self.nodes = made
        for i in range(nodes * 8 if full else 0):
            self.submit(job(f"r{i}", queue="full", at=-1, priority=1_000))
            self.moves(self.plan.decide(NOW))
        gc.collect()
        gc.freeze()  # as a long-lived scheduler does: the fleet itself is not searched for garbage again

    def submit(self, *jobs: Job) -> None:
        self.jobs |= {one.name: one for one in jobs}
        self.plan.apply(News(jobs=jobs, candidates={one.name: Candidate(one) for one in jobs}))

    def settle(self) -> None:
        """Until all who wait have been tried and have their answer."""
        while self.plan.unfinished:
            self.moves(self.plan.step(News(), NOW, BUDGET_S))

    def moves(self, moves: list[Move]) -> list[str]:
        """Writes what was decided: the records come back as news."""
        started = []
        for move in moves:
            if move.assignment is not None:
                starting = lifecycle.place(self.jobs[move.job], move.assignment, move.decision, NOW)
                self.jobs[move.job] = running = replace(starting, state=JobState.RUNNING)
                self.running.append(move.job)
                started.append(running)
        if started:
            self.plan.apply(News(jobs=tuple(started)))
        return [one.name for one in started]

    def ending(self) -> News:
        """The job that runs longest has ended."""
        name = self.running.popleft()
        known = self.jobs.pop(name)
        assert known.attempt is not None
        tasks = tuple(replace(task, phase=TaskPhase.EXITED) for task in known.attempt.tasks)
        over = replace(known, state=JobState.SUCCEEDED, attempt=replace(known.attempt, tasks=tasks))
        return News(jobs=(over,), candidates={name: None})

    def event(self, news: News) -> tuple[float, list[str]]:
        """CPU seconds of one step, and who started by it; a step that ran out of time is followed by the next, which counts too."""
        begun = time.thread_time()
        moves = self.plan.step(news, NOW, BUDGET_S)
        took_s = time.thread_time() - begun
        started = self.moves(moves)
        while self.plan.unfinished:
            begun = time.thread_time()
            moves = self.plan.step(News(), NOW, BUDGET_S)
            took_s += time.thread_time() - begun
            started += self.moves(moves)
        return took_s, started


def crowd(kind: str, count: int) -> Iterator[Job]:
    """Who waits."""
    for i in range(count):
        match kind:
            case "1,000 queues":
                yield job(f"w{i}", queue=f"q{i % 1000}", at=i)
            case "1,000 shapes":
                yield job(f"w{i}", at=i, memory_bytes_per_rank=GB + i % 1000)
            case "100 priorities":
                yield job(f"w{i}", at=i, priority=i % 100)
            case "1,000 shapes that do not fit":
                yield hopeless(i, i % 1000)
            case "queues at their limit":
                yield job(f"w{i}", gpus=2, queue=f"q{i % 1000}", at=i)


def hopeless(number: int, which: int) -> Job:
    """One of a thousand things that one free GPU is not enough for, most of which only the engine can tell."""
    match which % 4:
        case 0:
            return job(f"w{number}", at=number, memory_bytes_per_rank=2_000 * GB + which)
        case 1:
            return job(f"w{number}", at=number, cpu_millicores_per_rank=100_000 + which)
        case 2:
            return job(f"w{number}", at=number, gpus=2 + which % 7, memory_bytes_per_rank=GB + which)
        case _:
            return job(f"w{number}", at=number, any_of=(f"model-{which}",))


def freeing(nodes: int, kind: str, events: int, count: int = 10_000) -> Row:
    """One GPU comes free, `events` times, with `count` jobs that wait."""
    world = World(nodes, queues=1000)
    world.submit(*crowd(kind, count))
    world.settle()
    took, started = [], 0
    for _ in range(events):
        took_s, names = world.event(world.ending())
        took.append(took_s)
        started += len(names)
    assert started == events, f"{started} started in {events} events"
    world.plan.check()
    return _row(f"a GPU comes free, {count:,} wait: {kind}", nodes, took)


def behind(nodes: int, kind: str, events: int, others: int) -> Row:
    """Only the last of all who wait can be helped by the GPU that comes free."""
    world = World(nodes, queues=1000, limit=1 if kind == "queues at their limit" else 0)
    world.submit(*crowd(kind, others))
    world.settle()
    took = []
    for i in range(events):
        last = job(f"last{i}", queue="full", at=others + i)
        world.submit(last)
        world.settle()
        took_s, names = world.event(world.ending())
        assert names == [last.name], names
        took.append(took_s)
    return _row(f"only the last of {others + 1:,} fits: {kind}", nodes, took)


def facts(nodes: int, events: int) -> Row:
    """A node's facts change: a GPU's health, the price, a label."""
    world = World(nodes)
    world.submit(*crowd("1,000 shapes", 1_000))
    world.settle()
    took = []
    for i in range(events):
        node = world.nodes[i % nodes]
        sick = tuple(replace(gpu, healthy=not (gpu.index == 3 and i % 2 == 0)) for gpu in node.gpus)
        took.append(world.event(News(nodes=(replace(node, gpus=sick, labels=(("rack", str(i)),)),)))[0])
    return _row("a node's facts change, 1,000 shapes wait", nodes, took)


def rate(nodes: int, gpus: int, count: int) -> Iterator[Row]:
    """Jobs that come, start and end on a fleet at 80 % load: through the step, and by the engine alone."""
    world = World(nodes, full=False)
    for i in range(int(nodes * 8 * 0.8 / gpus)):
        world.submit(job(f"r{i}", gpus))
        world.moves(world.plan.decide(NOW))
    took = []
    for i in range(count):
        one = job(f"s{i}", gpus)
        world.jobs[one.name] = one
        coming = News(jobs=(one,), candidates={one.name: Candidate(one)})
        begun = time.thread_time()
        moves = world.plan.step(coming, NOW, BUDGET_S)
        took_s = time.thread_time() - begun
        assert world.moves(moves) == [one.name]
        ending = world.ending()
        begun = time.thread_time()
        world.plan.step(ending, NOW, BUDGET_S)
        took.append(took_s + time.thread_time() - begun)
    yield _row(f"{gpus} GPUs: a job comes and starts, another ends", nodes, took)
    yield _row(f"{gpus} GPUs: the same by the engine alone", nodes, list(_bare(nodes, gpus, count)))


def _bare(nodes: int, gpus: int, count: int) -> Iterator[float]:
    engine, held = Engine(), deque[str]()
    for node in fleet(nodes):
        engine.upsert_node(node)
    for i in range(int(nodes * 8 * 0.8 / gpus) + count):
        request = place_request(f"j{i}", Spec(command=("x",), gpus=gpus))
        begun = time.thread_time()
        placement = engine.fits(request)
        assert isinstance(placement, Placement)
        engine.apply(placement)
        held.append(request.id)
        if len(held) > nodes * 8 * 0.8 / gpus:
            engine.release(held.popleft())
            yield time.thread_time() - begun


def _row(what: str, nodes: int, took: list[float]) -> Row:
    steady = took[len(took) // 10 :]  # the first fill tables
    return {
        "what": what,
        "nodes": nodes,
        "events": len(steady),
        "median_ms": percentile(steady, 50) * 1e3,
        "p99_ms": percentile(steady, 99) * 1e3,
        "per_s": len(steady) / sum(steady),
    }


def measure(options: Options) -> Report:
    """Decisions on full fleets while thousands wait."""
    events = 60 if options.quick else 500
    report = Report(simulated="nodes, jobs and agents; the decision is the production code")
    limits = {"1,000 queues": 5.0, "1,000 shapes": 10.0, "100 priorities": 5.0}

    def add(row: Row, target_ms: float = 0.0) -> None:
        report.rows.append(row)
        print(row, file=sys.stderr)
        if target_ms:
            id_ = f"{row['what']}, {row['nodes']:,} nodes, p99"
            report.targets.append(Target(id_, row["p99_ms"], target_ms, "ms", per="python"))

    for nodes in (1_000,) if options.quick else (1_000, 5_000):
        for kind, limit_ms in limits.items():
            add(freeing(nodes, kind, events), limit_ms)
        add(behind(nodes, "1,000 shapes that do not fit", events // 5, 999), BUDGET_S * 1e3)
        for kind in ("1,000 shapes that do not fit", "queues at their limit"):
            add(behind(nodes, kind, events // 5, 9_999), 100.0)
        add(facts(nodes, events), 5.0)
        for gpus in (1, 64):
            for row in rate(nodes, gpus, events):
                add(row)
    return report


if __name__ == "__main__":
    sys.exit(main("decision_scale", measure))
