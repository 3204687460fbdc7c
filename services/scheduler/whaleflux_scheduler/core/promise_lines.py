"""Who may be promised a start: the jobs that wait for more GPUs than they find, in the order of their turns, and when each is looked at. Pure.

Every look costs something, so nobody is looked at each time: the first ones in line only, as far as promises are left to give, and each again
after a while that grows while looks find nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from whaleflux_scheduler.core.in_order import Order, order_of
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.placement.api import PlaceRequest

AGAIN_S, LONGEST_AGAIN_S = 60.0, 1800.0  # between two looks at one job
MOST_LOOKS = 4  # in one step


@dataclass(frozen=True, slots=True)
class PromiseRules:
    """Who is promised a start: the first `large` jobs of those that need several nodes, and the first `patient` of others.

    Others need several GPUs, and have waited for `patience_s`: so what fits one node is not starved by smaller work that keeps coming. Nothing
    is promised beyond `horizon_s`: GPUs would be kept for too long. A large job lets others pass for `let_pass_s`; from then on those that had waited
    for fewer GPU-hours may be suspended for it, so that nobody's wrong estimates keep it waiting.
    """

    large: int = 16
    patient: int = 4
    patience_s: float = 600.0
    let_pass_s: float = 4 * 3600.0
    horizon_s: float = 3 * 86400.0


@dataclass(slots=True)
class Asking:
    """A job that waits, and may be promised a start."""

    job: Job
    large: bool
    again_s: float = 0.0  # when to look (again)
    vain: int = 0  # looks since something was found


@dataclass(slots=True)
class _Line:
    """Jobs in the order of their turns, each once."""

    heap: list[Order] = field(default_factory=list)
    of: dict[str, Order] = field(default_factory=dict)

    def join(self, job: Job) -> None:
        if self.of.get(job.name) != (entry := order_of(job)):
            self.of[job.name] = entry
            heapq.heappush(self.heap, entry)

    def leave(self, name: str) -> None:
        self.of.pop(name, None)
        if len(self.heap) > 2 * len(self.of) + 1_000:
            self.heap = sorted(self.of.values())

    def first(self, most: int) -> list[str]:
        """The first ones, at most so many."""
        found: list[Order] = []
        while self.heap and len(found) < most:
            entry = heapq.heappop(self.heap)
            if self.of.get(entry[2]) == entry and entry not in found:
                found.append(entry)
        for entry in found:
            heapq.heappush(self.heap, entry)
        return [name for _, _, name in found]


class PromiseLines:
    """See the module. Those with a promise (`given`) stand in no line, and are looked at for a better one."""

    def __init__(self, rules: PromiseRules) -> None:
        self.rules = rules
        self.given: dict[str, None] = {}
        self._largest_node = 0
        self._new: dict[str, Job] = {}  # that most likely start at once
        self._asking: dict[str, Asking] = {}
        self._lines = {True: _Line(), False: _Line()}  # large ones without a promise, and others
        self._look_s = -math.inf  # nobody is to be looked at before
        self._missed: dict[str, None] = {}

    def knows_node(self, gpus: int) -> None:
        """A node with so many GPUs."""
        self._largest_node = max(self._largest_node, gpus)

    def waits(self, job: Job, request: PlaceRequest) -> None:
        """It may be placed, and asks for this."""
        if request.units > 1 and not request.without_gpus and not request.group.share:
            self._new[job.name] = job

    def leaves(self, name: str) -> None:
        """It waits no more."""
        self._new.pop(name, None)
        self._missed.pop(name, None)
        if self._asking.pop(name, None) is not None:
            self._leave_lines(name)

    def was_given(self, name: str) -> None:
        """It has a promise."""
        self.given[name] = None
        self._leave_lines(name)

    def lost(self, name: str) -> None:
        """It has none any more."""
        if name in self.given:
            del self.given[name]
            self._look_s = -math.inf
            if (asking := self._asking.get(name)) is not None:
                self._lines[asking.large].join(asking.job)

    def asking(self, name: str) -> Asking | None:
        return self._asking.get(name)

    def put_off(self, name: str, now_s: float, left_s: float = 0.0, *, vain: bool = False) -> None:
        """It was looked at, with so much time left until its promised start; `vain`: the engine was asked, and nothing was found."""
        asking = self._asking[name]
        asking.vain = asking.vain + 1 if vain else 0
        wait_s = max(AGAIN_S * 2.0 ** min(asking.vain, 8), 0.1 * left_s)
        asking.again_s = now_s + min(wait_s, LONGEST_AGAIN_S)
        self._look_s = min(self._look_s, asking.again_s)

    def not_yet(self, name: str) -> None:
        """There was no time to look at it: it is due in the next step."""
        self._missed[name] = None
        self._look_s = -math.inf

    @property
    def missed(self) -> bool:
        """Whether there was no time in the last step for somebody who was due."""
        return bool(self._missed)

    def due(self, now_s: float) -> list[str]:
        """Whom to look at: those with a promise first, then the first ones in line; a few."""
        self._missed.clear()
        self._take_in()
        if now_s < self._look_s:
            return []
        next_s = math.inf
        found: list[str] = []
        for name, at_s in (*self._with_promise(), *self._first_without(now_s)):
            if at_s > now_s:
                next_s = min(next_s, at_s)
            elif len(found) < MOST_LOOKS:
                found.append(name)
            else:
                next_s = now_s
        self._look_s = next_s
        return found

    def _take_in(self) -> None:
        for job in self._new.values():
            known = self._asking.get(job.name)
            large = self._largest_node > 0 and job.spec.gpus > self._largest_node
            if known is not None and known.large != large:  # the largest node is another now
                self._lines[known.large].leave(job.name)
            self._asking[job.name] = Asking(job, large, *((known.again_s, known.vain) if known else ()))
            if job.name not in self.given:
                self._lines[large].join(job)
                self._look_s = -math.inf
        self._new.clear()

    def _with_promise(self) -> Iterator[tuple[str, float]]:
        return ((name, self._asking[name].again_s) for name in self.given if name in self._asking)

    def _first_without(self, now_s: float) -> Iterator[tuple[str, float]]:
        """The first ones in line, and when to look at each; of those that are due as many as there are promises left to give."""
        given = [asking.large for name in self.given if (asking := self._asking.get(name)) is not None]
        for large, most in ((True, self.rules.large), (False, self.rules.patient)):
            left = most - given.count(large)
            for name in self._lines[large].first(4 * MOST_LOOKS) if left > 0 else ():
                asking = self._asking[name]
                patient_s = 0.0 if large else asking.job.create_time.timestamp() + self.rules.patience_s
                at_s = max(asking.again_s, patient_s)
                if left > 0 or at_s > now_s:
                    left -= at_s <= now_s
                    yield name, at_s

    def _leave_lines(self, name: str) -> None:
        for line in self._lines.values():
            line.leave(name)
