"""Why an attempt ended: asked beside the leader's loop, once an epoch; the answer is news of the job."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from whaleflux.clock import Clock
from whaleflux_scheduler.agent_sessions import AgentSessions
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.observed import EndReason, Timeouts
from whaleflux_scheduler.diagnosis import DiagnosisQuery, FailureDiagnosis, reconstruct
from whaleflux_scheduler.job_tracking import JobTracking
from whaleflux_scheduler.leader_state import LeaderState


class WhyEnded:
    """See the module."""

    def __init__(
        self,
        diagnosis: FailureDiagnosis,
        state: LeaderState,
        sessions: AgentSessions,
        clock: Clock,
        timeouts: Timeouts,
    ) -> None:
        self._diagnosis, self._state, self._sessions = diagnosis, state, sessions
        self._clock, self._timeouts = clock, timeouts

    def ask(self, job: Job, tracking: JobTracking, tasks: asyncio.TaskGroup) -> None:
        """Asks what the end of the attempt means, once per epoch."""
        if job.attempt is None or not tracking.ask_once(job.epoch):
            return
        failure = tracking.failure or reconstruct(job)
        disconnected = tuple(node for node in job.attempt.nodes if node not in self._sessions.connected)
        query = DiagnosisQuery(job, failure, tracking.launch_of(failure.task), disconnected)
        tasks.create_task(self._diagnose(query))

    def _avoid_s(self, end: EndReason) -> float:
        """How long a job avoids the node where its attempt ended. One that is drained takes nobody, and may come back at once."""
        known = {EndReason.UNFIT: self._timeouts.avoid_unfit_s, EndReason.DRAIN: 0.0}
        return known.get(end, self._timeouts.avoid_s)

    async def _diagnose(self, query: DiagnosisQuery) -> None:
        result = await self._diagnosis.ask(query)
        name = query.job.name
        if (tracking := self._state.tracked(name)) is not None:
            avoid_s = self._avoid_s(query.failure.reason)
            tracking.diagnose(result, self._clock.now() + timedelta(seconds=avoid_s))
            self._state.touch(name)
