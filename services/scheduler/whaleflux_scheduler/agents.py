"""What agents tell the leader, and what it tells them: hellos, reports, steps; desired tasks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import UTC

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import PermissionDenied, ResourceExhausted, StatusError
from whaleflux.reasons import ErrorReason
from whaleflux.store.cache import Cache
from whaleflux.telemetry import Metric
from whaleflux.trust import audit
from whaleflux.v1 import agent_pb2
from whaleflux_scheduler import convert, spans
from whaleflux_scheduler.agent_sessions import AgentSession, AgentSessions
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.model import ACTIVE, Task, TaskPhase
from whaleflux_scheduler.core.observed import Report
from whaleflux_scheduler.data_claims import checked
from whaleflux_scheduler.job_tracking import JobTracking, PendingReport, Progress
from whaleflux_scheduler.jobs import key_of
from whaleflux_scheduler.leader_state import LeaderState, find_task
from whaleflux_scheduler.node_view import NodeView

UNSTORED_REPORTS = 10_000  # of one agent


class Agents:
    """The leader's side of every stream. Lives as long as its leadership."""

    def __init__(
        self, jobs: Cache[StoredJob], state: LeaderState, sessions: AgentSessions, nodes: NodeView, clock: Clock
    ) -> None:
        self._jobs, self._state, self._sessions, self._nodes, self._clock = jobs, state, sessions, nodes, clock
        self._unstored: dict[str, int] = {}
        self.ray: Callable[[str, agent_pb2.RayReading], None] = _nowhere  # takes what is read of Ray clusters

    def connect(self, hello: agent_pb2.SyncHello) -> AgentSession:
        """An agent's stream begins: what it runs is compared with what should run."""
        jobs = frozenset(message.job for message in hello.tasks)
        session = AgentSession(
            hello.node, self.desired, hello.machine_id, self.unreadable, hello.boot_id, jobs, self._state.data.on
        )
        if hello.HasField("time"):
            session.clock_behind = self._clock.now() - hello.time.ToDatetime(UTC)
        named = {message.task for message in hello.tasks}
        session.learn_of(named)
        self._sessions.add(session)
        self._sessions.learn_network(hello.node, hello.network)
        try:
            for message in hello.tasks:  # not acknowledged: older reports of other tasks may still be on their way
                self.report(session, message, acknowledge=False)
        except StatusError:  # nobody serves the session then, so no work may go there
            self.disconnect(session)
            raise
        self._report_missing(session, named)
        self._nodes.touch(hello.node)
        return session

    def disconnect(self, session: AgentSession) -> bool:
        """The stream ended: no new work goes there, and nothing else follows. False: the node has a newer stream."""
        session.close()
        newest = self._sessions.remove(session)
        if newest:
            self._nodes.touch(session.node)
        return newest

    def report(self, session: AgentSession, message: agent_pb2.TaskReport, *, acknowledge: bool = True) -> None:
        """News about a task; acknowledged once the store has it. Raises ResourceExhausted, PermissionDenied."""
        stored = self._jobs.get(key_of(message.job))
        task = find_task(stored.value, message.task) if stored else None
        if task is not None and task.node != session.node:
            raise PermissionDenied(f"{message.task} is not on {session.node}", reason=ErrorReason.NOT_OWN_NODE)
        sequence = message.sequence if acknowledge else 0
        session.received(sequence)
        if task is None and (stored is None or stored.value.readable):  # its job is deleted or its attempt long over
            session.stored(sequence)
            return
        if task is None:
            self._nodes.occupied_by(session.node, message.job)
        if self._unstored.get(session.node, 0) >= UNSTORED_REPORTS:
            raise ResourceExhausted(f"{session.node} has {UNSTORED_REPORTS} reports waiting", retry_after_s=1.0)
        self._add(message.job, PendingReport(convert.report_of(message, session.node), session, sequence))

    def progress(self, session: AgentSession, moved: agent_pb2.TaskProgress) -> None:
        """A step was completed; kept in memory, and written with the next state. What is said of tasks elsewhere is dropped, and counted."""
        stored = self._jobs.get(key_of(moved.job))
        attempt = stored.value.attempt if stored else None
        if stored is None or attempt is None or attempt.epoch != moved.epoch or stored.value.state not in ACTIVE:
            return
        tracking = self._state.tracking(moved.job)
        if session.node not in tracking.nodes_of(attempt):
            telemetry.counter(Metric.CLAIMS_REFUSED).labels("progress").inc()
            audit.note_refused(moved.job, ErrorReason.NOT_OWN_NODE)
            return
        now = self._clock.now()
        completed = min(now, moved.time.ToDatetime(UTC) + session.clock_behind) if moved.HasField("time") else now
        newest = Progress(moved.epoch, moved.step, convert.loss_of(moved), completed)
        if tracking.advance_step(newest):
            self._state.touch(moved.job)
        spans.show_progress(moved.job, newest.step, newest.loss)

    def data(self, session: AgentSession, report: agent_pb2.DataReport) -> None:
        """How far data is that was asked for ahead; kept in memory. What nobody asked for is dropped. Raises InvalidArgument."""
        wanted = {claim.dataset for claim in self._state.data.on(session.node).claims}
        session.said_of_data = tuple(one for one in checked(report) if one.dataset in wanted)

    def desired(self, node: str) -> tuple[dict[str, agent_pb2.DesiredTask], int]:
        """The tasks that should be on the node, and the store's revision that says so."""
        wanted: dict[str, agent_pb2.DesiredTask] = {}
        for name in self._state.jobs_on(node):
            if (stored := self._jobs.get(key_of(name))) is not None:
                wanted |= {
                    task.id: self._desired_task(stored, task)
                    for task in self._state.tasks.desired_on(stored.value, node)
                }
        self._report_unsent(node, wanted.keys())
        return wanted, self._jobs.revision

    def _desired_task(self, stored: StoredJob, task: Task) -> agent_pb2.DesiredTask:
        attempt = stored.value.attempt
        nodes = (other.node for other in attempt.tasks) if attempt else ()
        elsewhere = self._sessions.elsewhere(task.node, nodes)
        return convert.desired_task(stored, task, elsewhere)

    def unreadable(self) -> frozenset[str]:
        """Jobs of which agents leave alone whatever they have."""
        return frozenset(name for name in self._state.unreadable if self._jobs.get(key_of(name)))

    def _report_unsent(self, node: str, wanted: Collection[str]) -> None:
        """Tasks that ended before they were ever sent are gone: their agent will not report what it does not know."""
        session = self._sessions.connected.get(node)
        if session is None:
            return
        holding: set[str] = set()
        for name in self._state.jobs_on(node):
            stored = self._jobs.get(key_of(name))
            for _, task in self._state.tasks.holding_on(stored.value, node) if stored else ():
                if task.id in wanted:
                    continue
                holding.add(task.id)
                if not session.knows(task.id) and task.phase is TaskPhase.UNSPECIFIED:
                    session.learn_of([task.id])  # so that it is reported only once
                    gone = Report(task.id, TaskPhase.GONE, message="it ended before its agent was sent it")
                    self._add(name, PendingReport(gone, session, 0))
        session.keep_known(holding | set(wanted))

    def settle(self, tracking: JobTracking, reports: tuple[PendingReport, ...]) -> None:
        """These reports are in the store or say nothing new."""
        for settled in tracking.settle(reports):
            self._unstored[settled.session.node] -= 1
            settled.stored()

    def _add(self, name: str, pending: PendingReport) -> None:
        self._state.tracking(name).add_report(pending)
        node = pending.session.node
        self._unstored[node] = self._unstored.get(node, 0) + 1
        self._state.touch(name)

    def _report_missing(self, session: AgentSession, known: set[str]) -> None:
        """Tasks that should have something to show on this node, and of which its agent says nothing, are gone."""
        for name in self._state.jobs_on(session.node):
            stored = self._jobs.get(key_of(name))
            if stored is None:
                continue
            job = stored.value
            current = job.attempt if job.state in ACTIVE else None
            for attempt, task in self._state.tasks.holding_on(job, session.node):
                begun = attempt is not current or task.phase.reached(TaskPhase.SETTING_UP)
                if task.id not in known and begun:
                    gone = Report(task.id, TaskPhase.GONE, message="its agent came back without it")
                    self._add(name, PendingReport(gone, session, 0))


def _nowhere(node: str, said: agent_pb2.RayReading) -> None:
    """Until somebody takes it."""
