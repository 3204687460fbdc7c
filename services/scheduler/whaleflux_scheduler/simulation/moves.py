"""What becomes of the planner's moves: one function for each kind, which says what the leader's loop would have written."""

from __future__ import annotations

import math

from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import Move
from whaleflux_scheduler.core.reservations import Reservation
from whaleflux_scheduler.simulation import happenings
from whaleflux_scheduler.simulation.running import SimulatedJob
from whaleflux_scheduler.simulation.state import State
from whaleflux_scheduler.simulation.timeline import instant, second_of


def apply(at_s: float, state: State, move: Move) -> None:
    """Makes the move; those about jobs that ended since are void."""
    if move.reservation is not None:
        _keep(at_s, state, move.reservation)
        return
    simulated = state.jobs.get(move.job)
    if simulated is None:
        return
    if move.assignment is not None:
        _start(at_s, state, simulated, move)
    elif move.claim is not None and simulated.job.state is JobState.RUNNING:
        _claim_running(at_s, state, simulated, move)
    elif move.claim is not None:
        _claim(at_s, state, simulated, move)
    else:
        _wait(state, simulated, move)


def _keep(at_s: float, state: State, reservation: Reservation) -> None:
    """It began, is over, has other GPUs or has more jobs leave."""
    known = state.reservations[reservation.name]
    state.reservations[reservation.name] = reservation
    state.leaving.set(reservation.name, reservation.victims)
    state.news.reservations = dict(state.reservations)
    if reservation.state is not known.state:
        state.result.moves.add(at_s, reservation.state.name.lower(), reservation.name, reservation.held)
    for name in reservation.victims:
        if (victim := state.jobs.get(name)) is not None:
            happenings.look(at_s, state, victim, victim.turn)


def _start(at_s: float, state: State, simulated: SimulatedJob, move: Move) -> None:
    assert move.assignment is not None
    job = lifecycle.place(simulated.job, move.assignment, move.decision, instant(at_s))
    simulated.job, simulated.placed_s, simulated.turn = job, at_s, simulated.turn + 1
    assert job.attempt is not None
    simulated.held, simulated.there = sum(task.gpus_worth for task in job.attempt.tasks), True
    result, outcomes = state.result, state.result.outcomes
    result.held.change(at_s, simulated.held)
    result.asked.change(at_s, -job.spec.gpus)
    result.moves.add(at_s, "start", job.name, move.assignment.nodes)
    if math.isnan(outcomes.start_s[simulated.row]):
        outcomes.start_s[simulated.row] = at_s
    happenings.claims(state, job)
    state.news.candidates.pop(
        job.name, None
    )  # it lost its claim to a move of the same step: it waits no more all the same
    state.is_on(job, job.attempt.nodes)
    if state.delays.start_s:
        state.news.record(job)
        state.timeline.add(at_s + state.delays.start_s, happenings.begin, state, simulated, simulated.turn)
    else:
        happenings.begin(at_s, state, simulated, simulated.turn)


def _claim_running(at_s: float, state: State, simulated: SimulatedJob, move: Move) -> None:
    """It goes on elsewhere, or with other GPUs, once those who are there have left."""
    assert move.claim is not None
    simulated.job = lifecycle.claim_while_running(simulated.job, move.claim, move.decision.summary)
    _claimed(at_s, state, simulated)
    happenings.look(at_s, state, simulated, simulated.turn)


def _claim(at_s: float, state: State, simulated: SimulatedJob, move: Move) -> None:
    assert move.claim is not None
    simulated.job = lifecycle.claim(simulated.job, move.claim, move.decision.summary)
    state.news.candidates[simulated.job.name] = Candidate(simulated.job)
    outcomes = state.result.outcomes
    if move.claim.start_time is not None and math.isnan(outcomes.start_s[simulated.row]):
        outcomes.promised_s[simulated.row] = second_of(move.claim.start_time)
    _claimed(at_s, state, simulated)


def _claimed(at_s: float, state: State, simulated: SimulatedJob) -> None:
    job, claim = simulated.job, simulated.job.claim
    assert claim is not None
    state.result.moves.add(at_s, "claim", job.name, claim.nodes)
    happenings.claims(state, job)
    state.news.record(job)
    state.timeline.add(second_of(claim.expire_time), happenings.look, state, simulated, simulated.turn)
    for name in claim.victims:
        if (victim := state.jobs.get(name)) is not None:
            happenings.look(at_s, state, victim, victim.turn)


def _wait(state: State, simulated: SimulatedJob, move: Move) -> None:
    """A recovering job that has no place goes back into its queue."""
    if simulated.job.state is JobState.RECOVERING:
        job = simulated.job = lifecycle.requeue(simulated.job, move.decision.summary)
        state.news.record(job)
        state.news.candidates[job.name] = Candidate(job)
