"""What tasks beside Ray heads read, on its way to the scheduler, and what was decided, on its way back: the newest of each task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.v1 import agent_pb2
from whaleflux_agent.core.work import Work

MOST_BYTES = 1 << 20  # of a reading
MOST_TASKS = 16  # of a node, whose newest readings are kept; the one that was silent longest goes
APART_S = 0.1  # between two messages of a task on the stream


@dataclass(slots=True)
class _Known:
    """Of a task. `told`: the number of the reading that the scheduler has; `due`: something is to be said."""

    reading: agent_pb2.RayReading
    decision: agent_pb2.RayDecision
    told: int = 0
    due: bool = True
    said_at_s: float = -APART_S


class RayReadings:
    """Nothing of it outlives the agent: who reads says it again."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tasks: dict[tuple[str, int], _Known] = {}  # by job and epoch, the one that was silent longest first
        self.on_change: Callable[[], None] = lambda: None  # called when there is something to send

    def report(self, work: Work, request: agent_pb2.ReportRayRequest) -> agent_pb2.ReportRayResponse:
        """Takes a reading, or that nothing changed. Raises InvalidArgument for one that is too large."""
        if len(request.demand) > MOST_BYTES:
            raise InvalidArgument(
                FieldViolation("demand", f"has {len(request.demand)} bytes; give at most {MOST_BYTES}")
            )
        key = work.job, work.epoch
        known = self._tasks.pop(key, None)
        if not request.demand and (known is None or known.reading.number != request.number):
            if known is not None:
                self._tasks[key] = known
            return agent_pb2.ReportRayResponse(again=True)
        if known is None:
            known = _Known(agent_pb2.RayReading(job=work.job, epoch=work.epoch), agent_pb2.RayDecision())
        self._tasks[key] = known
        if request.demand:
            known.reading.number, known.reading.demand = request.number, request.demand
            known.reading.dashboard, known.told = request.dashboard[:300], 0
        known.due = True
        while len(self._tasks) > MOST_TASKS:
            del self._tasks[next(iter(self._tasks))]
        self.on_change()
        return self._answer(known.decision, request.known_decision)

    def _answer(self, decision: agent_pb2.RayDecision, known: int) -> agent_pb2.ReportRayResponse:
        news = decision.decision if decision.number != known else b""
        return agent_pb2.ReportRayResponse(decision_number=decision.number, decision=news)

    def decided(self, decision: agent_pb2.RayDecision) -> None:
        """From the scheduler; of a task that reads nothing here it is dropped."""
        if (known := self._tasks.get((decision.job, decision.epoch))) is not None:
            known.decision.CopyFrom(decision)

    def begin(self) -> None:
        """A new stream, whose scheduler has none of them."""
        for known in self._tasks.values():
            known.told, known.due = 0, True

    def take(self) -> list[agent_pb2.RayReading]:
        """What is to be sent now: whole where the scheduler does not have it, else that nothing changed."""
        now_s, found = self._clock.monotonic(), list[agent_pb2.RayReading]()
        for known in self._tasks.values():
            if not known.due or now_s - known.said_at_s < APART_S:
                continue
            said = agent_pb2.RayReading()
            said.CopyFrom(known.reading)
            if known.told == known.reading.number:
                said.ClearField("demand")
            known.told, known.due, known.said_at_s = known.reading.number, False, now_s
            found.append(said)
        return found
