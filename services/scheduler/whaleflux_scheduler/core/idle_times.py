"""Whether a rented machine that is idle is worth keeping, by how long such machines were not needed before. Pure.

Keeping costs idle time, giving back costs what renting again does: the boot, and half a billing unit that is paid for nothing. Who knows how
long it will not be needed (`g`) pays `min(g, again)`. Nobody does, so:

* Idle times that begin while the fleet's own nodes have as many free GPUs as the machine are another kind than those that begin while these
  are full: the next job goes there first.
* The idle times of that kind that were seen before say how likely it is needed again soon; it is kept while some time of keeping costs less on
  average than giving it back now. The threshold is the best one for that empirical distribution, as Karlin et al. choose it ("Competitive
  randomized algorithms for nonuniform problems", 1994) for one that is known.
* Nothing is known of the first ones, which count as long: a boot is short beside what most machines are rented for. Whenever what was believed
  has cost more than twice what who knows the future would have paid, a machine is kept for as long as renting it again would cost: the
  ski-rental rule, which never pays more than twice that. So over the idle times that are remembered the cost is at most twice the least
  plus twice renting again, whatever they are (`is_indebted`; predictions within a bound as in Purohit, Svitkina and Kumar, "Improving online
  algorithms via ML predictions", 2018).

Machines that may stand for one another are looked at together, as levels: the k-th is needed while k of them work or come. The idle time of a
level ends when it is needed again, by whichever machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

REMEMBERED = 32  # idle times that are over, of each kind of machine
MOST_OPEN = 64  # levels that are not needed at a time


@dataclass(frozen=True, slots=True)
class Idle:
    """For how long one level was not needed. `kept_s`: a machine was kept for so long; less than `lasted_s`: it was given back then.

    `room`: whether the fleet's own nodes had room for what it would have taken, when it began.
    """

    lasted_s: float
    kept_s: float
    room: bool = False


@dataclass(frozen=True, slots=True)
class Open:
    """A level that is not needed now. Unix seconds; `given_back_s` 0.0: a machine is kept for it."""

    since_s: float
    room: bool = False
    given_back_s: float = 0.0

    @property
    def was_lost(self) -> bool:
        """Its machine was gone before it was seen idle: nobody gave it back, and nothing follows from that."""
        return self.given_back_s == self.since_s


@dataclass(frozen=True, slots=True)
class IdleTimes:
    """Of machines that may stand for one another. `open`: the level that is needed next is the last. `needed`: machines that work or come."""

    needed: int = 0
    open: tuple[Open, ...] = ()
    over: tuple[Idle, ...] = ()

    def seen(self, needed: int, idle: int, room: bool, at_s: float) -> IdleTimes:
        """After a look: so many machines work or come, and so many are idle; what is not there any more was given back, or taken away."""
        rose = min(max(0, needed - self.needed), len(self.open))
        opened, ended = list(self.open[: len(self.open) - rose]), self.open[len(self.open) - rose :]
        opened += [Open(at_s, room)] * max(0, self.needed - needed)
        kept = sum(not one.given_back_s for one in opened)
        opened += [Open(at_s, room)] * max(0, idle - kept)  # that another leader saw first
        gone = max(0, kept - idle)
        for at, one in enumerate(opened):
            if gone and not one.given_back_s:
                opened[at], gone = replace(one, given_back_s=max(at_s, one.since_s)), gone - 1
        over = tuple(_ended(one, at_s) for one in reversed(ended) if not one.was_lost)
        return replace(self, needed=needed, open=tuple(opened[-MOST_OPEN:]), over=(self.over + over)[-REMEMBERED:])

    def idle_s(self, idle: int, at_s: float) -> tuple[tuple[float, bool], ...]:
        """Of the levels for which a machine is kept, that was needed last first: for how long it was not, and whether there was room then."""
        kept = [one for one in reversed(self.open) if not one.given_back_s][:idle]
        return tuple((max(0.0, at_s - one.since_s), one.room) for one in kept)

    def like(self, room: bool, again_s: float, at_s: float) -> tuple[float, ...]:
        """How long those lasted that began as one does now; inf: one that lasts still, and for longer already than renting again costs."""
        alike = (one for one in self.open if one.given_back_s and one.room == room and not one.was_lost)
        still = sum(at_s - one.since_s > again_s for one in alike)
        return (*(one.lasted_s for one in self.over if one.room == room), *[math.inf] * still)

    def is_indebted(self, again_s: float) -> bool:
        """Whether what was done has cost more than twice the least and once renting again: then nothing is believed."""
        return self._debt_s(again_s) > again_s

    def _debt_s(self, again_s: float) -> float:
        """What was paid beyond twice the least, since it was nothing for the last time."""
        debt_s = 0.0
        for one in self.over:
            cost_s = one.kept_s + (again_s if one.kept_s < one.lasted_s else 0.0)
            debt_s = max(0.0, debt_s + cost_s - 2 * min(one.lasted_s, again_s))
        return debt_s


def is_kept(seen_s: Sequence[float], idle_s: float, indebted: bool, step_s: float, again_s: float) -> bool:
    """Whether a machine that has been idle for so long is paid for during one more step.

    `seen_s`: how long others were idle (`like`); `again_s`: what renting it again costs; `indebted`: what was believed has cost too much.
    """
    if indebted:
        return idle_s + step_s <= again_s  # the ski-rental rule
    if idle_s >= again_s:
        return False
    left_s = [lasted_s - idle_s for lasted_s in seen_s if lasted_s > idle_s]
    steps = max(1, math.floor((again_s - idle_s) / step_s + 1e-9))
    return any(_costs_s(left_s, step_s * n, again_s) < again_s for n in range(1, steps + 1))


def _costs_s(left_s: Sequence[float], kept_s: float, again_s: float) -> float:
    """Of keeping it for so long, on average over how long it may still last; once more it lasts for ever, which nobody has seen yet."""
    costs = [one if one <= kept_s else kept_s + again_s for one in left_s]
    return (sum(costs) + kept_s + again_s) / (len(costs) + 1)


def _ended(one: Open, at_s: float) -> Idle:
    lasted_s = max(0.0, at_s - one.since_s)
    kept_s = min(lasted_s, one.given_back_s - one.since_s) if one.given_back_s else lasted_s
    return Idle(lasted_s, kept_s, one.room)
