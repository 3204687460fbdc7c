"""What became of each request: Envoy's access-log records, received as a gRPC stream and read a batch at a time.

A record is a hint, never an account: while nobody listens they are lost without a word. The status is no verdict
either (a stream that was cut has 200): flags and the presence of the last byte's time are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from envoy.config.core.v3.base_pb2 import RequestMethod
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc

from whaleflux import hostport, names, telemetry
from whaleflux.clock import Clock
from whaleflux.frontdoor.http_paths import MALFORMED_KEY, NO_KEY, NO_SUCH_PATH, find
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.auth import NOBODY
from whaleflux.telemetry import Metric
from whaleflux.trust.audit import Audit, AuditRecord, NoAudit
from whaleflux_inference_router.core.load_tracker import Ended
from whaleflux_inference_router.core.outcomes import End, Outcome
from whaleflux_inference_router.routing_state import RoutingState

_REFUSED = {  # names of routes
    NO_SUCH_PATH: ("NOT_FOUND", ErrorReason.NO_SUCH_PATH),
    NO_KEY: ("UNAUTHENTICATED", ErrorReason.KEY_MISSING),
    MALFORMED_KEY: ("UNAUTHENTICATED", ErrorReason.KEY_UNKNOWN),
}
ATTEMPT_LOG = "attempt"  # one record per failed attempt; "request": one per request


class Feedback(als_pb2_grpc.AccessLogServiceServicer):  # type: ignore[misc]  # generated without types
    """AccessLogService for the front door."""

    def __init__(self, routing: RoutingState, clock: Clock, trail: Audit | None = None) -> None:
        self._routing, self._clock = routing, clock
        self._trail: Audit = NoAudit() if trail is None else trail

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
        common, now_s = entry.common_properties, self._clock.monotonic()
        replica = self._routing.replica_at(_upstream(common), _decision_id(entry))
        if not replica:
            return
        self._routing.load_tracker.fail(replica, now_s)
        flags = common.response_flags
        if flags.upstream_connection_termination or flags.upstream_remote_reset:
            self._routing.load_tracker.engine_ended(_decision_id(entry), replica, now_s)

    def _request_ended(self, entry: Any) -> None:
        decision_id = _decision_id(entry)
        if (route := entry.common_properties.route_name) in _REFUSED:
            self._trail.record(_refusal(entry, route))
        if not decision_id:
            return  # refused by the policy, or not a request for a replica
        common = entry.common_properties
        first_byte_s = _seconds(common, "time_to_first_upstream_rx_byte")
        completed = common.HasField("time_to_last_downstream_tx_byte")
        succeeded = 200 <= entry.response.response_code.value < 300
        ended = Ended(decision_id, _upstream(common), first_byte_s, completed, succeeded)
        replica = self._routing.replica_at(ended.address, decision_id)
        self._routing.load_tracker.close(ended)
        if replica and (end := _end(entry, ended)) is not None:
            lasted_s = _seconds(common, "time_to_last_downstream_tx_byte")
            outcome = Outcome(self._clock.monotonic(), end, first_byte_s, lasted_s)
            self._routing.load_tracker.outcomes.add(replica, outcome)
        if replica and first_byte_s is not None and completed:
            telemetry.histogram(Metric.FIRST_TOKEN).labels(names.top(replica)).observe(first_byte_s)


def _end(entry: Any, ended: Ended) -> End | None:
    """How a try went for the engine that had it; None: that is no word on the engine. What failed its attempt's record says."""
    if ended.first_byte_s is None:
        flags = entry.common_properties.response_flags
        has_left = flags.downstream_connection_termination or flags.downstream_remote_reset
        return End.LEFT if has_left else None
    if not ended.completed:
        return None
    refused = 400 <= entry.response.response_code.value < 500
    return End.ANSWERED if ended.succeeded else End.REFUSED if refused else None


def _refusal(entry: Any, route: str) -> AuditRecord:
    """What the audit trail keeps of a request that the front door refused by itself: without a key, or for a path that there is none of."""
    address = entry.common_properties.downstream_remote_address.socket_address.address
    method = RequestMethod.Name(entry.request.request_method)
    path = entry.request.path.partition("?")[0]
    code, reason = _REFUSED[route]
    if (
        route == NO_SUCH_PATH
    ):  # an engine's own switch, perhaps; the object, so that those of one address are counted together
        return AuditRecord(NOBODY.subject, "", f"{method} *", path, code, reason, address)
    row = find(method, path)
    known = path if row is None else row.path  # not the name below it, which may be another one each time
    return AuditRecord(NOBODY.subject, "", f"{method} {known}", "", code, reason, address)


def _decision_id(entry: Any) -> str:
    return str(entry.request.request_headers.get("x-wf-decision-id", ""))


def _upstream(common: Any) -> str:
    socket = common.upstream_remote_address.socket_address
    return hostport.join(socket.address, socket.port_value) if socket.address else ""


def _seconds(common: Any, field: str) -> float | None:
    """Time after the request's first byte; None: it never happened."""
    return float(getattr(common, field).ToNanoseconds() / 1e9) if common.HasField(field) else None
