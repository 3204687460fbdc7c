"""The tree of queues as numbers: what each holds, what it is guaranteed, what it borrows and lends. Pure.

The arithmetic is that of hierarchical quotas with lending limits (Kueue's KEP 79 and 1224), in whole GPUs, with the fleet at the root.
Between limits everybody may take what is idle; guarantees count when there is not enough for all. So that a guarantee of whole jobs
holds, each job is counted whole: at the lowest queue on its way to the root that has guarantee left for it, higher priorities and
earlier starts first, or else as *borrowed*. Of an elastic job a size that it can run with may be counted, and the rest further up: what it
has grown beyond a guarantee is borrowed, and the guarantee stays its own. Those who are guaranteed room take it from jobs that are counted above them (HiveD's rule
that nobody is worse off than with a cluster of its own).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from whaleflux_scheduler.core.model import Queue

_NOTHING = Queue("")


class QueueLimit(NamedTuple):
    """What keeps a queue from taking more: GPUs that it (or one above it) holds, and the most that it may.

    `most` None: that is not known, so nothing more is given to it. `kept`: idle GPUs that are kept for queues that do not lend them.
    """

    queue: str
    held: int
    most: int | None
    kept: int = 0


class Held(NamedTuple):
    """What a job holds or claims, in the order in which guarantees are given out."""

    rank: int  # negative priority
    since_s: float
    job: str
    gpus: int
    least: int = 0  # of an elastic job, the fewest that may be counted of it; 0: all or nothing
    step: int = 1
    first: bool = True  # False: what is left of a job of which a part is counted further down

    def within(self, room: int) -> int:
        """How many of its GPUs so much guarantee covers."""
        size = room - room % self.step
        return self.gpus if self.gpus <= room else size if 0 < self.least <= size else 0


@dataclass(slots=True)
class _Charge:
    """What a queue takes from the one above it: what is held, at least what is kept for it."""

    kept: int = 0
    load: int = 0  # its own jobs', and what those below it take
    idle: int = 0  # what those below it take when nobody holds anything

    @property
    def taken(self) -> int:
        return max(self.kept, self.load)


@dataclass(eq=False, slots=True)
class QueueNode:
    """A queue in the tree, or the fleet at its root; counts are of its jobs and of those below it."""

    id: str
    queue: Queue
    above: QueueNode | None = None
    known: bool = True
    depth: int = 0
    guaranteed: int = 0  # its own, at least what those below it are guaranteed
    held: int = 0
    own: int = 0  # of these what its own jobs hold
    lent: _Charge = field(default_factory=_Charge)
    firm: _Charge = field(default_factory=_Charge)
    below: list[QueueNode] = field(default_factory=list)
    jobs: dict[str, Held] = field(default_factory=dict)  # of this queue itself
    counted: list[Held] = field(default_factory=list)  # jobs that its own guarantee covers
    covered: int = 0  # GPUs of these and of those that are counted below
    lowest: float = math.inf  # priority of the jobs that its own guarantee covers
    rest: list[Held] = field(default_factory=list)  # jobs that neither it nor one below it covers
    stale: bool = True
    stoppable: Counter[int] = field(default_factory=Counter)  # by priority: GPUs of work that may be stopped
    swaps: int = 0  # GPUs that jobs claim for which others leave under a limit: held twice until these have left

    @property
    def over(self) -> int:
        """GPUs held beyond the guarantee."""
        return max(0, self.held - self.guaranteed)

    def path(self) -> Iterator[QueueNode]:
        """Itself, those above it, the fleet."""
        node: QueueNode | None = self
        while node is not None:
            yield node
            node = node.above


class QuotaTree:
    """See the module. `hold` is O(depth); which job is borrowed is worked out when it is asked, for what changed."""

    def __init__(self, queues: Mapping[str, Queue] | None = None) -> None:
        self._jobs: dict[str, tuple[str, Held]] = {}  # with the queue's id
        self._covered_by: dict[str, QueueNode] = {}
        self._nodes: dict[str, QueueNode] = {}
        self.queues: Mapping[str, Queue] = {}
        self._stoppable: dict[str, Counter[int]] = {}  # by queue, of its own jobs
        self._swaps: Counter[str] = Counter()  # the same
        self.guarantees = False  # whether any queue is guaranteed anything
        self._lost_cover: dict[str, None] = {}  # jobs that guarantees cover less than before, of what they hold still
        self.fleet = QueueNode("", _NOTHING)
        self.set_queues(queues or {})

    def set_queues(self, queues: Mapping[str, Queue]) -> None:
        """The queues as they are now, by id; jobs hold what they held."""
        self.queues, self._nodes, self.fleet = queues, {}, QueueNode("", _NOTHING)
        self._covered_by.clear()
        for id_, queue in queues.items():
            self._nodes[id_] = QueueNode(id_, queue, self.fleet)
        for id_, queue in queues.items():
            self._join(self._nodes[id_], queue.parent)
        for node in sorted(self._nodes.values(), key=_settle_depth, reverse=True):
            _guarantee(node)
        self.guarantees = self.fleet.firm.load > 0
        self.fleet.guaranteed = 0  # the fleet as a whole promises nothing: what is counted there is borrowed
        for name, (queue_id, held) in self._jobs.items():
            self._count(self.node(queue_id), name, held, held.gpus)
        for queue_id, by_priority in self._stoppable.items():
            for priority, gpus in by_priority.items():
                _add_stoppable(self.node(queue_id), priority, gpus)
        for queue_id, gpus in self._swaps.items():
            _add_swaps(self.node(queue_id), gpus)

    def _join(self, node: QueueNode, parent: str) -> None:
        """Below its parent. One whose parent is not known, or that is above itself, gets nothing more."""
        above = self._nodes.get(parent) if parent else self.fleet
        if above is None or any(up is node for up in above.path()):
            node.known, above = False, self.fleet
        node.above = above
        above.below.append(node)

    def node(self, queue: str) -> QueueNode:
        """The queue; one that is not known is a node that is given nothing."""
        known = self._nodes.get(queue)
        if known is None:
            known = self._nodes[queue] = QueueNode(queue, _NOTHING, self.fleet, known=False, depth=1)
            self.fleet.below.append(known)
        return known

    def held(self, queue: str) -> int:
        """GPUs that its jobs and those below it hold or claim."""
        return self.node(queue).held

    def held_by(self, job: str) -> int:
        """GPUs that the job holds or claims."""
        return self._jobs[job][1].gpus if job in self._jobs else 0

    # holdings

    def hold(
        self, job: str, queue: str, gpus: int, priority: int = 0, since_s: float = 0.0, *, least: int = 0, step: int = 1
    ) -> bool:
        """What the job holds from now on; 0: nothing. `least` and `step`: an elastic job's. False: as before."""
        held = Held(-priority, since_s, job, gpus, least, step)
        known = self._jobs.get(job)
        if known == (queue, held) or (known is None and not gpus):
            return False
        if known is not None:
            del self._jobs[job]
            self._count(self.node(known[0]), job, None, -known[1].gpus)
        if gpus:
            self._jobs[job] = queue, held
            self._count(self.node(queue), job, held, gpus)
        return True

    def _count(self, node: QueueNode, job: str, held: Held | None, change: int) -> None:
        if held is None:
            node.jobs.pop(job, None)
            self._covered_by.pop(job, None)
        else:
            node.jobs[job] = held
        node.own += change
        lent = firm = change
        for up in node.path():
            up.held += change
            up.stale = True
            lent, firm = _charge(up.lent, lent), _charge(up.firm, firm)

    def count_stoppable(self, queue: str, priority: int, change: int) -> None:
        """More or fewer GPUs of work that may be stopped."""
        self._stoppable.setdefault(queue, Counter())[priority] += change
        _add_stoppable(self.node(queue), priority, change)

    def count_swaps(self, queue: str, change: int) -> None:
        """More or fewer GPUs that jobs claim for which others leave under a limit."""
        self._swaps[queue] += change
        _add_swaps(self.node(queue), change)

    def suppose(self, queue: str, change: int) -> None:
        """As if its jobs held more, or less: for `admit` alone, and to be taken back. Whom guarantees cover is as before."""
        lent = firm = change
        for up in self.node(queue).path():
            up.held += change
            lent, firm = _charge(up.lent, lent), _charge(up.firm, firm)

    # admission

    def admit(
        self,
        queue: str,
        gpus: int,
        *,
        own: int = 0,
        free: Callable[[], int] = int,
        lends_back: bool = True,
        swap: int | None = None,
    ) -> QueueLimit | None:
        """What keeps the queue from taking `gpus` now, None when it may. `own`: GPUs of these that the job itself holds already.

        `free` answers how many GPUs of the fleet nobody holds. Work that cannot give back what it borrows (`lends_back` False) takes
        nothing that somebody is guaranteed, used or not. `swap`: others leave for the job under a limit, and so many GPUs it claims there;
        what others of that kind claim does not count for it: whichever of them comes first, there are only so many that leave.
        """
        node = self.node(queue)
        for up in node.path():
            if not up.known:
                return QueueLimit(up.id, up.held - own, None)
            if gpus and up.queue.max_gpus and self._held_beside(up, own, swap) + gpus > up.queue.max_gpus:
                return QueueLimit(up.id, up.held - own, up.queue.max_gpus)
        return self._keeps(node, gpus - own, free, lends_back)

    def _held_beside(self, node: QueueNode, own: int, swap: int | None) -> int:
        return node.held - own - (0 if swap is None else node.swaps - swap)

    def jobs_below(self, node: QueueNode) -> Iterator[str]:
        """Jobs that hold something in the queue and in those below it."""
        yield from node.jobs
        for below in node.below:
            yield from self.jobs_below(below)

    def limited_at(self, queue: str, gpus: int, own: int) -> QueueNode | None:
        """The highest queue that keeps the job back; the fleet, where it is idle GPUs that are kept for others. None: one is not known."""
        at = None
        for up in self.node(queue).path():
            if not up.known:
                return None
            if up.queue.max_gpus and up.held - own + gpus > up.queue.max_gpus:
                at = up
        return at or self.fleet

    def slack(self, free: int) -> tuple[float, float]:
        """How many of the `free` GPUs are kept for nobody: for work that gives back what it borrows, and for other work; infinite: nothing is kept."""
        kept = (charge.load - self.fleet.held for charge in (self.fleet.lent, self.fleet.firm))
        lent, firm = (free - gpus if gpus > 0 else math.inf for gpus in kept)
        return lent, firm

    def fleet_needed(self, queue: str, gpus: int, *, lends_back: bool = True) -> int:
        """GPUs that there have to be so that its limits let the queue take so many of them while nobody else holds any."""
        needed, below = gpus, 0
        for up in self.node(queue).path():
            charge = up.lent if lends_back else up.firm
            needed = max(charge.kept, charge.idle - below + needed)
            below = max(charge.kept, charge.idle)
        return needed

    def _keeps(self, node: QueueNode, more: int, free: Callable[[], int], lends_back: bool) -> QueueLimit | None:
        """Idle GPUs that are kept for others, where they are wanted."""
        taken = more
        for up in node.path():
            charge = up.lent if lends_back else up.firm
            taken = max(charge.kept, charge.load + taken) - charge.taken
        root = self.fleet.lent if lends_back else self.fleet.firm
        kept = root.load - self.fleet.held
        if taken <= 0 or kept <= 0 or free() >= kept + taken:
            return None
        return QueueLimit(node.id, node.held, node.held, kept)

    # who is guaranteed room, and who makes it

    def entitled(self, job: str, queue: str, gpus: int, priority: int) -> QueueNode | None:
        """The lowest queue on the job's way to the root whose guarantee has room for it, None when it would borrow."""
        self._settle(self.fleet)
        at = self._covered_by.get(job)
        own = sum(held.gpus for held in at.counted if held.job == job) if at is not None else 0
        own_is_below = False
        for node in self.node(queue).path():
            if node.guaranteed:
                mine = sum(held.gpus for held in node.counted)
                first = sum(held.gpus for held in node.counted if -held.rank >= priority and held.job != job)
                before = node.covered - mine - (own if own_is_below else 0) + first
                if before + gpus <= node.guaranteed:
                    return node
            own_is_below = own_is_below or node is at
        return None

    def below_guarantee(self, queue: str, priority: int, own: str = "") -> bool:
        """Whether it, or one above it, is guaranteed more than its jobs have of that, but for those that yield it to this priority.

        `own`: the job that asks, which may have it already by what it claims.
        """
        return priority > self.guarantees_above(queue) or (bool(own) and self.covering(own) is not self.fleet)

    def guarantees_above(self, queue: str) -> float:
        """The priority above which jobs may get some of what the queue, or one above it, is guaranteed: the least of those that have it all."""
        self._settle(self.fleet)
        return min(
            (-math.inf if up.covered < up.guaranteed else up.lowest for up in self.node(queue).path()),
            default=math.inf,
        )

    def covering(self, job: str) -> QueueNode:
        """The queue whose guarantee covers the job; the fleet, when it is borrowed from all."""
        self._settle(self.fleet)
        return self._covered_by.get(job, self.fleet)

    def covered(self, job: str, queue: str) -> dict[str, int]:
        """GPUs of the job that guarantees cover, by the id of the queue whose guarantee it is."""
        self._settle(self.fleet)
        counted = ((node.id, held) for node in self.node(queue).path() for held in node.counted)
        return {id_: held.gpus for id_, held in counted if held.job == job}

    def take_lost_cover(self) -> Collection[str]:
        """Jobs that may have to give GPUs back which they did not have to when this was asked last."""
        if not self.guarantees:
            return ()
        self._settle(self.fleet)
        lost, self._lost_cover = self._lost_cover, {}
        return lost

    def borrowed(self, queue: str) -> int:
        """GPUs of jobs of the queue and of those below it that no guarantee there covers."""
        node = self.node(queue)
        self._settle(node)
        return sum(held.gpus for held in node.rest)

    def _settle(self, node: QueueNode) -> None:
        """Gives the guarantees of this part of the tree to jobs, where something changed."""
        if not node.stale:
            return
        node.stale, rest = False, list(node.jobs.values())
        for below in node.below:
            self._settle(below)
            rest += below.rest if node is not self.fleet else ()
        before = node.counted
        for held in before:
            if self._covered_by.get(held.job) is node:
                del self._covered_by[held.job]
        node.covered, node.counted, node.rest = sum(below.covered for below in node.below), [], rest
        if node.guaranteed:
            self._cover(node, rest)
        node.lowest = min((-held.rank for held in node.counted), default=math.inf)
        after = {held.job: held.gpus for held in node.counted}
        lost = (held.job for held in before if after.get(held.job, 0) < held.gpus and held.job in self._jobs)
        self._lost_cover.update(dict.fromkeys(lost))

    def _cover(self, node: QueueNode, jobs: list[Held]) -> None:
        node.rest = []
        for held in sorted(jobs):
            part = held.within(node.guaranteed - node.covered)
            if part:
                node.covered += part
                node.counted.append(held._replace(gpus=part))
                if held.first:
                    self._covered_by[held.job] = node
            if part < held.gpus:
                left = held.gpus - part
                node.rest.append(held._replace(gpus=left, least=held.step, first=False) if part else held)


