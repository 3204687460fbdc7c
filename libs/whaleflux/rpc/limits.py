"""Bounds on what one caller may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Of each server; see `quotas.COSTS` for what a call counts."""

    request_bytes: int = 4 << 20  # of one message
    deadline_s: float = 30.0  # of a unary call whose caller gave none
    longest_deadline_s: float = 300.0
    first_request_s: float = 20.0  # within which the first message of a caller's stream has to come
    calls_per_caller: int = 1024  # unary calls at a time
    streams_per_caller: int = 256
    calls_per_s: float = 5000.0  # unary calls and streams that one caller may begin, by their cost, and its burst
    burst: float = 10_000.0
    anonymous_per_s: float = (
        20.0  # of one address without a certificate, that is of who joins or logs in, and its burst
    )
    anonymous_burst: float = 200.0  # a rack behind one address joins at once
    all_anonymous_per_s: float = 1000.0  # of all addresses together
