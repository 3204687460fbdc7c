"""The rungs: each does the same work as those below it, by the production scheduler's step and the console's own rules, and one thing more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.tco_lab import blind, kinds
from benchmarks.tco_lab.speeds import NODE
from benchmarks.tco_lab.work import WEEK_S, Work, interrupted, nodes, submissions
from whaleflux.fleet.model import Node
from whaleflux_console.core.recommend import fewer_gpus, release_idle
from whaleflux_console.core.recommend.release_idle import GRACE_MS
from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.core.rebalance import RebalanceRules
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.workload import Delays, NodeEvent, Workload

# H100 SXM, Nebius eu-north1, on demand and preemptible, of one catalogue (v8 snapshot, 2025-26): validation/prices.csv
USD_PER_GPU_HOUR, SPOT_USD_PER_GPU_HOUR = 2.95, 1.25
DONE = 0.95  # owned GPUs are counted until so much of the work is done: the last days belong to a few long jobs
DELAYS = Delays(start_s=30.0, save_s=30.0, restart_s=60.0)
LOOK_EVERY_S = 1800.0  # for moves: the leader looks each minute, which can only find more
RUNGS = ("placement", "consolidation", "idle released", "right-sized", "half of it spot")
INTERRUPTED_S, AWAY_S = 86400.0, 3600.0  # [P] a spot node is taken back about once a day and comes again after an hour
TAIL_WEEKS = 8  # for which interruptions are drawn


@dataclass(frozen=True, slots=True)
class Ran:
    """One rung: dollars for the GPUs while jobs held them, when so much of the work was done, and how long 95 % of jobs, and of gangs of two nodes and more, took."""

    usd: float
    done_s: float
    p95_s: float
    gangs_p95_s: float = 0.0


def baselines(work: Sequence[Work], gpus: int) -> dict[str, Ran]:
    """Each of the blind ways."""
    return {way.name: _blind(work, gpus, way) for way in blind.WAYS}


def best(ways: Sequence[Ran]) -> Ran:
    """The best of them in each figure, though none may have all three: nothing is held against a weak one."""
    return Ran(
        min(one.usd for one in ways),
        min(one.done_s for one in ways),
        min(one.p95_s for one in ways),
        min(one.gangs_p95_s for one in ways),
    )


def rungs(work: Sequence[Work], gpus: int, seed: int) -> dict[str, Ran]:
    """From placement to price, each with all before it."""
    rules, fleet = RebalanceRules(), nodes(gpus, USD_PER_GPU_HOUR)
    freed = [released(one) for one in work]
    sized = [right_sized(one) for one in freed]
    mixed = nodes(gpus, USD_PER_GPU_HOUR, SPOT_USD_PER_GPU_HOUR)
    taken = interrupted(mixed, INTERRUPTED_S, AWAY_S, TAIL_WEEKS * WEEK_S, seed)
    ran = (
        _ours(work, fleet),
        _ours(work, fleet, rules),
        _ours(freed, fleet, rules),
        _ours(sized, fleet, rules),
        _ours(sized, mixed, rules, taken),
    )
    return dict(zip(RUNGS, ran, strict=True))


def released(one: Work) -> Work:
    """Its GPUs go back half an hour into its rest, where the console says so."""
    part = kinds.part(one.run_s + one.idle_s, one.gpus, allocated_idle=one.idle_s)
    said = kinds.promised(release_idle.find, [part], one.gpus)
    return replace(one, idle_s=min(one.idle_s, GRACE_MS / 1000)) if said else one


def right_sized(one: Work) -> Work:
    """On half of its GPUs where the console says so and both speeds were measured: for the same work at the same global batch."""
    half = -(-one.gpus // 2 // NODE)
    double = one.app.doubled(one.gpus // 2, half, one.batch)
    if one.gpus < 2 or one.gpus % 2 or double is None or one.batch not in one.app.batches(one.gpus, one.fewest_nodes):
        return one
    now = one.app.step(one.gpus, one.fewest_nodes, one.batch)
    then = one.app.step(one.gpus // 2, half, double)
    slower = then.step_s * 2 * one.batch / double / now.step_s  # for as many samples
    name = "comm_in_node" if one.fewest_nodes == 1 else "comm_structural"
    part = kinds.part(one.run_s, one.gpus, **{name: one.run_s * min(1.0, now.sync_s / now.step_s)})
    if not kinds.promised(fewer_gpus.find, [part], one.gpus):
        return one
    return replace(one, gpus=one.gpus // 2, batch=double, run_s=one.run_s * slower)


def _blind(work: Sequence[Work], gpus: int, way: blind.Way) -> Ran:
    done = blind.run(work, gpus, way)
    held_s = sum((ran.end_s - ran.start_s + DELAYS.start_s) * one.gpus for one, ran in zip(work, done, strict=True))
    return _ran(work, held_s / 3600 * USD_PER_GPU_HOUR, [ran.end_s for ran in done])


def _ours(
    work: Sequence[Work], fleet: Sequence[Node], rules: RebalanceRules | None = None, events: Sequence[NodeEvent] = ()
) -> Ran:
    """By the production scheduler's step. Raises ArithmeticError where it did not do all of the work."""
    jobs = Workload(list(submissions(work)), {}, DELAYS)
    result = Simulation(fleet, jobs, events=events, rebalance=rules, look_every_s=LOOK_EVERY_S).run()
    undone = sum(one.state is not JobState.SUCCEEDED for one in result.outcomes)
    if undone:
        raise ArithmeticError(f"{undone} of {len(work)} jobs were not done: this is not the same work")
    return _ran(work, result.job_usd, [one.end_s for one in result.outcomes])


def _ran(work: Sequence[Work], usd: float, ends: Sequence[float]) -> Ran:
    gangs = {one.number for one in work if one.was_gpus >= 2 * NODE}
    whole, so_far, done_s = sum(one.useful_gpu_s for one in work), 0.0, 0.0
    for end_s, one in sorted(zip(ends, work, strict=True), key=lambda pair: pair[0]):
        so_far, done_s = so_far + one.useful_gpu_s, end_s
        if so_far >= DONE * whole:
            break
    took = [(end_s - one.at_s, one.number) for end_s, one in zip(ends, work, strict=True)]
    return Ran(usd, done_s, _p95([s for s, _ in took]), _p95([s for s, number in took if number in gangs]))


def _p95(seconds: Sequence[float]) -> float:
    return sorted(seconds)[int(0.95 * (len(seconds) - 1))] if seconds else 0.0
