"""What an agent does whose node is not admitted any more: it was retired, or its name was given to another machine.

Nothing that its ranks do can be reported or committed, and the fleet counts their GPUs as free or gone. So they are ended, and the agent stops
and says what can be done: trying again helps nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.reasons import ErrorReason
from whaleflux.telemetry import Event
from whaleflux.v1 import agent_pb2

LONGEST_S = 600.0  # for ranks to end; what outlives even that is left to the host's owner
_LOOK_EVERY_S = 0.2
_log = telemetry.get_logger("whaleflux.agent")


class Work(Protocol):
    """The supervisor, as far as it is needed here."""

    async def desire(self, desired: agent_pb2.DesiredTasks) -> None:
        """From now on these tasks are to run, and no others."""

    def running(self) -> Sequence[object]:
        """The tasks with processes."""


# REVOKED: to a certificate that is still good. The others: to a node that slept until it had ended, and asks to be let in again.
_FOR_GOOD = frozenset({ErrorReason.REVOKED, ErrorReason.NODE_RETIRED})


class Revocation:
    """Told of each refusal; `error` is set from the first that says that this node is not admitted any more."""

    def __init__(self) -> None:
        self.error: StatusError | None = None
        self._told = asyncio.Event()

    def look_at(self, refusal: StatusError) -> None:
        """A call of this agent's was refused."""
        if refusal.reason in _FOR_GOOD and self.error is None:
            self.error = refusal
            self._told.set()

    async def run(self, work: Work, clock: Clock, stopping: asyncio.Event) -> None:
        """For ever; ends all work and asks the agent to stop once it was told."""
        await self._told.wait()
        assert self.error is not None
        _log.error(Event.NODE_REVOKED, reason=self.error.message)
        await work.desire(agent_pb2.DesiredTasks())
        end_s = clock.monotonic() + LONGEST_S
        while work.running() and clock.monotonic() < end_s:
            await clock.sleep(_LOOK_EVERY_S)
        stopping.set()
        await asyncio.Event().wait()
