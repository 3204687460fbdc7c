"""What becomes of the planner's moves: one function for each kind, which says what the leader's loop would have written."""

from __future__ import annotations

import math

from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.core.planner import Choice
from whaleflux_scheduler.core.queueing import Candidate
from whaleflux_scheduler.simulation import happenings
from whaleflux_scheduler.simulation.running import SimulatedJob
from whaleflux_scheduler.simulation.state import State
from whaleflux_scheduler.simulation.timeline import instant, second_of


def apply(at_s: float, state: State, choice: Choice) -> None:
    """Makes the move; those about jobs that ended since are void."""
    simulated = state.jobs.get(choice.job)
    if simulated is None:
        return
    if choice.assignment is not None:
        _start(at_s, state, simulated, choice)
    elif choice.claim is not None:
        _claim(at_s, state, simulated, choice)
    else:
        _wait(state, simulated, choice)


def _start(at_s: float, state: State, simulated: SimulatedJob, choice: Choice) -> None:
    assert choice.assignment is not None
    job = lifecycle.place(simulated.job, choice.assignment, choice.decision, instant(at_s))
    simulated.job, simulated.placed_s, simulated.turn = job, at_s, simulated.turn + 1
    assert job.attempt is not None
    simulated.held = sum(task.gpus_worth for task in job.attempt.tasks)
    result, outcomes = state.result, state.result.outcomes
    result.held.change(at_s, simulated.held)
    result.asked.change(at_s, -job.spec.gpus)
    result.moves.add(at_s, "start", job.name, choice.assignment.nodes)
    if math.isnan(outcomes.start_s[simulated.row]):
        outcomes.start_s[simulated.row] = at_s
    state.claimants.set(job.name, ())
    state.is_on(job, job.attempt.nodes)
    if state.delays.start_s:
        state.news.jobs.append(job)
        state.timeline.add(at_s + state.delays.start_s, happenings.begin, state, simulated, simulated.turn)
    else:
        happenings.begin(at_s, state, simulated, simulated.turn)


def _claim(at_s: float, state: State, simulated: SimulatedJob, choice: Choice) -> None:
    assert choice.claim is not None
    job = simulated.job = lifecycle.claim(simulated.job, choice.claim, choice.decision.summary)
    state.result.moves.add(at_s, "claim", job.name, choice.claim.nodes)
    state.claimants.set(job.name, choice.claim.victims)
    state.news.jobs.append(job)
    state.news.candidates[job.name] = Candidate(job)
    expire_s = second_of(choice.claim.expire_time)
    state.timeline.add(expire_s, happenings.look, state, simulated, simulated.turn)
    for name in choice.claim.victims:
        if (victim := state.jobs.get(name)) is not None:
            happenings.look(at_s, state, victim, victim.turn)


def _wait(state: State, simulated: SimulatedJob, choice: Choice) -> None:
    """A recovering job that has no place goes back into its queue."""
    if simulated.job.state is JobState.RECOVERING:
        job = simulated.job = lifecycle.requeue(simulated.job, choice.decision.summary)
        state.news.jobs.append(job)
        state.news.candidates[job.name] = Candidate(job)
