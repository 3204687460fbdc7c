"""Elastic jobs in the plan: larger starts, growth into idle GPUs, and shrinking for those who wait. The policy is `resize`.

A resize is a claim of a running job on the GPUs that it goes on with (`Claim`, RESIZE); who needs what a shrinking job gives claims that.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from heapq import heappop, heappush
from itertools import accumulate, islice

from whaleflux_scheduler.core import elastic, resize
from whaleflux_scheduler.core.devices import Gpus
from whaleflux_scheduler.core.elastic_index import ElasticIndex
from whaleflux_scheduler.core.holdings import EXTRA, Holdings, count
from whaleflux_scheduler.core.lifecycle import may_go_on
from whaleflux_scheduler.core.model import Claim, ClaimPurpose, Job, JobState
from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest, PreemptionPlan, Victim
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.preemption import CLAIM_S
from whaleflux_scheduler.core.quota import Claimant
from whaleflux_scheduler.core.request import of_model, shape
from whaleflux_scheduler.core.resize import Growth

MOST_GROWTHS = 8  # in one step
LEAST_LATER_S = 1.0  # until one who was asked too early is asked again
MOST_LOOKED_AT = 128  # for one who waits, and for one look at who may grow
GIVES_MORE = 0.5  # of what it has beyond its part
_NO_PARTS: Mapping[str, int] = {}
_BEFORE_ALL = -(2**31)  # a priority
MOST_NODES = 96  # of those who may have to give


class Resizing:
    """The running elastic jobs of a plan, and what is to become of their sizes."""

    def __init__(self, engine: Engine, holdings: Holdings) -> None:
        self._engine, self._holdings = engine, holdings
        self._running = ElasticIndex()
        self._looked_at = -1  # the fleet's version then
        self._asked: dict[int, int] = {}  # by priority of who asked for room: the largest part that jobs had then
        self._settling: dict[
            str, float
        ] = {}  # who was asked before it had worked for long enough, and when it has, in seconds since the epoch
        self._settles: list[tuple[float, str]] = []  # the same as a heap; may hold times that are over

    def learn(self, job: Job) -> bool:
        """A job as it is stored; True when it may give others GPUs that it could not before (`ElasticIndex.learn`)."""
        if job.spec.is_elastic and job.state is JobState.RUNNING:
            self._looked_at = -1
        return self._running.learn(job)

    def forget(self, name: str) -> None:
        self._running.forget(name)

    def __bool__(self) -> bool:
        return bool(self._running)

    def may_give(self, priority: int, gpus: int) -> bool:
        """Whether jobs of at most that priority have as many GPUs beyond their least, with those that are free."""
        extra = self._running.spare(priority)
        return extra > 0 and gpus <= extra + self._engine.free_gpus()

    def is_asked(self, priority: int) -> None:
        """Somebody of that priority asks for room, against the part that jobs have now."""
        if self._running:
            self._asked[priority] = max(self._asked.get(priority, 0), self._part(priority))

    def take_fallen(self) -> list[int]:
        """Priorities of those who asked when jobs had a larger part: idle GPUs were taken since, so these may have to give more."""
        fallen = [priority for priority, part in self._asked.items() if self._part(priority) < part]
        for priority in fallen:
            del self._asked[priority]
        return fallen

    @property
    def next_look(self) -> float:
        """Seconds since the epoch when somebody who was asked too early may give, or grow; infinite: nobody was."""
        return min(self._next_gives, self._running.wakes_s)

    @property
    def _next_gives(self) -> float:
        while self._settles and self._settling.get(self._settles[0][1]) != self._settles[0][0]:
            heappop(self._settles)
        return self._settles[0][0] if self._settles else math.inf

    def take_settled(self, now: datetime) -> list[int]:
        """Priorities of those of them who may give now, each told once."""
        found = dict[int, None]()
        while self._next_gives <= now.timestamp():
            name = heappop(self._settles)[1]
            del self._settling[name]
            if self._running.has_more(name):
                found[self._running[name].spec.priority] = None
        return list(found)

    def wake(self, now: datetime) -> None:
        """Those who have rested after their restart are asked again whether they grow."""
        if self._running.wake(now.timestamp()):
            self._looked_at = -1

    def _gives_later(self, giver: Job, now: datetime) -> None:
        in_s = resize.gives_in_s(giver, now)
        if not 0.0 < in_s < math.inf:
            return
        at_s = (
            now + timedelta(seconds=max(LEAST_LATER_S, in_s))
        ).timestamp()  # in whole microseconds, as `next_look` is told
        if self._settling.get(giver.name) != at_s:
            self._settling[giver.name] = at_s
            heappush(self._settles, (at_s, giver.name))

    def _part(self, priority: int) -> int:
        return self._running.part(priority, self._engine.free_gpus())

    def may_give_again(self) -> int | None:
        """The lowest priority of those who could not give what others claimed, and may now; None: there are none."""
        names, known = self._holdings.unclaimed_now, self._holdings.jobs
        again = [known[name].spec.priority for name in names if name in known and self._running.has_more(name)]
        names.clear()
        return min(again, default=None)

    def room_for(self, request: PlaceRequest, job: Job, wished: int, now: datetime) -> Room | None:
        """Room of what elastic jobs have beyond their parts, for a job that waits: its part of up to `wished`, else its least."""
        if not self._running or request.without_gpus:
            return None
        part = self._part(job.spec.priority)
        givers = self._givers(job, request.units, part, now)
        if (size := elastic.floor(job.spec, min(part, wished))) > elastic.least(job.spec):
            larger = replace(
                shape(elastic.sized(job.spec, size), request.exclude_nodes, request.near_nodes), id=request.id
            )
            if (room := room_by_shrinking(self._engine, self._holdings, larger, job, givers, now)) is not None:
                return room
        return room_by_shrinking(self._engine, self._holdings, request, job, givers, now)

    def parts_for(self, job: Job, gpus: int, now: datetime) -> Callable[[Collection[str]], Iterator[Victim]]:
        """What of elastic jobs is lent, where guarantees cover the rest of them: it goes before anybody is stopped."""
        quota = self._holdings.shares.quota
        givers = self._givers(job, gpus, 0, now) if self._running and quota.guarantees and gpus else []

        def parts(stopped: Collection[str]) -> Iterator[Victim]:
            for giver in givers:
                if giver.job.name not in stopped:
                    for victim in _split(self._engine, self._holdings, giver):
                        yield replace(victim, priority=_BEFORE_ALL)

        return parts

    def _givers(self, job: Job, gpus: int, part: int, now: datetime) -> list[Giver]:
        """The first who give something, in the order of what they lose; their nodes are bounded, as each of them costs time.

        What the claimant's guarantee is lent comes back whatever the priority; what others are guaranteed stays theirs.
        """
        quota = self._holdings.shares.quota
        claimant = Claimant(quota, job.name, job.queue, gpus, job.spec.priority)
        asked = {victim for claim in self._holdings.claims.values() for victim in claim.victims}
        found, nodes = list[Giver](), 0
        for giver in islice(self._running.givers(), MOST_LOOKED_AT):
            lent = claimant.lends(giver.name, giver.queue)
            if nodes >= MOST_NODES or (giver.spec.priority > job.spec.priority and not quota.guarantees):
                break
            if giver.spec.priority > job.spec.priority and not lent:
                continue
            least = elastic.least(giver.spec) if lent else _keeps(giver, job, part)
            keeps = max(least, claimant.leaves(giver.name, giver.queue))
            if not lent and giver.spec.priority == job.spec.priority:
                self._gives_later(giver, now)
            if giver.name not in asked and _gives(giver, job, keeps, self._holdings, now, lent=lent):
                found.append(Giver(giver, keeps, count(_in_order(giver, self._holdings)) - keeps))
                nodes += len(self._holdings.held(giver.name))
        return found

    def grown(
        self, version: int, now: datetime, over_limit: Callable[[Job, int], object]
    ) -> Iterator[tuple[Growth, Claim]]:
        """Who grows now, where the fleet has changed since the last time or somebody has rested; each claim is to be held before the next is asked for."""
        if not self._running or version == self._looked_at:
            return
        self._looked_at = version
        idle = self._engine.free_by_model()
        growths = resize.growths(self._able(now), idle, now) if idle else []
        allowed = [growth for growth in growths if not over_limit(growth.job, growth.gpus)]
        yield from grown(self._engine, self._holdings, allowed, now)

    def _able(self, now: datetime) -> list[Job]:
        """The first of those who gain by more; who was restarted just now sleeps until it has settled."""
        able, now_s = list[Job](), now.timestamp()
        for job in islice(self._running.gainers(), MOST_LOOKED_AT):
            if (rests_s := resize.unsettled_s(job, now)) > 0:
                self._running.sleep(job.name, now_s + max(LEAST_LATER_S, rests_s))
            elif self._holdings.claim(job.name) is None and may_go_on(job):
                able.append(job)
        return able


@dataclass(frozen=True, slots=True)
class Room:
    """What is kept for a job that waits, and what those go on with who make room by shrinking."""

    claim: Claim
    shrinking: Mapping[str, Claim]


def enlarged(
    engine: Engine, request: PlaceRequest, job: Job, wished: int, allowed: Callable[[int], bool], least: Placement
) -> Placement:
    """Where the job is fastest, with the largest size up to `wished` that fits of a type and is allowed; `least`: its place without that."""
    models = elastic.throughputs(job.spec)
    options = [of_model(request, model) for model in models] if len(models) > 1 else [request]
    found = [place for option in options if (place := _largest(engine, option, job, wished, allowed)) is not None]
    return max((least, *found), key=lambda place: elastic.pace(job.spec, _size(place), place.option.model))


def _size(place: Placement) -> int:
    return sum(len(part.gpus) for part in place.nodes)


def _largest(
    engine: Engine, request: PlaceRequest, job: Job, wished: int, allowed: Callable[[int], bool]
) -> Placement | None:
    sizes = elastic.sizes(job.spec)

    def fit(at: int) -> Placement | None:
        return _fits(engine, request, job, sizes[at]) if allowed(sizes[at]) else None

    low, high = 0, bisect_right(sizes, wished) - 1
    if high <= 0 or (found := fit(high)) is not None:
        return found if high > 0 else None
    high -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if (place := fit(middle)) is not None:
            low, found = middle, place
        else:
            high = middle - 1
    return found


def _fits(engine: Engine, request: PlaceRequest, job: Job, gpus: int) -> Placement | None:
    wanted = shape(elastic.sized(job.spec, gpus), request.exclude_nodes, request.near_nodes)
    wanted = replace(wanted, id=request.id, requirement=request.requirement)
    return engine.fits(wanted) if engine.feasible(wanted) else None


# growing


def grown(
    engine: Engine, holdings: Holdings, growths: Sequence[Growth], now: datetime
) -> Iterator[tuple[Growth, Claim]]:
    """Each of the first of these with the place that it grows into; one that finds none stays as it is."""
    for growth in growths[:MOST_GROWTHS]:
        job = growth.job
        assert job.attempt is not None
        wanted = replace(shape(elastic.sized(job.spec, growth.gpus), (), job.attempt.nodes), id=job.name)
        if growth.model in elastic.throughputs(job.spec):
            wanted = of_model(wanted, growth.model)
        with holdings.without(job.name):
            placement = engine.fits(wanted)
        if placement is not None:
            yield growth, _claim(_gpus_of(placement, holdings), job, now)


def _gpus_of(placement: Placement, holdings: Holdings) -> dict[str, tuple[str, ...]]:
    gpus: dict[str, tuple[str, ...]] = {}
    for part in placement.nodes:
        gpus[part.node] = (*gpus.get(part.node, ()), *holdings.devices.uuids(part.node, part.gpus))
    return gpus


def _claim(gpus: Mapping[str, tuple[str, ...]], job: Job, now: datetime) -> Claim:
    until = now + timedelta(seconds=CLAIM_S + job.grace_s)
    return Claim(tuple(gpus.items()), (), until, ClaimPurpose.RESIZE)


# shrinking


@dataclass(frozen=True, slots=True)
class Giver:
    """A running job that may have to give `gives` of its GPUs, and keeps as many."""

    job: Job
    keeps: int
    gives: int


def room_by_shrinking(
    engine: Engine, holdings: Holdings, request: PlaceRequest, job: Job, givers: Sequence[Giver], now: datetime
) -> Room | None:
    """Room for a job that waits, of what these have beyond what they keep; None when that is not enough.

    First of the fewest of them that could be enough by numbers, then of twice as many.
    """
    lacks = request.units - engine.free_gpus()
    first = _first_enough(givers, max(1, lacks))
    while first:
        some = givers[:first]
        with engine.transaction():  # never committed
            victims = [victim for giver in some for victim in _split(engine, holdings, giver)]
            plan = engine.preempt(request, victims)
        if isinstance(plan, PreemptionPlan):
            return _room(_gpus_of(plan.placement, holdings), job, some, holdings, now)
        first = min(len(givers), 4 * first) if first < len(givers) else 0
    return None


def _first_enough(givers: Sequence[Giver], lacks: int) -> int:
    """How many of the first it takes to give as many; 0: all of them are not enough."""
    gives = list(accumulate(giver.gives for giver in givers))
    return bisect_left(gives, lacks) + 1 if gives and gives[-1] >= lacks else 0


def _keeps(giver: Job, to: Job, part: int) -> int:
    """What it has in any case: its least, and its part where the other is no more important."""
    least = elastic.least(giver.spec)
    return max(least, elastic.floor(giver.spec, part)) if giver.spec.priority == to.spec.priority else least


def _gives(giver: Job, to: Job, keeps: int, holdings: Holdings, now: datetime, *, lent: bool) -> bool:
    """Whether what it has beyond that may be had: what is lent and for a higher priority at any time, for an equal one when it has settled."""
    if not may_go_on(giver) or giver.name == to.name or holdings.disputed(giver.name):
        return False
    if holdings.claimants_on(giver.name) - {to.name}:  # what it left would be theirs
        return False
    first = lent or giver.spec.priority < to.spec.priority or resize.may_give(giver, now)
    return first and count(_in_order(giver, holdings)) > keeps


def _in_order(job: Job, holdings: Holdings) -> Gpus:
    """What it may go on with: a GPU that is reported as sick it does not keep."""
    return holdings.devices.in_order(holdings.held(job.name))


def _split(engine: Engine, holdings: Holdings, giver: Giver) -> Iterator[Victim]:
    """Takes the job apart in the engine: what it keeps stays its own, the rest may be taken."""
    job, held = giver.job, holdings.held(giver.job.name)
    own = {node: frozenset(uuids) for node, uuids in _kept(_in_order(job, holdings), {}, job, giver.keeps).items()}
    extra = {node: rest for node, uuids in held.items() if (rest := uuids - own.get(node, frozenset()))}
    engine.release(job.name)
    if own:
        engine.apply(holdings.as_placement(job.name, job, own))
    engine.apply(holdings.as_placement(job.name + EXTRA, job, extra))
    lost = resize.loss(job, giver.keeps + giver.gives, giver.keeps) * giver.gives
    yield Victim(job.name + EXTRA, job.spec.priority, lost, reclaimed=True)  # it is lent, whoever waits


def _room(
    taken: Mapping[str, tuple[str, ...]], job: Job, givers: Sequence[Giver], holdings: Holdings, now: datetime
) -> Room:
    """An equal gives at once half of what it has beyond its part, if that is more than is taken: so it is not restarted again for the next."""
    asked = {giver.job.name: giver for giver in givers if _concerned(holdings.held(giver.job.name), taken)}
    grace_s = max((giver.job.grace_s for giver in asked.values()), default=0.0)
    claim = Claim(tuple(taken.items()), tuple(asked), now + timedelta(seconds=CLAIM_S + grace_s))
    keeps = {name: giver.keeps for name, giver in asked.items() if giver.job.spec.priority == job.spec.priority}
    return Room(claim, shrinking(claim, [giver.job for giver in asked.values()], holdings, now, keeps))


def shrinking(
    claim: Claim, victims: Iterable[Job], holdings: Holdings, now: datetime, parts: Mapping[str, int] = _NO_PARTS
) -> dict[str, Claim]:
    """What those of the victims that are elastic go on with, where what is left to them is enough; the others are stopped."""
    found = {}
    for victim in victims:
        held = _in_order(victim, holdings)
        left = sum(len(uuids - claim.gpus.get(n, frozenset())) for n, uuids in held.items())
        beyond = max(0, left - parts.get(victim.name, left))
        size = elastic.floor(victim.spec, left - int(beyond * GIVES_MORE))
        if victim.spec.is_elastic and may_go_on(victim) and size:
            found[victim.name] = _claim(_kept(held, claim.gpus, victim, size), victim, now)
    return found


def _concerned(held: Gpus, taken: Mapping[str, tuple[str, ...]]) -> bool:
    return any(not uuids.isdisjoint(taken.get(node, ())) for node, uuids in held.items())


def _kept(held: Gpus, taken: Mapping[str, frozenset[str]], job: Job, size: int) -> dict[str, tuple[str, ...]]:
    """`size` of the GPUs that are not taken: those of the fullest nodes, in the order of its ranks."""
    assert job.attempt is not None
    mine = [(task.node, tuple(u for u in task.gpus if u in held.get(task.node, ()) and u not in taken.get(task.node, ())))
            for task in job.attempt.tasks]  # fmt: skip
    fullest = sorted(range(len(mine)), key=lambda at: (-len(mine[at][1]), at))
    left, counts = size, [0] * len(mine)
    for at in fullest:
        counts[at] = min(left, len(mine[at][1]))
        left -= counts[at]
    return {node: uuids[:most] for (node, uuids), most in zip(mine, counts, strict=True) if most}
