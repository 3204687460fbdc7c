"""What agents tell the leader, and what it tells them: hellos, reports, steps; desired tasks."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

from whaleflux.clock import Clock
from whaleflux.errors import Denied, OverLimit
from whaleflux.store.cache import Cache
from whaleflux.v1 import agent_pb2
from whaleflux_scheduler import convert, spans
from whaleflux_scheduler.book import Book, Heard, Note, Progress, desired_tasks, find_task
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.model import ACTIVE, TaskPhase
from whaleflux_scheduler.core.observed import Report
from whaleflux_scheduler.fleet import Fleet
from whaleflux_scheduler.hub import Connection, Hub
from whaleflux_scheduler.jobs import key_of

STEP_EVERY_S = 10.0  # how often a job's step is written when nothing else is
UNSTORED_REPORTS = 10_000  # of one agent


class Agents:
    """The leader's side of every stream. Lives as long as the term."""

    def __init__(self, jobs: Cache[StoredJob], book: Book, hub: Hub, fleet: Fleet, clock: Clock) -> None:
        self._jobs, self._book, self._hub, self._fleet, self._clock = jobs, book, hub, fleet, clock
        self._unstored: dict[str, int] = {}

    def connect(self, hello: agent_pb2.SyncHello) -> Connection:
        """An agent's stream begins: what it runs is compared with what should run."""
        connection = Connection(hello.node, self.desired)
        connection.told = {message.task for message in hello.tasks}
        self._hub.add(connection)
        for message in hello.tasks:  # not acknowledged: older reports of other tasks may still be on their way
            self.report(connection, message, acknowledge=False)
        self._miss(connection, {message.task for message in hello.tasks})
        self._fleet.touch(hello.node)
        return connection

    def disconnect(self, connection: Connection) -> bool:
        """The stream ended: no new work goes there, and nothing else follows. False: the node has a newer stream."""
        connection.close()
        newest = self._hub.remove(connection)
        if newest:
            self._fleet.touch(connection.node)
        return newest

    def report(self, connection: Connection, message: agent_pb2.TaskReport, *, acknowledge: bool = True) -> None:
        """News about a task; acknowledged once the store has it. Raises OverLimit, Denied."""
        stored = self._jobs.get(key_of(message.job))
        task = find_task(stored.value, message.task) if stored else None
        if task is not None and task.node != connection.node:
            raise Denied(f"{message.task} is not on {connection.node}", reason="NOT_OWN_NODE")
        sequence = message.sequence if acknowledge else 0
        connection.received(sequence)
        if task is None:  # its job is deleted or its attempt long over
            connection.stored(sequence)
            return
        if self._unstored.get(connection.node, 0) >= UNSTORED_REPORTS:
            raise OverLimit(f"{connection.node} has {UNSTORED_REPORTS} reports waiting", retry_after_s=1.0)
        self._hear(message.job, Heard(convert.report_of(message), connection, sequence))

    def progress(self, connection: Connection, moved: agent_pb2.TaskProgress) -> None:
        """A step was completed; kept in memory, written now and then."""
        stored = self._jobs.get(key_of(moved.job))
        attempt = stored.value.attempt if stored else None
        if stored is None or attempt is None or attempt.epoch != moved.epoch or stored.value.state not in ACTIVE:
            return
        note = self._book.note(moved.job)
        known = note.progress
        if known is None or known.epoch != moved.epoch:
            at = self._clock.now() + timedelta(seconds=STEP_EVERY_S)
            note.progress = Progress(moved.epoch, moved.step, moved.loss, at)
            if note.due is None or note.due > at:
                self._book.schedule(moved.job, at)
        elif moved.step >= known.step:
            known.step, known.loss = moved.step, moved.loss
        spans.show_progress(moved.job, moved.step, moved.loss)

    def desired(self, node: str) -> tuple[dict[str, agent_pb2.DesiredTask], int]:
        """The tasks that should be on the node, and the store's revision that says so."""
        wanted: dict[str, agent_pb2.DesiredTask] = {}
        for name in self._book.jobs_on(node):
            if (stored := self._jobs.get(key_of(name))) is not None:
                wanted |= {task.id: convert.desired_task(stored, task) for task in desired_tasks(stored, node)}
        self._withdraw(node, wanted.keys())
        return wanted, self._jobs.revision

    def _withdraw(self, node: str, wanted: Collection[str]) -> None:
        """Tasks that ended before their agent was ever told of them are gone: it will not report what it does not know."""
        connection = self._hub.connected.get(node)
        if connection is None:
            return
        holding: set[str] = set()
        for name in self._book.jobs_on(node):
            stored = self._jobs.get(key_of(name))
            for _, task in stored.value.holding() if stored else ():
                if task.node != node or task.id in wanted:
                    continue
                holding.add(task.id)
                if task.id not in connection.told and task.phase is TaskPhase.UNSPECIFIED:
                    connection.told.add(task.id)  # heard once
                    gone = Report(task.id, TaskPhase.GONE, message="it ended before its agent was told of it")
                    self._hear(name, Heard(gone, connection, 0))
        connection.told &= holding | set(wanted)

    def settle(self, note: Note, heard: tuple[Heard, ...]) -> None:
        """These reports, the oldest of the note, are in the store or say nothing new."""
        del note.heard[: len(heard)]
        for one in heard:
            self._unstored[one.connection.node] -= 1
            one.stored()

    def _hear(self, name: str, heard: Heard) -> None:
        note = self._book.note(name)
        note.heard.append(heard)
        node = heard.connection.node
        self._unstored[node] = self._unstored.get(node, 0) + 1
        if heard.report.traceparent:
            note.launches[heard.report.task] = heard.report.traceparent
        self._book.touch(name)

    def _miss(self, connection: Connection, known: set[str]) -> None:
        """Tasks that should have something to show on this node, and of which its agent says nothing, are gone."""
        for name in self._book.jobs_on(connection.node):
            stored = self._jobs.get(key_of(name))
            if stored is None:
                continue
            job = stored.value
            current = job.attempt if job.state in ACTIVE else None
            for attempt, task in job.holding():
                begun = attempt is not current or task.phase >= TaskPhase.STARTING
                if task.node == connection.node and task.id not in known and begun:
                    gone = Report(task.id, TaskPhase.GONE, message="its agent came back without it")
                    self._hear(name, Heard(gone, connection, 0))
