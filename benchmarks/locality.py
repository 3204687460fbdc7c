"""Jobs find their data where they run: how much of it, and what that costs them.

A fleet of 240 nodes of 8 GPUs under 30 leaves, a third of the nodes with 15 TB of NVMe (every third). Jobs are Philly's sizes and lives;
a quarter of the demand reads one of 60 datasets of 20 GB-3 TB (popular ones more often) 5 to 20 times over,
at no more than half of a node's link, so that short jobs read small ones. Both
policies run the production engine on the same arrivals; "blind" does not tell it about datasets. A node that can keep a dataset reads
it from its home once and from NVMe afterwards; one that cannot reads from the home each time. Reading from afar goes at 1.25 GB/s per node
and stretches the job when its reads do not fit beside its computing; communication stretches it as the engine's model says.
"""

from __future__ import annotations

import heapq
import random
import sys
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from benchmarks.common import Options, Report, Row, Target, main, percentile
from benchmarks.topology import read_jobs
from whaleflux.fleet import Disk, Gpu, Link, LinkKind, Node
from whaleflux_scheduler.core.placement.api import (
    DatasetFact,
    GroupRequest,
    Placement,
    PlaceRequest,
    Preference,
    Subgroup,
)
from whaleflux_scheduler.core.placement.engine import Engine

TB = 10**12
NODES = 240
NVME_BYTES = 15 * TB
HOME_BYTES_PER_S = 1.25e9
_LINKS = tuple(Link(a, b, LinkKind.NVLINK, 347e9) for a, b in combinations(range(8), 2))


def fleet(nodes: int) -> list[Node]:
    return [
        Node(
            name=f"sites/a/nodes/n{n:03}",
            site="a",
            gpus=tuple(Gpu(i, f"{n}-{i}", "H100-80GB", 80 * 10**9) for i in range(8)),
            links=_LINKS,
            spine=f"p{n // 80}",
            leaf=f"l{n // 8:02}",
            disks=(Disk("/nvme", NVME_BYTES),) if n % 3 == 0 else (),
            network_bytes_per_s=400e9,
        )
        for n in range(nodes)
    ]


@dataclass(frozen=True, slots=True)
class Job:
    id: str
    gpus: int
    arrives_s: float
    lasts_s: float  # when all data is local and nothing is shared
    dataset: str
    reads: float


def draw(
    philly: list[tuple[int, float]], nodes: int, load: float, count: int, seed: int
) -> tuple[list[Job], dict[str, int]]:
    """Jobs, and the size of each dataset in bytes."""
    pick = random.Random(seed)
    sizes = {f"d{n:02}": int(2 * 10**10 * 150 ** pick.random()) for n in range(60)}
    weights = {name: 1 / (1 + n) for n, name in enumerate(sizes)}
    kinds = [pick.choice(philly) for _ in range(count)]
    kinds = [(gpus, max(seconds, 600.0)) for gpus, seconds in kinds]
    rate = load * nodes * 8 / (sum(g * s for g, s in kinds) / count)
    at, jobs = 0.0, []
    for n, (gpus, seconds) in enumerate(kinds):
        at += pick.expovariate(rate)
        dataset, reads = "", 0.0
        most_bytes = seconds * HOME_BYTES_PER_S / 2
        readable = [name for name, size in sizes.items() if 5 * size <= most_bytes]
        if readable and pick.random() < 0.25:
            dataset = pick.choices(readable, [weights[name] for name in readable])[0]
            reads = min(pick.uniform(5, 20), most_bytes / sizes[dataset])
        jobs.append(Job(f"j{n}", min(gpus, 128), at, seconds, dataset, reads))
    return jobs, sizes


@dataclass(slots=True)
class Tally:
    """Bytes by where they were read from, and how long jobs took."""

    read: Counter[str] = field(default_factory=Counter)
    took_s: list[float] = field(default_factory=list)
    stretched: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    with_data_s: list[float] = field(default_factory=list)
    holds: Counter[str] = field(default_factory=Counter)


