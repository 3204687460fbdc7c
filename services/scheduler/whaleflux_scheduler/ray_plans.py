"""What a Ray cluster should get, as it is asked for over the contract: checks, the fleet's free nodes, the plan, and back. What is decided: `core.ray_plan`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from whaleflux.errors import FieldViolation, InvalidArgument, ResourceExhausted
from whaleflux.reasons import ErrorReason
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import ray_nodes
from whaleflux_scheduler.core.ray_demand import Demand, Gang, LabelRule, Selector, Shape, Strategy, shape_of
from whaleflux_scheduler.core.ray_nodes import Cluster, RayNode
from whaleflux_scheduler.core.ray_plan import Addition, RayPlan
from whaleflux_scheduler.core.ray_sizing import Plans, Resize

if TYPE_CHECKING:
    from whaleflux_scheduler.leader_session import Leading

T = TypeVar("T")

PATIENCE_S = 10.0  # until a plan has its turn
PLAN_S = 2.0  # that one plan takes at most; what it did not come to is first in the cluster's next
_MOST_SESSIONS = 256  # of which it is known what is first
MOST_SHAPES, MOST_COUNT, MOST_NODES = 1_000, 10_000_000, 10_000
_MOST_VALUE, _MOST_RESOURCES, _MOST_RULES, _MOST_GPUS = 1e15, 64, 64, 1_024
_STRATEGIES = {
    pb.RAY_STRATEGY_UNSPECIFIED: Strategy.PACK,
    pb.RAY_STRATEGY_PACK: Strategy.PACK,
    pb.RAY_STRATEGY_SPREAD: Strategy.SPREAD,
    pb.RAY_STRATEGY_STRICT_PACK: Strategy.STRICT_PACK,
    pb.RAY_STRATEGY_STRICT_SPREAD: Strategy.STRICT_SPREAD,
}


class RayPlans:
    """Makes plans one at a time, within `PLAN_S` each: they hold the interpreter of the process that leads.

    What a plan had no time for is remembered by the session of its cluster, which is new when its head is; a new leader does not know of it.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic, self._one = monotonic, asyncio.Lock()
        self._first: dict[str, frozenset[Shape]] = {}

    async def planned(self, request: pb.PlanRayRequest, leading: Leading) -> pb.RayPlan:
        """The answer to a demand, of the fleet as it is now.

        Raises InvalidArgument naming field and limit, ResourceExhausted where others' plans take longer than `PATIENCE_S`.
        """
        if not request.HasField("demand"):
            raise InvalidArgument(
                FieldViolation("demand", "is not set; give what waits in the cluster, as whaleflux ray explain does")
            )
        session = request.demand.session
        cluster = replace(cluster_of(request.demand), first=self.first(session))
        await leading.view.caught_up()
        nodes = await leading.planner.ask(lambda plan: plan.free_nodes())
        waits, should_hold = await self.alone(lambda resize: resize(cluster, nodes))
        self.remember(session, cluster, (waits, should_hold))
        return _message(request.demand, waits, should_hold)

    def first(self, session: str) -> frozenset[Shape]:
        """What the last plan for that session had no time for."""
        return self._first.get(session, frozenset())

    def remember(self, session: str, cluster: Cluster, plans: Plans) -> None:
        """What these plans had no time for comes first in the next."""
        waits, should_hold = plans
        self._first.pop(session, None)
        left = frozenset((*_postponed(cluster.demand, waits), *_postponed(Demand(cluster.constraints), should_hold)))
        if left:
            self._first[session] = left
        while len(self._first) > _MOST_SESSIONS:
            del self._first[next(iter(self._first))]

    async def alone(self, work: Callable[[Resize], T]) -> T:
        """Makes plans in a thread, all of `work` within `PLAN_S`. Who gives up leaves its turn taken until the thread has ended.

        Raises ResourceExhausted where others' plans take longer than `PATIENCE_S`.
        """
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._one.acquire()
        except TimeoutError:
            raise ResourceExhausted(
                "plans for other Ray clusters are being made; ask again later",
                reason=ErrorReason.PLANNER_BUSY,
                retry_after_s=1.0,
            ) from None
        working = asyncio.ensure_future(asyncio.to_thread(self._timed, work))
        working.add_done_callback(self._next)
        return await asyncio.shield(working)

    def _timed(self, work: Callable[[Resize], T]) -> T:
        until = self._monotonic() + PLAN_S
        return work(lambda cluster, nodes: ray_nodes.resize(cluster, nodes, lambda: self._monotonic() >= until))

    def _next(self, done: asyncio.Future[T]) -> None:
        self._one.release()
        if not done.cancelled():
            done.exception()  # told to who waits, if anybody does


