"""How fast the placement engine decides, on one core.

One decision is everything between a request and its record: filter, score, topology, modelled time, reasons, quota check, apply, and a
journal line written to a buffered file. Rates include the releases that keep the fleet at its load, which are not counted as decisions;
latencies are of the decision alone. Seconds are CPU time of the deciding thread, so that neighbours on a shared host do not count; on an
idle core it equals wall time, as nothing here waits. The first decisions of each kind are excluded (tables by wiring are filled).
"""

from __future__ import annotations

import cProfile
import gc
import io
import json
import pstats
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import IO

from benchmarks.common import Options, Report, Row, Target, main, percentile
from whaleflux.fleet import Gpu, Link, LinkKind, Node, Price
from whaleflux_scheduler.core.placement.api import (
    GroupRequest,
    NoPlacement,
    Placement,
    PlaceRequest,
    PreemptionPlan,
    Subgroup,
    Victim,
)
from whaleflux_scheduler.core.placement.engine import Engine

GB = 10**9
_LINKS = tuple(Link(a, b, LinkKind.NVLINK, 347e9) for a, b in combinations(range(8), 2))


def fleet(nodes: int, per_leaf: int = 8, leaves_per_spine: int = 64) -> list[Node]:
    """`nodes` H100 nodes of 8 GPUs with 400 Gb/s each, 8 nodes to a leaf, 64 leaves to a spine, one site."""
    return [
        Node(
            name=f"sites/a/nodes/n{n:05}",
            site="a",
            gpus=tuple(Gpu(i, f"{n}-{i}", "H100-80GB", 80 * GB, (9, 0)) for i in range(8)),
            links=_LINKS,
            spine=f"p{n // per_leaf // leaves_per_spine:03}",
            leaf=f"l{n // per_leaf:05}",
            cpu_millicores=96_000,
            memory_bytes=1000 * GB,
            network_bytes_per_s=400e9,
            price=Price(usd_per_gpu_hour=2.0),
        )
        for n in range(nodes)
    ]


