"""Protobuf values whose unknown fields survive.

During an upgrade an older service reads and writes records that a newer one has written. The stored message is kept
beside the domain's dataclass, and a write merges the dataclass into a copy of it, so that fields this version does not
know stay as they were. Large values of some kinds are stored compressed: ids and names in them repeat.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.message import DecodeError, Message

from whaleflux.store.api import Entry, Put

_PACKED = b"\0zlib\0"  # no protobuf message begins with 0, so a plain value is told from a packed one
_LEVEL = 1  # what is gained beyond is little, and a large value is written by a loop that others wait for
MAX_UNPACKED_BYTES = 64 << 20
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
    Values of `packed_from_bytes` and more are stored compressed (0: never); who reads them otherwise needs `read`.
    """

    message_type: type[M]
    to_domain: Callable[[M], T]
    merge: Callable[[T, M], None]
    packed_from_bytes: int = 0

    def decode(self, entry: Entry) -> Stored[T, M]:
        """Raises google.protobuf.message.DecodeError for what is no such message; suits `Cache`."""
        message = self.read(entry.value)
        return Stored(self.to_domain(message), message, entry)

    def read(self, value: bytes) -> M:
        """The stored message. Raises DecodeError for what is none."""
        return self.message_type.FromString(_unpacked(value))

    def encode(self, value: T, over: Stored[T, M] | None = None) -> bytes:
        """The bytes to store: `value` merged over what was read. Equal input gives equal bytes."""
        message = self.message_type()
        if over is not None:
            message.CopyFrom(over.message)
        self.merge(value, message)
        return self.pack(message)

    def pack(self, message: M) -> bytes:
        """The bytes to store of a message as it is."""
        plain = message.SerializeToString(deterministic=True)
        return _packed(plain) if 0 < self.packed_from_bytes <= len(plain) else plain

    def put(self, key: str, value: T, over: Stored[T, M] | None = None) -> Put:
        return Put(key, self.encode(value, over))


def _packed(plain: bytes) -> bytes:
    return _PACKED + zlib.compress(plain, _LEVEL)


def _unpacked(value: bytes) -> bytes:
    if not value.startswith(_PACKED):
        return value
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(value[len(_PACKED) :], MAX_UNPACKED_BYTES)
    except zlib.error as error:
        raise DecodeError(f"packed value: {error}") from None
    if not reader.eof:
        raise DecodeError(f"packed value: cut short, or more than {MAX_UNPACKED_BYTES} bytes")
    return plain


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
