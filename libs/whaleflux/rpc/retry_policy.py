"""When a failed call may be repeated, and after which pause. Pure: no gRPC, no time, randomness handed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from whaleflux.errors import StatusError, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.retry import Backoff

READS = ("Get", "List", "Find", "Explain", "Plan", "Check", "Probe")
NOTHING_DONE = frozenset(
    {ErrorReason.NOT_LEADER, ErrorReason.DRAINING}
)  # reasons by which a server says that it has not begun
_CALL_AGAIN = Backoff(first_s=0.05, longest_s=2.0)


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """How unary calls behave. `timeout_s` covers all attempts together; streams have no deadline of their own."""

    timeout_s: float = 10.0
    attempts: int = 6
    backoff: Backoff = _CALL_AGAIN

    def pause_s(self, attempt: int, error: StatusError, repeatable: bool, left_s: float, chance: float) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 1), or None to give up.

        `chance` in [0, 1) spreads the callers; a pause that the deadline would cut short is not begun.
        """
        harmless = isinstance(error, Unavailable) and (repeatable or error.reason in NOTHING_DONE)
        if not harmless or attempt >= self.attempts:
            return None
        pause = self.backoff.pause_s(attempt, chance, asked_s=error.retry_after_s or 0.0)
        return pause if pause < left_s else None


def repeatable(method: str, request: Any) -> bool:
    """Whether doing it twice is doing it once: reads, dry runs, and requests that carry a request_id (AIP-155)."""
    name = method.rpartition("/")[2]
    once = bool(getattr(request, "request_id", "")) or bool(getattr(request, "validate_only", False))
    return once or name.startswith(READS)


CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.enable_retries", 0),  # `CallPolicy` repeats: it knows status errors, gRPC knows only codes
    (
        "grpc.enable_http_proxy",
        0,
    ),  # a company's proxy in the environment is for the world outside, not for our services
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # the default of two minutes would outlive every restart
    ("grpc.max_receive_message_length", 32 << 20),
    ("grpc.use_local_subchannel_pool", 1),  # a renewed certificate must not find the old one's connection
)


def channel_options(server: str) -> tuple[tuple[str, Any], ...]:
    """Options of a channel; `server` is the name to find in the peer's certificate, "" for the dialled host."""
    return (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", server)) if server else CHANNEL_OPTIONS
