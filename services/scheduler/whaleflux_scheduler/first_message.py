"""The first message of a caller's stream, which says what the stream is for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol, TypeVar

from whaleflux.errors import FieldViolation, InvalidArgument


class _Message(Protocol):
    """A message of the contract whose kinds are the oneof `message`."""

    def WhichOneof(self, oneof_group: str, /) -> str | None: ...


M = TypeVar("M", bound=_Message)


async def first_message(requests: AsyncIterator[M], kind: str, within_s: float) -> M:
    """It. Raises InvalidArgument when none comes in time, or one of another kind."""
    try:
        async with asyncio.timeout(within_s):
            first = await anext(requests)
    except (TimeoutError, StopAsyncIteration):
        raise InvalidArgument(FieldViolation(kind, f"must be the first message, within {within_s:g} s")) from None
    if first.WhichOneof("message") != kind:
        raise InvalidArgument(FieldViolation(kind, "must be the first message of the stream"))
    return first
