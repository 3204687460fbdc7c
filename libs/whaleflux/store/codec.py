"""Protobuf values whose unknown fields survive.

During an upgrade an older service reads and writes records that a newer one has written. The stored message is kept
beside the domain's dataclass, and a write merges the dataclass into a copy of it, so that fields this version does not
know stay as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.message import Message

from whaleflux.store.api import Entry, Put

M = TypeVar("M", bound=Message)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stored(Generic[T, M]):
    """A value as read, with the message and the entry it came from. Never change `message`."""

    value: T
    message: M
    entry: Entry


@dataclass(frozen=True, slots=True)
class Codec(Generic[T, M]):
    """Between a domain dataclass and its stored message.

    `merge(value, message)` sets every field that this version knows, and clears those that are unset in `value`; it
    must change sub-messages in place (and repeated ones by `merge_repeated`) instead of replacing them.
    """

    message_type: type[M]
    to_domain: Callable[[M], T]
    merge: Callable[[T, M], None]

    def decode(self, entry: Entry) -> Stored[T, M]:
        """Raises google.protobuf.message.DecodeError for what is no such message; suits `Cache`."""
        message = self.message_type.FromString(entry.value)
        return Stored(self.to_domain(message), message, entry)

    def encode(self, value: T, over: Stored[T, M] | None = None) -> bytes:
        """The bytes to store: `value` merged over what was read. Equal input gives equal bytes."""
        message = self.message_type()
        if over is not None:
            message.CopyFrom(over.message)
        self.merge(value, message)
        return message.SerializeToString(deterministic=True)

    def put(self, key: str, value: T, over: Stored[T, M] | None = None) -> Put:
        return Put(key, self.encode(value, over))


def merge_repeated(
    messages: RepeatedCompositeFieldContainer[M],
    values: Iterable[T],
    *,
    message_key: Callable[[M], Hashable],
    value_key: Callable[[T], Hashable],
    merge: Callable[[T, M], None],
) -> None:
    """Makes `messages` say `values`, in their order; an element with a known key keeps its unknown fields."""
    known = {message_key(message): copy.deepcopy(message) for message in messages}
    del messages[:]
    for value in values:
        message = messages.add()
        if (old := known.get(value_key(value))) is not None:
            message.CopyFrom(old)
        merge(value, message)
