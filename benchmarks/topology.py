"""How much communication time does topology-aware placement save? On a real network tree, against how others choose.

Tree: 847 hosts of a three-layer Clos (lingjun2023), taken as 8 GPUs each with 400 Gb/s per GPU to the leaf. Jobs: half of the demand is
Philly's mix of sizes, half is spread evenly over 8, 16, 32, 64 and 128 GPUs; durations are Philly's. Every policy sees the same arrivals
on its own copy of the fleet. At sample times each gang's ring all-reduce is laid over the links: each of its rails is one flow
per ring edge, hashed onto one port of each uplink group it passes (static ECMP). A flow gets its port's line rate divided by the flows on
it, and the ring waits for its slowest flow. All gangs send at once. The engine is not told the hashing, only the expectation.
"""

from __future__ import annotations

import csv
import gzip
import heapq
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from benchmarks.baselines_topology import (
    Given,
    Policy,
    Tree,
    blind_first_fit,
    blind_random,
    kai_order,
    kueue_best_fit,
    slurm_block,
)
from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.topology_exact import compare
from whaleflux.fleet import Gpu, Link, LinkKind, Node
from whaleflux.fleet.links import Fabric
from whaleflux_scheduler.core.placement.api import GroupRequest, PlaceRequest, Subgroup
from whaleflux_scheduler.core.placement.engine import Engine

RAILS = 8
NIC = 50e9
NVLINK = 347e9
BUFFER = 2e9
_LINKS = tuple(Link(a, b, LinkKind.NVLINK, NVLINK) for a, b in combinations(range(8), 2))


def read_tree(path: Path) -> tuple[Tree, list[tuple[str, str]]]:
    """Hosts sorted by (PSW, ASW, address); ASW ids repeat under different PSWs, so a leaf is the pair."""
    with path.open(encoding="utf-8") as file:
        rows = sorted((r["PSW"], r["ASW"], r["ip"]) for r in csv.DictReader(file))
    places = [(psw, asw) for psw, asw, _ in rows]
    leaves = {place: at for at, place in enumerate(dict.fromkeys(places))}
    spines = {psw: at for at, psw in enumerate(dict.fromkeys(psw for psw, _ in places))}
    return Tree(tuple(leaves[p] for p in places), tuple(spines[p] for p, _ in places)), places


def read_jobs(path: Path) -> list[tuple[int, float]]:
    """(GPUs, seconds) of Philly's jobs; lives under a minute are left out, longer than a day cut."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found = [(int(r["num_gpus"]), float(r["duration"])) for r in csv.DictReader(file)]
    return [(gpus, min(seconds, 86_400.0)) for gpus, seconds in found if seconds >= 60]


@dataclass(frozen=True, slots=True)
class Job:
    id: int
    gpus: int
    arrives_s: float
    lasts_s: float

    def pods(self, largest: int) -> tuple[int, int]:
        """(pods, GPUs of each): the largest pod size up to `largest` that divides the job."""
        gpus = next(g for g in (8, 4, 2, 1) if g <= largest and self.gpus % g == 0)
        return self.gpus // gpus, gpus


def draw_jobs(philly: list[tuple[int, float]], gpus: int, load: float, count: int, seed: int) -> list[Job]:
    """Poisson arrivals that offer `load` of the fleet in GPU-seconds: half of them Philly's mix, half 8 to 128 GPUs in equal parts."""
    pick = random.Random(seed)
    sizes = [8, 16, 32, 64, 128]
    weights = [1 / n for n in sizes]
    lives = [s for _, s in philly]
    demand = sum(n * s for n, s in philly) / len(philly)
    other = len(sizes) / sum(weights) * sum(lives) / len(lives)
    kinds: list[tuple[int, float]] = []
    for _ in range(count):
        if pick.random() < other / (other + demand):  # so that each half offers half of the demand
            kinds.append(pick.choice(philly))
        else:
            kinds.append((pick.choices(sizes, weights)[0], pick.choice(lives)))
    rate = load * gpus / (sum(n * s for n, s in kinds) / count)
    at, jobs = 0.0, []
    for id_, (n, seconds) in enumerate(kinds):
        at += pick.expovariate(rate)
        jobs.append(Job(id_, n, at, seconds))
    return jobs


