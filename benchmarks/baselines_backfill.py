"""FIFO, EASY, conservative backfilling and no reservations at all: the policies that promised starts are compared with, on nodes of equal size.

A job of at most a node's GPUs lies on one node (best fit), a larger one on whole nodes and at most one part. EASY is Lifka's (1995): the first
that does not fit gets the earliest time at which it will, by what is estimated of those that run; others may start beside it when they are over
by then or use nothing that it needs then. Conservative backfilling (Mu'alem and Feitelson, 2001) gives such a time to all that do not fit, and
`k` of them is what Slurm's backfill does with `bf_max_job_test`: like it, all are planned anew at each event. A job that outlives its estimate is
estimated again. Nobody is suspended.

What is expected of run times comes from a `Predictor`, so that they can be told the same that we are. Nothing else is known to a policy.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

NEVER_S = math.inf
ALL = 10**9  # reservations: conservative backfilling

Where = tuple[tuple[int, int], ...]
"""(node, GPUs)."""


@dataclass(frozen=True, slots=True)
class TraceJob:
    """`expected_s` is what its user says."""

    at_s: float
    run_s: float
    gpus: int
    expected_s: float


class Predictor(Protocol):
    """How long jobs are expected to run; jobs by their number."""

    def guess_s(self, number: int, ran_s: float) -> float:
        """Seconds in all, more than it has run."""

    def ended(self, number: int) -> None:
        """How long it ran is known now."""


@dataclass(frozen=True, slots=True)
class Said:
    """What users say, and twice as much as often as it takes."""

    jobs: Sequence[TraceJob]

    def guess_s(self, number: int, ran_s: float) -> float:
        guess_s = max(self.jobs[number].expected_s, 1.0)
        while guess_s <= ran_s:
            guess_s *= 2
        return guess_s

    def ended(self, number: int) -> None:
        """Nothing is learned."""


def place(free: Sequence[int], gpus: int, size: int) -> Where | None:
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


class Waiting:
    """Who waits, by size in the order of submission."""

    def __init__(self, jobs: Sequence[TraceJob]) -> None:
        numbers: dict[int, list[int]] = {}
        for number, job in enumerate(jobs):
            numbers.setdefault(job.gpus, []).append(number)
        self._jobs = jobs
        self._numbers = {gpus: np.array(found) for gpus, found in numbers.items()}
        self._guess_s = {gpus: np.full(len(found), NEVER_S) for gpus, found in numbers.items()}
        self._span = {gpus: [0, 0] for gpus in numbers}  # from the first that waits to the last that came
        self._many = dict.fromkeys(numbers, 0)

    @property
    def sizes(self) -> list[int]:
        """Of those who wait, GPUs."""
        return [gpus for gpus, many in self._many.items() if many]

    def join(self, number: int, guess_s: float) -> None:
        gpus = self._jobs[number].gpus
        self._guess_s[gpus][self._span[gpus][1]] = guess_s
        self._span[gpus][1] += 1
        self._many[gpus] += 1

    def leave(self, number: int) -> None:
        gpus = self._jobs[number].gpus
        guess_s, span = self._guess_s[gpus], self._span[gpus]
        guess_s[int(np.searchsorted(self._numbers[gpus], number))] = NEVER_S
        self._many[gpus] -= 1
        while span[0] < span[1] and guess_s[span[0]] == NEVER_S:
            span[0] += 1

    def first(self, gpus: int, most_s: float, after: int = -1) -> int | None:
        """The number of the first of that size that is expected to take no longer."""
        first, last = self._span[gpus]
        if after >= 0:
            first = max(first, int(np.searchsorted(self._numbers[gpus], after, side="right")))
        short = self._guess_s[gpus][first:last] <= min(most_s, 1e300)
        at = int(short.argmax()) if short.size else 0
        return int(self._numbers[gpus][first + at]) if short.size and short[at] else None

    def in_order(self) -> Iterator[int]:
        """All, the first one first; those that came before may leave meanwhile."""
        at = -1
        while (firsts := [n for gpus in self.sizes if (n := self.first(gpus, NEVER_S, at)) is not None]) and (
            at := min(firsts)
        ) >= 0:
            yield at

    def guess_s(self, number: int) -> float:
        """As it was when the job came."""
        gpus = self._jobs[number].gpus
        return float(self._guess_s[gpus][int(np.searchsorted(self._numbers[gpus], number))])


@dataclass(slots=True)
class Scene:
    """What a policy sees: free GPUs of each node, who waits, and (expected end, number) and place of those who run."""

    size: int
    jobs: Sequence[TraceJob]
    waiting: Waiting
    free: list[int]
    now_s: float = 0.0
    ends: list[tuple[float, int]] = field(default_factory=list)
    held: dict[int, Where] = field(default_factory=dict)


class Policy(Protocol):
    """Decides at one event; `came` are the numbers of those who arrived with it."""

    def __call__(self, scene: Scene, came: Sequence[int], *, ended: bool) -> Iterator[tuple[int, Where]]:
        """Who starts where, the first one first; each is started before the next is asked for."""

    @property
    def promised_s(self) -> dict[int, float]:
        """The first start that each was promised."""


@dataclass(slots=True)
class Fifo:
    """In order; the first that does not fit keeps all others waiting."""

    promised_s: dict[int, float] = field(default_factory=dict)

    def __call__(self, scene: Scene, came: Sequence[int], *, ended: bool) -> Iterator[tuple[int, Where]]:
        for number in scene.waiting.in_order():
            where = place(scene.free, scene.jobs[number].gpus, scene.size)
            if where is None:
                return
            yield number, where


@dataclass(slots=True)
class WorkConserving:
    """In order, whoever fits: no GPU that somebody could use stays idle, and large jobs may starve."""

    promised_s: dict[int, float] = field(default_factory=dict)

    def __call__(self, scene: Scene, came: Sequence[int], *, ended: bool) -> Iterator[tuple[int, Where]]:
        waiting, refused = scene.waiting, set[int]()
        while firsts := [waiting.first(gpus, NEVER_S) for gpus in waiting.sizes if gpus not in refused]:
            number = min(n for n in firsts if n is not None)
            where = place(scene.free, scene.jobs[number].gpus, scene.size)
            if where is None:
                refused.add(scene.jobs[number].gpus)
            else:
                yield number, where


@dataclass(slots=True)
class Reservations:
    """EASY for `k` 1: the first `k` that do not fit have reservations that nobody behind them delays, as far as estimates hold."""

    k: int = 1
    promised_s: dict[int, float] = field(default_factory=dict)
    _until_s: dict[int, float] = field(default_factory=dict)  # by size: over by then, a job may start; as found last

    def __call__(self, scene: Scene, came: Sequence[int], *, ended: bool) -> Iterator[tuple[int, Where]]:
        if not ended and self._all_too_long(scene, came):
            return
        profile, waiting = _Profile(scene), scene.waiting
        promised = 0
        for number in waiting.in_order():
            gpus, guess_s = scene.jobs[number].gpus, waiting.guess_s(number)
            if scene.now_s + guess_s <= profile.until_s(gpus):
                where = profile.now(gpus, guess_s)
                profile.take(where, scene.now_s, scene.now_s + guess_s)
                yield number, where
                continue
            at_s, where = profile.earliest(gpus, guess_s)
            profile.take(where, at_s, at_s + guess_s)
            self.promised_s.setdefault(number, at_s)
            promised += 1
            if promised == self.k:
                yield from self._beside(scene, profile, number)
                return
        self._until_s = {}

    def _all_too_long(self, scene: Scene, came: Sequence[int]) -> bool:
        """Whether nothing changed but that these came, and none of them is over in time."""
        jobs, guess_s = scene.jobs, scene.waiting.guess_s
        return bool(self._until_s) and all(
            scene.now_s + guess_s(n) > self._until_s.get(jobs[n].gpus, NEVER_S) for n in came
        )

    def _beside(self, scene: Scene, profile: _Profile, after: int) -> Iterator[tuple[int, Where]]:
        """Those behind the reservations that delay none of them."""
        while True:
            self._until_s = {gpus: profile.until_s(gpus) for gpus in scene.waiting.sizes}
            found = (scene.waiting.first(g, until_s - scene.now_s, after) for g, until_s in self._until_s.items())
            number = min((n for n in found if n is not None), default=None)
            if number is None:
                return
            guess_s = scene.waiting.guess_s(number)
            where = profile.now(scene.jobs[number].gpus, guess_s)
            profile.take(where, scene.now_s, scene.now_s + guess_s)
            yield number, where


class _Profile:
    """GPUs free on each node (columns) from each of a list of times on (rows)."""

    def __init__(self, scene: Scene) -> None:
        self.size, self.now_s = scene.size, scene.now_s
        self.times = [scene.now_s]
        freed = [np.array(scene.free, dtype=np.int32)]
        for end_s, number in scene.ends:
            if end_s > self.times[-1]:
                self.times.append(end_s)
                freed.append(np.zeros(len(scene.free), dtype=np.int32))
            for node, gpus in scene.held[number]:
                freed[-1][node] += gpus
        self.free: npt.NDArray[np.int32] = np.cumsum(np.stack(freed), axis=0, dtype=np.int32)
        self._least: npt.NDArray[np.int32] | None = None

    @property
    def least(self) -> npt.NDArray[np.int32]:
        """The fewest free GPUs from now on up to and with each row."""
        if self._least is None:
            self._least = np.minimum.accumulate(self.free, axis=0)
        return self._least

    def _fits(self, free: npt.NDArray[np.int32], gpus: int) -> npt.NDArray[np.bool_]:
        whole, rest = divmod(gpus, self.size)
        fits: npt.NDArray[np.bool_] = (free == self.size).sum(axis=-1) >= whole
        if rest:
            fits &= (free >= rest).sum(axis=-1) >= whole + 1
        return fits

    def until_s(self, gpus: int) -> float:
        """A job of that size may start now that is over by then; before now: none may."""
        if not self._fits(self.free[0], gpus):
            return -NEVER_S
        fits = self._fits(self.least, gpus)
        return NEVER_S if fits.all() else self.times[int((~fits).argmax())]

    def now(self, gpus: int, guess_s: float) -> Where:
        last = bisect_left(self.times, self.now_s + guess_s) - 1
        return self._where(self.least[max(0, last)], gpus)

    def earliest(self, gpus: int, guess_s: float) -> tuple[float, Where]:
        for at in np.flatnonzero(self._fits(self.free, gpus)):
            at_s = self.times[at]
            least = self.free[at : max(at + 1, bisect_left(self.times, at_s + guess_s))].min(axis=0)
            if self._fits(least, gpus):
                return at_s, self._where(least, gpus)
        raise ValueError(f"{gpus} GPUs never fit")

    def _where(self, free: npt.NDArray[Any], gpus: int) -> Where:
        where = place(free.tolist(), gpus, self.size)
        assert where is not None
        return where

    def take(self, where: Where, from_s: float, until_s: float) -> None:
        begin, end = self._at(from_s), self._at(until_s)
        for node, gpus in where:
            self.free[begin:end, node] -= gpus
        self._least = None

    def _at(self, at_s: float) -> int:
        """The row of that time, which is added where it is new."""
        row = bisect_left(self.times, at_s)
        if row == len(self.times) or self.times[row] != at_s:
            self.times.insert(row, at_s)
            self.free = np.insert(self.free, row, self.free[row - 1], axis=0)
        return row


@dataclass(slots=True)
class Outcome:
    """When each job started, in the order of the jobs, and the first start that was promised, by the number of the job."""

    start_s: list[float]
    promised_s: dict[int, float]


def run(jobs: Sequence[TraceJob], nodes: int, size: int, policy: Policy, predictor: Predictor | None = None) -> Outcome:
    """All jobs, in the order of their submission, to the last start."""
    told, start_s = predictor or Said(jobs), [NEVER_S] * len(jobs)
    scene = Scene(size, jobs, Waiting(jobs), [size] * nodes)
    over: list[tuple[float, int]] = []  # when jobs end indeed
    arrived = started = 0
    while started < len(jobs):
        now_s = min(over[0][0] if over else NEVER_S, jobs[arrived].at_s if arrived < len(jobs) else NEVER_S)
        scene.now_s = now_s
        ended = _end(scene, over, told)
        came = []
        while arrived < len(jobs) and jobs[arrived].at_s <= now_s:
            scene.waiting.join(arrived, told.guess_s(arrived, 0.0))
            came.append(arrived)
            arrived += 1
        late = _guess_again(scene, start_s, told)
        if not any(scene.free):
            continue
        for number, where in policy(scene, came, ended=ended or late):
            _start(scene, number, where, now_s + told.guess_s(number, 0.0))
            start_s[number] = now_s
            heapq.heappush(over, (now_s + jobs[number].run_s, number))
            started += 1
    return Outcome(start_s, policy.promised_s)


def _end(scene: Scene, over: list[tuple[float, int]], told: Predictor) -> bool:
    """Those that are over by now have left; whether there were any."""
    known = len(over)
    while over and over[0][0] <= scene.now_s:
        number = heapq.heappop(over)[1]
        for node, gpus in scene.held.pop(number):
            scene.free[node] += gpus
        scene.ends = [end for end in scene.ends if end[1] != number]
        told.ended(number)
    return len(over) < known


def _guess_again(scene: Scene, start_s: Sequence[float], told: Predictor) -> bool:
    """Of those that should have ended by now; whether there were any."""
    late = scene.ends[: bisect_left(scene.ends, (scene.now_s, len(start_s)))]
    del scene.ends[: len(late)]
    for _, number in late:
        end_s = start_s[number] + told.guess_s(number, scene.now_s - start_s[number])
        insort(scene.ends, (max(end_s, math.nextafter(scene.now_s, NEVER_S)), number))
    return bool(late)


def _start(scene: Scene, number: int, where: Where, end_s: float) -> None:
    for node, gpus in where:
        scene.free[node] -= gpus
    scene.held[number] = where
    insort(scene.ends, (end_s, number))
    scene.waiting.leave(number)


BASELINES: dict[str, Callable[[], Policy]] = {
    "fifo": Fifo,
    "easy": Reservations,
    "16 reservations": lambda: Reservations(16),
    "conservative": lambda: Reservations(ALL),
    "work-conserving": WorkConserving,
}
