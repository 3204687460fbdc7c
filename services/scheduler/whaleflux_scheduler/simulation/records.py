"""What a simulation leaves: the outcome of each job, how busy the GPUs were, and every move."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from whaleflux_scheduler.core.model import Attempt, JobState

BINS = 480  # of the series over time; twice as wide ones when they are used up


@dataclass(frozen=True, slots=True)
class Outcome:
    """One job at the end of the simulation; seconds of it, NaN for what has not happened."""

    name: str
    queue: str
    gpus: int
    priority: int
    submit_s: float
    start_s: float
    end_s: float
    run_s: float  # what it would take undisturbed
    state: JobState
    suspensions: int
    recoveries: int
    promised_s: float  # the last start that it was promised

    @property
    def wait_s(self) -> float:
        """From its submission to its first start."""
        return self.start_s - self.submit_s

    @property
    def completion_s(self) -> float:
        """From its submission to its end."""
        return self.end_s - self.submit_s


class Outcomes:
    """Columns, since there may be a million; iterate for `Outcome`s in the order of submission."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.queues: list[str] = []
        self.gpus, self.priorities = array("i"), array("i")
        self.submit_s, self.start_s, self.end_s = array("d"), array("d"), array("d")
        self.run_s, self.promised_s = array("d"), array("d")
        self.states, self.suspensions, self.recoveries = array("b"), array("i"), array("i")

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, queue: str, gpus: int, priority: int, submit_s: float, run_s: float) -> int:
        """A job that was submitted; returns its row."""
        self.names.append(name)
        self.queues.append(queue)
        self.gpus.append(gpus)
        self.priorities.append(priority)
        self.submit_s.append(submit_s)
        self.run_s.append(run_s)
        for column in (self.start_s, self.end_s, self.promised_s):
            column.append(math.nan)
        self.states.append(JobState.QUEUED)
        self.suspensions.append(0)
        self.recoveries.append(0)
        return len(self.names) - 1

    def __getitem__(self, row: int) -> Outcome:
        return Outcome(
            self.names[row],
            self.queues[row],
            self.gpus[row],
            self.priorities[row],
            self.submit_s[row],
            self.start_s[row],
            self.end_s[row],
            self.run_s[row],
            JobState(self.states[row]),
            self.suspensions[row],
            self.recoveries[row],
            self.promised_s[row],
        )

    def __iter__(self) -> Iterator[Outcome]:
        return (self[row] for row in range(len(self)))


class Series:
    """A level over time as means of equal bins, whose width doubles when time outgrows them: bounded memory."""

    def __init__(self, bin_s: float = 60.0) -> None:
        self.bin_s, self.level, self._at_s = bin_s, 0.0, 0.0
        self._area = [0.0] * BINS
        self.total = 0.0  # level times seconds so far
        self.peak = 0.0

    def change(self, at_s: float, by: float) -> None:
        """The level from `at_s` on."""
        self.until(at_s)
        self.level += by
        self.peak = max(self.peak, self.level)

    def until(self, at_s: float) -> None:
        """The level stayed as it is until then."""
        span_s = at_s - self._at_s
        if span_s <= 0.0:
            return
        self._reach(at_s)
        if self.level:
            self.total += self.level * span_s
            self._spread(self._at_s, at_s)
        self._at_s = at_s

    def _reach(self, to_s: float) -> None:
        while to_s > BINS * self.bin_s:
            halves = zip(self._area[::2], self._area[1::2], strict=True)
            self._area = [a + b for a, b in halves] + [0.0] * (BINS // 2)
            self.bin_s *= 2

    def _spread(self, from_s: float, to_s: float) -> None:
        first, last = int(from_s // self.bin_s), min(BINS - 1, int(to_s // self.bin_s))
        if first == last:
            self._area[first] += self.level * (to_s - from_s)
            return
        self._area[first] += self.level * ((first + 1) * self.bin_s - from_s)
        for at in range(first + 1, last):
            self._area[at] += self.level * self.bin_s
        self._area[last] += self.level * (to_s - last * self.bin_s)

    def means(self) -> list[tuple[float, float]]:
        """(begin of the bin, mean level in it) up to the last change."""
        bins = math.ceil(self._at_s / self.bin_s)
        widths = [min(self.bin_s, self._at_s - at * self.bin_s) for at in range(bins)]
        return [(at * self.bin_s, self._area[at] / width) for at, width in enumerate(widths) if width > 0]


class MoveLog:
    """Every move as one line of JSON, in order: their digest always, the lines where a file is given."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self._digest, self._file = hashlib.blake2b(digest_size=16), file
        self.moves = 0

    def add(self, at_s: float, move: str, job: str, nodes: tuple[tuple[str, tuple[str, ...]], ...] = ()) -> None:
        """`nodes`: the GPUs that it is about, by node, in rank order."""
        where = ",".join(f'"{node}":["{_JOIN.join(gpus)}"]' if gpus else f'"{node}":[]' for node, gpus in nodes)
        line = f'{{"t":{at_s!r},"move":"{move}","job":"{job}","gpus":{{{where}}}}}\n'
        self._digest.update(line.encode())
        self.moves += 1
        if self._file is not None:
            self._file.write(line)

    @property
    def digest(self) -> str:
        """Of all lines so far; equal for equal lists of moves."""
        return self._digest.hexdigest()


_JOIN = '","'


@dataclass(frozen=True, slots=True)
class Span:
    """A job on one node."""

    job: str
    queue: str
    node: str
    gpus: tuple[str, ...]
    from_s: float
    to_s: float
    why: str  # how it ended: done, suspended, lost, runs


@dataclass(slots=True)
class Spans:
    """Who was where and when, for the picture: on these nodes, at most so many; `left_out` counts the rest."""

    nodes: frozenset[str]
    most: int
    kept: list[Span] = field(default_factory=list)
    left_out: int = 0

    def add(self, job: str, queue: str, attempt: Attempt, from_s: float, to_s: float, why: str) -> None:
        """All tasks of an attempt that is over."""
        for task in attempt.tasks:
            if task.node not in self.nodes:
                continue
            if len(self.kept) < self.most:
                self.kept.append(Span(job, queue, task.node, task.gpus, from_s, to_s, why))
            else:
                self.left_out += 1