class OurPolicy:
    """The production engine behind the same interface."""

    def __init__(self, tree: Tree, oversubscription: float) -> None:
        self.engine = Engine(
            Fabric(leaf_oversubscription=oversubscription, spine_oversubscription=1.0, nic_bytes_per_s=NIC)
        )
        self.host: dict[str, int] = {}
        for host, (leaf, spine) in enumerate(zip(tree.leaf, tree.spine, strict=True)):
            node = Node(
                name=f"sites/a/nodes/h{host:04}",
                site="a",
                gpus=tuple(Gpu(i, f"{host}-{i}", "GPU", 80 * 10**9) for i in range(8)),
                links=_LINKS,
                spine=f"p{spine}",
                leaf=f"l{leaf:03}",
                network_bytes_per_s=RAILS * NIC,
            )
            self.host[node.name] = host
            self.engine.upsert_node(node)

    def start(self, job: Job, pod: int) -> Given | None:
        _, size = job.pods(pod)
        subgroups = (Subgroup(size),) if size > 1 else ()
        placement = self.engine.fits(PlaceRequest(str(job.id), GroupRequest(job.gpus, subgroups=subgroups)))
        if placement is None:
            return None
        self.engine.apply(placement)
        return [(self.host[part.node], len(part.gpus)) for part in placement.nodes]

    def end(self, job: Job) -> None:
        self.engine.release(str(job.id))


class OtherPolicy:
    """A baseline with its own record of free GPUs."""

    def __init__(self, tree: Tree, choose: Policy) -> None:
        self.tree, self.choose = tree, choose
        self.free = [8] * len(tree.leaf)
        self.placed: dict[int, Given] = {}

    def start(self, job: Job, pod: int) -> Given | None:
        given = self.choose(self.tree, self.free, *job.pods(pod))
        if given is not None:
            assert sum(gpus for _, gpus in given) == job.gpus
            self.placed[job.id] = given
            for host, gpus in given:
                assert self.free[host] >= gpus, "a GPU was given twice"
                self.free[host] -= gpus
        return given

    def end(self, job: Job) -> None:
        for host, gpus in self.placed.pop(job.id):
            self.free[host] += gpus


@dataclass(slots=True)
class Network:
    """Lays running gangs over the links. Ports of a group: the lines of all its hosts over the oversubscription."""

    tree: Tree
    oversubscription: float
    hashed: bool = True
    leaf_ports: dict[int, int] = field(default_factory=dict)
    spine_ports: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.leaf_ports = {
            d: max(1, int(n * RAILS / self.oversubscription)) for d, n in Counter(self.tree.leaf).items()
        }
        self.spine_ports = {
            d: max(1, int(n * RAILS / self.oversubscription)) for d, n in Counter(self.tree.spine).items()
        }

    def times(self, running: dict[int, Given], salt: int) -> dict[int, float]:
        """Seconds of one all-reduce of `BUFFER` for every gang of 8 GPUs or more."""
        gangs = {id_: given for id_, given in running.items() if sum(g for _, g in given) >= 8}
        ports: Counter[tuple[str, int, int]] = Counter()
        groups: Counter[tuple[str, int]] = Counter()
        used: dict[int, list[tuple[str, int, int]]] = {}
        for id_, given in gangs.items():
            used[id_] = flows = self._flows(id_, given, salt)
            ports.update(flows)
            groups.update((kind, d) for kind, d, _ in flows)
        seconds = {}
        for id_, given in gangs.items():
            slowest = 1.0
            if self.hashed:
                slowest = float(max((ports[port] for port in used[id_]), default=1))
            elif used[id_]:
                slowest = max(1.0, *(groups[k, d] / self._lines(k, d) for k, d, _ in used[id_]))
            rails = min(gpus for _, gpus in given)
            bus = NVLINK if len(given) == 1 else min(NVLINK, rails * NIC / slowest)
            ranks = sum(gpus for _, gpus in given)
            seconds[id_] = BUFFER * 2 * (ranks - 1) / ranks / bus
        return seconds

    def _lines(self, kind: str, d: int) -> int:
        return (self.leaf_ports if kind in ("leaf up", "leaf down") else self.spine_ports)[d]

    def _flows(self, id_: int, given: Given, salt: int) -> list[tuple[str, int, int]]:
        """The port of every rail of every ring edge that leaves a leaf, at each group it passes."""
        pick = random.Random(id_ * 1_000_003 + salt)
        tree, rails = self.tree, min(gpus for _, gpus in given)
        found: list[tuple[str, int, int]] = []
        for at, (host, _) in enumerate(given):
            after = given[(at + 1) % len(given)][0]
            passed: list[tuple[str, int]] = []
            if tree.leaf[host] != tree.leaf[after]:
                passed += [("leaf up", tree.leaf[host]), ("leaf down", tree.leaf[after])]
            if tree.spine[host] != tree.spine[after]:
                passed += [("spine up", tree.spine[host]), ("spine down", tree.spine[after])]
            for kind, d in passed:
                lines = self._lines(kind, d)
                found += [(kind, d, pick.randrange(lines)) for _ in range(rails)]
        return found


