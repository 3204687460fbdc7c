"""Moving what runs: how long gangs of at least 64 GPUs wait on a busy, fragmented fleet, with and without rebalancing, and what moves cost.

Small jobs (sizes and run times from Philly's list, those of at most 8 GPUs) keep a fleet of 8-GPU nodes busy; gangs of 64 to 256 GPUs, each on whole
nodes, come all the time and find enough GPUs free in all, but no whole nodes. Nobody has a higher priority, so nobody is preempted. The
baseline is the same production planner without moves, on the same jobs. A third run loses a node that a job is about to move to, each time while that job
saves: every one of them has to run again, on other GPUs or where it was, and no GPU is ever held twice.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.scheduler_speed import fleet
from whaleflux import names
from whaleflux.fleet.model import Node
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.lifecycle import GpuAssignment
from whaleflux_scheduler.core.model import ACTIVE, Job, JobState, SchedulingDecision
from whaleflux_scheduler.core.rebalance import RebalancePlan, RebalanceRules
from whaleflux_scheduler.simulation import happenings, records, running, traces
from whaleflux_scheduler.simulation.runner import SIMULATED, Simulation
from whaleflux_scheduler.simulation.state import State
from whaleflux_scheduler.simulation.timeline import BEGIN
from whaleflux_scheduler.simulation.workload import Delays, NodeEvent, Submission, Workload

HOUR = 3600.0
DELAYS = Delays(start_s=20.0, save_s=30.0, restart_s=60.0)
GANGS = ((64, 0.6), (128, 0.3), (256, 0.1))
LONGEST_S, LONGEST_GANG_S = 48 * HOUR, 3 * HOUR
RESUMES = 0.8  # of the small jobs: their files say how often they save; the others are never moved
GANG_SHARE = 0.2  # of the GPU time asked for
NODE_BACK_S, AGAIN_S = 2 * HOUR, 300.0
RULES = RebalanceRules(most_closer=0)  # what is measured is room for gangs


@dataclass(frozen=True, slots=True)
class Scene:
    """How large and busy; gangs are counted that come between `warm_h` and `until_h`."""

    nodes: int
    load: float
    warm_h: float
    until_h: float
    most_gang: int


QUICK, FULL = Scene(150, 0.95, 0, 6, 64), Scene(5_000, 0.95, 0, 1, 256)


class Jobs:
    """Drawn from the trace's rows, the same for the same seed."""

    def __init__(self, scene: Scene, rows: Sequence[traces.Row], seed: int) -> None:
        self._scene, self._drawn = scene, random.Random(seed)
        self._small = [(row.gpus, min(row.run_s, LONGEST_S)) for row in rows if row.gpus <= 8]
        self._long = [min(row.run_s, LONGEST_GANG_S) for row in rows if row.gpus >= 16]
        self._sizes = [(gpus, share) for gpus, share in GANGS if gpus <= scene.most_gang]
        self._number = 0

    def running(self, nodes: Sequence[Node]) -> Iterator[tuple[Job, Submission]]:
        """Jobs that have run for a while already, the longer the more probably, on nodes at random: what a busier time left behind."""
        left = 8 * len(nodes) * self._scene.load * (1 - GANG_SHARE)
        taken, weights = [0] * len(nodes), [run_s for _, run_s in self._small]
        while left > 0:
            for size, run_s in self._drawn.choices(self._small, weights, k=1000):
                at = self._drawn.randrange(len(nodes))
                if left > 0 and taken[at] + size <= 8:
                    uuids = tuple(gpu.uuid for gpu in nodes[at].gpus[taken[at] : taken[at] + size])
                    taken[at], left = taken[at] + size, left - size
                    job = self._job(0.0, size, run_s * self._drawn.random())
                    yield _placed(job, nodes[at].name, uuids), job

    def __iter__(self) -> Iterator[Submission]:
        scene, gpus = self._scene, self._scene.nodes * 8
        small_s = statistics.fmean(size * run_s for size, run_s in self._small) / (gpus * scene.load * (1 - GANG_SHARE))
        mean = sum(size * share for size, share in self._sizes) / sum(share for _, share in self._sizes)
        gang_s = mean * statistics.fmean(self._long) / (gpus * scene.load * GANG_SHARE)
        next_small, next_gang = self._drawn.expovariate(1 / small_s), self._drawn.expovariate(1 / gang_s)
        while min(next_small, next_gang) < scene.until_h * HOUR:
            if next_small < next_gang:
                yield self._job(next_small, *self._drawn.choice(self._small))
                next_small += self._drawn.expovariate(1 / small_s)
            else:
                yield self._gang(next_gang)
                next_gang += self._drawn.expovariate(1 / gang_s)

    def _job(self, at_s: float, gpus: int, run_s: float) -> Submission:
        return self._named("small", at_s, _spec(gpus, 0, saves=self._drawn.random() < RESUMES), max(60.0, run_s))

    def _gang(self, at_s: float) -> Submission:
        (gpus,) = self._drawn.choices([size for size, _ in self._sizes], [share for _, share in self._sizes])
        return self._named("gang", at_s, _spec(gpus, gpus // 8, saves=True), max(600.0, self._drawn.choice(self._long)))

    def _named(self, what: str, at_s: float, spec: Spec, run_s: float) -> Submission:
        self._number += 1
        return Submission(names.job("q", f"{what}-{self._number:07}"), spec, at_s, run_s)


def _placed(submission: Submission, node: str, uuids: tuple[str, ...]) -> Job:
    """The job as it runs there from the beginning."""
    job = Job(submission.name, submission.spec, JobState.QUEUED, BEGIN, uid=submission.name)
    decision = SchedulingDecision(BEGIN, True, "it ran before")
    return running.running(lifecycle.place(job, GpuAssignment(((node, uuids),)), decision, BEGIN), BEGIN)


@lru_cache(maxsize=64)
def _spec(gpus: int, nodes: int, *, saves: bool) -> Spec:
    return Spec(command=("true",), gpus=gpus, max_nodes=nodes, checkpoint_every_steps=100 if saves else 0)


@dataclass(slots=True)
class Losses:
    """Takes away a node that a job is about to move to, ten seconds after the move was ordered; it comes back later."""

    every: int = 2  # of so many plans one
    plans: int = 0
    lost: dict[str, float] = field(default_factory=dict)  # job -> when its new place was lost
    again: dict[str, bool] = field(default_factory=dict)  # job -> whether it runs (or is done) five minutes later

    def after(self, at_s: float, state: State, plan: RebalancePlan) -> None:
        self.plans += 1
        if self.plans % self.every:
            return
        move = plan.proposals[0].moves[0]
        nodes = (move.to[0][0],)
        state.timeline.add(at_s + 10.0, happenings.node_event, state, NodeEvent(at_s + 10.0, "down", nodes))
        state.timeline.add(at_s + NODE_BACK_S, happenings.node_event, state, NodeEvent(at_s + NODE_BACK_S, "up", nodes))
        for proposal in plan.proposals:
            for one in proposal.moves:
                if any(node in nodes for node, _ in one.to):
                    self.lost[one.job.name] = at_s
                    state.timeline.add(at_s + AGAIN_S, self._look, state, one.job.name)

    def _look(self, at_s: float, state: State, name: str) -> None:
        known = state.jobs.get(name)
        self.again[name] = known is None or known.job.state in ACTIVE


@dataclass(frozen=True, slots=True)
class Outcome:
    row: Row
    waits_s: list[float]
    share: float  # of the GPU time held, what moves cost
    losses: Losses | None = None


def simulated(
    name: str, scene: Scene, rows: Sequence[traces.Row], seed: int, *, rules: RebalanceRules | None, lose: bool
) -> Outcome:
    losses = Losses() if lose else None
    nodes, jobs = fleet(scene.nodes), Jobs(scene, rows, seed)
    began = tuple(jobs.running(nodes))
    workload = Workload(jobs, delays=DELAYS, running=began)
    simulation = Simulation(nodes, workload, rebalance=rules, after_rebalance=losses.after if losses else None)
    end_s = scene.until_h * HOUR
    result = simulation.run(end_s)
    simulation.check()
    waits = [
        (end_s if math.isnan(one.start_s) else one.start_s) - one.submit_s
        for one in result.outcomes
        if one.gpus >= 64 and one.submit_s >= scene.warm_h * HOUR
    ]
    waits.sort()
    moved = sum(len(proposal.moves) for plan in result.rebalances for proposal in plan.proposals)
    cost = sum(proposal.cost_gpu_s for plan in result.rebalances for proposal in plan.proposals)
    moved_gpus = sum(move.gpus for plan in result.rebalances for proposal in plan.proposals for move in proposal.moves)
    restarts = moved_gpus * (DELAYS.save_s + DELAYS.start_s + DELAYS.restart_s)
    row: Row = {
        "run": name,
        "jobs": len(result.outcomes),
        "busy %": 100 * result.held.total / (result.gpus * end_s),
        "gangs": len(waits),
        "gang wait mean min": statistics.fmean(waits) / 60 if waits else math.nan,
        "p50": _quantile(waits, 0.5) / 60,
        "p95": _quantile(waits, 0.95) / 60,
        "small wait mean min": _small_wait_min(result.outcomes, scene),
        "moved": moved,
        "cost %": 100 * restarts / result.held.total,
        "estimated %": 100 * cost / result.held.total,
        "look ms": 1e3 * result.look_s / max(1, result.looks),
        "cpu s": result.total_s,
    }
    return Outcome(row, waits, restarts / result.held.total, losses)


def _small_wait_min(outcomes: Iterable[records.Outcome], scene: Scene) -> float:
    counted = (one for one in outcomes if one.gpus <= 8 and one.submit_s > scene.warm_h * HOUR)
    waits = [one.wait_s for one in counted if not math.isnan(one.start_s)]
    return statistics.fmean(waits) / 60 if waits else math.nan


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1)] if ordered else math.nan