class Run:
    """One policy's fleet: the production engine with its book of held data, agents' caches that are played, a first-come queue.

    A cache keeps what it has until a dataset that is held needs the room: the one that was used longest ago goes first.
    """

    def __init__(self, nodes: int, sizes: dict[str, int], *, aware: bool, shrink: float = 1.0) -> None:
        self.engine, self.sizes, self.aware = Engine(), sizes, aware
        self.copies: dict[str, dict[str, float]] = {}  # by node and dataset: when it was last used
        self.room: dict[str, int] = {}
        for node in fleet(nodes):
            node = replace(
                node, disks=tuple(replace(d, capacity_bytes=int(d.capacity_bytes * shrink)) for d in node.disks)
            )
            self.engine.upsert_node(node)
            self.copies[node.name], self.room[node.name] = {}, sum(d.capacity_bytes for d in node.disks)
        for name, size in sizes.items():
            self.engine.book.resize(name, size)
            if aware:
                self.engine.upsert_dataset(DatasetFact(name, size, (), HOME_BYTES_PER_S))
        self.ends: list[tuple[float, str]] = []
        self.waiting: deque[Job] = deque()
        self.tally = Tally()

    def play(self, jobs: Sequence[Job]) -> Tally:
        for at, job in enumerate(jobs):
            self._until(job.arrives_s)
            self.waiting.append(job)
            self._start(job.arrives_s)
            self.tally.busy.append(1 - self.engine.free_gpus() / len(self.engine.nodes) / 8)
            if at % 500 == 0:
                self._check()
        self._until(float("inf"))
        self._check()
        return self.tally

    def _check(self) -> None:
        """Raises AssertionError when a sum does not hold, or a node has more than its room."""
        self.engine.book.check()
        for node, copies in self.copies.items():
            held = {name for name in copies if self.engine.book.holds(node, name)}
            assert self.engine.book.held_bytes(node) == sum(self.sizes[name] for name in held), (
                f"{node}: held and not there"
            )
            assert sum(map(self.sizes.__getitem__, copies)) <= self.room[node], f"{node} has more than its room"

    def _until(self, now_s: float) -> None:
        while self.ends and self.ends[0][0] <= now_s:
            at, id_ = heapq.heappop(self.ends)
            self.engine.release(id_)
            self.engine.hold_data(id_, ())
            self._start(at)

    def _start(self, now_s: float) -> None:
        while self.waiting:
            job = self.waiting[0]
            subgroups = (Subgroup(8),) if job.gpus % 8 == 0 else ()
            request = PlaceRequest(
                job.id,
                GroupRequest(job.gpus, subgroups=subgroups),
                datasets=(job.dataset,) if job.dataset and self.aware else (),
                data_reads=job.reads,
                preference=Preference(work_gpu_s=job.gpus * job.lasts_s),
            )
            placement = self.engine.fits(request)
            if placement is None:
                return
            self.waiting.popleft()
            self.engine.apply(placement)
            heapq.heappush(self.ends, (now_s + self._run_s(job, placement, now_s), job.id))

    def _run_s(self, job: Job, placement: Placement, now_s: float) -> float:
        """Computing, stretched by communication beyond an idle network's, or reading from afar if that takes longer."""
        ideal = 2e9 * 2 * (job.gpus - 1) / job.gpus / 347e9
        slower = placement.cost.step_communication_s / ideal - 1 if ideal else 0.0
        run_s = job.lasts_s * (1 + 0.1 * max(0.0, slower))
        far_bytes = self._read(job, placement, now_s) if job.dataset else 0.0
        run_s = max(run_s, far_bytes / HOME_BYTES_PER_S)
        self.tally.waited_s.append(now_s - job.arrives_s)
        self.tally.took_s.append(now_s - job.arrives_s + run_s)
        self.tally.stretched.append(run_s / job.lasts_s)
        if job.dataset:
            self.tally.with_data_s.append(now_s - job.arrives_s + run_s)
        return run_s

    def _read(self, job: Job, placement: Placement, now_s: float) -> float:
        """Accounts the job's reads, each node its part; returns the most that one node reads from afar."""
        nodes, size = placement.node_names, self.sizes[job.dataset]
        part, most = size * job.reads / len(nodes), 0.0  # every read is divided among the nodes of the gang
        self.engine.hold_data(job.id, [(node, job.dataset) for node in nodes if self.room[node]])
        for node in nodes:
            far = {"local": 0.0, "fetch": min(part, float(size)), "remote": part}[
                how := self._how(node, job.dataset, now_s)
            ]
            self.tally.holds[how] += 1
            self.tally.read["afar"] += int(far)
            self.tally.read["nvme"] += int(part - far)
            most = max(most, far)
        return most

    def _how(self, node: str, dataset: str, now_s: float) -> str:
        """How it is read there: from the copy, by a fetch that is kept, or from afar each time."""
        copies, book = self.copies[node], self.engine.book
        if not book.holds(node, dataset):
            return "local" if dataset in copies else "remote"
        there, copies[dataset] = dataset in copies, now_s
        if there:
            return "local"
        over = sum(map(self.sizes.__getitem__, copies)) - self.room[node]
        for name in sorted((n for n in copies if not book.holds(node, n)), key=copies.__getitem__):
            if over <= 0:
                break
            over -= self.sizes[name]
            del copies[name]
            self._tell(name)
        self._tell(dataset)
        return "fetch"

    def _tell(self, dataset: str) -> None:
        if self.aware:
            where = tuple(node for node, copies in self.copies.items() if dataset in copies)
            self.engine.upsert_dataset(DatasetFact(dataset, self.sizes[dataset], where, HOME_BYTES_PER_S))


