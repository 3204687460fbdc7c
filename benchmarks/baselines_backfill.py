"""FIFO, EASY, reservations for the first k, and no reservations at all: the policies that backfilling is compared with, on nodes of equal size.

A job of at most a node's GPUs lies on one node (best fit), a larger one on whole nodes and at most one part. `EASY` is Lifka's: the first that
does not fit gets the earliest time at which it will, by what is estimated of those that run; others may start beside it when they are over by then
or use nothing that it needs then. `k` reservations instead of one is what Slurm's backfill does with `bf_max_job_test`; conservative
backfilling is `k` for all. A job that outlives its estimate is estimated at twice as much, as often as it takes. Nobody is suspended.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NEVER_S = float("inf")


@dataclass(frozen=True, slots=True)
class TraceJob:
    """`expected_s` is what its user says."""

    at_s: float
    run_s: float
    gpus: int
    expected_s: float


@dataclass(slots=True)
class Running:
    """What a job holds: (node, GPUs)."""

    job: TraceJob
    start_s: float
    held: tuple[tuple[int, int], ...]

    def expected_end_s(self, now_s: float) -> float:
        guess_s = max(self.job.expected_s, 1.0)
        while self.start_s + guess_s <= now_s:
            guess_s *= 2
        return self.start_s + guess_s


def place(free: Sequence[int], gpus: int, size: int) -> tuple[tuple[int, int], ...] | None:
    """Where it goes on nodes with so many free GPUs; None: nowhere."""
    whole, rest = divmod(gpus, size)
    found = [(node, size) for node, left in enumerate(free) if left == size][:whole]
    if len(found) < whole:
        return None
    if rest:
        taken = {node for node, _ in found}
        fits = [(left, node) for node, left in enumerate(free) if left >= rest and node not in taken]
        if not fits:
            return None
        found.append((min(fits)[1], rest))
    return tuple(found)


Starts = tuple[list[tuple[int, tuple[tuple[int, int], ...]]], dict[int, float]]
Policy = Callable[[list[int], list[int], Sequence[TraceJob], Sequence[Running], float, int], Starts]


@dataclass(slots=True)
class Outcome:
    """When each job started, in the order of the jobs, and the first start that was promised, by the number of the job."""

    start_s: list[float]
    promised_s: dict[int, float]


def fifo(
    free: list[int], queue: list[int], jobs: Sequence[TraceJob], running: Sequence[Running], now_s: float, size: int
) -> Starts:
    """In order; the first that does not fit keeps all others waiting."""
    starts = []
    for number in queue:
        where = place(free, jobs[number].gpus, size)
        if where is None:
            break
        _take(free, where)
        starts.append((number, where))
    return starts, {}


def no_reservations(
    free: list[int], queue: list[int], jobs: Sequence[TraceJob], running: Sequence[Running], now_s: float, size: int
) -> Starts:
    """In order, whoever fits: no GPU that somebody could use stays idle, and large jobs may starve."""
    starts = []
    refused = size * len(free) + 1
    for number in queue:
        gpus = jobs[number].gpus
        if gpus >= refused:
            continue
        where = place(free, gpus, size)
        if where is None:
            refused = min(refused, gpus)
            continue
        _take(free, where)
        starts.append((number, where))
    return starts, {}


def with_reservations(k: int) -> Policy:
    """EASY for `k` 1; the first `k` that do not fit have reservations that nobody behind them delays, as far as estimates hold."""

    def decide(
        free: list[int], queue: list[int], jobs: Sequence[TraceJob], running: Sequence[Running], now_s: float, size: int
    ) -> Starts:
        starts: list[tuple[int, tuple[tuple[int, int], ...]]] = []
        promises: dict[int, float] = {}
        profile = _Profile(free, running, now_s, size)
        least_refused: dict[int, float] = {}
        for number in queue:
            job = jobs[number]
            if least_refused.get(job.gpus, NEVER_S) <= job.expected_s:
                continue
            where = profile.fits_now(job)
            if where is not None:
                profile.take(where, now_s, now_s + max(job.expected_s, 1.0))
                starts.append((number, where))
            elif len(promises) < k:
                at_s, there = profile.earliest(job)
                profile.take(there, at_s, at_s + max(job.expected_s, 1.0))
                promises[number] = at_s
            else:
                least_refused[job.gpus] = min(least_refused.get(job.gpus, NEVER_S), job.expected_s)
        return starts, promises

    return decide


class _Profile:
    """GPUs free on each node from each of a list of times on."""

    def __init__(self, free: Sequence[int], running: Sequence[Running], now_s: float, size: int) -> None:
        self.size, self.now_s = size, now_s
        ends = sorted((run.expected_end_s(now_s), run.held) for run in running)
        self.times, self.free = [now_s], [list(free)]
        for end_s, held in ends:
            if end_s > self.times[-1]:
                self.times.append(end_s)
                self.free.append(list(self.free[-1]))
            for node, gpus in held:
                self.free[-1][node] += gpus

    def fits_now(self, job: TraceJob) -> tuple[tuple[int, int], ...] | None:
        if place(self.free[0], job.gpus, self.size) is None:
            return None
        return place(self._least(0, self.now_s + max(job.expected_s, 1.0)), job.gpus, self.size)

    def earliest(self, job: TraceJob) -> tuple[float, tuple[tuple[int, int], ...]]:
        for at, at_s in enumerate(self.times):
            if place(self.free[at], job.gpus, self.size) is None:
                continue
            where = place(self._least(at, at_s + max(job.expected_s, 1.0)), job.gpus, self.size)
            if where is not None:
                return at_s, where
        raise ValueError(f"{job.gpus} GPUs never fit")

    def _least(self, at: int, until_s: float) -> list[int]:
        """The fewest free GPUs of each node from then until `until_s`."""
        least = self.free[at]
        for later in range(at + 1, len(self.times)):
            if self.times[later] >= until_s:
                break
            least = list(map(min, least, self.free[later]))
        return least

    def take(self, where: tuple[tuple[int, int], ...], from_s: float, until_s: float) -> None:
        begin, end = self._at(from_s), self._at(until_s)
        for at in range(begin, end):
            for node, gpus in where:
                self.free[at][node] -= gpus

    def _at(self, at_s: float) -> int:
        """The index of that time, which is added where it is new."""
        for index, known_s in enumerate(self.times):
            if known_s == at_s:
                return index
            if known_s > at_s:
                self.times.insert(index, at_s)
                self.free.insert(index, list(self.free[index - 1]))
                return index
        self.times.append(at_s)
        self.free.append(list(self.free[-1]))
        return len(self.times) - 1


def run(jobs: Sequence[TraceJob], nodes: int, size: int, policy: Policy) -> Outcome:
    """All jobs, in the order of their submission, to the last start."""
    free, queue, running = [size] * nodes, list[int](), dict[int, Running]()
    outcome = Outcome([NEVER_S] * len(jobs), {})
    ends: list[tuple[float, int]] = []
    arrived = 0
    while arrived < len(jobs) or queue:
        now_s = min(ends[0][0] if ends else NEVER_S, jobs[arrived].at_s if arrived < len(jobs) else NEVER_S)
        while ends and ends[0][0] <= now_s:
            _give(free, running.pop(heapq.heappop(ends)[1]).held)
        while arrived < len(jobs) and jobs[arrived].at_s <= now_s:
            queue.append(arrived)
            arrived += 1
        starts, promises = (
            policy(list(free), queue, jobs, list(running.values()), now_s, size) if any(free) else ([], {})
        )
        for number, at_s in promises.items():
            outcome.promised_s.setdefault(number, at_s)
        for number, where in starts:
            _take(free, where)
            running[number] = Running(jobs[number], now_s, where)
            outcome.start_s[number] = now_s
            heapq.heappush(ends, (now_s + jobs[number].run_s, number))
        if starts:
            gone = {number for number, _ in starts}
            queue = [number for number in queue if number not in gone]
    return outcome


def _take(free: list[int], where: Sequence[tuple[int, int]]) -> None:
    for node, gpus in where:
        free[node] -= gpus


def _give(free: list[int], where: Sequence[tuple[int, int]]) -> None:
    for node, gpus in where:
        free[node] += gpus