@dataclass(slots=True)
class Result:
    """Communication seconds per step, by gang size in GPUs, weighted by time; and what was refused."""

    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    leaves: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    hosts: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    refused: int = 0
    split: int = 0  # gangs that got parts of islands although enough whole ones were free
    busy: list[float] = field(default_factory=list)

    def weighted(self) -> float:
        """Mean over the GPUs of gangs of 8 and more."""
        return sum(size * sum(s) for size, s in self.seconds.items()) / sum(
            size * len(s) for size, s in self.seconds.items()
        )

    def mean(self, size: int) -> float:
        return sum(self.seconds[size]) / len(self.seconds[size]) if self.seconds.get(size) else math.nan


def simulate(
    tree: Tree, policy: OurPolicy | OtherPolicy, jobs: Sequence[Job], network: Network, pod: int, samples: int
) -> Result:
    """Runs the arrivals; a gang that does not fit is refused. The first third is warm-up."""
    running: dict[int, Given] = {}
    ends: list[tuple[float, int]] = []
    result = Result()
    free = [8] * len(tree.leaf)
    start, every = len(jobs) // 3, max(1, len(jobs) * 2 // 3 // samples)
    for at, job in enumerate(jobs):
        while ends and ends[0][0] <= job.arrives_s:
            _, id_ = heapq.heappop(ends)
            policy.end(jobs[id_])
            for host, gpus in running.pop(id_):
                free[host] += gpus
        whole = sum(gpus == 8 for gpus in free)
        fits_one = max(free) >= job.gpus
        given = policy.start(job, pod)
        if given is None:
            result.refused += 1
        else:
            result.split += splits_an_island(job, given, whole, fits_one=fits_one)
            for host, gpus in given:
                free[host] -= gpus
            running[job.id] = given
            heapq.heappush(ends, (job.arrives_s + job.lasts_s, job.id))
        if at > start and at % every == 0:
            sample(tree, running, network, result, at)
    return result


def splits_an_island(job: Job, given: Given, whole: int, *, fits_one: bool) -> bool:
    """Whether NVLink was given up needlessly: several hosts where one had room, or parts of hosts where enough were whole."""
    if job.gpus <= 8:
        return len(given) > 1 and fits_one
    return job.gpus % 8 == 0 and whole >= job.gpus // 8 and any(gpus < 8 for _, gpus in given)


def sample(tree: Tree, running: dict[int, Given], network: Network, result: Result, salt: int) -> None:
    for id_, seconds in network.times(running, salt).items():
        given = running[id_]
        size = sum(gpus for _, gpus in given)
        result.seconds[size].append(seconds)
        result.leaves[size].append(len({tree.leaf[h] for h, _ in given}))
        result.hosts[size].append(len(given))
    result.busy.append(sum(gpus for given in running.values() for _, gpus in given) / len(tree.leaf) / 8)


def policies(tree: Tree, oversubscription: float, seed: int) -> dict[str, OurPolicy | OtherPolicy]:
    return {
        "whaleflux": OurPolicy(tree, oversubscription),
        "kueue best-fit": OtherPolicy(tree, kueue_best_fit),
        "kai order": OtherPolicy(tree, kai_order),
        "slurm block": OtherPolicy(tree, slurm_block),
        "blind random": OtherPolicy(tree, blind_random(seed)),
        "blind first-fit": OtherPolicy(tree, blind_first_fit(seed)),
    }


