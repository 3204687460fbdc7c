"""Two Ray clusters with uneven load and training on one pool, for an hour: GPUs that idle, and how long tasks wait, beside static halves.

One cluster is busy while the other rests; four times in the hour they change, and bursts come on top. In static halves each has 32 GPUs of its own. In
the pool each holds what its tasks need; training, of lower priority, fills the rest and makes room. All decisions are production code under virtual time: how
many workers (`core.ray_sizing`, each second), which of them leave (`core.ray_leaving`), where, and who makes room (the scheduler's step). What is modelled:
Ray itself (`ray_pool_cluster`), the time to see demand, to save and to start. Tasks are Philly's jobs, ten times as fast; training is Philly's jobs as they are.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks import tenants
from benchmarks.common import Options, Report, Row, Target, main, percentile
from benchmarks.ray_pool_cluster import Cluster, Task, delays
from whaleflux import names
from whaleflux.manifests.job_fields import Spec
from whaleflux.manifests.ray_file import IDLE_S
from whaleflux_scheduler.core.model import JobState, Queue
from whaleflux_scheduler.core.ray_clusters import RayCluster
from whaleflux_scheduler.core.ray_leaving import Idle, leaving
from whaleflux_scheduler.core.ray_nodes import Cluster as Asked
from whaleflux_scheduler.core.ray_parts import Part, Role, Worker
from whaleflux_scheduler.core.ray_sizing import Seen, size
from whaleflux_scheduler.simulation import happenings, traces
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.timeline import instant
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

HOUR_S, QUICK_S, NODES = 3600.0, 900.0, 8
GPUS = NODES * tenants.PER_NODE
HIGH, LOW, BURST, CHANGES_S, BURST_EVERY_S = 24.0, 3.0, 8, 900.0, 300.0  # GPUs in use on the mean; tasks of a burst
WARM_S = 60.0  # training is there first
MOST_AT_ONCE = 48  # GPUs that all tasks ask for at once
SEEN_S, LOOK_S = 1.0, 1.0  # raylets tell what waits once a second; the leader looks as often
PRIORITY = 100  # of the clusters' workers; training has 0
DELAYS = Delays(start_s=6.0, save_s=4.0, checkpoint_every_s=600.0, restart_s=10.0)
CLUSTERS = ("one", "two")
ENDLESS_S = 1e9


@dataclass(slots=True)
class Use:
    """GPUs by what they did, second by second: worked for tasks, worked for training, and idle in one way or another."""

    tasks: int = 0
    training: int = 0
    idle_workers: int = 0
    starting: int = 0  # workers that join, training that saves, starts or loads
    free: int = 0

    @property
    def total(self) -> int:
        return self.tasks + self.training + self.idle_workers + self.starting + self.free

    @property
    def idle_share(self) -> float:
        """Of all GPU time, what nothing worked in."""
        return 1 - (self.tasks + self.training) / max(1, self.total)


@dataclass(slots=True)
class Outcome:
    """What came of one way to share."""

    use: Use
    delays_s: list[float]
    lost: int = 0  # tasks that began anew
    waiting: int = 0  # at the end
    workers: int = 0
    stopped: int = 0  # training that made room


def measure(options: Options) -> Report:
    span_s = QUICK_S if options.quick else HOUR_S
    rows = traces.read(options.trace("pollux", "philly.csv.gz"), tenants.PER_NODE).rows
    tasks = demand(rows, span_s, options.seed)
    training = training_of(rows, span_s, options.seed)
    halves = static_halves(copies(tasks), span_s)
    alone = Pool(copies(tasks), [], span_s).run()
    own_time = Pool(copies(tasks), training, span_s, soon=False).run()
    pool = Pool(copies(tasks), training, span_s).run()
    found = {
        "static halves": halves,
        "one pool, no training": alone,
        f"one pool, workers leave when idle for {IDLE_S:g} s": own_time,
        "one pool": pool,
    }
    targets = [
        Target("idle_gpu_share", 100 * pool.use.idle_share, 10.0, "%"),
        Target("longest_delay_of_a_task", pool.delays_s[-1], 15.0, "s"),
        Target("tasks_that_began_anew", pool.lost, 0, "tasks"),
    ]
    return Report(
        rows=[_row(who, outcome) for who, outcome in found.items()],
        targets=targets,
        simulated="Ray, agents, network and store: what waits is seen after a second, a worker joins "
        f"{DELAYS.start_s:g} s after it was placed, training saves in {DELAYS.save_s:g} s and loads in {DELAYS.restart_s:g} s",
        notes=[
            f"{sum(map(len, tasks.values()))} tasks in {span_s / 60:.0f} minutes on {GPUS} GPUs; idle is what worked for nobody, starts and saves included"
        ],
    )


def _row(who: str, found: Outcome) -> Row:
    share = {
        name: round(100 * getattr(found.use, name) / found.use.total, 1)
        for name in ("tasks", "training", "idle_workers", "starting", "free")
    }
    return {
        "how": who,
        "idle_percent": round(100 * found.use.idle_share, 1),
        **{f"{name}_percent": value for name, value in share.items()},
        "delay_p50_s": round(percentile(found.delays_s, 50), 1),
        "delay_p99_s": round(percentile(found.delays_s, 99), 1),
        "delay_most_s": round(found.delays_s[-1], 1),
        "over_15_s": sum(one > 15.0 for one in found.delays_s),
        "workers": found.workers,
        "training_stopped": found.stopped,
    }


# what comes


def demand(rows: Sequence[traces.Row], span_s: float, seed: int) -> dict[str, list[Task]]:
    """Tasks of each cluster: as many as keep its GPUs in use on the mean, a burst now and then, and never more at once than the pool has."""
    draw, drawn = random.Random(seed), _tasks_of(rows)
    mean_gpu_s = sum(gpus * run_s for gpus, run_s in drawn) / len(drawn)
    coming = [
        (at_s, cluster, *drawn[draw.randrange(len(drawn))])
        for cluster in CLUSTERS
        for at_s in _arrivals(draw, cluster, span_s, mean_gpu_s)
    ]
    found: dict[str, list[Task]] = {cluster: [] for cluster in CLUSTERS}
    going = list[tuple[float, int]]()
    for at_s, cluster, gpus, run_s in sorted(coming):
        going = [one for one in going if one[0] > at_s]
        if sum(g for _, g in going) + gpus <= MOST_AT_ONCE:
            going.append((at_s + run_s, gpus))
            found[cluster].append(Task(at_s, run_s, gpus))
    return found


def _tasks_of(rows: Sequence[traces.Row]) -> list[tuple[int, float]]:
    """GPUs and seconds: a minute of the trace is two seconds, none is shorter than 2 s or longer than 5 min."""
    return [(row.gpus, min(600.0, max(5.0, row.run_s / 10))) for row in rows[1000:5000] if row.gpus <= 4]


def _arrivals(draw: random.Random, cluster: str, span_s: float, mean_gpu_s: float) -> list[float]:
    found, at_s = list[float](), WARM_S
    while at_s < span_s:
        busy = int(at_s // CHANGES_S) % 2 == CLUSTERS.index(cluster)
        at_s += draw.expovariate((HIGH if busy else LOW) / mean_gpu_s)
        found.append(at_s)
    bursts = range(int(span_s // BURST_EVERY_S))
    begin_s = {n: WARM_S + BURST_EVERY_S * (n + 0.8 * draw.random()) for n in bursts}
    return found + [begin_s[n] + draw.random() for n in bursts for _ in range(BURST)]


def copies(tasks: dict[str, list[Task]]) -> dict[str, list[Task]]:
    return {cluster: [replace(task) for task in mine] for cluster, mine in tasks.items()}


def training_of(rows: Sequence[traces.Row], span_s: float, seed: int) -> list[Submission]:
    """Twice as much as the pool could do, all of it there from the beginning: Philly's jobs of five minutes and more, as they are."""
    draw, found, gpu_s = random.Random(seed + 1), list[Submission](), 0.0
    long = [row for row in rows[1000:5000] if row.run_s >= 300.0]
    while gpu_s < 2 * GPUS * span_s:
        row = draw.choice(long)
        spec = Spec(command=("train",), gpus=row.gpus, checkpoint_every_steps=100, expected_s=row.run_s)
        found.append(Submission(names.job("training", f"j{len(found):04}"), spec, 0.0, row.run_s))
        gpu_s += row.gpus * min(row.run_s, span_s)
    return found


