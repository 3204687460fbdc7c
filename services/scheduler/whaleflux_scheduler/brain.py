"""The leader's loop: wake on news, work out what follows, write it, go on. Never polls.

A round takes everything that came since the last one: reports, phases of nodes, judgements, changes of jobs, deadlines. Each job
makes at most one move per round (`core.lifecycle`), waiting jobs are placed (`core.planner`, in its own thread), and all moves are
written at once, each under the job's revision and this leadership. What a move leads to is the next round's news.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from typing import NamedTuple, TypeVar

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Fenced, Held, Put, Store, Unchanged
from whaleflux.store.cache import Cache
from whaleflux.store.election import Leader
from whaleflux.telemetry import Metric
from whaleflux.v1 import scheduler_pb2
from whaleflux_scheduler import convert, spans
from whaleflux_scheduler.agents import STEP_EVERY_S, Agents
from whaleflux_scheduler.book import Book, Note, Offer
from whaleflux_scheduler.convert import StoredJob, StoredQueue
from whaleflux_scheduler.core import breaks, lifecycle
from whaleflux_scheduler.core.model import ACTIVE, Decision, Job, JobState, Queue
from whaleflux_scheduler.core.observed import Limits, Seen, Standing
from whaleflux_scheduler.core.placement.api import DatasetFact
from whaleflux_scheduler.core.planner import Choice, News, Planner
from whaleflux_scheduler.core.queueing import Candidate
from whaleflux_scheduler.fleet import Fleet
from whaleflux_scheduler.hub import Hub
from whaleflux_scheduler.jobs import deletion, key_of
from whaleflux_scheduler.judge import Inquiry, Judge, reconstruct
from whaleflux_scheduler.writer import Answers, Move, Writer

DELETE_AT_ONCE = 50
COALESCE_S = 0.0005  # news that come together are one round
ROUND_EVERY_S, LONGEST_PAUSE_S = 0.008, 0.03  # between the starts of two rounds, at least and at most
SMALL_FLEET, SMALL_BUDGET_S = 256, 0.004  # nodes; decisions for fewer are too short to be worth another thread
SHOW_EVERY_S = 1.0
CAUGHT_UP_S = 1.0
T = TypeVar("T")


class Sources(NamedTuple):
    """What the leader reads, all current and owned by others."""

    jobs: Cache[StoredJob]
    queues: Cache[StoredQueue]


class Brain:
    """One term of leadership."""

    def __init__(
        self,
        store: Store,
        leader: Leader,
        sources: Sources,
        hub: Hub,
        fleet: Fleet,
        judge: Judge,
        clock: Clock,
        limits: Limits,
        *,
        keep_ended: int = 10_000,
    ) -> None:
        self._store, self._leader, self._sources = store, leader, sources
        self._hub, self._fleet, self._judge, self._clock, self._limits = hub, fleet, judge, clock, limits
        self._keep_ended = keep_ended
        self._book, self._planner = Book(), Planner(clock)
        self.agents = Agents(sources.jobs, self._book, hub, fleet, clock)
        answers = Answers(self._written, self._book.touch, self._refused)
        self._writer = Writer(store, leader, sources.jobs, answers)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._queues_changed = True
        self._datasets: tuple[DatasetFact, ...] = ()
        fleet.on_change = self._book.news.set
        self._tasks: asyncio.TaskGroup | None = None
        self._suspend: dict[str, str] = {}  # job -> for whom it makes room
        self._rounds_done = 0
        self._models: set[str] = set()  # of which gauges exist
        self._asked = 0  # questions to the planner in its thread
        self._round_over = asyncio.Event()  # another one for each round

    def load(self) -> None:
        """Learns what the store holds. Before this, an agent would be told that nothing is desired."""
        for stored in self._sources.jobs.values.values():
            self._book.record(stored.value.name, stored.value)
            if not stored.value.ended or any(stored.value.holding()):
                self._book.touch(stored.value.name)

    async def run(self) -> None:
        """Until cancelled; raises Fenced (in a group) when another leads."""
        try:
            async with asyncio.TaskGroup() as group:
                self._tasks = group
                self._writer.runs_in(group)
                group.create_task(self._follow_jobs())
                group.create_task(self._follow_queues())
                group.create_task(self._alarm())
                group.create_task(self._rounds())
                group.create_task(self._keep_showing())
        finally:
            self._worker.shutdown(wait=False, cancel_futures=True)

    # what others tell

    def datasets_are(self, facts: tuple[DatasetFact, ...]) -> None:
        """Which datasets exist and where they are."""
        self._datasets += facts
        self._book.news.set()

    # what others ask

    def present(self, stored: StoredJob) -> scheduler_pb2.Job:
        """The job as callers see it: with its cost up to now, its live step, and why it waits."""
        job, message = stored.value, scheduler_pb2.Job()
        message.CopyFrom(stored.message)
        message.cost_usd = job.cost_at(self._clock.now())
        note = self._book.notes.get(job.name)
        if note is None:
            return message
        if note.progress and job.attempt is not None and note.progress.epoch == job.attempt.epoch:
            message.step, message.loss = note.progress.step, note.progress.loss
        if note.waits is not None and job.state is JobState.QUEUED:
            message.decision.CopyFrom(convert.decision_message(note.waits))
            message.state_message = note.waits.summary
        return message

    async def explain(self, job: Job) -> Decision:
        """Why a waiting job waits, decided afresh."""
        await self._caught_up()
        note = self._book.notes.get(job.name)
        now = self._clock.now()
        shunned = [node for node, until in (note.shunned if note else {}).items() if until > now]
        return await self._on_worker(lambda: self._planner.explain(job, shunned, now))

    async def dry_run(self, job: Job) -> Decision:
        """What would be decided for a job that is not submitted."""
        await self._caught_up()
        return await self._on_worker(lambda: self._planner.dry_run(job, self._clock.now()))

    async def _caught_up(self) -> None:
        """Returns when the planner knows what has come so far, or after a second of ever more news."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CAUGHT_UP_S):
                while self._book.news.is_set():
                    await self._round_over.wait()

    # feeds

    async def _follow_jobs(self) -> None:
        async for changes in self._sources.jobs.changes():
            for change in changes:
                old = change.old.value if change.old is not None else None
                new = change.new.value if change.new is not None else None
                known = new or old
                assert known is not None
                for node in self._book.record(known.name, new):
                    self._hub.kick(node)
                idle = new is not None and new.ended and not any(new.holding())
                if old is not None or not idle:
                    self._book.touch(known.name)
            if self._too_many_ended:
                self._book.news.set()

    async def _follow_queues(self) -> None:
        async for _ in self._sources.queues.changes():
            self._queues_changed = True
            self._book.news.set()

    async def _alarm(self) -> None:
        """Wakes the loop when a deadline of a job has come."""
        while True:
            self._book.rescheduled.clear()
            at = self._book.next_due()
            waiting: set[asyncio.Task[object]] = {asyncio.create_task(self._book.rescheduled.wait())}
            if at is not None:
                left_s = (at - self._clock.now()).total_seconds()
                waiting.add(asyncio.create_task(self._clock.sleep(max(left_s, 0.0) + 0.001)))
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waiting:
                    task.cancel()
            if due := self._book.take_due(self._clock.now()):
                self._book.touch(*due)

    async def _rounds(self) -> None:
        await self._found()
        next_s = 0.0  # a round at once when it is quiet, else so many that most of the time is left for others
        while True:
            await self._book.news.wait()
            await self._clock.sleep(max(COALESCE_S, next_s - self._clock.monotonic()))
            await self._writer.room()
            self._book.news.clear()
            begun_s = self._clock.monotonic()
            await self._round()
            took_s = self._clock.monotonic() - begun_s
            next_s = begun_s + min(took_s + LONGEST_PAUSE_S, max(ROUND_EVERY_S, 3 * took_s))
            self._rounds_done += 1
            done, self._round_over = self._round_over, asyncio.Event()
            done.set()

    async def _found(self) -> None:
        """The queue that exists from the start."""
        key = keys.QUEUES + "default"
        queue = scheduler_pb2.Queue(name="queues/default", weight=1.0, create_time=convert.timestamp(self._clock.now()))
        try:
            await self._store.commit(
                Put(key, queue.SerializeToString(deterministic=True)), when=[Absent(key), Held(self._leader)]
            )
        except Fenced:
            raise
        except ConditionFailed:
            return

    # one round

    async def _round(self) -> None:
        now = self._clock.now()
        changed = self._fleet.take()
        names, self._book.dirty = self._book.dirty, set()
        for node in changed.touched:
            names |= self._book.jobs_on(node)
        moves: dict[str, Move] = {}
        jobs: list[Job] = []
        gone: list[str] = []
        candidates: dict[str, Candidate | None] = {}
        for name in names:
            if name in self._writer.busy:
                self._writer.later(name)
                continue
            stored = self._sources.jobs.get(key_of(name))
            if stored is None:
                gone.append(name)
                self._forget(name)
                continue
            jobs.append(stored.value)
            candidates[name] = self._look(stored, now, moves)
        news = News(
            nodes=tuple(changed.nodes.values()),
            removed=tuple(changed.removed),
            closed={node: self._fleet.closed(node) for node in changed.touched},
            jobs=tuple(jobs),
            gone=tuple(gone),
            candidates=candidates,
            queues=self._queues() if self._queues_changed else None,
            datasets=self._datasets,
        )
        self._queues_changed, self._datasets = False, ()
        with telemetry.histogram(Metric.PLAN_DURATION).labels("round").time():
            choices = await self._plan(news)
        for choice in choices:
            self._choose(choice, now, moves)
        self._writer.write(moves)
        if self._planner.unfinished:
            self._book.news.set()
        await self._prune()

    def _queues(self) -> dict[str, Queue]:
        return {stored.value.name.split("/")[1]: stored.value for stored in self._sources.queues.values.values()}

    async def _plan(self, news: News) -> list[Choice]:
        """In the planner's thread, unless that would take longer than the decision."""
        small = self._planner.nodes <= SMALL_FLEET and not self._planner.unfinished and not self._asked
        if small:
            self._planner.learn(news)
            return self._planner.decide(SMALL_BUDGET_S)

        def plan() -> list[Choice]:
            self._planner.learn(news)
            return self._planner.decide()

        return await self._on_worker(plan)

    def _look(self, stored: StoredJob, now: datetime, moves: dict[str, Move]) -> Candidate | None:
        """Notes the job's move, if it makes one; returns it as a candidate when it may be placed."""
        job = stored.value
        note = self._book.note(job.name)
        note.offer = None
        seen = self._seen(job, note)
        heard = tuple(note.heard)
        after = lifecycle.advance(job, seen, now, self._limits)
        if after is job:
            after = self._preempted(job, now)
        if after is not job or (note.progress is not None and now >= note.progress.next_store):
            after = _with_step(after, note)
        self._book.schedule(job.name, self._due(job, note, seen, now))
        if job.state is JobState.RECOVERING and after.state is JobState.RECOVERING:
            if note.finding is not None and note.finding.verdict.epoch == job.epoch:
                return self._offer(Offer(stored, after, heard), note, now)
            self._inquire(job, note)
        if after != job:
            if job.state in ACTIVE and after.state is JobState.RECOVERING:
                note.broken = breaks.find(lifecycle.observe(job, seen), seen, now, self._limits)
            moves[job.name] = Move(stored, after, heard)
            return None
        self.agents.settle(note, heard)
        if job.state is JobState.QUEUED and (job.not_before is None or job.not_before <= now):
            return self._offer(Offer(stored, job, heard), note, now)
        if job.ended and not note.heard:
            self._book.notes.pop(job.name)
        return None

    def _seen(self, job: Job, note: Note) -> Seen:
        nodes: dict[str, Standing] = {task.node: self._fleet.standing(task.node) for _, task in job.holding()}
        verdict = note.finding.verdict if note.finding is not None else None
        return Seen(tuple(heard.report for heard in note.heard), nodes, verdict)

    def _due(self, job: Job, note: Note, seen: Seen, now: datetime) -> datetime | None:
        dues = [at for at in note.shunned.values() if at > now]
        if (at := lifecycle.due(job, seen, now, self._limits)) is not None:
            dues.append(at)
        if note.progress is not None and job.state in ACTIVE:
            at = note.progress.next_store
            dues.append(at if at > now else now + timedelta(seconds=STEP_EVERY_S))
        return min(dues, default=None)

    def _offer(self, offer: Offer, note: Note, now: datetime) -> Candidate:
        note.offer = offer
        note.shunned = {node: until for node, until in note.shunned.items() if until > now}
        return Candidate(offer.job, frozenset(note.shunned))

    def _choose(self, choice: Choice, now: datetime, moves: dict[str, Move]) -> None:
        note = self._book.note(choice.job)
        if (offer := note.offer) is None:
            return
        ready = offer.job
        if choice.place is not None:
            restore = note.finding.verdict.restore_checkpoint if note.finding is not None else ""
            traceparent = telemetry.new_traceparent(spans.parent_of(ready, note))
            after = lifecycle.place(ready, choice.place, choice.decision, now, traceparent=traceparent, restore=restore)
        elif ready.state is JobState.RECOVERING:
            after = lifecycle.requeue(ready, choice.decision.summary)
        else:
            note.waits = choice.decision
            after = ready
        if after is not ready:
            note.offer = None
            moves[choice.job] = Move(offer.stored, after, offer.heard, choice)
        for name in choice.victims:
            self._suspend[name] = choice.job
            self._book.touch(name)

    def _preempted(self, job: Job, now: datetime) -> Job:
        """The job on its way out, when it was chosen to make room for one that still waits."""
        by = self._suspend.pop(job.name, "")
        waiting = self._sources.jobs.get(key_of(by)) if by else None
        if waiting is None or waiting.value.state is not JobState.QUEUED or job.state is not JobState.RUNNING:
            return job
        return lifecycle.suspend(job, by, now)

    # after writing

    def _written(self, move: Move) -> None:
        before, after = move.stored.value, move.after
        note = self._book.note(after.name)
        self.agents.settle(note, move.heard)
        now = self._clock.now()
        if note.progress is not None:
            note.progress.next_store = now + timedelta(seconds=STEP_EVERY_S)
        if after.state is JobState.STARTING and before.state is not JobState.STARTING:
            spans.placed(before, after, note, move.choice, now)
            note.finding = note.broken = note.waits = note.offer = None
        if before.state is not after.state:
            spans.moved(before, after, note, now)

    def _refused(self, move: Move, why: str) -> None:
        """The store will never take it; the job waits with that as its reason."""
        note = self._book.note(move.after.name)
        note.offer, note.waits = None, Decision(self._clock.now(), placed=False, summary=f"waits: {why}")

    # asking

    def _inquire(self, job: Job, note: Note) -> None:
        """Asks what the end of the attempt means, once per epoch."""
        if note.inquiring == job.epoch or job.attempt is None:
            return
        assert self._tasks is not None
        note.inquiring = job.epoch
        broken = note.broken or reconstruct(job)
        disconnected = tuple(node for node in job.attempt.nodes if node not in self._hub.connected)
        inquiry = Inquiry(job, broken, note.launches.get(broken.task, ""), disconnected)
        self._tasks.create_task(self._judged(inquiry))

    async def _judged(self, inquiry: Inquiry) -> None:
        finding = await self._judge.judge(inquiry)
        name = inquiry.job.name
        note = self._book.notes.get(name)
        if note is None:
            return
        note.finding, note.launches = finding, {}
        until = self._clock.now() + timedelta(seconds=self._limits.shun_s)
        note.shunned |= dict.fromkeys(finding.verdict.culprits, until)
        self._book.touch(name)

    # housekeeping

    def _forget(self, name: str) -> None:
        note = self._book.notes.pop(name, None)
        if note is not None:
            self.agents.settle(note, tuple(note.heard))
        spans.forget(name)

    @property
    def _too_many_ended(self) -> bool:
        return len(self._book.ended) >= self._keep_ended + DELETE_AT_ONCE

    async def _prune(self) -> None:
        """Deletes the oldest ended jobs beyond what is kept."""
        if not self._too_many_ended:
            return
        oldest = sorted(self._book.ended, key=self._book.ended.__getitem__)[:DELETE_AT_ONCE]
        for name in oldest:
            stored = self._sources.jobs.get(key_of(name))
            if stored is None or any(stored.value.holding()):
                continue
            try:
                await self._store.commit(*deletion(stored), when=[Unchanged(stored.entry), Held(self._leader)])
            except Fenced:
                raise
            except ConditionFailed:
                continue

    async def _keep_showing(self) -> None:
        """Metrics are at most a second older than the last round."""
        shown = 0
        while True:
            if shown == self._rounds_done:
                await self._round_over.wait()
            await self._clock.sleep(SHOW_EVERY_S)
            shown = self._rounds_done
            await self._show()

    async def _show(self) -> None:
        for state in JobState:
            if state:
                telemetry.gauge(Metric.JOBS).labels(state.name).set(self._book.states[state])
        telemetry.gauge(Metric.QUEUE_DEPTH).labels("jobs").set(self._planner.waiting)
        offered, held = await self._on_worker(self._planner.gpus)
        for metric, gpus in ((Metric.GPUS, offered), (Metric.GPUS_ALLOCATED, held)):
            for model in self._models | gpus.keys():
                telemetry.gauge(metric).labels(model).set(gpus[model])
        self._models |= offered.keys() | held.keys()

    async def _on_worker(self, work: Callable[[], T]) -> T:
        """The planner belongs to one thread at a time: to the worker while it is asked something."""
        self._asked += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, work)
        finally:
            self._asked -= 1


def _with_step(job: Job, note: Note) -> Job:
    """With the newest step of its attempt."""
    progress, attempt = note.progress, job.attempt
    if progress is None or attempt is None or attempt.epoch != progress.epoch:
        return job
    if (job.step, job.loss) == (progress.step, progress.loss):
        return job
    return replace(job, step=progress.step, loss=progress.loss)
