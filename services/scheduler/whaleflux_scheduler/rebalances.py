"""Moves of running jobs, as the leader makes them: a look each minute, and what operators ask for. What is worth it: `core.rebalance`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import Aborted, ResourceExhausted, Unavailable
from whaleflux.reasons import What
from whaleflux.telemetry import Metric
from whaleflux.v1 import events_pb2, types_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core.going_on import Place
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.plan import Move
from whaleflux_scheduler.core.rebalance import Proposal, RebalancePlan, RebalanceRules, held_place
from whaleflux_scheduler.news_beside import NewsBeside
from whaleflux_scheduler.planner_thread import PlannerThread

EVERY_S = 60.0
_MOST_TOLD = 256
Mode = Literal["off", "plan", "on"]


@dataclass(frozen=True, slots=True)
class RebalanceSettings:
    """What the scheduler does by itself, and its bounds."""

    mode: Mode = "plan"
    rules: RebalanceRules = field(default_factory=RebalanceRules)


class Rebalances:
    """Lives as long as its leadership. `caught_up` returns when the planner knows what has come so far, `order` has moves carried out."""

    def __init__(
        self,
        mode: Mode,
        planner: PlannerThread,
        caught_up: Callable[[], Awaitable[None]],
        order: Callable[[Sequence[Move]], None],
        news: NewsBeside,
        clock: Clock,
    ) -> None:
        self._mode, self._planner, self._caught_up = mode, planner, caught_up
        self._order, self._news, self._clock = order, news, clock
        self._told: dict[str, None] = {}  # what was proposed already

    async def plan(self) -> pb.RebalancePlan:
        """What is worth it now, also for gangs that were looked at lately in vain."""
        return self._message(await self._look(thorough=True))

    async def check(self, etag: str) -> pb.RebalancePlan:
        """A plan that could be applied now. Raises Aborted naming what is not as it found it."""
        await self._caught_up()
        now = self._clock.now()
        return self._message(await self._planner.ask(lambda planner: planner.check_rebalance(etag, now)))

    async def apply(self, etag: str) -> pb.RebalancePlan:
        """Begins what a plan says. Raises as `check`."""
        await self._caught_up()
        now = self._clock.now()
        plan, moves = await self._planner.ask(lambda planner: planner.apply_rebalance(etag, now))
        self._order(moves)
        return self._message(plan)

    async def run(self) -> None:
        """For ever: what is worth it is told, or done."""
        while self._mode != "off":
            await self._clock.sleep(EVERY_S)
            try:
                await self._once()
            except (
                Aborted,
                ResourceExhausted,
                Unavailable,
            ):  # others were faster, or the planner has no time: in a minute
                continue

    async def _once(self) -> None:
        plan = await self._look()
        if plan.proposals and self._mode == "on":
            await self.apply(plan.etag)
        for proposal in plan.proposals if self._mode == "plan" else ():
            self._propose(plan, proposal)

    async def _look(self, *, thorough: bool = False) -> RebalancePlan:
        await self._caught_up()
        now = self._clock.now()
        with telemetry.histogram(Metric.PLAN_DURATION).labels("rebalance").time():
            return await self._planner.ask(lambda planner: planner.plan_rebalance(now, thorough=thorough))

    def _propose(self, plan: RebalancePlan, proposal: Proposal) -> None:
        """Once for each set of moves."""
        about: Job = proposal.gang or proposal.moves[0].job
        alone = RebalancePlan(plan.time, (proposal,), 0.0).etag
        if alone in self._told:
            return
        self._told[alone] = None
        while len(self._told) > _MOST_TOLD:
            del self._told[next(iter(self._told))]
        movers = ", ".join(move.job.name for move in proposal.moves)
        self._news.tell(
            events_pb2.Event(
                id=f"rebalance/{alone}",
                resource=about.name,
                what=What.REBALANCE_PROPOSED,
                epoch=about.epoch,
                cause=types_pb2.Cause(actor="scheduler/rebalance"),
                message=f"moving {movers} {proposal.why}; see: whaleflux rebalance plan"[:2000],
                source="scheduler",
                attributes={
                    "moves": movers[:4000],
                    "cost_gpu_s": f"{proposal.cost_gpu_s:.0f}",
                    "gain_gpu_s": f"{proposal.gain_gpu_s:.0f}",
                    "gain_usd": f"{proposal.gain_usd:.2f}",
                },
            )
        )

    def _message(self, plan: RebalancePlan) -> pb.RebalancePlan:
        return pb.RebalancePlan(
            etag=plan.etag,
            time=convert.timestamp(plan.time),
            proposals=map(_proposal, plan.proposals),
            budget_left_gpu_s=max(0.0, plan.budget_left_gpu_s),
            mode=self._mode,
        )


def _proposal(proposal: Proposal) -> pb.RebalanceProposal:
    moves = (
        pb.RebalanceMove(
            job=move.job.name, to=_place(move.to), cost_gpu_s=move.cost_gpu_s, **{"from": _place(held_place(move.job))}
        )
        for move in proposal.moves
    )
    return pb.RebalanceProposal(
        moves=moves,
        starts=proposal.gang.name if proposal.gang is not None else "",
        room=_place(proposal.room),
        gain_gpu_s=proposal.gain_gpu_s,
        gain_usd=proposal.gain_usd,
        cost_gpu_s=proposal.cost_gpu_s,
        why=proposal.why,
    )


def _place(place: Place) -> list[pb.ClaimedNode]:
    return [pb.ClaimedNode(node=node, gpu_uuids=uuids) for node, uuids in place]
