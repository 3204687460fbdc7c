"""Jobs that wait, in classes: requests that are alike get one answer, so a class is tried once, whoever and how many are in it.

In a class the jobs of one queue (and of one limited array) stand in line in the order of submission.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from whaleflux.errors import InvalidArgument
from whaleflux_scheduler.core.in_order import InOrder, order_of
from whaleflux_scheduler.core.lazy_heap import Entry, LazyHeap
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.needs import Need, need_of
from whaleflux_scheduler.core.placement.api import NoPlacement, PlaceRequest
from whaleflux_scheduler.core.placement.validate import check_request

MOST_NAMED = 10  # of those that go before a job
_MOST_KNOWN = 20_000
_SLACK = 64  # names that left a line and are still in its heap


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job that may be placed now, and the nodes that it should not get."""

    job: Job
    exclude: frozenset[str] = frozenset()
    wished: int = 0  # GPUs, of an elastic job that asks for fewer, which would do


@dataclass(eq=False, slots=True)
class RequestClass:
    """Jobs whose requests are alike. `own` names a job that holds or claims GPUs: it is alone, as it may fit where others do not.

    `refused`: the fleet had no room, and nothing came free since that could be enough. `no_room_made`: nor can others be stopped for it. `hopeful`: it was, and
    nodes have gained since. `may_stop`: it is tried because others may be stopped, whatever becomes of what was gained.
    """

    request: PlaceRequest  # of nobody in particular: its id is empty
    need: Need
    gpus: int  # that count for a queue
    own: str = ""
    lasts: int = 0  # how long they take, by classes: some may be over in time where others are not
    impossible: str = ""  # why the engine will never take it
    lines: dict[tuple[str, str], Line] = field(default_factory=dict)  # by queue and array
    families: dict[Hashable, dict[Line, None]] = field(default_factory=dict)  # lines by what their keys fall with
    heap: LazyHeap[Line] = field(default_factory=LazyHeap)  # of lines that are to be tried
    passed: dict[Line, None] = field(default_factory=dict)  # lines whose queue nobody makes room for either
    entry: Entry[RequestClass] | None = None  # among the classes that are to be tried
    seen: int = 0  # how many falls of keys it has taken in
    refused: bool = False
    no_room_made: bool = False
    may_stop: bool = False
    hopeful: bool = False
    why: NoPlacement | None = None
    why_at: int = -1  # the version of what room the fleet has, then

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def counts_differ(self) -> bool:
        """Whether a queue's limit may keep its jobs from some GPU types and not from others."""
        return any(option.per_unit > 1 for option in self.request.requirement.any_of)

    @property
    def settled(self) -> bool:
        """Whether trying it again would give the same."""
        return self.refused and self.no_room_made


@dataclass(eq=False, slots=True)
class Line:
    """Jobs of one class and queue. `array` is one of which only so many members may run: those behind it are not to wait for that."""

    kind: RequestClass
    queue: str
    array: str
    members: list[tuple[float, str]] = field(default_factory=list)  # a heap by submission; may hold names that left
    names: dict[str, float] = field(default_factory=dict)  # when each was submitted; a name may come again
    entry: Entry[Line] | None = (
        None  # in the heap of its class; while it is parked, of those for which others could be stopped
    )
    parked: bool = False  # its queue or its array may not take more
    vain: bool = False  # enough of its queue could be stopped for it, but not so that it fits

    def first(self) -> tuple[float, str] | None:
        """When the first of the line was submitted, and its name."""
        while self.members and not self._stands(self.members[0]):
            heapq.heappop(self.members)
        return self.members[0] if self.members else None

    def join(self, job: Job) -> None:
        """At the place that its submission gives it."""
        at_s = self.names[job.name] = job.create_time.timestamp()
        if len(self.members) > 2 * len(self.names) + _SLACK:
            self.members = [member for member in set(self.members) if self._stands(member)]
            heapq.heapify(self.members)
        heapq.heappush(self.members, (at_s, job.name))

    def _stands(self, member: tuple[float, str]) -> bool:
        return self.names.get(member[1]) == member[0]


@dataclass(eq=False, slots=True)
class Waiting:
    """A job that waits, and the kind of reason that it was given last."""

    candidate: Candidate
    line: Line
    told: str = ""
    told_of: int = -1  # the fleet, as it was then (`KnownFleet.facts_version`)


class Ahead(NamedTuple):
    """Who goes before a job in its queue: the first `MOST_NAMED` in order, how many do, and how many of these for their priority."""

    names: tuple[str, ...] = ()
    many: int = 0
    above: int = 0


