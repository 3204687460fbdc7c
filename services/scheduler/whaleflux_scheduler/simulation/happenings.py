"""What happens to simulated jobs and nodes, by the second: each function takes the time, and makes news for the planner.

What a record becomes is decided by the production core: `lifecycle.advance` with what agents and health_monitor would have told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from whaleflux import names
from whaleflux_scheduler.core import cost, lifecycle
from whaleflux_scheduler.core.model import GOES_ON, Cause, Job, JobState, Queue, TaskPhase
from whaleflux_scheduler.core.observed import Observations, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.simulation import running
from whaleflux_scheduler.simulation.running import SimulatedJob
from whaleflux_scheduler.simulation.state import State
from whaleflux_scheduler.simulation.timeline import instant, second_of
from whaleflux_scheduler.simulation.workload import NodeEvent, Submission

_PATIENT = Timeouts(accept_s=1e9, start_s=1e9, fetch_s=1e9)  # no agent is late here


def submit(state: State, submission: Submission) -> None:
    """A job comes; a queue that nobody described comes with its first job."""
    name, spec, at_s = submission.name, submission.spec, submission.at_s
    queue = names.top(name)
    if queue not in state.queues:
        state.queues[queue] = Queue(names.queue(queue))
        state.news.queues = dict(state.queues)
    job = Job(name, spec, JobState.QUEUED, instant(at_s), uid=name, is_ray_worker=submission.is_ray_worker)
    row = state.result.outcomes.add(name, queue, spec.gpus, spec.priority, at_s, submission.run_s)
    state.jobs[name] = SimulatedJob(job, submission, row, submission.run_s)
    state.result.asked.change(at_s, spec.gpus)
    state.news.candidates[name] = Candidate(job)


def adopt(state: State, job: Job, submission: Submission) -> None:
    """A job runs already when the simulation begins."""
    assert job.attempt is not None
    if job.queue not in state.queues:
        state.queues[job.queue] = Queue(names.queue(job.queue))
        state.news.queues = dict(state.queues)
    row = state.result.outcomes.add(job.name, job.queue, job.spec.gpus, job.spec.priority, 0.0, submission.run_s)
    state.result.outcomes.start_s[row] = 0.0
    simulated = state.jobs[job.name] = SimulatedJob(job, submission, row, submission.run_s, turn=1)
    simulated.held, simulated.there = sum(task.gpus_worth for task in job.attempt.tasks), True
    state.result.held.change(0.0, simulated.held)
    state.is_on(job, job.attempt.nodes)
    state.news.record(job)
    done_s = simulated.starts_work(0.0, job.attempt.gpus, state.delays)
    state.timeline.add(done_s, finish, state, simulated, simulated.turn)


def begin(at_s: float, state: State, simulated: SimulatedJob, turn: int) -> None:
    """All ranks of the attempt run."""
    if simulated.turn != turn:
        return
    job = simulated.job = running.running(simulated.job, instant(at_s))
    assert job.attempt is not None
    done_s = simulated.starts_work(at_s, job.attempt.gpus, state.delays)
    limit_s = running.limit_s(job)
    if limit_s < done_s:
        state.timeline.add(limit_s, look, state, simulated, turn)
    else:
        state.timeline.add(done_s, finish, state, simulated, turn)
    state.news.record(job, urgent=False)  # told with what comes next
    if job.spec.is_elastic:
        state.timeline.add(simulated.works_from_s, step, state, simulated, turn)
        state.timeline.add(at_s + lifecycle.LOOK_FIRST_S, look_at_size, state, simulated, turn, lifecycle.LOOK_FIRST_S)
    if state.claimants.to(job.name) or state.leaving.to(job.name):
        look(at_s, state, simulated, turn)


def step(at_s: float, state: State, simulated: SimulatedJob, turn: int) -> None:
    """Its first step of this attempt: it has loaded its checkpoint."""
    job = simulated.job
    if simulated.turn == turn and job.attempt is not None:
        simulated.job = replace(job, attempt=replace(job.attempt, first_step_time=instant(at_s)))
        state.news.record(simulated.job, urgent=False)


def look_at_size(at_s: float, state: State, simulated: SimulatedJob, turn: int, after_s: float) -> None:
    """An elastic job that has run for `after_s` may be worth a resize; the next time when it has run for twice as long."""
    if simulated.turn == turn and simulated.job.state is JobState.RUNNING:
        state.news.record(simulated.job)
        state.timeline.add(at_s + after_s, look_at_size, state, simulated, turn, 2 * after_s)


def finish(at_s: float, state: State, simulated: SimulatedJob, turn: int) -> None:
    """Its work is done."""
    if simulated.turn == turn:
        _end(at_s, state, simulated, running.finished(simulated.job, instant(at_s)))


def cancel(at_s: float, state: State, simulated: SimulatedJob, turn: int) -> None:
    """Who submitted it ends it."""
    if simulated.turn == turn and not simulated.job.ended:
        _became(at_s, state, simulated, lifecycle.cancel(simulated.job, Cause(message="cancelled"), instant(at_s)))


def look(at_s: float, state: State, simulated: SimulatedJob, turn: int) -> None:
    """Something about the job may have changed: its nodes, who claims its GPUs, or the time."""
    before = simulated.job
    if simulated.turn != turn or before.ended:
        return
    now = instant(at_s)
    observed = Observations(
        nodes=state.conditions_of(before),
        claimed_by=state.claimed_by(before, now),
        claim_is_free=state.claim_is_free(before),
    )
    after = lifecycle.advance(before, observed, now, _PATIENT)
    if after is not before:
        _became(at_s, state, simulated, after)


def offer(at_s: float, state: State, simulated: SimulatedJob, turn: int) -> None:
    """It may be placed: now, or when its pause is over."""
    job = simulated.job
    if simulated.turn != turn or job.state not in (JobState.QUEUED, JobState.RECOVERING):
        return
    if job.not_before is not None and second_of(job.not_before) > at_s:
        state.timeline.add(second_of(job.not_before), offer, state, simulated, turn)
    else:
        state.news.candidates[job.name] = Candidate(job)


def node_event(at_s: float, state: State, event: NodeEvent) -> None:
    """Nodes are lost, are to be emptied, or are back."""
    for node in event.nodes:
        was_closed = node in state.conditions
        if event.what == "up":
            state.conditions.pop(node, None)
        else:
            state.conditions[node] = running.condition_of(event.what)
        state.news.closed[node] = "" if event.what == "up" else "draining" if event.what == "drain" else "unreachable"
        closed = node in state.conditions
        state.result.closed.change(at_s, (closed - was_closed) * state.sizes[node])
    touched = {name for node in event.nodes for name in state.on_node.get(node, ())}
    touched |= {name for name in state.claiming if not state.claiming[name].isdisjoint(event.nodes)}
    for name in sorted(touched):
        look(at_s, state, state.jobs[name], state.jobs[name].turn)


# what a transition leads to


def _became(at_s: float, state: State, simulated: SimulatedJob, after: Job) -> None:
    before, simulated.job = simulated.job, after
    if after.ended:
        _end(at_s, state, simulated, running.with_tasks(after, TaskPhase.KILLED))
    elif after.state is before.state:  # a claim that it lost, or something of its record
        state.news.record(after)
        claims(state, after)
        offer(at_s, state, simulated, simulated.turn)
    else:
        _AFTER[after.state](at_s, state, simulated)


def _suspending(at_s: float, state: State, simulated: SimulatedJob) -> None:
    """It saves, and leaves its GPUs when that is done or its grace is over; at once where nothing ran yet."""
    delays, job = state.delays, simulated.job
    save_s = delays.save_s if job.attempt is not None and job.attempt.run_time is not None else 0.0
    simulated.turn += 1
    claims(state, job)
    if save_s <= job.grace_s:
        simulated.keeps_work(at_s)
    else:
        simulated.loses_work(at_s, delays.checkpoint_every_s)
    state.result.outcomes.suspensions[simulated.row] += 1
    state.result.moves.add(at_s, "suspend", job.name)
    state.news.record(job)
    state.timeline.add(at_s + min(save_s, job.grace_s), left, state, simulated, simulated.turn)


def left(at_s: float, state: State, simulated: SimulatedJob, turn: int) -> None:
    """Nothing of the suspended attempt is on its nodes any more."""
    if simulated.turn != turn:
        return
    now = instant(at_s)
    gone = running.with_tasks(simulated.job, TaskPhase.KILLED)
    leave(at_s, state, simulated, "suspended")
    simulated.job = lifecycle.advance(gone, Observations(), now, _PATIENT)
    _queued(at_s, state, simulated)
    if simulated.job.claim is not None:  # others may have come to claim where it was to go on
        look(at_s, state, simulated, simulated.turn)


def _queued(at_s: float, state: State, simulated: SimulatedJob) -> None:
    state.news.record(simulated.job)
    state.result.asked.change(at_s, simulated.job.spec.gpus)
    offer(at_s, state, simulated, simulated.turn)


def _recovering(at_s: float, state: State, simulated: SimulatedJob) -> None:
    """A node was lost or is emptied: the attempt is over."""
    simulated.turn += 1
    simulated.loses_work(at_s, state.delays.checkpoint_every_s)
    state.result.outcomes.recoveries[simulated.row] += 1
    state.result.moves.add(at_s, "recover", simulated.job.name)
    leave(at_s, state, simulated, "lost")
    simulated.job = running.with_tasks(simulated.job, TaskPhase.GONE)
    state.news.record(simulated.job)
    state.result.asked.change(at_s, simulated.job.spec.gpus)
    state.timeline.add(at_s + state.delays.recover_s, _diagnosed, state, simulated, simulated.turn)


def _diagnosed(at_s: float, state: State, simulated: SimulatedJob, turn: int) -> None:
    if simulated.turn == turn:
        observed = Observations(diagnosis=running.diagnosed(simulated.job))
        simulated.job = lifecycle.advance(simulated.job, observed, instant(at_s), _PATIENT)
        offer(at_s, state, simulated, turn)


def _end(at_s: float, state: State, simulated: SimulatedJob, job: Job) -> None:
    result, name, row = state.result, job.name, simulated.row
    waited = not simulated.there and job.attempt is not None
    leave(at_s, state, simulated, "done" if job.state is JobState.SUCCEEDED else job.state.name.lower())
    if waited:
        result.asked.change(at_s, -job.spec.gpus)
    simulated.job, simulated.turn = job, simulated.turn + 1
    result.outcomes.end_s[row], result.outcomes.states[row] = at_s, job.state
    result.job_usd += cost.job_cost_usd(job, instant(at_s))
    result.moves.add(at_s, job.state.name.lower(), name)
    claims(state, job)
    state.news.record(job)
    state.news.candidates[name] = None
    del state.jobs[name]


def leave(at_s: float, state: State, simulated: SimulatedJob, why: str) -> None:
    """The attempt holds its GPUs no more."""
    job, held = simulated.job, simulated.held
    if not simulated.there or job.attempt is None:
        return
    simulated.held, simulated.there = 0.0, False
    state.result.held.change(at_s, -held)
    if state.result.spans is not None:
        state.result.spans.add(job.name, job.queue, job.attempt, simulated.placed_s, at_s, why)
    state.is_off(job, job.attempt.nodes)
    for name in state.going_on:
        other = state.jobs[name]
        state.timeline.add(at_s, look, state, other, other.turn)


def claims(state: State, job: Job) -> None:
    """The claim in the job's record is known to those whom it concerns."""
    state.claimants.set(job.name, job.claim.victims if job.claim is not None else ())
    if job.claim is not None:
        state.claiming[job.name] = job.claim.gpus.keys()
    else:
        state.claiming.pop(job.name, None)
    if job.claim is not None and job.state is JobState.RUNNING and job.claim.purpose in GOES_ON:
        state.going_on[job.name] = None
    else:
        state.going_on.pop(job.name, None)


_AFTER: dict[JobState, Callable[[float, State, SimulatedJob], None]] = {
    JobState.SUSPENDING: _suspending,
    JobState.QUEUED: _queued,
    JobState.RECOVERING: _recovering,
}
