"""What each kind of recommendation promises of the first half of a history, and what doing it saves in the second: replayed, not asserted.

The promises are the console's own (`core/recommend`); the replays are measured speeds (Pollux), recorded failures and idle spells.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

from benchmarks.tco_lab.speeds import NODE, App
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.recommend import checkpoint_interval, fewer_gpus, one_island, release_idle
from whaleflux_console.core.recommend.evidence import Part, Spent, Window
from whaleflux_console.core.recommend.recommendation import Recommendation
from whaleflux_console.core.rows import CLASSES, CostClass

MICROS_PER_GPU_S = 1_000_000 / 3600  # at 1 USD per GPU-hour: a ratio does not depend on the price
DAY_S, START_S = 86400.0, 60.0
DAYS = 7


@dataclass(frozen=True, slots=True)
class Case:
    """Micro-dollars of the second half."""

    kind: str
    promised: float
    replayed: float


def part(seconds: float, gpus: int, **classes: float) -> Part:
    """A stretch of a job: `classes` are seconds; the rest is useful."""
    rest = seconds - sum(classes.values())
    by_class = {CostClass.USEFUL: rest} | {CostClass(name): value for name, value in classes.items()}
    micros = tuple(round(by_class.get(kind, 0.0) * gpus * MICROS_PER_GPU_S) for kind in CLASSES)
    return Part(round(seconds * gpus * 1000), micros)


def promised(find: Callable[[Window, Spent], Recommendation | None], parts: Sequence[Part], gpus: int) -> float:
    """What it says of a history; 0 where it says nothing."""
    hours = round(sum(one.gpu_ms for one in parts) / gpus / HOUR_MS)
    spent = Spent("queues/q/jobs/j", tuple(parts), gpus=gpus)
    found = find(Window(0, hours * HOUR_MS), spent)
    return float(found.saved_micros) if found else 0.0


def idle(drawn: random.Random) -> Case:
    """A job that works and rests by turns; released half an hour into each rest, it starts again when there is work."""
    gpus, work_h, rest_h = drawn.choice((1, 2, 4, 8)), drawn.uniform(4, 48), drawn.uniform(2, 36)
    halves = []
    for _ in range(2):
        by_day, spells, at, working = [0.0] * DAYS, list[float](), 0.0, drawn.random() < 0.5
        while at < DAYS * DAY_S:
            length = drawn.expovariate(1 / (work_h if working else rest_h)) * 3600
            length = min(length, DAYS * DAY_S - at)
            if not working:
                spells.append(length)
                _spread(by_day, at, at + length)
            at, working = at + length, not working
        halves.append((by_day, spells))
    said = promised(release_idle.find, [part(DAY_S, gpus, allocated_idle=one) for one in halves[0][0]], gpus)
    saved = sum(max(0.0, one - 1800 - START_S) for one in halves[1][1]) * gpus * MICROS_PER_GPU_S
    return Case("release_idle", said, saved if said else 0.0)


def _spread(by_day: list[float], start: float, end: float) -> None:
    for day in range(len(by_day)):
        by_day[day] += max(0.0, min(end, (day + 1) * DAY_S) - max(start, day * DAY_S))


def island(drawn: random.Random, app: App) -> Case:
    """A job that is spread over more nodes than it needs, then moved; both speeds were measured."""
    gpus = drawn.choice((2, 3, 4, 8, 16))
    best = -(-gpus // NODE)
    nodes = min(gpus, best + drawn.randint(1, 3))
    batch = drawn.choice(app.batches(gpus, best) or [app.middle(gpus)])
    spread, tight = app.step(gpus, nodes, batch), app.step(gpus, best, batch)
    avoidable = max(0.0, spread.sync_s * (1 - tight.sync_s / spread.sync_s)) / spread.step_s if spread.sync_s else 0.0
    parts = [
        part(DAY_S, gpus, comm_avoidable=avoidable * DAY_S, startup=START_S if not day else 0.0) for day in range(DAYS)
    ]
    said = promised(one_island.find, parts, gpus)
    saved = (DAYS * DAY_S * (1 - tight.step_s / spread.step_s) - START_S) * gpus * MICROS_PER_GPU_S
    return Case("one_island", said, saved if said else 0.0)


def fewer(drawn: random.Random, app: App) -> Case:
    """A job on whole nodes, then on half of them with twice the batch each, where both were measured."""
    gpus = drawn.choice((2, 4, 8, 16))
    nodes, half = -(-gpus // NODE), -(-gpus // 2 // NODE)
    sizes = [(size, app.doubled(gpus // 2, half, size)) for size in app.batches(gpus, nodes)]
    found = [(size, double) for size, double in sizes if double is not None]
    if not found:
        return Case("fewer_gpus", 0.0, 0.0)
    batch, double = drawn.choice(found)
    now, then = app.step(gpus, nodes, batch), app.step(gpus // 2, half, double)
    slower = then.step_s * 2 * batch / double / now.step_s  # for as many samples
    share = min(1.0, now.sync_s / now.step_s)
    name = "comm_in_node" if nodes == 1 else "comm_structural"
    said = promised(fewer_gpus.find, [part(DAY_S, gpus, **{name: share * DAY_S})] * DAYS, gpus)
    saved = DAYS * DAY_S * (1 - slower / 2) * gpus * MICROS_PER_GPU_S
    return Case("fewer_gpus", said, saved if said else 0.0)


def interval(drawn: random.Random) -> Case:
    """Failures at random on 1,024 to 4,096 GPUs; the second half is played with the old interval and with the one that it says."""
    gpus, save_s = drawn.choice((1024, 2048, 4096)), drawn.uniform(20, 120)
    mtbf_s = 50_000 * 3600 / gpus * 24 * drawn.uniform(0.01, 0.03)
    every_s = sqrt(2 * save_s * mtbf_s) * drawn.choice((0.2, 0.3, 4.0, 6.0))
    first, second = (_failures(drawn, mtbf_s) for _ in range(2))
    costs = [_save_and_lost(first[day], every_s, save_s) for day in range(DAYS)]
    said = promised(checkpoint_interval.find, [part(DAY_S, gpus, save=save, lost=lost) for save, lost in costs], gpus)
    saves, losts = (sum(column) for column in zip(*costs, strict=True))
    if not said:
        return Case("checkpoint_interval", 0.0, 0.0)
    better_s = every_s * sqrt(saves / losts)
    old, new = (sum(sum(_save_and_lost(day, each, save_s)) for day in second) for each in (every_s, better_s))
    return Case("checkpoint_interval", said, (old - new) * gpus * MICROS_PER_GPU_S)


def _failures(drawn: random.Random, mtbf_s: float) -> list[list[float]]:
    """Seconds of each day at which something failed."""
    days: list[list[float]] = [[] for _ in range(DAYS)]
    at = drawn.expovariate(1 / mtbf_s)
    while at < DAYS * DAY_S:
        days[int(at // DAY_S)].append(at % DAY_S)
        at += drawn.expovariate(1 / mtbf_s)
    return days


def _save_and_lost(failures: Sequence[float], every_s: float, save_s: float) -> tuple[float, float]:
    """Seconds of a day: saves after every so much work, and what was done since the last one at each failure."""
    saves = lost = at = 0.0
    for end in (*failures, DAY_S):
        whole = int((end - at) // (every_s + save_s))
        saves += whole * save_s
        lost += end - at - whole * (every_s + save_s) if end < DAY_S else 0.0
        at = end
    return saves, lost
