"""Running jobs that could be made to go on elsewhere, in columns: so that a look at tens of thousands of them takes milliseconds.

What of a job changes with time (how long it has rested, what it would lose) is worked out for all of them at once when somebody looks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from whaleflux_scheduler.core import rebalance
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.placement.columns import Columns, Floats, Ints
from whaleflux_scheduler.core.placement.relocate import Movables

Bools = NDArray[np.bool_]


class _Is(IntEnum):
    """Columns of numbers, one row for each node of each job."""

    HERE = 0  # GPUs on the node
    GPUS = 1  # of the whole job
    PRIORITY = 2  # NaN: the row is nobody's
    RUN_S = 3  # since when it runs, seconds since the epoch, as all instants here
    FIXED_S = 4  # to save and to start again
    UNSAVED = 5  # of the time that it runs, the share after its last regular checkpoint at most
    SAVED_S = 6  # when its newest checkpoint was committed
    ENDED_S = 7  # when its attempt before ended
    OVER_S = 8  # when its time limit ends it


class Movers:
    """See the module. `learn` is told of each job whenever it changes."""

    def __init__(self) -> None:
        self._rows_of: dict[str, list[int]] = {}  # by job; in turn for those who look at a few of them
        self._free: list[int] = []
        self._names: list[str] = []
        self._nodes: list[str] = []
        self._numbers: Floats = np.full((64, len(_Is)), np.nan)
        self._at: Ints = np.full(64, -1, dtype=np.int64)  # the engine's row of each node, -1: it has none
        self._columns: Columns | None = None  # of which they are
        self._saved: Mapping[str, datetime] = {}

    def __len__(self) -> int:
        return len(self._rows_of)

    def learn(self, job: Job) -> None:
        """The job as it is stored."""
        if not rebalance.could_move(job):
            self.forget(job.name)
            return
        here: dict[str, int] = {}
        for node, uuids in rebalance.held_place(job):
            here[node] = here.get(node, 0) + len(uuids)
        rows = self._rows_of.get(job.name, [])
        if [self._nodes[row] for row in rows] != list(here):
            self.forget(job.name)
            rows = self._rows_of[job.name] = [self._new(job.name, node) for node in here]
        numbers = self._numbers_of(job)
        for row, gpus in zip(rows, here.values(), strict=True):
            self._numbers[row] = (gpus, *numbers)

    def _numbers_of(self, job: Job) -> tuple[float, ...]:
        attempt, last = job.attempt, job.past_attempts[-1] if job.past_attempts else None
        assert attempt is not None
        assert attempt.run_time is not None
        ended = last.end_time.timestamp() if last is not None and last.end_time is not None else -math.inf
        over = rebalance.over_at(job)
        return (
            attempt.gpus,
            job.spec.priority,
            attempt.run_time.timestamp(),
            rebalance.restart_s(job),
            rebalance.unsaved_share(job),
            self._saved_s(job.name),
            ended,
            over.timestamp() if over is not None else math.inf,
        )

    def _saved_s(self, name: str) -> float:
        at = self._saved.get(name)
        return at.timestamp() if at is not None else -math.inf

    def _new(self, name: str, node: str) -> int:
        if not self._free:
            self._names.append(name)
            self._nodes.append(node)
            if len(self._names) > len(self._numbers):
                self._numbers = np.concatenate((self._numbers, np.full_like(self._numbers, np.nan)))
                self._at = np.concatenate((self._at, np.full_like(self._at, -1)))
            row = len(self._names) - 1
        else:
            row = self._free.pop()
            self._names[row], self._nodes[row] = name, node
        self._at[row] = self._columns.index.get(node, -1) if self._columns is not None else -1
        return row

    def forget(self, name: str) -> None:
        """It runs no more, or must not be moved any more."""
        for row in self._rows_of.pop(name, ()):
            self._numbers[row] = np.nan
            self._free.append(row)

    def saved(self, newest: Mapping[str, datetime]) -> None:
        """When the newest checkpoint of each job was committed, as far as that is known."""
        before, self._saved = self._saved, newest
        for name in (name for name, at in newest.items() if before.get(name) != at):
            for row in self._rows_of.get(name, ()):
                self._numbers[row, _Is.SAVED_S] = self._saved_s(name)

    def in_turn(self, most: int) -> Iterator[str]:
        """Some of them; those that were taken come last the next time."""
        for name in list(itertools.islice(self._rows_of, most)):
            self._rows_of[name] = self._rows_of.pop(name)
            yield name

    def able(self, columns: Columns, now_s: float, rest_s: float) -> Able:
        """Those of them that may be moved now, with what that costs each."""
        if columns is not self._columns:  # nodes came, went, or changed
            self._columns = columns
            known = [columns.index.get(node, -1) for node in self._nodes]
            self._at[: len(known)] = known
        count = len(self._names)
        numbers, at = self._numbers[:count], self._at[:count]
        fit = (numbers[:, _Is.ENDED_S] <= now_s - rest_s) & (numbers[:, _Is.OVER_S] > now_s + rebalance.ENDS_SOON_S)
        ran_s = now_s - numbers[:, _Is.RUN_S]
        lost_s = np.minimum(ran_s * numbers[:, _Is.UNSAVED], np.minimum(ran_s, now_s - numbers[:, _Is.SAVED_S]))
        cost = numbers[:, _Is.GPUS] * (numbers[:, _Is.FIXED_S] + rebalance.FAILED_SAVES * np.maximum(lost_s, 0.0))
        return Able(self, fit & (at >= 0), at, cost)

    def at_most(self, priority: int) -> Bools:
        """By row: whether it is of that priority or a lower one."""
        below: Bools = self._numbers[: len(self._names), _Is.PRIORITY] <= priority
        return below

    def rows_of(self, names: Iterable[str]) -> list[int]:
        return [row for name in names for row in self._rows_of.get(name, ())]

    def movables(self, rows: Bools, at: Ints, cost: Floats, count: int) -> Movables:
        """What those of these rows hold on each of the engine's `count` rows."""
        chosen = np.flatnonzero(rows)
        ids = [self._names[row] for row in chosen.tolist()]
        return Movables(at[chosen], self._numbers[chosen, _Is.HERE], ids, cost[chosen], count)


@dataclass(frozen=True, slots=True)
class Able:
    """Who may be moved at one moment, by row of `Movers`: valid until it learns something."""

    movers: Movers
    fit: Bools
    at: Ints
    cost: Floats

    def _left(self, names: Collection[str], priority: int) -> Bools:
        left = self.fit & self.movers.at_most(priority)
        left[self.movers.rows_of(names)] = False
        return left

    def includes(self, name: str) -> bool:
        """Whether the job may be moved."""
        rows = self.movers.rows_of((name,))
        return bool(rows) and bool(self.fit[rows[0]])

    def movables(self, without: Collection[str], priority: int, count: int) -> Movables:
        """What those up to this priority, but for these, hold on each of the engine's `count` rows."""
        return self.movers.movables(self._left(without, priority), self.at, self.cost, count)
