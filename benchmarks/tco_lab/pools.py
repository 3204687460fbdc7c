"""What is promised of free GPUs by the first half of a history, and what doing it saves in the second, by the production scheduler's step.

Jobs come at random: one to three GPUs, and gangs that need whole nodes. Both halves are drawn alike. Fragmented and idle are told apart by the
console's own function, an hour at a time, as it bills them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.tco_lab.kinds import DAY_S, MICROS_PER_GPU_S, Case
from benchmarks.tco_lab.speeds import NODE
from benchmarks.tco_lab.work import nodes
from whaleflux.manifests.job_fields import Spec
from whaleflux_console.core.chronicle import Device
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.fragmentation import WaitingGang, fragmented
from whaleflux_console.core.recommend import commit, defragment, hand_back
from whaleflux_console.core.recommend.evidence import Part, Rented, Reserved, Spent, Window
from whaleflux_console.core.recommend.recommendation import Recommendation
from whaleflux_console.core.rows import CLASSES, CostClass
from whaleflux_scheduler.core.rebalance import RebalanceRules
from whaleflux_scheduler.simulation.records import MoveLog
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

HOUR_S, DAYS = 3600.0, 2  # of a half
DELAYS = Delays(start_s=30.0, save_s=30.0, restart_s=60.0)


@dataclass(frozen=True, slots=True)
class Half:
    """A history of free GPUs. GPU-seconds: fragmented, of work that was done within it, and what its moves cost."""

    parts: tuple[Part, ...]  # by hour
    fragmented_gpu_s: float
    work_gpu_s: float
    moves_gpu_s: float
    held: tuple[Part, ...]  # by hour: of GPUs that work


def cases(seed: int, *, back: int, together: int, reserved: int) -> list[Case]:
    """So many of each kind: `together` takes half a minute each, the others seconds."""
    drawn = random.Random(seed)
    numbers = {handed_back: back, moved_together: together, committed: reserved}
    return [play(drawn) for play, count in numbers.items() for _ in range(count)]


def committed(drawn: random.Random) -> Case:
    """What works in nine hours of ten is reserved, at a price between the least and the most that is usual; the next week has other jobs."""
    gpus, load, price = 64, drawn.uniform(0.4, 0.9), drawn.uniform(0.4, 0.9)
    first, second = (_played(_jobs(drawn, load * gpus, 0.2, days=7), gpus, days=7) for _ in range(2))
    reserved = Reserved("prices/r", round(price * 1_000_000), "drawn")
    spent = [Spent("s/c/on_demand", one.held, node_gpus=NODE) for one in (first, second)]
    said = commit.find(Window(0, 7 * 24 * HOUR_MS), Rented(spent[0], reserved))
    if said is None:
        return Case("commit", 0.0, 0.0)
    many = int(said.change.split()[0])
    used = sum(min(part.bill_micros, many * 1_000_000) for part in second.held)
    return Case("commit", said.saved_micros, used - many * reserved.micros_per_hour * 7 * 24)


def moved_together(drawn: random.Random) -> Case:
    """Gangs wait beside free GPUs that lie apart; then running jobs are moved for them, each move with its save and restart."""
    gpus, load = drawn.choice((64, 128)), drawn.uniform(0.85, 0.98)
    first, second = (_jobs(drawn, load * gpus, gangs=drawn.uniform(0.2, 0.5)) for _ in range(2))
    said = _promised(defragment.find, _played(first, gpus))
    if not said:
        return Case("defragment", 0.0, 0.0)
    stays, moves = _played(second, gpus), _played(second, gpus, RebalanceRules())
    saved = stays.fragmented_gpu_s - moves.fragmented_gpu_s - moves.moves_gpu_s
    return Case("defragment", said.saved_micros, saved * MICROS_PER_GPU_S)


def handed_back(drawn: random.Random) -> Case:
    """A fleet that is larger than its work needs, then without the nodes that are handed back; work that is not done in time is not saved."""
    gpus, load = drawn.choice((32, 64)), drawn.uniform(0.4, 0.8)
    first, second = (_jobs(drawn, load * gpus, gangs=0.2) for _ in range(2))
    said = _promised(hand_back.find, _played(first, gpus))
    if not said:
        return Case("hand_back", 0.0, 0.0)
    back = NODE * round(said.saved_micros / (MICROS_PER_GPU_S * DAYS * DAY_S * NODE))
    stays, fewer = _played(second, gpus), _played(second, gpus - back)
    late_gpu_s = max(0.0, stays.work_gpu_s - fewer.work_gpu_s)
    return Case("hand_back", said.saved_micros, (back * DAYS * DAY_S - late_gpu_s) * MICROS_PER_GPU_S)


def _jobs(drawn: random.Random, gpus: float, gangs: float, days: int = DAYS) -> list[Submission]:
    """Work for so many GPUs; `gangs` of it is of jobs on whole nodes."""
    wanted, rows = gpus * days * DAY_S, list[tuple[float, int, float]]()
    while wanted > 0:
        size = NODE * drawn.choice((1, 1, 2, 4)) if drawn.random() < gangs / 4 else drawn.choice((1, 1, 2, 3))
        run_s = min(2 * DAY_S, drawn.expovariate(1 / (6 * HOUR_S)) + 600)
        rows.append((drawn.uniform(0, days * DAY_S), size, run_s))
        wanted -= size * run_s
    return [_submission(number, *row) for number, row in enumerate(sorted(rows))]


def _submission(number: int, at_s: float, gpus: int, run_s: float) -> Submission:
    spec = Spec(command=("true",), gpus=gpus, max_nodes=-(-gpus // NODE), checkpoint_every_steps=100)
    return Submission(f"queues/q/jobs/j{number:05}", replace(spec, expected_s=1.2 * run_s + 300), at_s, run_s)


def _promised(find: Callable[[Window, Spent], Recommendation | None], half: Half) -> Recommendation | None:
    return find(Window(0, int(DAYS * DAY_S * 1000)), Spent("s/c", half.parts, node_gpus=NODE))


class Log(MoveLog):
    """Every move with its second, for what is free and who waits between them."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[float, str, str]] = []

    def add(self, at_s: float, move: str, job: str, nodes: tuple[tuple[str, tuple[str, ...]], ...] = ()) -> None:
        super().add(at_s, move, job, nodes)
        self.kept.append((at_s, move, job))


