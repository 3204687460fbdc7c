"""Policies of renting over the production planner in virtual time: who rents when, what it costs, what is paid and not used.

Real: the planner, its forecasts, and the policy's `decide`. Simulated: nodes, boots, prices, time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from whaleflux.fleet.model import Node, Price, PriceKind
from whaleflux_scheduler.core import give_back
from whaleflux_scheduler.core.burst import BurstRules, decide
from whaleflux_scheduler.core.idle_times import Idle, IdleTimes
from whaleflux_scheduler.core.offered import Kind, Offered, Rented, billed_usd
from whaleflux_scheduler.simulation import happenings
from whaleflux_scheduler.simulation.records import Span, Spans
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.state import State
from whaleflux_scheduler.simulation.timeline import instant
from whaleflux_scheduler.simulation.workload import NodeEvent, Submission, Workload

HOUR_S = 3600.0
LOOK_EVERY_S, MOST_SPANS = 10.0, 1_000_000
OFFER = Offered("offers/cloud", "H100-80GB", 8, "cloud", 24.0, 180.0, 60.0, 0)


@dataclass(frozen=True, slots=True)
class Policy:
    """`rules` None: nothing is rented by itself. `always`: machines that are rented all the time. `learns`: from idle times, else the ski-rental rule."""

    name: str
    rules: BurstRules | None = None
    always: int = 0
    learns: bool = True


@dataclass(slots=True)
class Machine:
    """One rental; seconds of the simulation."""

    slot: int
    begun_s: float
    ended_s: float = math.inf
    idle_s: float | None = None  # as the leader sees it
    works: list[tuple[float, float]] = field(default_factory=list)  # from when to when something ran on it


class Cloud:
    """Nodes that are there from the beginning, and closed until they are rented."""

    def __init__(self, machines: int, owned: Sequence[Node]) -> None:
        pattern = owned[0]
        self.nodes = [
            replace(
                pattern,
                name=f"sites/cloud/nodes/m{n:03}",
                site="cloud",
                gpus=tuple(replace(gpu, uuid=f"cloud-{n}-{gpu.index}") for gpu in pattern.gpus),
                price=Price(PriceKind.ON_DEMAND, OFFER.usd_per_hour / 8),
            )
            for n in range(machines)
        ]
        self.rentals: list[Machine] = []
        self.up: dict[int, Machine] = {}

    def closed(self, at_s: float = 0.0) -> list[NodeEvent]:
        return [NodeEvent(at_s, "down", tuple(node.name for node in self.nodes))]

    def rent(self, at_s: float, state: State, boot_s: float) -> None:
        slot = next(n for n in range(len(self.nodes)) if n not in self.up)
        self.up[slot] = machine = Machine(slot, at_s)
        self.rentals.append(machine)
        event = NodeEvent(at_s + boot_s, "up", (self.nodes[slot].name,))
        state.timeline.add(at_s + boot_s, happenings.node_event, state, event)

    def end(self, at_s: float, state: State, machine: Machine) -> None:
        del self.up[machine.slot]
        machine.ended_s = at_s
        happenings.node_event(at_s, state, NodeEvent(at_s, "down", (self.nodes[machine.slot].name,)))

    def note_works(self, spans: Iterable[Span]) -> None:
        """What ran on the machines, from its start to its end, together where it touches."""
        slots = {node.name: slot for slot, node in enumerate(self.nodes)}
        of_slot = defaultdict[int, list[Machine]](list)
        for machine in self.rentals:
            of_slot[machine.slot].append(machine)
        for span in sorted(spans, key=lambda one: one.from_s):
            machine = next(one for one in of_slot[slots[span.node]] if one.begun_s <= span.from_s <= one.ended_s)
            if machine.works and span.from_s <= machine.works[-1][1]:
                machine.works[-1] = machine.works[-1][0], max(span.to_s, machine.works[-1][1])
            else:
                machine.works.append((span.from_s, span.to_s))


class Bursting:
    """Looks as the scheduler's loop does, each ten seconds."""

    def __init__(self, simulation: Simulation, cloud: Cloud, policy: Policy) -> None:
        self._simulation, self.cloud, self._policy = simulation, cloud, policy
        self._state: State = simulation._state
        self._times: dict[Kind, IdleTimes] = {}

    def begin(self) -> None:
        for _ in range(self._policy.always):
            self.cloud.rent(0.0, self._state, 0.0)
        self._state.timeline.add(LOOK_EVERY_S, self.look)

    def look(self, at_s: float) -> None:
        if self._policy.rules is not None:
            self._decide(at_s, self._policy.rules)
        self._state.timeline.add(at_s + LOOK_EVERY_S, self.look)

    def _decide(self, at_s: float, rules: BurstRules) -> None:
        names = [node.name for node in self.cloud.nodes]
        facts = self._simulation._plan.burst_facts(names, instant(at_s))
        left = len(self.cloud.nodes) - len(self.cloud.up)
        rented = [self._rented(machine, at_s, facts.busy) for machine in self.cloud.up.values()]
        self._times = give_back.seen(rented, self._times, facts.free, at_s)
        times = self._times if self._policy.learns else {kind: _doubtful(one) for kind, one in self._times.items()}
        plan = decide(facts.waiting, [replace(OFFER, left=left)], rented, {}, rules, times, at_s)
        for end in plan.ends:
            self.cloud.end(at_s, self._state, self.cloud.up[int(end.lease)])
        for rent in plan.rents:
            for _ in range(rent.machines):
                self.cloud.rent(at_s, self._state, OFFER.boot_s)

    def _rented(self, machine: Machine, at_s: float, busy: frozenset[str]) -> Rented:
        coming = at_s <= machine.begun_s + OFFER.boot_s
        works = coming or self.cloud.nodes[machine.slot].name in busy
        machine.idle_s = None if works else (machine.idle_s or 0.0) + LOOK_EVERY_S * (machine.idle_s is not None)
        return Rented(str(machine.slot), OFFER, "", at_s - machine.begun_s, coming=coming, idle_s=machine.idle_s)


