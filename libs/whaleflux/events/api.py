"""The Bus: news about what happened, delivered at least once, in order per subject.

The store is the truth and the bus is the news: a consumer must be right even if it misses every event, and it must
bear every event twice. So publishers give each event an id under which repeats are dropped for a while
(`duplicate_window_s` of the stream), and every event carries its key and revision.

`memory.MemoryBus` is the model and the fake, `nats.NatsBus` the real thing; one contract suite runs over both.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Literal, Protocol, Self

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.events import subjects as names

MAX_DATA_BYTES = 768 * 1024  # the server takes 1 MiB for headers and data together
MAX_HEADERS_BYTES = 16 * 1024
MAX_ID_CHARACTERS = 512
PUBLISH_TIMEOUT_S = 5.0
ACK_WAIT_S = 10.0
MAX_IN_FLIGHT = 64
MAX_READ = 1_000
READ_TIMEOUT_S = 5.0

_HEADER_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
_DURABLE = re.compile(r"[A-Za-z0-9_-]{1,64}")

Start = Literal["all", "new"] | datetime | int
"""Where a consumer begins: everything kept, only what comes, from an instant (UTC), or from a sequence of the hub's stream."""


@dataclass(frozen=True, slots=True)
class Ack:
    """The stream has the event: its place there, and whether it was there already under the same id."""

    stream: str
    sequence: int
    duplicate: bool


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """One event as a consumer gets it; it comes again after `ack_wait_s` unless acknowledged."""

    subject: str
    data: bytes
    id: str  # the publisher's; empty when it gave none
    headers: Mapping[str, str]
    stream: str
    sequence: int  # grows within a stream
    timestamp: datetime  # UTC, when the stream took it
    attempt: int  # 1 the first time, as far as the server knows (it forgets after a crash)
    settle: Callable[[float | None], Awaitable[None]] = field(repr=False)

    async def ack(self) -> None:
        """Done with it. Best effort: an acknowledgement that is lost means the event comes again."""
        await self.settle(None)

    async def nak(self, delay_s: float = 0.0) -> None:
        """Could not handle it: deliver it again, not before `delay_s`."""
        await self.settle(max(0.0, delay_s))


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One event as the stream keeps it."""

    sequence: int
    subject: str
    data: bytes
    id: str
    headers: Mapping[str, str]
    timestamp: datetime  # UTC, when the stream took it


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A part of what a stream keeps, oldest first."""

    events: tuple[StoredEvent, ...]
    matching: int  # events that match from where it began on; more than `events` when the limit cut it off
    first: int  # of the stream: the oldest sequence kept
    last: int  # the newest given


class Subscription(Protocol):
    """`async with bus.subscribe(...) as news: async for event in news: ...; await event.ack()`."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Delivery: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    async def aclose(self) -> None:
        """Stops; the durable's position stays where its acknowledgements left it."""
        ...


class Bus(Protocol):
    """What services know of the event backbone."""

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        id: str,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = PUBLISH_TIMEOUT_S,
    ) -> Ack:
        """Returns when the stream has stored the event.

        The current trace context is added unless `headers` has a `traceparent`. Raises Unavailable when no answer came:
        then the event may or may not be stored, and publishing it again under the same id is safe. Raises InvalidArgument
        for a bad subject, header or size. Keep one publish in flight per subject where order matters.
        """
        ...

    def subscribe(
        self,
        subjects: Sequence[str],
        *,
        durable: str,
        start: Start = "all",
        max_in_flight: int = MAX_IN_FLIGHT,
        ack_wait_s: float = ACK_WAIT_S,
        forget_after_s: float = 0.0,
    ) -> Subscription:
        """Events whose subject matches one of `subjects` (wildcards `*` and `>`; they must not overlap).

        `durable` names the position, which the bus keeps: who subscribes with it again goes on there, and several
        subscribers at once share the events. Each holds at most `max_in_flight` unacknowledged events. What it does
        not settle within `ack_wait_s` comes again, to it or another; so does what a crash of the server made it
        forget, which means repeats and a late event out of order. `start` counts only when the durable is new;
        `forget_after_s` > 0 drops the position when nobody has read for so long.
        """
        ...

    async def read(self, subjects: Sequence[str], *, start: Start = "all", limit: int = MAX_READ) -> Excerpt:
        """What the hub's stream keeps of these subjects (one root), at most `limit` events (0: only counted); keeps no position.

        Raises Unavailable when the bus does not answer: an empty answer means that nothing is kept.
        """
        ...

    async def forget(self, durable: str) -> None:
        """Drops the position; no error when there is none."""
        ...

    async def close(self) -> None:
        """Ends every subscription and the connection."""
        ...