class Bench:
    """An engine at a steady load, with a quota table and a journal."""

    def __init__(self, nodes: int, load: float, seed: int, journal: IO[str]) -> None:
        self.random = random.Random(seed)
        self.engine = Engine()
        for node in fleet(nodes):
            self.engine.upsert_node(node)
        self.journal = journal
        self.total = nodes * 8
        self.queues = {f"q{i}": self.total for i in range(20)}
        self.used = dict.fromkeys(self.queues, 0)
        self.running: deque[tuple[str, str, int]] = deque()
        self.held = 0
        self.next_id = 0
        self.fill(load)

    def fill(self, load: float) -> None:
        """Jobs of 1 to 64 GPUs until the load is reached, then a fifth of them leave at random and others come."""
        sizes = [1, 1, 1, 2, 4, 8, 8, 16, 32, 64]
        while self.held < load * self.total:
            self.decide(self.request(self.random.choice(sizes)))
        for _ in range(len(self.running) // 5):
            self.running.rotate(self.random.randrange(len(self.running)))
            self.finish()
        while self.held < load * self.total:
            self.decide(self.request(self.random.choice(sizes)))
        self.random.shuffle(self.running)
        gc.collect()
        gc.freeze()  # as a long-lived scheduler does: the fleet itself is not searched for garbage again

    def request(self, gpus: int) -> PlaceRequest:
        self.next_id += 1
        subgroups = (Subgroup(8),) if gpus >= 8 else ()
        return PlaceRequest(f"job-{self.next_id}", GroupRequest(gpus, subgroups=subgroups))

    def decide(self, request: PlaceRequest) -> bool:
        queue = f"q{self.next_id % 20}"
        gpus = request.units
        if self.used[queue] + gpus > self.queues[queue]:
            return False
        placement = self.engine.fits(request)
        if placement is None:
            return False
        self.engine.apply(placement)
        self.used[queue] += gpus
        self.held += gpus
        self.running.append((request.id, queue, gpus))
        self.journal.write(journal_line(placement))
        return True

    def finish(self) -> None:
        id_, queue, gpus = self.running.popleft()
        self.engine.release(id_)
        self.used[queue] -= gpus
        self.held -= gpus
        self.journal.write(f'{{"end":"{id_}"}}\n')


def journal_line(placement: Placement) -> str:
    return (
        json.dumps({"id": placement.id, "on": [(a.node, a.gpus) for a in placement.nodes]}, separators=(",", ":"))
        + "\n"
    )


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each decision, and of everything including the releases between them."""

    decisions_s: list[float]
    total_s: float

    @property
    def per_s(self) -> float:
        return len(self.decisions_s) / self.total_s


def timed(bench: Bench, sizes: Sequence[int], rounds: int) -> Timing:
    latencies: list[tuple[float, float]] = []
    level = bench.held
    for at in range(rounds + 20):
        request = bench.request(sizes[at % len(sizes)])
        begun = time.thread_time()
        placed = bench.decide(request)
        decided = time.thread_time()
        assert placed, "the fleet is too full for this benchmark"
        while bench.held > level and bench.running:
            bench.finish()
        released = time.thread_time()
        if at >= 20:
            latencies.append((decided - begun, released - begun))
    return Timing([decided for decided, _ in latencies], sum(both for _, both in latencies))


def row(name: str, nodes: int, timing: Timing) -> Row:
    return {
        "what": name,
        "nodes": nodes,
        "decisions_per_s": timing.per_s,
        "p50_ms": percentile(timing.decisions_s, 50) * 1e3,
        "p99_ms": percentile(timing.decisions_s, 99) * 1e3,
    }


PREEMPTORS = (64, 256, 1024, 2048, 4096)


def preemption(seed: int, nodes: int = 2000, victims: int = 700) -> dict[int, list[float]]:
    """Seconds of one plan by size of the preemptor: a full fleet, of which `victims` jobs have lower priority."""
    with tempfile.TemporaryFile("w") as journal:
        bench = Bench(nodes, 0.0, seed, journal)
        pick = random.Random(seed)
        while bench.engine.free_gpus():  # jobs of 8 to 64 GPUs, so that 700 of them are most of the fleet
            sizes = [s for s in (8, 16, 32, 64) if s <= bench.engine.free_gpus()]
            bench.decide(bench.request(pick.choice(sizes)))
        ids = sorted(bench.engine.placements, key=lambda _: pick.random())
        assert len(ids) < 2 * victims, "victims are meant to be most of the jobs"
        low = [Victim(id_, pick.randrange(3), pick.random() * 1e5) for id_ in ids[:victims]]
        seconds: dict[int, list[float]] = {}
        for gpus in PREEMPTORS:
            for at in range(4):
                request = PlaceRequest(f"big-{gpus}-{at}", GroupRequest(gpus, subgroups=(Subgroup(8),)), priority=10)
                begun = time.thread_time()
                plan = bench.engine.preempt(request, low)
                if at:  # the first is warm-up
                    seconds.setdefault(gpus, []).append(time.thread_time() - begun)
                assert isinstance(plan, PreemptionPlan), plan
        return seconds


def waiting(seed: int, nodes: int, journal: IO[str]) -> list[float]:
    """Seconds to explain requests that do not fit on a full fleet."""
    bench = Bench(nodes, 0.985, seed, journal)
    seconds = []
    for gpus in [bench.total, 4096, 2048, 1024, 8 * nodes + 8] * 4:
        begun = time.thread_time()
        answer = bench.engine.place(bench.request(gpus))
        seconds.append(time.thread_time() - begun)
        assert isinstance(answer, NoPlacement)
    return seconds[5:]


def profile(run: Callable[[], object], lines: int = 12) -> list[str]:
    """The functions in which the time goes, own time, largest first."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(lines)
    table = text.getvalue().splitlines()
    start = next(i for i, line in enumerate(table) if "tottime" in line)
    return [line.strip() for line in table[start : start + lines + 1] if line.strip()]


def measure(options: Options) -> Report:
    """Decisions per second on one core, latency of large gangs, preemption, explanations, and growth with the fleet."""
    report = Report(simulated="the fleet and the jobs; the engine is the production one")
    rounds = 400 if options.quick else 3000
    gang = [8, 16, 32, 64]
    with tempfile.TemporaryFile("w") as journal:
        means: dict[int, float] = {}
        for nodes in (1000, 5000, 12_500):
            bench = Bench(nodes, 0.7, options.seed, journal)
            single = timed(bench, [1], rounds)
            gangs = timed(bench, gang, rounds)
            big = timed(bench, [1024], rounds // 10)
            report.rows += [row("1 GPU", nodes, single), row("8-64 GPUs", nodes, gangs), row("1,024 GPUs", nodes, big)]
            means[nodes] = 1 / gangs.per_s
            if nodes == 5000:
                at_5000 = (single, gangs, big)
                profiled = profile(lambda b=bench: timed(b, gang, 300))  # type: ignore[misc]
        explained = waiting(options.seed, 5000, journal)
        report.rows.append(row("explain a refusal", 5000, Timing(explained, sum(explained))))
    stopped = preemption(options.seed)
    for gpus, seconds in stopped.items():
        report.rows.append(row(f"{gpus:,} GPUs by preempting among 700", 2000, Timing(seconds, sum(seconds))))
    single, gangs, big = at_5000
    log_growth = 1.3662  # log(12,500) / log(1,000)
    report.targets = [
        Target("single_gpu_decisions_per_s", single.per_s, 10_000, "/s", "higher", per="python"),
        Target("gang_decisions_per_s", gangs.per_s, 1_000, "/s", "higher", per="python"),
        Target("gang_1024_p99_ms", percentile(big.decisions_s, 99) * 1e3, 5, "ms", per="python"),
        Target("preempt_700_victims_ms", max(map(max, stopped.values())) * 1e3, 100, "ms", per="python"),
        Target("growth_1000_to_12500_nodes", means[12_500] / means[1000], log_growth, "x"),
        Target("explain_ms", max(explained) * 1e3, 10, "ms", per="python"),
    ]
    report.notes = ["one core; warm-up of 20 decisions per kind excluded", *(f"profile: {line}" for line in profiled)]
    return report


if __name__ == "__main__":
    sys.exit(main("scheduler_speed", measure))