@dataclass(frozen=True, slots=True)
class Regime:
    """How full the fleet is, and how many jobs and histories are played."""

    name: str
    load: float
    jobs: int
    seeds: int


def row(regime: str, policy: str, tallies: Sequence[Tally]) -> Row:
    """Sums and means over the histories."""
    read: Counter[str] = sum((t.read for t in tallies), Counter())
    holds: Counter[str] = sum((t.holds for t in tallies), Counter())
    took = [s for t in tallies for s in t.took_s]
    waited = [s for t in tallies for s in t.waited_s]
    busy = [b for t in tallies for b in t.busy]
    return {
        "regime": regime,
        "policy": policy,
        "jobs": len(took),
        "busy": sum(busy) / len(busy),
        "from_nvme_percent": 100 * read["nvme"] / sum(read.values()),
        "afar_TB": read["afar"] / TB,
        "mean_wait_s": sum(waited) / len(waited),
        "mean_completion_s": sum(took) / len(took),
        "p95_completion_s": percentile(took, 95),
        "found_local": holds["local"],
        "fetched": holds["fetch"],
        "remote": holds["remote"],
    }


def measure(options: Options) -> Report:
    """Bytes read from held NVMe copies and completion time, against placement that does not know where data is."""
    philly = read_jobs(options.trace("pollux", "philly.csv.gz"))
    report = Report(
        simulated="fleet, datasets, reads and clock; caches of agents; engine and book of held data are the production ones"
    )
    regimes = [Regime("load 0.9", 0.9, 8000, 4), Regime("load 0.95 for longer: a queue", 0.95, 20_000, 2)]
    for regime in [Regime("load 0.9", 0.9, 1500, 2)] if options.quick else regimes:
        play(regime, philly, options.seed, report)
    report.notes = [
        "rooms and sums are checked every 500 jobs (an AssertionError would end the run)",
        "first come, first served without backfill: in the queue one gang that waits for whole nodes holds up everyone",
    ]
    return report


def play(regime: Regime, philly: list[tuple[int, float]], seed: int, report: Report) -> None:
    """Both policies on the same histories, and ours again with a tenth of the NVMe."""
    aware, blind, full = [], [], []
    for at in range(regime.seeds):
        jobs, sizes = draw(philly, NODES, regime.load, regime.jobs, seed + at)
        aware.append(Run(NODES, sizes, aware=True).play(jobs))
        blind.append(Run(NODES, sizes, aware=False).play(jobs))
        full.append(Run(NODES, sizes, aware=True, shrink=0.1).play(jobs))
    ours, theirs = row(regime.name, "whaleflux", aware), row(regime.name, "blind", blind)
    small = row(regime.name, "whaleflux, NVMe a tenth as large", full)
    report.rows += [ours, theirs, small]
    longer = 100 * (ours["mean_completion_s"] / theirs["mean_completion_s"] - 1)
    report.targets += [
        Target(f"bytes_from_held_nvme_percent ({regime.name})", ours["from_nvme_percent"], 90, "%", "higher"),
        Target(f"completion_longer_than_blind_percent ({regime.name})", longer, 2, "%"),
        Target(f"jobs_lost_when_full ({regime.name})", ours["jobs"] - small["jobs"], 0, "jobs"),
        Target(f"read_from_afar_when_full ({regime.name})", small["remote"], 1, "holds", "higher"),
    ]


if __name__ == "__main__":
    sys.exit(main("locality", measure))
