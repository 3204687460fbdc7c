"""The simulation: events make news, the production planner makes moves of them, moves make events. See the package for its use."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from whaleflux.fleet.model import Node
from whaleflux_scheduler.core import cost
from whaleflux_scheduler.core.plan import Move, News, Plan
from whaleflux_scheduler.core.rebalance import RebalancePlan, RebalanceRules
from whaleflux_scheduler.simulation import happenings, moves
from whaleflux_scheduler.simulation.records import MoveLog, Spans
from whaleflux_scheduler.simulation.state import Result, State
from whaleflux_scheduler.simulation.timeline import NEVER_S, instant, second_of
from whaleflux_scheduler.simulation.workload import NodeEvent, Submission, Workload

LOOK_EVERY_S = 60.0  # for moves of running jobs
AfterRebalance = Callable[[float, State, RebalancePlan], None]
"""Called with the second, the simulation's state and what was moved."""
SIMULATED = (
    "no agents, network or store: starts, checkpoints, restarts and lost nodes take the workload's `delays`; jobs run for as long as the "
    "workload says, whatever their place; all decisions are the production planner's, which needs no time for them"
)


class Simulation:
    """A fleet and a workload; `run` once.

    With `decision_time` so many times the CPU time of each decision passes, and what happens meanwhile waits for the next one: no two runs are
    equal then. Moves of running jobs are looked for every `look_every_s`, the leader's minute unless told otherwise.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        workload: Workload,
        *,
        events: Iterable[NodeEvent] = (),
        log: MoveLog | None = None,
        spans: Spans | None = None,
        decision_time: float = 0.0,
        rebalance: RebalanceRules | None = None,
        look_every_s: float = LOOK_EVERY_S,
        after_rebalance: AfterRebalance | None = None,
    ) -> None:
        hourly = sum(len(node.gpus) * node.price.usd_per_gpu_hour for node in nodes)
        result = Result(sum(len(node.gpus) for node in nodes), hourly, log or MoveLog(), spans)
        self._state = State(nodes, workload.queues, workload.delays, result, workload.reservations)
        self._plan, self._decision_time = Plan(reasons=False, rules=rebalance), decision_time
        self._rebalance, self._after_rebalance = rebalance is not None, after_rebalance
        self._look_every_s = self._look_s = look_every_s
        self._arrivals = workload.in_order()
        for event in events:
            self._state.timeline.add(event.at_s, happenings.node_event, self._state, event)
        for job, submission in workload.running:
            happenings.adopt(self._state, job, submission)

    def run(self, until_s: float = NEVER_S) -> Result:
        """To the end of the last job, or until then. What waits for what never comes is QUEUED in the outcomes."""
        begun, state = time.thread_time(), self._state
        arrival: Submission | None = next(self._arrivals, None)
        self._decide()
        while state.jobs or arrival is not None:
            plan_s = self._plan_s()
            due_s = min(state.timeline.next_s, arrival.at_s if arrival else NEVER_S, plan_s)
            if due_s == NEVER_S or due_s > until_s:
                break
            if self._rebalance:  # a look alone is nothing that goes on
                due_s = min(due_s, max(state.now_s, self._look_s))
            state.now_s = now_s = max(state.now_s, self._round_of(due_s))
            state.timeline.run_until(now_s)
            while arrival is not None and arrival.at_s <= now_s:
                happenings.submit(state, arrival)
                arrival = next(self._arrivals, None)
            self._decide(look=plan_s <= now_s)
            if self._rebalance and now_s >= self._look_s:
                self._look_for_moves()
        self._finish(state.now_s if until_s == NEVER_S else until_s)
        state.result.total_s = time.thread_time() - begun
        return state.result

    def _round_of(self, due_s: float) -> float:
        every_s = self._state.delays.round_s
        return math.ceil(due_s / every_s) * every_s if every_s else due_s

    def _plan_s(self) -> float:
        """When the plan has to be asked again without news."""
        at = self._plan.next_look
        return NEVER_S if at is None else second_of(at)

    def _decide(self, *, look: bool = False) -> None:
        """Until nothing follows any more: what was started runs, who was claimed from is asked to leave."""
        state, result = self._state, self._state.result
        while state.news or look:
            look = False
            begun = time.thread_time()
            made = self._plan.step(state.take_news(), instant(state.now_s))
            decided = time.thread_time()
            state.now_s += self._decision_time * (decided - begun)
            for move in made if len(made) == 1 else first_of_each(made):
                moves.apply(state.now_s, state, move)
            result.steps += 1
            result.step_s += decided - begun
            result.apply_s += time.thread_time() - decided

    def _look_for_moves(self) -> None:
        """As the leader does when it may move."""
        state, result = self._state, self._state.result
        at_s, begun = state.now_s, time.thread_time()
        self._look_s = at_s + self._look_every_s
        self._plan.take_in(News(saved=state.saved(at_s)), instant(at_s))
        plan = self._plan.plan_rebalance(instant(at_s))
        result.looks, result.look_s = result.looks + 1, result.look_s + time.thread_time() - begun
        if not plan.proposals:
            return
        result.rebalances.append(plan)
        for move in self._plan.apply_rebalance(plan.etag, instant(at_s))[1]:
            moves.apply(at_s, state, move)
        if self._after_rebalance is not None:
            self._after_rebalance(at_s, state, plan)
        self._decide()

    def check(self) -> None:
        """Raises AssertionError when a GPU is held twice, or the plan holds something else than the jobs do."""
        self._plan.check()

    def _finish(self, end_s: float) -> None:
        """Books what still goes on."""
        state, result = self._state, self._state.result
        for series in (result.held, result.asked, result.closed):
            series.until(end_s)
        result.end_s = end_s
        for simulated in state.jobs.values():
            result.outcomes.states[simulated.row] = simulated.job.state
            result.job_usd += cost.job_cost_usd(simulated.job, instant(end_s))
            if result.spans is not None and simulated.there and simulated.job.attempt:
                job, attempt = simulated.job, simulated.job.attempt
                result.spans.add(job.name, job.queue, attempt, simulated.placed_s, end_s, "runs")


def first_of_each(made: Iterable[Move]) -> Iterable[Move]:
    """A record makes one transition in a round, as in the leader's loop: further moves of one job are void, and news of it says so."""
    seen = set[str]()
    for move in made:
        if move.job in seen:
            continue
        if move.assignment is not None or move.claim is not None or move.reservation is not None:
            seen.add(move.job)
        yield move