class Claimant:
    """One who asks for room, against jobs that hold it."""

    def __init__(self, tree: QuotaTree, job: str, queue: str, gpus: int, priority: int) -> None:
        self._tree, self._queue, self._priority = tree, queue, priority
        self._path = {node.id: node.depth for node in tree.node(queue).path()}
        self._at = tree.entitled(job, queue, gpus, priority) if tree.guarantees else None

    @property
    def entitled(self) -> bool:
        """Whether somebody's guarantee covers what it asks for."""
        return self._at is not None

    def reclaims(self, victim: str, queue: str) -> bool:
        """Whether the victim holds what the claimant is guaranteed; its priority does not matter then."""
        if self._at is None or queue == self._queue:
            return False
        depth = self._path.get(self._tree.covering(victim).id)
        return depth is not None and depth < self._at.depth

    def lends(self, victim: str, queue: str) -> bool:
        """Whether some of what the victim holds is borrowed of the claimant's guarantee; its priority does not matter then."""
        return self._at is not None and queue != self._queue and self._reclaimable(victim, queue) > 0

    def leaves(self, victim: str, queue: str) -> int:
        """GPUs of the victim that guarantees cover which do not yield to the claimant."""
        if not self._tree.guarantees:
            return 0
        return sum(gpus for id_, gpus in self._tree.covered(victim, queue).items() if not self._yields(id_))

    def _reclaimable(self, victim: str, queue: str) -> int:
        assert self._at is not None
        covered = self._tree.covered(victim, queue)
        mine = sum(gpus for id_, gpus in covered.items() if self._path.get(id_, self._at.depth) >= self._at.depth)
        return self._tree.held_by(victim) - mine

    def preempts(self, victim: str, priority: int) -> bool:
        """Whether the victim is of lower priority, and not within a guarantee that does not cover the claimant instead."""
        return priority < self._priority and not self._guaranteed(victim)

    def outlasts(self, victim: str, queue: str, priority: int) -> bool:
        """Whether the victim makes way when it stays longer than expected where the claimant was promised a start: an equal does too."""
        return self.reclaims(victim, queue) or (priority <= self._priority and not self._guaranteed(victim))

    def _guaranteed(self, victim: str) -> bool:
        return self._tree.guarantees and not self._yields(self._tree.covering(victim).id)

    def _yields(self, guaranteed: str) -> bool:
        """Whether what this queue's guarantee covers is the claimant's to take, by priority.

        Who would only borrow takes nothing that is guaranteed, not in its own queue either: those who made way for it would take as
        much from a third one, by guarantee, and that one, by priority, from the claimant: for ever. So who goes first is one order,
        by how low the guarantee stands and then by priority.
        """
        depth = self._path.get(guaranteed)
        return guaranteed == self._tree.fleet.id or (
            depth is not None and self._at is not None and depth <= self._at.depth
        )


def _settle_depth(node: QueueNode) -> int:
    node.depth = sum(1 for _ in node.path()) - 1
    return node.depth


def _guarantee(node: QueueNode) -> None:
    """What it is guaranteed and keeps, and the same in the one above; those below it have been here before."""
    queue = node.queue
    node.guaranteed = max(queue.guaranteed_gpus, sum(below.guaranteed for below in node.below))
    node.firm.kept = node.guaranteed
    if queue.lending_limit_gpus is not None:
        node.lent.kept = max(0, node.guaranteed - queue.lending_limit_gpus)
    assert node.above is not None
    node.above.lent.load += node.lent.taken
    node.above.firm.load += node.firm.taken
    node.above.lent.idle, node.above.firm.idle = node.above.lent.load, node.above.firm.load


def _add_stoppable(node: QueueNode, priority: int, change: int) -> None:
    for up in node.path():
        up.stoppable[priority] += change


def _add_swaps(node: QueueNode, change: int) -> None:
    for up in node.path():
        up.swaps += change


def _charge(charge: _Charge, change: int) -> int:
    """Counts a change of what lies below; returns what that changes above."""
    kept, before = charge.kept, charge.load
    after = charge.load = before + change
    return (after if after > kept else kept) - (before if before > kept else kept)