def _played(jobs: Sequence[Submission], gpus: int, rules: RebalanceRules | None = None, days: int = DAYS) -> Half:
    """The half, by the production step."""
    end_s, log = days * DAY_S, Log()
    simulation = Simulation(nodes(gpus, 1.0), Workload(jobs, {}, DELAYS), log=log, rebalance=rules)
    moved = [proposal.cost_gpu_s for plan in simulation.run(end_s).rebalances for proposal in plan.proposals]
    hours = [[0.0, 0.0] for _ in range(round(end_s / HOUR_S))]
    for start_s, until_s, free, wasted in _levels(jobs, log, gpus, end_s):
        for hour in range(int(start_s // HOUR_S), -(-int(until_s) // 3600) + 1):
            inside_s = min(until_s, (hour + 1) * HOUR_S) - max(start_s, hour * HOUR_S)
            if inside_s > 0:
                hours[hour][0] += (free - wasted) * inside_s
                hours[hour][1] += wasted * inside_s
    parts = tuple(
        _part({CostClass.IDLE: idle, CostClass.FRAGMENTED: wasted}) for idle, wasted in hours if idle or wasted
    )
    held = tuple(_part({CostClass.USEFUL: gpus * HOUR_S - idle - wasted}) for idle, wasted in hours)
    done = {job for _, move, job in log.kept if move == "succeeded"}
    work_gpu_s = sum(one.run_s * one.spec.gpus for one in jobs if one.name in done)
    return Half(parts, sum(wasted for _, wasted in hours), work_gpu_s, sum(moved), held)


def _levels(jobs: Sequence[Submission], log: Log, gpus: int, end_s: float) -> Iterator[tuple[float, float, int, int]]:
    """(from, to, free GPUs, those of them that are fragmented)."""
    devices = [Device(f"d{n:03}", f"d{n:03}", "sites/s/nodes/n", "c", 1_000_000, True) for n in range(gpus)]
    size = {one.name: one.spec.gpus for one in jobs}
    waiting, moving = dict[str, WaitingGang](), set[str]()
    free, at_s = gpus, 0.0
    events = [*((one.at_s, "submit", one.name) for one in jobs), *log.kept, (end_s, "end", "")]
    for to_s, move, job in sorted(events, key=lambda event: event[0]):
        wasted = len(fragmented(devices[:free], {}, list(waiting.values()))) if to_s > at_s else 0
        yield at_s, to_s, free, wasted
        at_s = max(at_s, to_s)
        if move == "claim" and job not in waiting:
            moving.add(job)  # its place is kept for it: it waits for nobody
        elif move in {"submit", "suspend"} and job not in moving:
            waiting[job] = WaitingGang(job, size[job])
        elif move == "start":
            waiting.pop(job, None)
            moving.discard(job)
        free += {"start": -1, "suspend": 1, "succeeded": 1}.get(move, 0) * size.get(job, 0)


def _part(gpu_s: Mapping[CostClass, float]) -> Part:
    micros = tuple(round(gpu_s.get(kind, 0.0) * MICROS_PER_GPU_S) for kind in CLASSES)
    return Part(round(sum(gpu_s.values()) * 1000), micros)