def _postponed(demand: Demand, plan: RayPlan) -> Iterator[Shape]:
    """The shapes that it had no time for, of a gang all of its bundles."""
    for one in plan.unmet:
        if one.postponed and one.of_gang:
            yield from (shape for shape, _ in demand.gangs[one.source].bundles)
        elif one.postponed:
            yield demand.singles[one.source][0]


# what is asked


def cluster_of(demand: pb.RayDemand) -> Cluster:
    """Raises InvalidArgument naming field and limit."""
    _few("demand.bundles", demand.bundles, MOST_SHAPES)
    _few("demand.gangs", demand.gangs, MOST_SHAPES)
    _few("demand.constraints", demand.constraints, MOST_SHAPES)
    _few("demand.nodes", demand.nodes, MOST_NODES)
    _few_in_all(demand)
    gangs = tuple(_gang(f"demand.gangs[{at}]", gang) for at, gang in enumerate(demand.gangs))
    nodes = tuple(_node(f"demand.nodes[{at}]", node) for at, node in enumerate(demand.nodes))
    singles = _bundles("demand.bundles", demand.bundles)
    return Cluster(Demand(singles, gangs), _bundles("demand.constraints", demand.constraints), nodes)


def _gang(field: str, gang: pb.RayGang) -> Gang:
    _few(f"{field}.bundles", gang.bundles, MOST_SHAPES)
    if not gang.bundles:
        raise InvalidArgument(FieldViolation(f"{field}.bundles", "is empty; a placement group has a bundle at least"))
    if gang.strategy not in _STRATEGIES:
        raise InvalidArgument(
            FieldViolation(f"{field}.strategy", f"{gang.strategy} is no strategy that this version knows")
        )
    return Gang(_bundles(f"{field}.bundles", gang.bundles), _STRATEGIES[gang.strategy], _count(field, gang.count))


def _bundles(field: str, bundles: Iterable[pb.RayBundle]) -> tuple[tuple[Shape, int], ...]:
    return tuple(_bundle(f"{field}[{at}]", bundle) for at, bundle in enumerate(bundles))


def _bundle(field: str, bundle: pb.RayBundle) -> tuple[Shape, int]:
    _few(f"{field}.selectors", bundle.selectors, _MOST_RULES)
    selectors = [_selector(f"{field}.selectors[{at}]", one) for at, one in enumerate(bundle.selectors)]
    return shape_of(_resources(f"{field}.resources", bundle.resources), selectors), _count(field, bundle.count)


def _selector(field: str, selector: pb.RayLabelSelector) -> Selector:
    _few(f"{field}.rules", selector.rules, _MOST_RULES)
    return tuple(LabelRule(rule.key, tuple(rule.values), rule.excludes) for rule in selector.rules)


def _resources(field: str, resources: Mapping[str, float]) -> dict[str, float]:
    if len(resources) > _MOST_RESOURCES:
        raise InvalidArgument(FieldViolation(field, f"has {len(resources)} resources; at most {_MOST_RESOURCES}"))
    for name, value in resources.items():
        if not (math.isfinite(value) and 0 <= value <= _MOST_VALUE):
            raise InvalidArgument(FieldViolation(f"{field}[{name[:64]}]", f"is {value:g}; give 0 to {_MOST_VALUE:g}"))
    return dict(resources)