def main_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark takes besides what all take."""
    parser.add_argument("--nodes", type=int, help="nodes of 8 GPUs, 40 or more (default 5,000; quick: 150)")
    parser.add_argument("--hours", type=float, help="how much of the fleet's time (default 1; quick: 6)")


def _scene(options: Options) -> Scene:
    scene, extra = QUICK if options.quick else FULL, options.extra
    return replace(scene, nodes=extra.nodes or scene.nodes, until_h=extra.hours or scene.until_h)


def _told(outcome: Outcome) -> Outcome:
    """Prints a line when a run has ended: the full form takes long."""
    print(json.dumps(outcome.row), file=sys.stderr, flush=True)
    return outcome


def measure(options: Options) -> Report:
    """Waits of gangs of at least 64 GPUs on a busy fleet, with and without moving what runs."""
    scene = _scene(options)
    rows = traces.read(options.trace("pollux", "philly.csv.gz"), 8 * scene.nodes).rows
    runs = [
        _told(simulated("with moves", scene, rows, options.seed, rules=RULES, lose=False)),
        _told(simulated("with moves, nodes lost", scene, rows, options.seed, rules=RULES, lose=True)),
        _told(simulated("without moves", scene, rows, options.seed, rules=None, lose=False)),
    ]
    moved, lost, without = runs
    assert lost.losses is not None
    undone = lost.losses.again
    ratio = statistics.fmean(moved.waits_s) / statistics.fmean(without.waits_s)
    tail = _quantile(moved.waits_s, 0.95) / _quantile(without.waits_s, 0.95)
    return Report(
        rows=[one.row for one in runs],
        targets=[
            Target("gang_wait_mean_ratio", ratio, 0.5, "of the wait without moves"),
            Target("gang_wait_p95_ratio", tail, 0.5, "of the wait without moves"),
            Target("moves_cost", 100 * moved.share, 1.0, "% of GPU-hours"),
            Target(
                "undone",
                100 * sum(undone.values()) / max(1, len(undone)),
                100.0,
                "% run again in 5 min",
                better="higher",
            ),
        ],
        simulated=SIMULATED,
        notes=[
            f"{scene.nodes} nodes of 8 GPUs; gangs that came in hours {scene.warm_h:g} to {scene.until_h:g}; those that wait at the end count as long as they waited",
            f"{len(undone)} jobs lost the node that they were about to move to; {len(undone) - sum(undone.values())} of them did not run 5 min later",
        ],
    )


if __name__ == "__main__":
    sys.exit(main("rebalance", measure, add_arguments=main_arguments))
