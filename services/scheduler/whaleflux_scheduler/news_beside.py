"""Events that no record tells of, published beside the work: nobody waits for the bus."""

from __future__ import annotations

import asyncio
import contextlib

from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.events.api import Bus
from whaleflux.events.subjects import HUB, Subject
from whaleflux.v1 import events_pb2

WAITING = 256  # to be published; what comes beyond is in the log only


class NewsBeside:
    """See the module. `bus` None: nobody is told."""

    def __init__(self, bus: Bus | None, clock: Clock) -> None:
        self._bus, self._clock = bus, clock
        self._waiting = set[asyncio.Task[None]]()

    def tell(self, event: events_pb2.Event) -> None:
        """Publishes the event as of now."""
        if self._bus is None or len(self._waiting) >= WAITING:
            return
        event.time.FromDatetime(self._clock.now())
        event.publish_time.CopyFrom(event.time)
        publishing = asyncio.create_task(_publish(self._bus, event))
        self._waiting.add(publishing)
        publishing.add_done_callback(self._waiting.discard)


async def _publish(bus: Bus, event: events_pb2.Event) -> None:
    subject = str(Subject.of(event.resource, event.what, site=HUB))
    with contextlib.suppress(StatusError):  # the bus is away: the log has it
        await bus.publish(subject, event.SerializeToString(), id=event.id)