def check_message(subject: str, data: bytes, id: str, headers: Mapping[str, str]) -> None:
    """Refuses what a server would refuse, or would answer by closing the connection."""
    names.check(subject)
    if len(data) > MAX_DATA_BYTES:
        raise InvalidArgument(
            FieldViolation(
                "data",
                f"{len(data)} bytes; an event holds at most {MAX_DATA_BYTES}, publish a reference instead",
            )
        )
    if not 0 < len(id) <= MAX_ID_CHARACTERS or not id.isprintable() or not id.isascii() or id != id.strip():
        raise InvalidArgument(
            FieldViolation("id", f"use 1-{MAX_ID_CHARACTERS} printable ASCII characters, such as key@revision-digest")
        )
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or name.lower().startswith("nats-"):
            raise InvalidArgument(
                FieldViolation(
                    f"headers[{name[:64]!r}]", "use 1-64 of A-Z, a-z, 0-9 and '-', not starting with 'Nats-'"
                )
            )
        if not value.isprintable() or not value.isascii() or value != value.strip():
            raise InvalidArgument(
                FieldViolation(f"headers[{name!r}]", "use printable ASCII without surrounding blanks")
            )
    size = sum(len(name) + len(value) + 4 for name, value in headers.items())
    if size > MAX_HEADERS_BYTES:
        raise InvalidArgument(FieldViolation("headers", f"{size} bytes; at most {MAX_HEADERS_BYTES}"))


def check_reading(subjects: Sequence[str], limit: int) -> tuple[str, ...]:
    """The filters, valid, not overlapping and of one root; refuses otherwise, the same way for every bus."""
    if not 0 <= limit <= MAX_READ:
        raise InvalidArgument(FieldViolation("limit", f"{limit}: use 0 to {MAX_READ}"))
    filters = names.check_filters(subjects)
    if len({".".join(one.split(".")[:2]) for one in filters}) > 1:
        raise InvalidArgument(FieldViolation("subjects", "lie in two streams; read one after the other"))
    return filters


def check_subscription(
    subjects: Sequence[str], durable: str, max_in_flight: int, ack_wait_s: float, forget_after_s: float
) -> tuple[str, ...]:
    """The filters, valid and not overlapping; refuses otherwise, the same way for every bus."""
    if not _DURABLE.fullmatch(durable):
        raise InvalidArgument(FieldViolation("durable", f"{durable[:64]!r}: use 1-64 of A-Z, a-z, 0-9, '_' and '-'"))
    if not 1 <= max_in_flight <= 10_000:
        raise InvalidArgument(FieldViolation("max_in_flight", f"{max_in_flight}: use 1 to 10000"))
    if not 0.1 <= ack_wait_s <= 3600:
        raise InvalidArgument(FieldViolation("ack_wait_s", f"{ack_wait_s}: use 0.1 to 3600 seconds"))
    if forget_after_s != 0 and not 1 <= forget_after_s <= 30 * 86400:
        raise InvalidArgument(
            FieldViolation("forget_after_s", f"{forget_after_s}: use 1 second to 30 days, or 0 for never")
        )
    return names.check_filters(subjects)
