"""What queues hold, may hold and are due, as jobs come and go: the tree's arithmetic (`quota`) and its fair shares together. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import NamedTuple

from whaleflux_scheduler.core import elastic
from whaleflux_scheduler.core.fair_share import FairShare
from whaleflux_scheduler.core.model import Attempt, Job, JobState, Queue
from whaleflux_scheduler.core.quota import QueueNode, QuotaTree

HALF_LIFE_S = 86_400.0
STEP_BACK_S = 60.0  # what is more is no jitter of a clock
MOST_RECALLED = 5_000  # attempts that a new leader takes in: it has to decide within a fraction of a second
_OWN = "/own"  # of a queue with others below it: its own jobs, which take turns with those as a queue of weight 1

Turn = tuple[bool, int, tuple[tuple[float, str], ...]]


class QueueUse(NamedTuple):
    """GPUs that a queue and those below it hold, how many beyond its guarantee, and what of these counts for its turn.

    `stuck`: its jobs that wait and can never start under the limits as they are. `data_bytes`: of datasets on nodes.
    """

    held: int
    over: int
    score: float
    stuck: tuple[str, ...] = ()
    data_bytes: int = 0


class PastUse(NamedTuple):
    """GPUs that jobs of a queue held from one instant to another, seconds."""

    queue: str
    gpus: int
    from_s: float
    to_s: float

    def changes(self) -> tuple[tuple[float, int], ...]:
        return (self.from_s, self.gpus), (max(self.from_s, self.to_s), 0)


def past_uses(jobs: Iterable[Job], now: datetime) -> tuple[PastUse, ...]:
    """What the newest attempts in jobs' records held, up to now: so a new leader knows what queues are due."""
    held = (
        PastUse(job.queue, _gpus(attempt), attempt.allocate_time.timestamp(), (attempt.end_time or now).timestamp())
        for job in jobs
        for attempt in job.attempts()
        if job.spec.gpus
    )
    return tuple(heapq.nlargest(MOST_RECALLED, held, key=lambda use: use.to_s))


def _gpus(attempt: Attempt) -> int:
    """Of an attempt that is over not all tasks may be kept."""
    return sum(many for _, many in attempt.gpus_by_model) or attempt.gpus


class QueueShares:
    """O(depth) for each change and each turn. `now_s` is the time of what is said to it: whoever owns it keeps it current by `goes_to`."""

    def __init__(self, half_life_s: float = HALF_LIFE_S) -> None:
        self.quota, self.now_s = QuotaTree(), 0.0
        self._fair = FairShare(half_life_s)
        self._turns: dict[tuple[str, int, int], Turn] = {}  # as they are until something is held, or time goes on
        self._turns_at_s = 0.0

    def goes_to(self, now_s: float) -> bool:
        """The time of what is said from now on. True: the clock was far ahead before, so that turns may have fallen.

        Where it steps back by little, time stands still until it has caught up.
        """
        back_s = self.now_s - now_s
        if 0 < back_s < STEP_BACK_S:
            return False
        self.now_s = now_s
        if back_s > 0:
            self._fair.set_back(now_s)
            self._turns.clear()
        return back_s > 0

    def set_queues(self, queues: Mapping[str, Queue]) -> None:
        """The queues as they are now, by id."""
        before = self.quota.queues
        self._turns.clear()
        self.quota.set_queues(queues)
        for id_ in before.keys() - queues.keys():
            self._fair.forget(id_)
            self._fair.forget(id_ + _OWN)
        for id_, queue in queues.items():
            self._fair.set_weight(id_, queue.weight)
            self._count(self.quota.node(id_))

    def hold(self, job: Job, gpus: int) -> None:
        """What the job holds or claims from now on."""
        sizes = {"least": elastic.least(job.spec), "step": elastic.step(job.spec)} if job.spec.is_elastic else {}
        if self.quota.hold(job.name, job.queue, gpus, job.spec.priority, self._since_s(job), **sizes):
            for node in self.quota.node(job.queue).path():
                if node.above is not None:  # the fleet takes no turns
                    self._count(node)

    def _since_s(self, job: Job) -> float:
        """When it began to hold what it holds; who waits for what it claims comes after all that run."""
        if job.state is JobState.QUEUED:
            return job.claim.expire_time.timestamp() if job.claim is not None else self.now_s
        return job.attempt.allocate_time.timestamp() if job.attempt is not None else self.now_s

    def _count(self, node: QueueNode) -> None:
        self._turns.clear()
        self._fair.hold(node.id, node.over, self.now_s)
        if node.below:
            self._fair.hold(node.id + _OWN, node.own, self.now_s)

    def recall(self, past: Iterable[PastUse]) -> None:
        """What was held before anything was said: counted as if it had been said then. `now_s` is as before at the end."""
        changes = [(at_s, number, use, held) for number, use in enumerate(past) for at_s, held in use.changes()]
        now_s, nodes = self.now_s, self.quota.node
        for at_s, number, use, held in sorted(changes, key=lambda change: change[:2]):
            self.now_s = min(at_s, now_s)  # of who wrote it the clock may have been ahead
            self.quota.hold(f"past/{number}", use.queue, held)
            for node in nodes(use.queue).path():
                self._count(node)
        self.now_s = now_s

    def turn(self, queue: str, gpus: int, priority: int) -> Turn:
        """The least goes first: who asks for no more than a guarantee, then by priority, then by shares from the top of the tree down."""
        if self._turns_at_s != self.now_s:
            self._turns.clear()
            self._turns_at_s = self.now_s
        key = (queue, gpus, priority)
        known = self._turns.get(key)
        if known is None:
            known = self._turns[key] = self._turn(*key)
        return known

    def _turn(self, queue: str, gpus: int, priority: int) -> Turn:
        node = self.quota.node(queue)
        within = any(up.held + gpus <= up.guaranteed for up in node.path())
        shares = [(self._fair.key(up.id, self.now_s), up.id) for up in node.path() if up.above is not None]
        if node.below:
            shares.insert(0, (self._fair.key(node.id + _OWN, self.now_s), ""))
        return not within, -priority, tuple(reversed(shares))

    def family(self, queue: str) -> str:
        """The queue at the top of its part of the tree: turns of queues below one top fall together."""
        node = self.quota.node(queue)
        while node.above is not None and node.above.above is not None:
            node = node.above
        return node.id

    def use(self, queue: str) -> QueueUse:
        node = self.quota.node(queue)
        return QueueUse(node.held, node.over, self._fair.score(queue, self.now_s))
