"""Sessions with jobs as events of the job: who looked inside, where, and with which command's first word."""

from __future__ import annotations

import asyncio
import contextlib

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.events.api import Bus
from whaleflux.events.subjects import HUB, Subject
from whaleflux.reasons import What
from whaleflux.v1 import agent_pb2, events_pb2, types_pb2
from whaleflux_scheduler.attach_checks import shown

WAITING = 256  # to be published; what comes beyond is in the log only


class SessionNews:
    """Publishes beside: no session waits for the bus."""

    def __init__(self, bus: Bus | None, clock: Clock) -> None:
        self._bus, self._clock = bus, clock
        self._waiting = set[asyncio.Task[None]]()

    def opened(self, order: agent_pb2.AttachOrder, node: str, submitter: str) -> None:
        """A session with a job of `submitter` was ordered."""
        if self._bus is None or len(self._waiting) >= WAITING:
            return
        publishing = asyncio.create_task(self._publish(self._bus, self._event(order, node, submitter)))
        self._waiting.add(publishing)
        publishing.add_done_callback(self._waiting.discard)

    def _event(self, order: agent_pb2.AttachOrder, node: str, submitter: str) -> events_pb2.Event:
        event = events_pb2.Event(
            id=f"session/{order.session}",
            resource=order.job,
            what=What.SESSION_OPENED,
            epoch=order.epoch,
            cause=types_pb2.Cause(actor=order.caller),
            message=f"{shown(order.open)} at rank {order.open.rank}, on {node}",
            source="scheduler",
            site=names.top(node),
            attributes={"nodes": node, "rank": str(order.open.rank), "submitter": submitter},
        )
        event.time.FromDatetime(self._clock.now())
        event.publish_time.CopyFrom(event.time)
        return event

    async def _publish(self, bus: Bus, event: events_pb2.Event) -> None:
        subject = str(Subject.of(event.resource, event.what, site=HUB))
        with contextlib.suppress(StatusError):  # the bus is away: the log has it
            await bus.publish(subject, event.SerializeToString(), id=event.id)
