"""The leader's loop: wake on news, work out what follows, write it, go on. Never polls.

A round takes everything that came since the last one: reports, phases of nodes, diagnoses, changes of jobs, deadlines. Each job
makes at most one transition per round (`core.lifecycle`), waiting jobs are placed (`core.plan`, in its own thread), and all
transitions are written at once, each under the job's revision and this leadership. What a transition leads to is the next round's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from whaleflux import names, telemetry
from whaleflux.clock import Clock
from whaleflux.planning.calibration import Calibrated
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.store.election import Leader
from whaleflux.telemetry import Event, Metric
from whaleflux.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from whaleflux_scheduler import spans
from whaleflux_scheduler.agent_sessions import AgentSessions
from whaleflux_scheduler.agents import Agents
from whaleflux_scheduler.budget_stops import BudgetStops
from whaleflux_scheduler.clock_watch import ClockWatch
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core import (
    after_failure,
    attempt_failures,
    budget_stops,
    dependencies,
    lifecycle,
    task_observations,
    wait_reasons,
)
from whaleflux_scheduler.core.data_ahead import datasets_of
from whaleflux_scheduler.core.model import ACTIVE, GOES_ON, Job, JobState, Queue, SchedulingDecision
from whaleflux_scheduler.core.observed import Observations, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement.api import DatasetFact
from whaleflux_scheduler.core.plan import Move, News, Plan
from whaleflux_scheduler.core.queue_shares import PastUse, past_uses
from whaleflux_scheduler.core.reservations import Reservation
from whaleflux_scheduler.decision_log import DecisionLog
from whaleflux_scheduler.diagnosis import FailureDiagnosis
from whaleflux_scheduler.housekeeping import Housekeeping
from whaleflux_scheduler.job_access import of_earlier_queue
from whaleflux_scheduler.job_sight import JobSight, Sources
from whaleflux_scheduler.job_tracking import JobTracking, Offer
from whaleflux_scheduler.job_view import JobView
from whaleflux_scheduler.jobs import key_of
from whaleflux_scheduler.leader_state import LeaderState
from whaleflux_scheduler.node_view import NodeChanges, NodeView
from whaleflux_scheduler.planner_thread import PlannerThread
from whaleflux_scheduler.replanning import Replanning
from whaleflux_scheduler.reservation_keeper import ReservationKeeper
from whaleflux_scheduler.saved_checkpoints import Newest
from whaleflux_scheduler.task_index import nodes_to_tell
from whaleflux_scheduler.why_ended import WhyEnded
from whaleflux_scheduler.writer import Transition, Writer, WriterCallbacks

COALESCE_S = 0.0005  # news that come together are one round
ROUND_EVERY_S, LONGEST_PAUSE_S = 0.02, 0.03  # between the starts of two rounds, at least and at most
SHOW_EVERY_S = 1.0
CAUGHT_UP_S = 1.0
LOOK_OVER_S = 60.0  # some of those who wait are tried again, whatever is known of them
LOOK_EVERY_S = 30.0  # at a clock by which something is due: it may have been set
MOST_LEARNED, LEARNED_AT_ONCE = 5_000, 500  # ended jobs that a new leader learns from, and those of one round
ASK_AGAIN = timedelta(seconds=0.1)  # whether a job's data is known by now
_NOTHING = Observations()
_log = telemetry.get_logger("whaleflux.scheduler")
PLAN = "!plan"  # what looks at no job in particular when it is due


class Reconciler:
    """One leadership: everything that it remembers ends with it."""

    def __init__(
        self,
        store: Store,
        leader: Leader,
        sources: Sources,
        sessions: AgentSessions,
        nodes: NodeView,
        diagnosis: FailureDiagnosis,
        clock: Clock,
        timeouts: Timeouts,
        stops: BudgetStops,
        *,
        keep_ended: int = 10_000,
        told: Callable[[], float] = lambda: math.inf,
        plan: Plan | None = None,
        data_known: Callable[[Collection[str]], bool] = lambda _: True,
        checkpoint: CheckpointServiceStub | None = None,
        measured: Mapping[str, Mapping[str, Calibrated]] | None = None,
    ) -> None:
        self._data_known = data_known
        self._sources, self._sessions, self._nodes, self._stops = sources, sessions, nodes, stops
        self._clock, self._timeouts = clock, timeouts
        self._state, self.planner = LeaderState(), PlannerThread(clock, plan)
        self.agents = Agents(sources.jobs, self._state, sessions, nodes, clock)
        self._replanning = Replanning(checkpoint, clock, self._state.touch, measured)
        seen, sized = self._replanning.seen, self._replanning.sized
        self.view = JobView(
            self._state, self.planner, nodes, clock, self._caught_up, sessions.said_of_data, seen, sized, stops
        )
        self._housekeeping = Housekeeping(
            store, leader, sources.jobs, self._state, self.planner, clock, keep_ended, told
        )
        callbacks = WriterCallbacks(self._written, self._state.touch, self._not_storable)
        self._decisions = DecisionLog(store, leader, sources.jobs, self.planner, clock)
        self._writer = Writer(store, leader, sources.jobs, callbacks, clock)
        self._keeper = ReservationKeeper(store, leader, sources.reservations, clock)
        self._queues_changed = self._reservations_changed = True
        self._to_learn: list[Job] = []
        self._loaded: dict[str, Job] = {}  # jobs that are taken in as the feed of jobs will begin by telling
        self._looks_over = False
        self._saved: Mapping[str, datetime] | None = None  # of all jobs; None: as in the last round
        self._past_uses: tuple[PastUse, ...] = ()  # what queues held before this leadership
        self._ordered: list[Move] = []  # that the planner made beside its steps
        self._datasets: dict[str, DatasetFact | None] = {}  # what changed since the last round; None: gone
        nodes.on_change = self._state.wake
        self._watch = ClockWatch(clock)
        self._why_ended = WhyEnded(diagnosis, self._state, sessions, clock, timeouts)
        self._sight = JobSight(sources, self._state, nodes, self._watch, timeouts)
        self._tasks: asyncio.TaskGroup | None = None
        self._rounds_done = 0
        self._round_over = asyncio.Event()  # another one for each round

    def load(self) -> None:
        """Takes in what the store holds. Before this, an agent would be told that nothing is desired."""
        self._stops.changed()
        for stored in self._sources.jobs.values.values():
            self._loaded[stored.value.name] = stored.value
            self._state.record(stored.value.name, stored.value)
            self._state.data.record(stored.value.name, stored.value)
            if not stored.value.ended or any(stored.value.holding()):
                self._state.touch(stored.value.name)
        for reserved in self._sources.reservations.values.values():
            self._state.reserve(reserved.value.name, reserved.value.victims)
        ended = [stored.value for stored in self._sources.jobs.values.values() if stored.value.ended]
        ended.sort(key=lambda job: job.end_time or job.create_time)
        self._to_learn = ended[-MOST_LEARNED:]
        self._past_uses = past_uses(self._of_their_queues(), self._clock.now())

    def _of_their_queues(self) -> Iterator[Job]:
        """All jobs but those that ended in a queue that is gone, of which another has the name now."""
        queues = {names.top(stored.value.name): stored for stored in self._sources.queues.values.values()}
        for stored in self._sources.jobs.values.values():
            queue = queues.get(stored.value.queue)
            if queue is None or not of_earlier_queue(stored, queue):
                yield stored.value

    async def run(self) -> None:
        """Until cancelled; raises Fenced (in a group) when another leads."""
        try:
            async with asyncio.TaskGroup() as group:
                self._tasks = group
                self._writer.runs_in(group)
                self._replanning.runs_in(group)
                group.create_task(self._follow_jobs())
                group.create_task(self._follow_queues())
                group.create_task(self._follow_reservations())
                group.create_task(self._follow_budgets())
                group.create_task(self._keeper.run())
                group.create_task(self._alarm())
                group.create_task(self._confirm_clock())
                group.create_task(self._look_over())
                group.create_task(self._rounds())
                group.create_task(self._keep_showing())
                group.create_task(self._housekeeping.prune())
                group.create_task(self._decisions.run())
        finally:
            self.planner.shutdown()
            self._housekeeping.clear_gauges()

    def datasets_are(self, changed: Sequence[DatasetFact], gone: Sequence[str] = ()) -> None:
        """Datasets of which the size or the copies changed, and those that exist no more."""
        self._datasets |= {fact.name: fact for fact in changed} | dict.fromkeys(gone)
        self._state.wake()

    def saved(self, newest: Mapping[str, Newest]) -> None:
        """The newest checkpoint of each job; taken in with the next round."""
        self._saved = {name: one.at for name, one in newest.items()}
        self._replanning.saved({name: one.saved for name, one in newest.items()})

    def order(self, moves: Sequence[Move]) -> None:
        """Has moves carried out that the planner made beside its steps."""
        self._ordered += moves
        self._state.wake()

    async def _look_over(self) -> None:
        while True:
            await self._clock.sleep(LOOK_OVER_S)
            self._looks_over = True
            self._state.wake()

    async def _caught_up(self) -> None:
        """Returns when the planner knows what has come so far, or after a second of ever more news."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CAUGHT_UP_S):
                while self._state.changed:
                    await self._round_over.wait()

    # feeds

    async def _follow_jobs(self) -> None:
        async for changes in self._sources.jobs.changes():
            for change in changes:
                old = change.old.value if change.old is not None else None
                new = change.new.value if change.new is not None else None
                known = new or old
                assert known is not None
                if (old is None or old.readable) != (new is None or new.readable):
                    self._readability_changed(known.name)
                if old is not None and (new is None or new.uid != old.uid):
                    self._state.deleted(old)
                if new is not None:
                    self._decisions.changed(old, new)
                if self._loaded and self._loaded.pop(known.name, None) is new:
                    continue
                nodes = self._state.record(known.name, new)
                for node in {*nodes_to_tell(old, new, nodes), *self._state.data.record(known.name, new)}:
                    self._sessions.wake(node)
                idle = new is not None and new.ended and not any(new.holding())
                if old is not None or not idle:
                    self._state.touch(known.name)
            self._housekeeping.jobs_changed()

    def _readability_changed(self, name: str) -> None:
        """Every agent is told which jobs to leave alone, and nodes that were closed for this one may open."""
        self._nodes.not_occupied_by(name)
        for node in self._sessions.connected:
            self._sessions.wake(node)

    async def _follow_queues(self) -> None:
        async for _ in self._sources.queues.changes():
            self._queues_changed = True
            self._state.wake()

    async def _follow_reservations(self) -> None:
        async for changes in self._sources.reservations.changes():
            for change in changes:
                known = change.new or change.old
                assert known is not None
                self._state.reserve(known.value.name, change.new.value.victims if change.new is not None else ())
            self._reservations_changed = True
            self._state.wake()

    async def _follow_budgets(self) -> None:
        async for _ in self._stops.records.changes():
            self._look_at_stops()

    def _look_at_stops(self) -> None:
        """Those that were never placed look at what changed of budgets that stop new work, which is seldom."""
        if self._stops.changed():
            self._state.touch(*self._never_placed())

    def _never_placed(self) -> Iterator[str]:
        for stored in self._sources.jobs.values.values():
            if stored.value.state is JobState.QUEUED and budget_stops.is_new(stored.value):
                yield stored.value.name

    async def _alarm(self) -> None:
        """Wakes the loop when a deadline of a job has come; what lasts lasts no longer when the clock is set back."""
        while True:
            rescheduled = self._state.watch_schedule()
            at = self._state.next_due()
            waiting: set[asyncio.Task[object]] = {asyncio.create_task(rescheduled.wait())}
            if at is not None:
                left_s = (at - self._clock.now()).total_seconds()
                waiting.add(asyncio.create_task(self._clock.sleep(min(max(left_s, 0.0), LOOK_EVERY_S) + 0.001)))
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waiting:
                    task.cancel()
            if due := self._state.take_due(self._look_at_clock()):
                self._state.touch(*due - {PLAN})

    def _look_at_clock(self) -> datetime:
        """The time; what lasts moves with a clock that was set."""
        now, moved = self._watch.look()
        if moved:
            self._state.clock_moved(moved, self._stored_job)
            for session in self._sessions.connected.values():
                session.clock_behind += moved
        return now

    def _stored_job(self, name: str) -> Job | None:
        stored = self._sources.jobs.get(key_of(name))
        return stored.value if stored is not None and stored.value.readable else None

    async def _confirm_clock(self) -> None:
        """By agents' clocks: until then nobody's time is up, which another leader's clock began to count."""
        ahead = await self._watch.confirm(self._sessions.connected.values())
        if ahead:
            _log.error(Event.CLOCK_AHEAD, seconds=ahead.total_seconds())
            self._state.clock_moved(ahead, self._stored_job)
        self._state.touch(*self._sight.doubted)
        self._sight.doubted.clear()

    async def _keep_showing(self) -> None:
        """Gauges are at most a second older than the last round."""
        shown = 0
        while True:
            if shown == self._rounds_done:
                await self._round_over.wait()
            await self._clock.sleep(SHOW_EVERY_S)
            shown = self._rounds_done
            await self._housekeeping.show_gauges()

    # rounds

    async def _rounds(self) -> None:
        if keys.of_name(keys.QUEUES, names.DEFAULT_QUEUE) not in self._sources.queues.values:
            await self._housekeeping.found_default_queue()
        next_s = 0.0  # a round at once when it is quiet, else so many that most of the time is left for others
        while True:
            await self._state.wait_for_change()
            await self._clock.sleep(max(COALESCE_S, next_s - self._clock.monotonic()))
            await self._writer.room()
            self._state.begin_round()
            begun_s = self._clock.monotonic()
            await self._round()
            took_s = self._clock.monotonic() - begun_s
            next_s = begun_s + min(took_s + LONGEST_PAUSE_S, max(ROUND_EVERY_S, 3 * took_s))
            self._rounds_done += 1
            done, self._round_over = self._round_over, asyncio.Event()
            done.set()

    async def _round(self) -> None:
        now = self._look_at_clock()
        changes = self._nodes.take_changes()
        if self._stops.sites_changed():
            self._state.touch(*self._never_placed())
        names = self._state.take_touched()
        for node in changes.touched:
            names |= self._state.jobs_on(node)
        transitions: dict[str, Transition] = {}
        news = self._news(changes, names, now, transitions)
        with telemetry.histogram(Metric.PLAN_DURATION).labels("round").time():
            moves = await self.planner.step(news, now)
        ordered, self._ordered = self._ordered, []
        for move in (*moves, *ordered):
            self._apply(move, now, transitions)
        self._writer.write(transitions)
        self._state.schedule(PLAN, self.planner.next_look)
        if self.planner.unfinished:
            self._state.wake()

    def _news(self, changes: NodeChanges, names: set[str], now: datetime, transitions: dict[str, Transition]) -> News:
        """What the planner has to know; the transitions that need no planner are added to `transitions`."""
        jobs = self._take_to_learn()
        gone: list[str] = []
        candidates: dict[str, Candidate | None] = {}
        for name in names:
            if self._writer.writes(name):
                self._writer.later(name)
                continue
            stored = self._sources.jobs.get(key_of(name))
            if stored is None:
                gone.append(name)
                self._forget(name)
                continue
            jobs.append(self._replanning.seen(self._state.tracking(name).by_this_clock(stored.value)))
            candidates[name] = self._look(stored, now, transitions)
        queues, datasets = self._queues() if self._queues_changed else None, self._datasets
        reserved = self._reserved() if self._reservations_changed else None
        past, self._past_uses = self._past_uses, ()
        saved, self._saved = self._saved, None
        self._queues_changed, self._reservations_changed, self._datasets = False, False, {}
        look_over, self._looks_over = self._looks_over, False
        return News(
            nodes=tuple(changes.nodes.values()),
            removed=tuple(changes.removed),
            closed={node: self._nodes.closed(node) for node in changes.touched},
            jobs=tuple(jobs),
            gone=tuple(gone),
            candidates=candidates,
            queues=queues,
            past_uses=past,
            reservations=reserved,
            saved=saved,
            datasets=tuple(fact for fact in datasets.values() if fact is not None),
            datasets_gone=tuple(name for name, fact in datasets.items() if fact is None),
            look_over=look_over,
        )

    def _take_to_learn(self) -> list[Job]:
        """Some of the jobs that had ended before this leadership: how long they ran is learned, after the first decisions."""
        if not self._rounds_done:
            return []
        taken, self._to_learn = self._to_learn[:LEARNED_AT_ONCE], self._to_learn[LEARNED_AT_ONCE:]
        if self._to_learn:
            self._state.wake()
        return taken

    def _queues(self) -> dict[str, Queue]:
        return {names.top(stored.value.name): stored.value for stored in self._sources.queues.values.values()}

    def _reserved(self) -> dict[str, Reservation]:
        return {stored.value.name: stored.value for stored in self._sources.reservations.values.values()}

    def _forget(self, name: str) -> None:
        if (tracking := self._state.forget(name)) is not None:
            self.agents.settle(tracking, tracking.reports)
        self._decisions.forget(name)
        self._replanning.forget(name)
        spans.forget(name)

    def _look(self, stored: StoredJob, now: datetime, transitions: dict[str, Transition]) -> Candidate | None:
        """Adds the job's transition, if it makes one; returns the job as a candidate when it may be placed."""
        tracking = self._state.tracking(stored.value.name)
        job = tracking.by_this_clock(stored.value)
        tracking.withdraw_offer()
        if not job.readable:  # what is reported of it waits until it can be read
            self._state.schedule(job.name, None)
            return None
        waits, reports = lifecycle.only_waits(job), tracking.reports
        observed = _NOTHING if waits else self._sight.observed(job, tracking, now)
        after = job if waits else lifecycle.advance(job, observed, now, self._timeouts)
        if after is not job or tracking.step_is_due:
            after = tracking.with_step(after)
        dues = self._sight.due(job, tracking, observed, now), self._stops.over_at(job, now)
        self._state.schedule(job.name, min((at for at in dues if at is not None), default=None))
        if job.state is JobState.RECOVERING and after.state is JobState.RECOVERING:
            diagnosed = tracking.diagnosed
            if diagnosed is not None and diagnosed.diagnosis.epoch == job.epoch:
                return self._offer(Offer(stored, after, reports), tracking, now)
            assert self._tasks is not None
            self._why_ended.ask(job, tracking, self._tasks)
        if after is not job and after != job:
            if job.state in ACTIVE and after.state is JobState.RECOVERING:
                before = task_observations.observe(job, observed)
                tracking.failed(attempt_failures.find(before, observed, now, self._timeouts))
            transitions[job.name] = Transition(stored, after, reports)
            return None
        self.agents.settle(tracking, reports)
        kept = wait_reasons.kept_back(_as_known(job, observed), now) or self._stops.why(job, now)
        if job.state is JobState.QUEUED and kept:
            self._waits(job.name, tracking, kept)
        elif job.state is JobState.QUEUED and after_failure.paused_until(job, now) is None:
            return self._offer(Offer(stored, job, reports), tracking, now)
        if job.ended and not tracking.reports:
            self._state.forget(job.name)
        return None

    def _offer(self, offer: Offer, tracking: JobTracking, now: datetime) -> Candidate | None:
        if tracking.cannot_be_stored(offer.stored.entry.revision):
            return None  # the same again would come of it, and the planner holds GPUs for what is written only
        if not self._data_known(datasets_of(offer.job)):
            self._state.schedule(offer.job.name, now + ASK_AGAIN)
            return None
        if not self._replanning.ready(offer.job):
            return None  # it is told of when its sizes are known
        tracking.offer_as(offer)
        seen = self._replanning.seen(offer.job)
        return Candidate(self._stops.admit(seen, now).job, tracking.avoided(now))

    def _apply(self, move: Move, now: datetime, transitions: dict[str, Transition]) -> None:
        if move.reservation is not None:
            self._keeper.write(move.reservation)
            return
        if move.claim is not None and move.claim.purpose in GOES_ON:
            self._keep_place(move, transitions)
            return
        tracking = self._state.tracking(move.job)
        if (offer := tracking.offer) is None:
            if move.claim is not None:  # it changed meanwhile: the planner is to learn how it is
                self._state.touch(move.job)
            return
        ready = offer.job
        if move.assignment is not None:
            after = self._placed(ready, move, tracking, now)
        elif move.claim is not None:
            self._waits(move.job, tracking, move.decision)
            after = lifecycle.claim(ready, move.claim, move.decision.summary)
        elif ready.state is JobState.RECOVERING:
            after = lifecycle.requeue(ready, move.decision.summary)
        else:
            self._waits(move.job, tracking, move.decision)
            after = ready
        if after is not ready:
            tracking.withdraw_offer()
            transitions[move.job] = Transition(offer.stored, after, offer.reports, move)

    def _keep_place(self, move: Move, transitions: dict[str, Transition]) -> None:
        """A running job claims where it goes on, unless it changed meanwhile; then the planner learns how it is."""
        stored, claim = self._sources.jobs.get(key_of(move.job)), move.claim
        busy = move.job in transitions or self._writer.writes(move.job)
        if stored is None or busy or claim is None or not lifecycle.may_go_on(stored.value):
            self._state.touch(move.job)
        else:
            after = lifecycle.claim_while_running(stored.value, claim, move.decision.summary)
            transitions[move.job] = Transition(stored, after, (), move)

    def _waits(self, name: str, tracking: JobTracking, decision: SchedulingDecision) -> None:
        tracking.wait_because(decision)
        self._decisions.waits(name, decision)

    def _placed(self, ready: Job, move: Move, tracking: JobTracking, now: datetime) -> Job:
        assert move.assignment is not None
        diagnosed = tracking.diagnosed
        restore = diagnosed.diagnosis.restore_checkpoint if diagnosed is not None else ""
        trace = telemetry.new_traceparent(spans.parent_of(ready, diagnosed))
        known = self._nodes.limits_not_kept(ready.spec, [node for node, _ in move.assignment.nodes])
        decision = replace(move.decision, reasons=(*move.decision.reasons, *known))
        return lifecycle.place(ready, move.assignment, decision, now, traceparent=trace, restore=restore)

    # after writing

    def _written(self, transition: Transition) -> None:
        before, after = transition.stored.value, transition.after
        tracking = self._state.tracking(after.name)
        self.agents.settle(tracking, transition.reports)
        now = self._clock.now()
        tracking.step_written()
        if after.state is JobState.STARTING and before.state is not JobState.STARTING:
            spans.placed(before, after, tracking.diagnosed, transition.move, now)
            tracking.placed()
        if before.state is not after.state:
            spans.transitioned(before, after, now)

    def _not_storable(self, transition: Transition, why: str) -> None:
        """The store will never take it; the job waits with that as its reason."""
        tracking = self._state.tracking(transition.after.name)
        tracking.not_storable(transition.stored.entry.revision)
        self._waits(transition.after.name, tracking, wait_reasons.cannot_be_stored(why, self._clock.now()))
        self._state.touch(transition.after.name)


def _as_known(job: Job, observed: Observations) -> Job:
    """The job without what it waits for no longer, which may not be stored yet."""
    if not job.awaits:
        return job
    left = dependencies.left(job.awaits, observed.ends)
    return job if left is job.awaits else replace(job, awaits=left)
