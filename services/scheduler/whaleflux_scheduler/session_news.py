"""Sessions with jobs as events of the job: who looked inside, where, and with which command's first word."""

from __future__ import annotations

from whaleflux import names
from whaleflux.reasons import What
from whaleflux.v1 import agent_pb2, events_pb2, types_pb2
from whaleflux_scheduler.attach_checks import shown
from whaleflux_scheduler.news_beside import NewsBeside


class SessionNews(NewsBeside):
    """No session waits for the bus."""

    def opened(self, order: agent_pb2.AttachOrder, node: str, submitter: str) -> None:
        """A session with a job of `submitter` was ordered."""
        self.tell(
            events_pb2.Event(
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
        )
