"""Times of requests: a Timestamp may hold numbers that are no instant."""

from __future__ import annotations

from typing import Any

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux_console.core.price_rules import LAST_S

_NANOS = 1_000_000_000


def is_instant(at: Any) -> bool:
    """Whether a Timestamp is one of 1970 to 2100."""
    return bool(0 <= at.seconds <= LAST_S and 0 <= at.nanos < _NANOS)


def asked_ms(message: Any, field: str, otherwise: int, *, within: str = "") -> int:
    """A time of a request, milliseconds since 1970; `otherwise` where it is not set. Raises InvalidArgument for what is no instant."""
    if not message.HasField(field):
        return otherwise
    at = getattr(message, field)
    if not is_instant(at):
        raise InvalidArgument(
            FieldViolation(within + field, "is no instant of 1970 to 2100; write it as 2026-12-01T08:00Z")
        )
    return int(at.seconds) * 1000 + int(at.nanos) // 1_000_000
