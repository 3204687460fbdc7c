"""What became of each request: Envoy's access-log records, received as a gRPC stream and read a batch at a time.

A record is a hint, never an account: while nobody listens they are lost without a word. The status is no verdict
either (a stream that was cut has 200): flags and the presence of the last byte's time are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.telemetry import Metric
from whaleflux_inference_router.core.load import Ended
from whaleflux_inference_router.routing import Routing

ATTEMPT_LOG = "attempt"  # one record per failed attempt; "request": one per request


class Feedback(als_pb2_grpc.AccessLogServiceServicer):  # type: ignore[misc]  # generated without types
    """AccessLogService for the front door."""

    def __init__(self, routing: Routing, clock: Clock) -> None:
        self._routing, self._clock = routing, clock

    async def StreamAccessLogs(self, requests: AsyncIterator[Any], context: Any) -> Any:
        log_name = ""
        async for message in requests:
            if message.HasField("identifier"):  # only in the first message of each stream
                log_name = message.identifier.log_name
            for entry in message.http_logs.log_entry:
                if log_name == ATTEMPT_LOG:
                    self._attempt_failed(entry)
                else:
                    self._request_ended(entry)
        return als_pb2.StreamAccessLogsResponse()

    def _attempt_failed(self, entry: Any) -> None:
        replica = self._routing.replica_at(_upstream(entry.common_properties))
        if replica:
            self._routing.book.fail(replica, self._clock.monotonic())

    def _request_ended(self, entry: Any) -> None:
        decision_id = entry.request.request_headers.get("x-wf-decision-id", "")
        if not decision_id:
            return  # refused by the policy, or not a request for a replica
        common = entry.common_properties
        first_byte_s = _seconds(common, "time_to_first_upstream_rx_byte")
        ended = Ended(decision_id, _upstream(common), first_byte_s, common.HasField("time_to_last_downstream_tx_byte"))
        self._routing.book.close(ended)
        replica = self._routing.replica_at(ended.address)
        if replica and first_byte_s is not None and ended.completed:
            telemetry.histogram(Metric.FIRST_TOKEN).labels(replica.split("/")[1]).observe(first_byte_s)


def _upstream(common: Any) -> str:
    socket = common.upstream_remote_address.socket_address
    return f"{socket.address}:{socket.port_value}" if socket.address else ""


def _seconds(common: Any, field: str) -> float | None:
    """Time after the request's first byte; None: it never happened."""
    return float(getattr(common, field).ToNanoseconds() / 1e9) if common.HasField(field) else None
