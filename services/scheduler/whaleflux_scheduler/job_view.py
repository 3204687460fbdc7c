"""What users see beyond the record, as far as only the leader knows it: live cost and step, and why a job waits."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace

from whaleflux.clock import Clock
from whaleflux.errors import FailedPrecondition, ResourceExhausted, Unavailable
from whaleflux.manifests.job_fields import Spec
from whaleflux.reasons import ErrorReason
from whaleflux.v1 import agent_pb2, scheduler_pb2
from whaleflux_scheduler import convert, data_claims
from whaleflux_scheduler.budget_stops import BudgetStops
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core import cost, dependencies, running_time
from whaleflux_scheduler.core.model import Job, JobState, SchedulingDecision
from whaleflux_scheduler.core.queue_shares import QueueUse
from whaleflux_scheduler.core.wait_reasons import kept_back
from whaleflux_scheduler.leader_state import LeaderState
from whaleflux_scheduler.node_view import NodeView
from whaleflux_scheduler.planner_thread import PlannerThread


class JobView:
    """Lives as long as its leadership. `caught_up` returns when the planner knows what has come so far; `seen`: a job as the planner sees it; `sized`: one that is not submitted."""

    def __init__(
        self,
        state: LeaderState,
        planner: PlannerThread,
        nodes: NodeView,
        clock: Clock,
        caught_up: Callable[[], Awaitable[None]],
        said_of_data: Callable[[Iterable[str]], list[tuple[str, agent_pb2.DataProgress]]],
        seen: Callable[[Job], Job],
        sized: Callable[[Job], Awaitable[Job]],
        stops: BudgetStops,
    ) -> None:
        self._state, self._planner, self._nodes, self._clock, self._stops = state, planner, nodes, clock, stops
        self.caught_up, self._said_of_data, self._seen, self._sized = caught_up, said_of_data, seen, sized

    def present(self, stored: StoredJob) -> scheduler_pb2.Job:
        """The job with its cost up to now, its live step, and why it waits."""
        tracking = self._state.tracked(stored.value.name)
        job = stored.value if tracking is None else tracking.by_this_clock(stored.value)
        message = present_stored(stored, self._clock, job)
        if tracking is None:
            return message
        if progress := tracking.progress_in(job.attempt):
            message.step = progress.step
            message.step_time.FromDatetime(progress.time)
            convert.set_loss(message, progress.loss)
        if tracking.waits is not None and job.state is JobState.QUEUED:
            message.decision.CopyFrom(convert.decision_message(tracking.waits))
            message.state_message = tracking.waits.summary
        message.decision.reasons.extend(self._stops.closed(job, self._clock.now()))
        if ahead := self._data_ahead(job):
            message.decision.reasons.extend(ahead)
            message.state_message = "; ".join(filter(None, (message.state_message, *ahead)))
        return message

    def _data_ahead(self, job: Job) -> list[str]:
        """How far the data is that is pulled before the job starts, in words."""
        if job.claim is None or not job.claim.datasets or job.ended:
            return []
        return data_claims.words(job.claim, self._said_of_data(node for node, _ in job.claim.nodes))

    async def explain(self, job: Job) -> SchedulingDecision:
        """Why a waiting job waits, decided afresh."""
        await self.caught_up()
        now, tracking = self._clock.now(), self._state.tracked(job.name)
        avoided = tracking.avoided(now) if tracking is not None else ()
        if spent := await self._kept_by_budget(job):
            return spent
        known = self._stops.admit(self._seen(job), now).job
        decision = await self._planner.ask(lambda planner: planner.explain(known, avoided, now))
        closed = await self._closed_sites(job)
        return replace(decision, reasons=(*decision.reasons, *closed, *self._data_ahead(job)))

    async def _kept_by_budget(self, job: Job) -> SchedulingDecision | None:
        """Who held it, or what it waits for, comes first."""
        now = self._clock.now()
        if kept_back(job, now) or (spent := self._stops.why(job, now)) is None:
            return None
        return replace(spent, reasons=(*spent.reasons, *await self._stops.how_sure(now)))

    async def _closed_sites(self, job: Job) -> tuple[str, ...]:
        now = self._clock.now()
        closed = self._stops.closed(job, now)
        return (*closed, *await self._stops.how_sure(now)) if closed else ()

    async def why_it_stays(self, job: Job) -> str:
        """Why a running elastic job does not grow; "" for any other, and where the planner has no time."""
        if not job.spec.is_elastic or job.state is not JobState.RUNNING:
            return ""
        now, tracking = self._clock.now(), self._state.tracked(job.name)
        known = self._seen(tracking.by_this_clock(job) if tracking is not None else job)
        with contextlib.suppress(ResourceExhausted, Unavailable):
            return await self._planner.ask(lambda planner: planner.why_it_stays(known, now))
        return ""

    async def check_capacity(self, queue: str, spec: Spec) -> None:
        """Raises FailedPrecondition for what this queue and fleet can never give.

        Of a fleet that is not known nothing is said, nor by a planner that has no time for it: what is taken waits.
        """
        if not self._nodes.complete or self._planner.could_hold(queue, spec):
            return
        await self.caught_up()
        try:
            why = await self._planner.ask(lambda planner: planner.shortage(queue, spec))
        except (ResourceExhausted, Unavailable):
            return
        if why:
            raise FailedPrecondition(
                f"it could never run: {why}; to let it wait for more all the same: whaleflux submit --wait-for-capacity",
                reason=ErrorReason.CAPACITY_SHORT,
                metadata={"gpus": str(spec.gpus), "queue": queue},
            )

    async def queue_use(self, queues: Sequence[str]) -> dict[str, QueueUse]:
        """What queues hold and are due, by id; nothing of a planner that has no time for it."""
        await self.caught_up()
        with contextlib.suppress(ResourceExhausted, Unavailable):
            return await self._planner.ask(lambda planner: planner.queue_use(queues))
        return {}

    async def dry_run(self, job: Job) -> SchedulingDecision:
        """What would be decided for a job that is not submitted."""
        await self.caught_up()
        if spent := await self._kept_by_budget(replace(job, awaits=())):
            return spent
        now, sized = self._clock.now(), await self._sized(job)
        admitted = self._stops.admit(sized, now).job
        decision = await self._planner.ask(lambda planner: planner.dry_run(admitted, now))
        decision = replace(decision, reasons=(*decision.reasons, *await self._closed_sites(job)))
        known = self._nodes.limits_not_kept(job.spec, [task.node for task in decision.tasks])
        first = tuple(f"first it waits for {one.job} {dependencies.words(one)}" for one in job.awaits)
        tasks = tuple(replace(task, isolation=self._nodes.isolation_on(task.node)) for task in decision.tasks)
        return replace(decision, reasons=(*first, *decision.reasons, *known), tasks=tasks)


def present_stored(stored: StoredJob, clock: Clock, known: Job | None = None) -> scheduler_pb2.Job:
    """The job as any replica can show it: its record, with its cost up to now. `known`: as its leader counts the time."""
    job = known or stored.value
    message = scheduler_pb2.Job()
    message.CopyFrom(stored.message)
    message.cost_usd = cost.job_cost_usd(job, clock.now())
    message.cost_micros = cost.micros_of(message.cost_usd)
    if (at := running_time.latest_end(job)) is not None and not job.ended:
        message.latest_end_time.CopyFrom(convert.timestamp(at))
    return message