def measure(options: Options) -> Report:
    """Modelled communication time of gangs placed by us and by others on the same tree under the same load."""
    tree, _ = read_tree(options.trace("lingjun2023", "topo.csv"))
    philly = read_jobs(options.trace("pollux", "philly.csv.gz"))
    count, states = (5000, 40) if options.quick else (30_000, 400)
    report = Report(simulated="jobs, placements and network; the tree and the job sizes are real")
    for load in (0.9,) if options.quick else (0.5, 0.7, 0.9):
        jobs = draw_jobs(philly, 8 * len(tree.leaf), load, count, options.seed)
        for over in (1.0, 2.0):
            alone = bound(tree, Network(tree, over), options.seed)
            for pod in (8, 1):
                where = {"load": load, "oversubscribed": f"{over:g}:1", "pods_of": pod}
                found = {}
                for name, policy in policies(tree, over, options.seed).items():
                    found[name] = simulate(tree, policy, jobs, Network(tree, over), pod, samples=60)
                    report.rows.append({"policy": name, **where, **table_row(found[name])})
                floor = weigh(found["whaleflux"], alone)
                report.rows.append({"policy": "bound: alone, fewest leaves", **where, "ms_per_step": floor * 1e3})
                named = f"load {load}, {over:g}:1, pods of {pod}"
                report.targets += targets(named, found)
                over_bound = 100 * (found["whaleflux"].weighted() / floor - 1)
                report.targets.append(Target(f"over_bound_percent ({named})", over_bound, 1, "%"))
    rows, exact = compare(options.seed, states)
    report.rows += rows
    report.targets += exact
    report.notes = [
        "pods of 8: rivals are told that gangs want whole hosts, their best case; pods of 1: they are told GPUs only, as Philly's jobs say",
        "bound: each gang alone on an empty fleet on the fewest leaves; no policy can be below it by more than chance in hashing",
        "where rivals are within 2 % of the bound (pods of 8) nobody can need 20 % less than they",
        "quick runs do not reach the offered load" if options.quick else "the first third of the jobs is warm-up",
    ]
    return report


def bound(tree: Tree, network: Network, seed: int) -> dict[int, float]:
    """Seconds by gang size when the gang is alone and on whole hosts of the fewest leaves: the mean over hashings."""
    best = {}
    for size in (8, 16, 24, 32, 64, 128):
        hosts = kueue_best_fit(tree, [8] * len(tree.leaf), size // 8, 8)
        assert hosts is not None
        seconds = [network.times({at: hosts}, seed)[at] for at in range(200)]
        best[size] = sum(seconds) / len(seconds)
    return best


def weigh(result: Result, alone: dict[int, float]) -> float:
    """The bound's mean over the same gangs as a result's; sizes without a bound keep their measured mean."""
    sizes = {size: len(s) for size, s in result.seconds.items()}
    total = sum(size * n * alone.get(size, result.mean(size)) for size, n in sizes.items())
    return total / sum(size * n for size, n in sizes.items())


def table_row(result: Result) -> Row:
    return {
        "busy": float(np.mean(result.busy)),
        "refused": result.refused,
        "split": result.split,
        "ms_per_step": result.weighted() * 1e3,
        **{f"ms_{size}": result.mean(size) * 1e3 for size in (8, 16, 32, 64, 128)},
        "leaves_128": float(np.mean(result.leaves[128])) if result.leaves.get(128) else math.nan,
    }


def targets(where: str, found: dict[str, Result]) -> list[Target]:
    ours = found["whaleflux"]
    rivals = [
        Target(
            f"less_than_{name.split()[0]}_percent ({where})",
            100 * (1 - ours.weighted() / found[name].weighted()),
            20,
            "%",
            "higher",
        )
        for name in ("kueue best-fit", "kai order", "slurm block")
    ]
    blind = min(found[name].mean(128) for name in ("blind random", "blind first-fit"))
    return [
        *rivals,
        Target(f"128_gpus_less_than_blind_percent ({where})", 100 * (1 - ours.mean(128) / blind), 60, "%", "higher"),
        Target(f"islands_split_needlessly ({where})", ours.split, 0, "gangs"),
    ]


if __name__ == "__main__":
    sys.exit(main("topology", measure))
