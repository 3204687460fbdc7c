"""Reports to the scheduler: durable before they are sent, kept until they are acknowledged, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from whaleflux.v1 import agent_pb2
from whaleflux_agent.state import StateDir


class ReportLog:
    """At-least-once delivery of task reports. One event loop; any number of writers, one reader."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._waiting: dict[int, agent_pb2.TaskReport] = {}
        self._numbers = range(0)
        self._adding = asyncio.Lock()
        self.on_change: Callable[[], None] = lambda: None  # called when there is something to send

    async def open(self) -> None:
        """Reads what an earlier agent could not deliver."""
        for report in await self._state.run(self._state.load_reports):
            self._waiting[report.sequence] = report
        self._numbers = await self._state.run(self._state.reserve_sequences)

    async def add(self, report: agent_pb2.TaskReport) -> None:
        """Numbers `report`, makes it durable, and lets it be sent."""
        async with self._adding:  # numbers reach the disk and the stream in order
            if not self._numbers:
                self._numbers = await self._state.run(self._state.reserve_sequences)
            report.sequence, self._numbers = self._numbers[0], self._numbers[1:]
            await self._state.run(self._state.save_report, report)
            self._waiting[report.sequence] = report
        self.on_change()

    def after(self, sequence: int) -> list[agent_pb2.TaskReport]:
        """Unacknowledged reports above `sequence`, in order."""
        return [report for number, report in self._waiting.items() if number > sequence]

    async def acknowledge(self, sequence: int) -> None:
        """The scheduler has stored everything up to `sequence`."""
        stored = [number for number in self._waiting if number <= sequence]
        for number in stored:
            del self._waiting[number]
        if stored:
            await self._state.run(self._state.drop_reports, stored)
