"""What is written down of calls: each change, and each attempt that was denied.

The boundary makes a record of every call that counts and hands it to an `Audit`, which never blocks. What a process is no server of (requests
at the inference API, ranks at an agent's socket) is handed over by whoever refuses it. How records are kept: `trust.audit_trail`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from whaleflux.errors import DeadlineExceeded

OK, CANCELLED, INTERNAL = "OK", "CANCELLED", "INTERNAL"
MAY_BE_DONE = frozenset(
    {OK, CANCELLED, INTERNAL, DeadlineExceeded.code}
)  # each is written down; the others are counted
MAX_CHARS = 300  # of one text of a record


@dataclass(slots=True)  # not frozen: that triples what it takes to make one, on the path of every change
class AuditRecord:
    """One call. `peer`: address of who dialled, as far as the front door or the server sees it; `result`: "OK", or a status code's name; CANCELLED: nobody waited for it."""

    subject: str
    session: str
    method: str
    object: str
    result: str
    reason: str = ""
    peer: str = ""
    trace_id: str = ""
    before: str = ""
    after: str = ""
    groups: tuple[str, ...] = ()
    client: str = ""


class Audit(Protocol):
    """Where records go."""

    def record(self, record: AuditRecord) -> None:
        """Takes it; returns at once."""

    def check_room(self) -> None:
        """Before a change. Raises Unavailable where nothing may be changed that cannot be written down."""


class NoAudit:
    """Keeps nothing: tests, and servers that are no service."""

    def record(self, record: AuditRecord) -> None:
        pass

    def check_room(self) -> None:
        pass


def _nowhere(about: str, reason: str) -> None:
    pass


@dataclass(slots=True)
class Noted:
    """What the servicer adds to the record of the call being served. `refused`: takes a record of its own while a stream goes on."""

    before: str = ""
    after: str = ""
    refused: Callable[[str, str], None] = _nowhere


_noted: ContextVar[Noted | None] = ContextVar("whaleflux_audit_noted", default=None)


def begin() -> Noted:
    """From now on in this task `note` adds to what is returned."""
    noted = Noted()
    _noted.set(noted)
    return noted


def note_refused(about: str, reason: str) -> None:
    """Of a stream that goes on: one of its messages spoke of `about`, which is not the caller's, and was not heeded."""
    if (noted := _noted.get()) is not None:
        noted.refused(about, reason)


def note(*, before: str = "", after: str = "") -> None:
    """What was changed, in few words and without secrets: "priority 10", "members users/ann". Outside of a call: nothing."""
    if (noted := _noted.get()) is not None:
        noted.before, noted.after = before or noted.before, after or noted.after