# how it is shared


def static_halves(tasks: dict[str, list[Task]], span_s: float) -> Outcome:
    """Each cluster has half of the nodes, always."""
    use, found = Use(), {name: Cluster(mine) for name, mine in tasks.items()}
    for name, cluster in found.items():
        for n in range(NODES // len(CLUSTERS)):
            cluster.join(f"{name}-{n}", {"GPU": 8.0, "CPU": 192.0}, 0.0)
    for second in range(1, int(span_s) + 1):
        for cluster in found.values():
            cluster.run_until(second)
        busy = sum(cluster.busy_gpus for cluster in found.values())
        use.tasks += busy
        use.idle_workers += GPUS - busy
    return _outcome(use, found, tasks)


def _outcome(use: Use, found: dict[str, Cluster], tasks: dict[str, list[Task]]) -> Outcome:
    every = [task for mine in tasks.values() for task in mine]
    return Outcome(
        use, delays(every), sum(task.lost for task in every), sum(len(one.waiting) for one in found.values())
    )


class Pool:
    """The production scheduler on all nodes, with both clusters and training."""

    def __init__(
        self, tasks: dict[str, list[Task]], training: Sequence[Submission], span_s: float, *, soon: bool = True
    ) -> None:
        self._tasks, self._span_s, self._use, self._soon = tasks, span_s, Use(), soon
        self._clusters = {name: Cluster(mine) for name, mine in tasks.items()}
        self._records = {name: RayCluster(f"rayClusters/{name}", name, PRIORITY, GPUS) for name in CLUSTERS}
        self._made = Counter[str]()
        self._workers: dict[str, dict[str, Worker]] = {name: {} for name in CLUSTERS}
        heads = [Submission(names.job(name, "head"), Spec(command=("ray",)), 0.0, ENDLESS_S) for name in CLUSTERS]
        workload = Workload(
            [*heads, *training], {name: Queue(names.queue(name)) for name in (*CLUSTERS, "training")}, DELAYS
        )
        self._simulation = Simulation(tenants.fleet(NODES), workload)
        self._state = self._simulation._state
        self._state.timeline.add(LOOK_S, self._second)

    def run(self) -> Outcome:
        self._simulation.run(self._span_s)
        outcome = _outcome(self._use, self._clusters, self._tasks)
        outcome.workers = self._made.total()
        outcome.stopped = sum(one.suspensions for one in self._state.result.outcomes if one.queue == "training")
        return outcome

    def check(self) -> None:
        """Raises AssertionError when a GPU is held twice."""
        self._simulation.check()

    def _second(self, at_s: float) -> None:
        """What happened since the last look, what the leader does about it, and who did what."""
        for name, cluster in self._clusters.items():
            cluster.run_until(at_s)
            self._follow(name, cluster, at_s)
            self._size(name, cluster, at_s)
        self._count(at_s)
        self._state.timeline.add(at_s + LOOK_S, self._second)

    def _follow(self, name: str, cluster: Cluster, at_s: float) -> None:
        """Workers that run join, those that were stopped are lost, and those that are idle leave."""
        for job, worker in [*self._workers[name].items()]:
            simulated = self._state.jobs.get(job)
            runs = simulated is not None and simulated.job.state is JobState.RUNNING
            if runs and job not in cluster.nodes:
                cluster.join(job, worker.total, at_s)
            elif not runs and job in cluster.nodes:
                cluster.lose(job)
            if simulated is None:
                del self._workers[name][job]
        idle = [
            Idle(node.job, node.gpus, "", at_s - node.idle_s) for node in cluster.nodes.values() if not node.running
        ]
        wanted = self._simulation._plan.gpus_wanted() if idle and self._soon else {}
        over = {one.instance for one in idle if one.idle_s >= IDLE_S}
        for job in over.union(leaving(idle, wanted)):
            simulated = self._state.jobs[job]
            happenings.finish(at_s, self._state, simulated, simulated.turn)
            cluster.lose(job)
            del self._workers[name][job]

    def _size(self, name: str, cluster: Cluster, at_s: float) -> None:
        parts = [self._part(job, worker) for job, worker in self._workers[name].items()]
        seen = Seen(Asked(cluster.demand(at_s - SEEN_S), (), cluster.states()), frozenset(cluster.nodes))
        sizing = size(self._records[name], seen, parts, self._simulation._plan.free_nodes(), instant(at_s))
        for end in sizing.end:
            simulated = self._state.jobs[end.job]
            happenings.cancel(at_s, self._state, simulated, simulated.turn)
            del self._workers[name][end.job]
        for worker in sizing.start:
            self._made[name] += 1
            job = names.job(name, f"w{self._made[name]:05}")
            self._workers[name][job] = worker
            spec = Spec(
                command=("ray",),
                gpus=worker.gpus,
                priority=PRIORITY,
                max_nodes=1,
                cpu_millicores_per_rank=1000 * worker.cpus_held // max(1, worker.gpus),
                max_restarts=0,
            )
            happenings.submit(self._state, Submission(job, spec, at_s, ENDLESS_S, is_ray_worker=True))

    def _part(self, job: str, worker: Worker) -> Part:
        known = self._state.jobs[job].job
        since = known.attempt.allocate_time if known.attempt is not None else known.create_time
        return Part(job, Role.WORKER, known.state, since, worker=worker)

    def _count(self, at_s: float) -> None:
        use, busy = self._use, sum(cluster.busy_gpus for cluster in self._clusters.values())
        joined = sum(cluster.gpus for cluster in self._clusters.values())
        held, works = 0, 0
        for one in self._state.jobs.values():
            held += int(one.held) if one.there else 0
            if (
                one.there
                and one.job.state is JobState.RUNNING
                and one.job.queue == "training"
                and one.works_from_s <= at_s
            ):
                works += int(one.held)
        use.tasks += busy
        use.training += works
        use.idle_workers += joined - busy
        use.starting += held - joined - works
        use.free += GPUS - held


def options_of(parser: argparse.ArgumentParser) -> None:
    del parser


if __name__ == "__main__":
    sys.exit(main("ray_pool", measure))
