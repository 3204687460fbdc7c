"""Several jobs with deadlines on several kinds of GPUs at several prices: who gets which, and when, for the least money.

One job alone takes the cheapest pool on which it ends in time. Together they compete for the cheap ones, so the order in which they
choose decides: the plan is the cheapest found over orders, starting from those who lose most by coming second, improved by moving
one job at a time. Given an order each job takes the cheapest start that meets its deadline on capacity that earlier ones left.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pool:
    """GPUs of one kind at one price. `gpus` 0 is without limit (rented as needed)."""

    name: str
    usd_per_gpu_hour: float
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """What a job would take of one pool, and for how long."""

    pool: int
    gpus: int
    run_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """A job that waits: it must end by `deadline_s` from now, on any one of its choices."""

    id: str
    deadline_s: float
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """When and where a job runs. `late_s` is 0 unless nothing could meet its deadline."""

    id: str
    choice: Choice
    start_s: float
    usd: float
    late_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One assignment per job that any pool can hold, in the order of the jobs given."""

    assignments: tuple[Assignment, ...]

    @property
    def usd(self) -> float:
        return math.fsum(a.usd for a in self.assignments)

    @property
    def late(self) -> int:
        """Jobs that end after their deadline."""
        return sum(a.late_s > 0 for a in self.assignments)

    @property
    def key(self) -> tuple[int, float]:
        return (self.late, round(self.usd, 6))


class Skyline:
    """GPUs in use of one pool over time: a step function, `used[k]` from `times[k]` until the next."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity or math.inf
        self.times, self.used = [0.0], [0]

    def earliest(self, gpus: int, run_s: float) -> float:
        """The first start from which `gpus` are free for `run_s`; infinite when the pool is too small."""
        if gpus > self.capacity:
            return math.inf
        room, start, k = self.capacity - gpus, 0.0, 0
        while k < len(self.times):
            if self.used[k] > room:
                start = self.times[k + 1] if k + 1 < len(self.times) else math.inf
            elif k + 1 == len(self.times) or self.times[k + 1] >= start + run_s:
                return start
            k += 1
        return start

    def take(self, start_s: float, gpus: int, run_s: float) -> None:
        first, last = self._cut(start_s), self._cut(start_s + run_s)
        for k in range(first, last):
            self.used[k] += gpus

    def _cut(self, at_s: float) -> int:
        """The index of the step that begins at `at_s`, made if there is none."""
        k = bisect_right(self.times, at_s) - 1
        if self.times[k] != at_s:
            insort(self.times, at_s)
            self.used.insert(k + 1, self.used[k])
            k += 1
        return k


def usd_of(choice: Choice, pools: Sequence[Pool]) -> float:
    return choice.gpus * choice.run_s / 3600 * pools[choice.pool].usd_per_gpu_hour


def in_order(works: Sequence[Work], pools: Sequence[Pool], order: Sequence[int], *, fastest: bool = False) -> Plan:
    """Each job in turn takes the cheapest (or, if asked, the earliest ending) choice that meets its deadline, else the least late."""
    skylines = [Skyline(p.gpus) for p in pools]
    made: dict[int, Assignment] = {}
    for at in order:
        work = works[at]
        best: tuple[tuple[float, float, float], Assignment] | None = None
        for choice in work.choices:
            start = skylines[choice.pool].earliest(choice.gpus, choice.run_s)
            if math.isinf(start):
                continue
            end, usd = start + choice.run_s, usd_of(choice, pools)
            late = max(0.0, end - work.deadline_s)
            key = (late, end, usd) if fastest else (late, usd, end)
            if best is None or key < best[0]:
                best = (key, Assignment(work.id, choice, start, usd, late))
        if best is not None:
            taken = made[at] = best[1]
            skylines[taken.choice.pool].take(taken.start_s, taken.choice.gpus, taken.choice.run_s)
    return Plan(tuple(made[at] for at in sorted(made)))


def cheapest(works: Sequence[Work], pools: Sequence[Pool], tries: int = 1000) -> Plan:
    """The cheapest plan found within `tries` orders. Deterministic; fewest missed deadlines come first."""
    search = _Search(works, pools, tries)
    orders = sorted(_starts(works, pools), key=lambda order: search.score(order).key)
    order = search.descend(orders[0])
    pick = random.Random(len(works))  # the same kicks for the same set: a plan does not change by itself
    while search.left > 0 and len(works) > 2:
        kicked = list(order)
        for _ in range(1 + pick.randrange(3)):
            at, to = pick.randrange(len(kicked)), pick.randrange(len(kicked))
            kicked[at], kicked[to] = kicked[to], kicked[at]
        before = search.best.key
        kicked = search.descend(kicked)
        order = kicked if search.best.key < before else order
    return search.best


class _Search:
    """Counts the orders tried and keeps the best plan."""

    def __init__(self, works: Sequence[Work], pools: Sequence[Pool], tries: int) -> None:
        self.works, self.pools, self.left = works, pools, tries
        self.best = in_order(works, pools, range(len(works)))

    def score(self, order: Sequence[int]) -> Plan:
        self.left -= 1
        found = in_order(self.works, self.pools, order)
        if found.key < self.best.key:
            self.best = found
        return found

    def descend(self, order: list[int]) -> list[int]:
        """Moves one job at a time to another place in the order while that saves money."""
        plan, moved = self.score(order), True
        while moved and self.left > 0:
            moved = False
            for source, target in _moves(plan, order, self.works, self.pools):
                changed = order[:source] + order[source + 1 :]
                changed.insert(target, order[source])
                found = self.score(changed)
                if found.key < plan.key:
                    plan, order, moved = found, changed, True
                    break
                if self.left <= 0:
                    break
        return order


def _starts(works: Sequence[Work], pools: Sequence[Pool]) -> Iterator[list[int]]:
    """Orders worth starting from: most to lose by coming second (per GPU-second and in all), earliest deadline, largest, as given."""
    everyone = list(range(len(works)))
    prices = [sorted(usd_of(c, pools) for c in w.choices if c.run_s <= w.deadline_s) for w in works]
    regret = [p[1] - p[0] if len(p) > 1 else math.inf for p in prices]
    size = [min((c.gpus * c.run_s for c in w.choices), default=0.0) for w in works]
    slack = [w.deadline_s - min((c.run_s for c in w.choices), default=0.0) for w in works]
    yield sorted(everyone, key=lambda j: (-regret[j] / max(size[j], 1.0), j))
    yield sorted(everyone, key=lambda j: (-regret[j], j))
    yield sorted(everyone, key=lambda j: (works[j].deadline_s, j))
    yield sorted(everyone, key=lambda j: (slack[j], j))
    yield sorted(everyone, key=lambda j: (-size[j], j))
    yield everyone


def _moves(plan: Plan, order: Sequence[int], works: Sequence[Work], pools: Sequence[Pool]) -> Iterator[tuple[int, int]]:
    """Jobs that pay most above their cheapest choice go first, to the front and then to places in between."""
    paid, count = {a.id: a.usd for a in plan.assignments}, len(order)
    excess = [paid.get(w.id, 0.0) - min((usd_of(c, pools) for c in w.choices), default=0.0) for w in works]
    sources = sorted((at for at in range(count) if excess[order[at]] > 1e-9), key=lambda at: (-excess[order[at]], at))
    step = max(1, count // 12)
    for source in sources:
        for target in range(0, count, step):
            if target != source:
                yield source, target