def _node(field: str, node: pb.RayNode) -> RayNode:
    total = _resources(f"{field}.total", node.total)
    if total.get("GPU", 0) > _MOST_GPUS:
        raise InvalidArgument(FieldViolation(f"{field}.total[GPU]", f"is {total['GPU']:g}; give 0 to {_MOST_GPUS}"))
    free = total if node.status == "STARTING" else _resources(f"{field}.available", node.available)
    return RayNode(node.id, total, free, dict(node.labels), node.status)


def _count(field: str, count: int) -> int:
    if not 1 <= count <= MOST_COUNT:
        raise InvalidArgument(FieldViolation(f"{field}.count", f"is {count}; give 1 to {MOST_COUNT}"))
    return count


def _few(field: str, items: Sequence[object], most: int) -> None:
    if len(items) > most:
        raise InvalidArgument(
            FieldViolation(field, f"has {len(items)} entries; at most {most}: equal ones belong together")
        )


def _few_in_all(demand: pb.RayDemand) -> None:
    """The time that a plan takes grows with all shapes together."""
    count = len(demand.bundles) + len(demand.constraints) + sum(len(gang.bundles) for gang in demand.gangs)
    if count > MOST_SHAPES:
        raise InvalidArgument(
            FieldViolation(
                "demand",
                f"has {count} bundles in all, its gangs' included; at most {MOST_SHAPES}: equal ones belong together",
            )
        )


# what is answered


def _message(demand: pb.RayDemand, waits: RayPlan, should_hold: RayPlan) -> pb.RayPlan:
    parts = [(part, "for what waits") for part in waits.additions]
    parts += [(part, "for what the cluster should hold in all") for part in should_hold.additions]
    return pb.RayPlan(
        additions=[_addition(part, why) for part, why in parts],
        held=[pb.RayHeld(nodes=part.names, bundles=_laid(part)) for part in waits.held],
        unmet=unmet_of(demand, (waits, should_hold)),
        usd_per_hour=waits.usd_per_hour + should_hold.usd_per_hour,
        gpus=waits.gpus + should_hold.gpus,
        stranded_mib=waits.stranded_mib + should_hold.stranded_mib,
    )


def _addition(part: Addition, why: str) -> pb.RayAddition:
    filling, kind = part.filling, part.filling.kind
    price = f"${kind.usd_per_gpu_hour:g} per GPU and hour, {filling.memory_share:.0%} of its memory asked for"
    return pb.RayAddition(
        gpu_type=kind.model,
        gpus=filling.gpus_paid,
        gpu_memory_mib=kind.device_memory_mib if filling.gpus_paid else 0,
        count=part.count,
        nodes=part.names,
        usd_per_hour=filling.usd_per_hour * part.count,
        bundles=_laid(part),
        why=f"{why}: {price}" if filling.gpus_paid else f"{why}: no GPU is needed",
    )


def _laid(part: Addition) -> list[pb.RayBundle]:
    return [_back(shape, count) for shape, count in part.bundles]


def _back(shape: Shape, count: int) -> pb.RayBundle:
    return pb.RayBundle(resources=shape.resources(), selectors=map(_selector_back, shape.selectors), count=count)


def _selector_back(selector: Selector) -> pb.RayLabelSelector:
    rules = [pb.RayLabelRule(key=rule.key, values=rule.values, excludes=rule.excludes) for rule in selector]
    return pb.RayLabelSelector(rules=rules)


def unmet_of(demand: pb.RayDemand, plans: Plans) -> list[pb.RayUnmet]:
    """What cannot be had, as the demand has it."""
    waits, should_hold = plans
    return [*_unmet(demand, demand.bundles, waits), *_unmet(demand, demand.constraints, should_hold)]


def _unmet(demand: pb.RayDemand, singles: Sequence[pb.RayBundle], plan: RayPlan) -> list[pb.RayUnmet]:
    found = []
    for one in plan.unmet:
        of = demand.gangs[one.source].bundles[0] if one.of_gang else singles[one.source]
        found.append(
            pb.RayUnmet(
                bundle=of,
                gang=one.of_gang,
                count=one.count,
                why=one.why,
                never=one.never,
                postponed=one.postponed,
            )
        )
    return found
