"""The leader's memory beside the store: who is on which node, which jobs to look at, and what is tracked of each unfinished job.

Nothing here is true by itself: a new leader starts with nothing and learns it from the store, the feeds and the agents' hellos.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta

from whaleflux_scheduler.core import dependencies
from whaleflux_scheduler.core.model import Job, JobState, Task, When
from whaleflux_scheduler.data_claims import DataClaims
from whaleflux_scheduler.job_pointers import JobPointers
from whaleflux_scheduler.job_tracking import JobTracking
from whaleflux_scheduler.task_index import TaskIndex


class LeaderState:
    """See the module."""

    def __init__(self) -> None:
        self._tracked: dict[str, JobTracking] = {}
        self._touched: set[str] = set()
        self._changed, self._rescheduled = asyncio.Event(), asyncio.Event()
        self._ended: dict[str, datetime] = {}  # job that holds nothing any more -> when it ended
        self._states: Counter[JobState] = Counter()
        self._unreadable: set[str] = set()  # jobs whose record this version cannot read
        self._state_of: dict[str, JobState] = {}
        self._on_node: dict[str, set[str]] = {}
        self._nodes_of: dict[str, frozenset[str]] = {}
        self.tasks, self.data = TaskIndex(), DataClaims()
        self._claimants, self._dependents, self._reservations = JobPointers(), JobPointers(), JobPointers()
        self._waits: dict[str, tuple[int, frozenset[When]]] = {}  # for how many jobs, and what they must do
        self._new_ends: dict[str, int] = {}  # of these, since the record of who waits was written
        self._unseen_ends: dict[str, dict[str, JobState]] = {}  # of deleted jobs whose dependents have not seen it yet
        self._due_at: dict[str, datetime] = {}
        self._dues: list[tuple[datetime, str]] = []  # heap; may hold what is not due any more

    # what is tracked

    def tracking(self, name: str) -> JobTracking:
        """Of an unfinished job; begins to track it."""
        return self._tracked.setdefault(name, JobTracking())

    def tracked(self, name: str) -> JobTracking | None:
        return self._tracked.get(name)

    def forget(self, name: str) -> JobTracking | None:
        """Ends the tracking of a job; returns what was tracked."""
        self._due_at.pop(name, None)
        return self._tracked.pop(name, None)

    # what to look at

    def touch(self, *names: str) -> None:
        """These jobs are to be looked at."""
        self._touched.update(names)
        self._changed.set()

    def wake(self) -> None:
        """Something changed that concerns no job in particular."""
        self._changed.set()

    @property
    def changed(self) -> bool:
        """Whether anything came since `begin_round`."""
        return self._changed.is_set()

    async def wait_for_change(self) -> None:
        await self._changed.wait()

    def begin_round(self) -> None:
        """What comes from now on is another round's."""
        self._changed.clear()

    def take_touched(self) -> set[str]:
        """Jobs to be looked at; another call does not return them again."""
        taken, self._touched = self._touched, set()
        return taken

    # what the store holds

    def record(self, name: str, new: Job | None) -> frozenset[str]:
        """A job as it is in the store now; returns the nodes that this concerns."""
        if (before := self._state_of.pop(name, None)) is not None:
            self._states[before] -= 1
        if new is not None:
            self._state_of[name] = new.state
            self._states[new.state] += 1
        nodes = frozenset(task.node for _, task in new.holding()) if new is not None else frozenset[str]()
        self._unreadable.discard(name)
        if new is not None and not new.readable:
            self._unreadable.add(name)
        self._ended.pop(name, None)
        if new is not None and new.ended and not nodes:
            self._ended[name] = new.end_time or new.create_time
        claim = new.claim if new is not None else None
        victims = claim.victims if claim else ()
        self._claimants.set(name, victims)
        self._record_awaits(name, new)
        self.tasks.keep(name, new)
        self.touch(*victims, *self._claimants.to(name))  # who goes on where this one was looks whether it is free
        self._tell_dependents(name, new)
        return self._record_nodes(name, nodes | frozenset(claim.gpus if claim else ()))

    def reserve(self, reservation: str, victims: Iterable[str]) -> None:
        """Jobs that are to leave for a reservation look at it."""
        victims = tuple(victims)
        self._reservations.set(reservation, victims)
        self.touch(*victims)

    def _record_awaits(self, name: str, new: Job | None) -> None:
        awaits = new.awaits if new is not None else ()
        self._dependents.set(name, (awaited.job for awaited in awaits))
        self._new_ends.pop(name, None)
        if awaits:
            self._waits[name] = (len(awaits), frozenset(awaited.when for awaited in awaits))
        else:
            self._waits.pop(name, None)
            self._unseen_ends.pop(name, None)

    def _tell_dependents(self, name: str, new: Job | None) -> None:
        """Those that wait for the end of a job look at it; who waits for many does when half of them have ended.

        Else each end of an array's member would cost a look at all that each of its dependents waits for.
        """
        if new is not None and not new.ended:
            return
        for dependent in self._dependents.to(name):
            many, whens = self._waits[dependent]
            self._new_ends[dependent] = ends = self._new_ends.get(dependent, 0) + 1
            as_it_must_be = new is not None and all(dependencies.met(when, new.state) for when in whens)
            if not as_it_must_be or many <= dependencies.FEW or 2 * ends >= many:
                self.touch(dependent)

    def deleted(self, old: Job) -> None:
        """A job is gone; how it ended is told to those that wait for it."""
        for dependent in self._dependents.to(old.name):
            if old.ended:
                self._unseen_ends.setdefault(dependent, {})[old.uid] = old.state
            self.touch(dependent)

    def unseen_end(self, dependent: str, uid: str) -> JobState:
        """How a deleted job ended that `dependent` waits for; UNSPECIFIED when nobody saw it."""
        return self._unseen_ends.get(dependent, {}).get(uid, JobState.UNSPECIFIED)

    def _record_nodes(self, name: str, nodes: frozenset[str]) -> frozenset[str]:
        if (left := self._nodes_of.get(name, frozenset())) == nodes:
            return nodes
        for node in left - nodes:
            self._on_node[node].discard(name)
        for node in nodes - left:
            self._on_node.setdefault(node, set()).add(name)
        if nodes:
            self._nodes_of[name] = nodes
        else:
            self._nodes_of.pop(name, None)
        return nodes | left

    def jobs_on(self, node: str) -> frozenset[str]:
        """Jobs with tasks on the node whose GPUs are taken, or that should run there, and jobs that claim some of its GPUs."""
        return frozenset(self._on_node.get(node, ()))

    def claimants_of(self, name: str) -> frozenset[str]:
        """Jobs and reservations that wait for this one to make room."""
        return self._claimants.to(name) | self._reservations.to(name)

    @property
    def unreadable(self) -> frozenset[str]:
        """Jobs whose record this version cannot read."""
        return frozenset(self._unreadable)

    def count(self, state: JobState) -> int:
        return self._states[state]

    @property
    def ended(self) -> int:
        """How many jobs have ended and hold nothing any more."""
        return len(self._ended)

    def oldest_ended(self, most: int) -> list[str]:
        """Of these, the ones that ended first."""
        return heapq.nsmallest(most, self._ended, key=self._ended.__getitem__)

    # deadlines

    def schedule(self, name: str, at: datetime | None) -> None:
        """The job is to be looked at again at that time, and not at another."""
        if at is None:
            self._due_at.pop(name, None)
            return
        if at != self._due_at.get(name):
            heapq.heappush(self._dues, (at, name))
            if self._dues[0] == (at, name):
                self._rescheduled.set()
        self._due_at[name] = at

    def clock_moved(self, by: timedelta, job_of: Callable[[str], Job | None]) -> None:
        """The clock was set, ahead or back: what was to last from then on lasts from now on, and everybody who is due is looked at."""
        for name, tracking in self._tracked.items():
            tracking.clock_moved(job_of(name), by)
        self.touch(*self._due_at)

    def next_due(self) -> datetime | None:
        """When the first job has to be looked at again."""
        while self._dues:
            at, name = self._dues[0]
            if self._due_at.get(name) == at:
                return at
            heapq.heappop(self._dues)  # rescheduled or over since
        return None

    def take_due(self, now: datetime) -> set[str]:
        """Jobs whose time has come; another call does not return them again."""
        due = set()
        while (at := self.next_due()) is not None and at <= now:
            name = heapq.heappop(self._dues)[1]
            self._due_at.pop(name, None)
            due.add(name)
        return due

    def watch_schedule(self) -> asyncio.Event:
        """An event that is set when a job becomes due before all others did."""
        self._rescheduled.clear()
        return self._rescheduled


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