class Pending:
    """All waiting jobs."""

    def __init__(self) -> None:
        self.jobs: dict[str, Waiting] = {}
        self.by_queue: dict[str, dict[Line, None]] = {}
        self._orders: dict[str, InOrder] = {}  # of queues of which somebody asked
        self._classes: dict[_Same, RequestClass] = {}
        self._facts: dict[_Same, tuple[Need, str]] = {}
        self._hashes: dict[int, tuple[PlaceRequest, int]] = {}  # by the identity of objects that are kept with them
        self._by_priority: dict[int, set[RequestClass]] = {}

    @property
    def classes(self) -> Iterator[RequestClass]:
        yield from self._classes.values()

    def __len__(self) -> int:
        return len(self.jobs)

    def above(self, priority: float, most: float = math.inf) -> Iterator[RequestClass]:
        """Those whose jobs may have others stopped that are of this priority, up to `most`."""
        for own, classes in self._by_priority.items():
            if priority < own <= most:
                yield from tuple(classes)

    def before(self, job: Job) -> Ahead:
        """Who goes before the job in its queue. Other queues are not looked at."""
        own, order = order_of(job), self._order_of_queue(job.queue)
        named = itertools.takewhile(lambda key: key < own, itertools.islice(order, MOST_NAMED))
        above = order.before((own[0], -math.inf, ""))
        return Ahead(tuple(key[-1] for key in named), order.before(own), above)

    def positions(self, names: Iterable[str]) -> dict[str, int]:
        """Of those that wait: their positions in their queues, from 1."""
        known = ((name, self.jobs[name].candidate.job) for name in names if name in self.jobs)
        return {name: self._order_of_queue(job.queue).before(order_of(job)) + 1 for name, job in known}

    def _order_of_queue(self, queue: str) -> InOrder:
        """Worked out when somebody asks first, then kept: who simulates asks never."""
        order = self._orders.get(queue)
        if order is None:
            lines = self.by_queue.get(queue, ())
            jobs = (self.jobs[name].candidate.job for line in lines for name in line.names)
            order = InOrder(map(order_of, jobs))
            if lines:
                self._orders[queue] = order
        return order

    def join(self, candidate: Candidate, request: PlaceRequest, *, own: bool, lasts: int = 0) -> Waiting:
        """The job waits in its line; `own`: it holds or claims GPUs, `lasts`: a class of jobs that take equally long."""
        job = candidate.job
        kind = self._class_of(request, job, lasts, own=own)
        array = job.spec.array_name if job.spec.array_max_running else ""
        line = kind.lines.get((job.queue, array))
        if line is None:
            line = kind.lines[job.queue, array] = Line(kind, job.queue, array)
            self.by_queue.setdefault(job.queue, {})[line] = None
        line.join(job)
        waiting = self.jobs[job.name] = Waiting(candidate, line)
        if (order := self._orders.get(job.queue)) is not None:
            order.add(order_of(job))
        return waiting

    def leave(self, name: str) -> Line | None:
        """It waits no more; returns its line when nobody is left in that. A class without lines is forgotten."""
        waiting = self.jobs.pop(name, None)
        if waiting is None:
            return None
        line = waiting.line
        if (order := self._orders.get(line.queue)) is not None:
            order.remove(order_of(waiting.candidate.job))
        line.names.pop(name, None)
        if line.names:
            return None
        kind = line.kind
        del kind.lines[line.queue, line.array]
        del self.by_queue[line.queue][line]
        if not self.by_queue[line.queue]:
            del self.by_queue[line.queue]
            self._orders.pop(line.queue, None)
        if not kind.lines:
            del self._classes[self._key(kind.request, kind.own, kind.lasts)]
            self._by_priority[kind.priority].discard(kind)
        return line

    def _facts_of(self, key: _Same) -> tuple[Need, str]:
        """What it needs, and why it is impossible; for classes come and go with their jobs."""
        known = self._facts.get(key)
        if known is None:
            if len(self._facts) >= _MOST_KNOWN:
                self._facts.clear()
            known = need_of(key.request, own=bool(key.own)), _impossible(key.request)
            if not key.own:
                self._facts[key] = known
        return known

    def _key(self, request: PlaceRequest, own: str, lasts: int) -> _Same:
        """Requests have many fields; those of jobs that are alike are mostly one object."""
        known = self._hashes.get(id(request))
        if known is None:
            if len(self._hashes) >= _MOST_KNOWN:
                self._hashes.clear()
            known = self._hashes[id(request)] = (request, hash(request))
        return _Same(request, own, lasts, known[1])

    def _class_of(self, request: PlaceRequest, job: Job, lasts: int, *, own: bool) -> RequestClass:
        key = self._key(request, job.name if own else "", lasts)
        kind = self._classes.get(key)
        if kind is None:
            need, impossible = self._facts_of(key)
            kind = RequestClass(request, need, job.spec.gpus, key.own, lasts, impossible=impossible)
            self._classes[key] = kind
            self._by_priority.setdefault(kind.priority, set()).add(kind)
        return kind


class _Same:
    """Requests that are alike: equal, with a hash that is worked out once."""

    __slots__ = ("_hash", "lasts", "own", "request")

    def __init__(self, request: PlaceRequest, own: str, lasts: int, hash_: int) -> None:
        self.request, self.own, self.lasts, self._hash = request, own, lasts, hash((hash_, own, lasts))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or (self.own, self.lasts) != (other.own, other.lasts):
            return False
        return self.request is other.request or self.request == other.request


def _impossible(request: PlaceRequest) -> str:
    try:
        check_request(request, named=False)
    except InvalidArgument as never:  # of an older version's rules
        return str(never)
    return ""
