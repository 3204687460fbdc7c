"""The leader's memory beside the store: who is on which node, what was reported and not stored yet, who waits and why.

Nothing here is true by itself: a new leader starts with an empty book and fills it from the store, the feeds and the agents' hellos.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.model import ACTIVE, Decision, Job, JobState, Task
from whaleflux_scheduler.core.observed import Break, Report
from whaleflux_scheduler.hub import Connection
from whaleflux_scheduler.judge import Finding


@dataclass(frozen=True, slots=True)
class Heard:
    """A report on its way into the store."""

    report: Report
    connection: Connection
    sequence: int  # 0: not to be acknowledged

    def stored(self) -> None:
        if self.sequence:
            self.connection.stored(self.sequence)


@dataclass(slots=True)
class Progress:
    """The newest step of a job's current attempt."""

    epoch: int
    step: int
    loss: float
    next_store: datetime  # when it is written to the store, if nothing else is written before


@dataclass(frozen=True, slots=True)
class Offer:
    """A job as it was offered to the planner: what was stored, what follows from the news, and the news that this accounts for."""

    stored: StoredJob
    job: Job
    heard: tuple[Heard, ...]


@dataclass(slots=True)
class Note:
    """What the leader remembers about one unfinished job."""

    heard: list[Heard] = field(default_factory=list)
    progress: Progress | None = None
    broken: Break | None = None  # why its last attempt was fenced
    inquiring: int = 0  # epoch that others are being asked about
    finding: Finding | None = None
    shunned: dict[str, datetime] = field(default_factory=dict)  # node -> until
    launches: dict[str, str] = field(default_factory=dict)  # task -> traceparent of its launch
    offer: Offer | None = None
    waits: Decision | None = None
    due: datetime | None = None


class Book:
    """See the module."""

    def __init__(self) -> None:
        self.notes: dict[str, Note] = {}
        self.dirty: set[str] = set()  # jobs with news
        self.news, self.rescheduled = asyncio.Event(), asyncio.Event()
        self.ended: dict[str, datetime] = {}  # job -> when
        self.states: Counter[JobState] = Counter()
        self._state_of: dict[str, JobState] = {}
        self._on_node: dict[str, set[str]] = {}
        self._nodes_of: dict[str, frozenset[str]] = {}
        self._dues: list[tuple[datetime, str]] = []  # heap; may hold what is not due any more

    def touch(self, *names: str) -> None:
        """These jobs are to be looked at."""
        self.dirty.update(names)
        self.news.set()

    def note(self, name: str) -> Note:
        return self.notes.setdefault(name, Note())

    def jobs_on(self, node: str) -> frozenset[str]:
        """Jobs with tasks on the node whose GPUs are taken, or that should run there."""
        return frozenset(self._on_node.get(node, ()))

    def record(self, name: str, new: Job | None) -> frozenset[str]:
        """A job as it is in the store now; returns the nodes that this concerns."""
        if (before := self._state_of.pop(name, None)) is not None:
            self.states[before] -= 1
        if new is not None:
            self._state_of[name] = new.state
            self.states[new.state] += 1
        nodes = frozenset(task.node for _, task in new.holding()) if new is not None else frozenset[str]()
        left = self._nodes_of.pop(name, frozenset())
        for node in left - nodes:
            self._on_node[node].discard(name)
        for node in nodes:
            self._on_node.setdefault(node, set()).add(name)
        if nodes:
            self._nodes_of[name] = nodes
        self.ended.pop(name, None)
        if new is not None and new.ended:
            self.ended[name] = new.end_time or new.create_time
        return nodes | left

    def schedule(self, name: str, at: datetime | None) -> None:
        """The job is to be looked at again at that time, and not at another."""
        note = self.note(name)
        if at is not None and at != note.due:
            heapq.heappush(self._dues, (at, name))
            if self._dues[0] == (at, name):
                self.rescheduled.set()
        note.due = at

    def next_due(self) -> datetime | None:
        """When the first job has to be looked at again."""
        while self._dues:
            at, name = self._dues[0]
            if (note := self.notes.get(name)) is not None and note.due == at:
                return at
            heapq.heappop(self._dues)  # rescheduled or over since
        return None

    def take_due(self, now: datetime) -> set[str]:
        """Jobs whose time has come; each is told once."""
        due = set()
        while (at := self.next_due()) is not None and at <= now:
            name = heapq.heappop(self._dues)[1]
            self.notes[name].due = None
            due.add(name)
        return due


def desired_tasks(stored: StoredJob, node: str) -> Iterator[Task]:
    """The tasks of a job that should be on the node."""
    job = stored.value
    if job.state in ACTIVE and job.attempt is not None:
        yield from (task for task in job.attempt.tasks if task.node == node and not task.over)


def find_task(job: Job, task_id: str) -> Task | None:
    """The task of any kept attempt; its id ends with its position, so large gangs are not searched."""
    position = task_id.rpartition(".")[2]
    at = int(position) if position.isdecimal() and len(position) < 7 else 0
    for attempt in job.attempts():
        if at < len(attempt.tasks) and attempt.tasks[at].id == task_id:
            return attempt.tasks[at]
        if len(attempt.tasks) <= at:  # a past attempt of which only some tasks are kept
            found = next((task for task in attempt.tasks if task.id == task_id), None)
            if found is not None:
                return found
    return None