def _doubtful(times: IdleTimes) -> IdleTimes:
    """With a past in which giving back early was wrong: what follows is the ski-rental rule."""
    return replace(times, over=(Idle(1.0, 0.0),) * 3)


@dataclass(frozen=True, slots=True)
class Played:
    """`waits_s` of all jobs; `usd` of rented machines; hours paid, hours in which something ran on them, and the fewest unused ones."""

    waits_s: tuple[float, ...]
    usd: float
    paid_h: float
    used_h: float
    least_unused_h: float
    rentals: int
    unfinished: int


def play(owned: Sequence[Node], jobs: Callable[[], Sequence[Submission]], policy: Policy, machines: int) -> Played:
    """One policy over the jobs."""
    cloud = Cloud(machines, owned)
    spans = Spans(frozenset(node.name for node in cloud.nodes), MOST_SPANS)
    simulation = Simulation([*owned, *cloud.nodes], Workload(jobs()), events=cloud.closed(), spans=spans)
    bursting = Bursting(simulation, cloud, policy)
    bursting.begin()
    result = simulation.run()
    for machine in list(cloud.up.values()):
        machine.ended_s = result.end_s
    assert not spans.left_out
    cloud.note_works(spans.kept)
    outcomes = list(result.outcomes)
    begun = [one for one in outcomes if not math.isnan(one.start_s)]
    return Played(
        tuple(one.wait_s for one in begun),
        sum(billed_usd(OFFER, one.ended_s - one.begun_s) for one in cloud.rentals),
        sum(paid_s(one.ended_s - one.begun_s) for one in cloud.rentals) / HOUR_S,
        sum(last - first for one in cloud.rentals for first, last in one.works) / HOUR_S,
        least_unused_h([work for one in cloud.rentals for work in one.works]),
        len(cloud.rentals),
        len(outcomes) - len(begun),
    )


def paid_s(used_s: float) -> float:
    """Seconds that are paid for: whole billing units."""
    return billed_usd(OFFER, used_s) / OFFER.usd_per_hour * HOUR_S


def least_unused_h(works: Sequence[tuple[float, float]]) -> float:
    """Hours that who knows the future would pay for machines on which nothing runs, for work at the same times.

    The k-th machine is there while k of them work; between two such times it is kept when that is shorter than a boot, else rented again.
    """
    changes = sorted([(first, 1) for first, _ in works] + [(last, -1) for _, last in works])
    ended_s: dict[int, float] = {}
    level, unused_s = 0, 0.0
    for at_s, change in changes:
        if change > 0:
            level += 1
            unused_s += min(OFFER.boot_s, at_s - ended_s.get(level, -math.inf))
        else:
            ended_s[level] = at_s
            level -= 1
    return unused_s / HOUR_S
