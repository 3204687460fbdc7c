"""Reading many records, some of which may be damaged or of a version that this one does not know.

What cannot be read is not gone: it is logged and named, and it holds up no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from whaleflux.store.api import Entry
from whaleflux.telemetry import Event, get_logger

_log = get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Read(Generic[T]):
    """The entries that could be read with their values, in their order, and the keys of the others."""

    values: tuple[tuple[Entry, T], ...]
    unreadable: tuple[str, ...]


def read_all(entries: Iterable[Entry], decode: Callable[[Entry], T]) -> Read[T]:
    """Whatever `decode` raises makes its entry one that cannot be read."""
    values, unreadable = [], []
    for entry in entries:
        try:
            values.append((entry, decode(entry)))
        except Exception as error:
            _log.error(Event.RECORD_UNREADABLE, key=entry.key, revision=entry.revision, reason=repr(error))
            unreadable.append(entry.key)
    return Read(tuple(values), tuple(unreadable))
