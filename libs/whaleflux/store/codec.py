"""Protobuf values whose unknown fields survive.

During an upgrade an older service reads and writes records that a newer one has written. The stored message is kept
beside the domain's dataclass, and a write merges the dataclass into a copy of it, so that fields this version does not
know stay as they were. Large values of some kinds are stored compressed: ids and names in them repeat.
"""

from __future__ import annotations

import asyncio
import copy
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.message import DecodeError, Message

from whaleflux.store import uuid_packing
from whaleflux.store.api import Entry, Put

_PACKED = b"\0zlib\0"  # no protobuf message begins with 0, so a plain value is told from a packed one
_LEVEL = 1  # what is gained beyond is little, and a large value is written by a loop that others wait for
_TIGHT = b"\0uuid\0"  # see `uuid_packing`
_TIGHT_FROM_BYTES = 1_100_000  # of what is compressed the usual way: it takes longer, and the store's limit is not far
_RECENT = 8  # large values that were written here
MAX_UNPACKED_BYTES = 64 << 20
M = TypeVar("M", bound=Message)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stored(Generic[T, M]):
    """A value as read, with the message and the entry it came from. Never change `message`."""

    value: T
    message: M
    entry: Entry


class _Recent(Generic[T, M]):
    """Large values that were written here: read again, as each is when the watch tells of it, they need not be unpacked."""

    def __init__(self) -> None:
        self._written: OrderedDict[bytes, tuple[M, T]] = OrderedDict()

    def add(self, packed: bytes, message: M, value: T) -> None:
        self._written[packed] = message, value
        if len(self._written) > _RECENT:
            self._written.popitem(last=False)

    def get(self, value: bytes) -> tuple[M, T] | None:
        return self._written.get(value) if value.startswith((_PACKED, _TIGHT)) else None


@dataclass(frozen=True, slots=True)
class Codec(Generic[T, M]):
    """Between a domain dataclass and its stored message.

    `merge(value, message)` sets every field that this version knows, and clears those that are unset in `value`; it
    must change sub-messages in place (and repeated ones by `merge_repeated`) instead of replacing them.
    Values of `packed_from_bytes` and more are stored compressed (0: never); who reads them otherwise needs `read`.
    For large values: `merge_over(value, message, known)` does the same where `message` says `known`, and may leave alone what is the
    same in both; `read_as(message, written)` is `to_domain` of what `written` was stored as, and may share parts of it.
    """

    message_type: type[M]
    to_domain: Callable[[M], T]
    merge: Callable[[T, M], None]
    packed_from_bytes: int = 0
    merge_over: Callable[[T, M, T], None] | None = None
    read_as: Callable[[M, T], T] | None = None
    _recent: _Recent[T, M] = field(default_factory=_Recent, repr=False, compare=False)

    def decode(self, entry: Entry) -> Stored[T, M]:
        """Raises google.protobuf.message.DecodeError for what is no such message; suits `Cache`."""
        if self.read_as is not None and (known := self._recent.get(entry.value)) is not None:
            message, written = known
            return Stored(self.read_as(message, written), message, entry)
        message = self.read(entry.value)
        return Stored(self.to_domain(message), message, entry)

    def read(self, value: bytes) -> M:
        """The stored message, never to be changed. Raises DecodeError for what is none."""
        if (known := self._recent.get(value)) is not None:
            return known[0]
        return self.message_type.FromString(_unpacked(value))

    def encode(self, value: T, over: Stored[T, M] | None = None) -> bytes:
        """The bytes to store: `value` merged over what was read. Equal input gives equal bytes."""
        return self.pack(self._merged(value, over))

    async def encode_aside(self, value: T, over: Stored[T, M] | None = None) -> bytes:
        """The same; what is large is compressed in a thread of its own, so that nobody waits for it but the caller."""
        message = self._merged(value, over)
        plain = message.SerializeToString(deterministic=True)
        if not 0 < self.packed_from_bytes <= len(plain):
            return plain
        packed = await asyncio.to_thread(_packed, plain)
        self._recent.add(packed, message, value)
        return packed

    def _merged(self, value: T, over: Stored[T, M] | None) -> M:
        message = self.message_type()
        if over is not None:
            message.CopyFrom(over.message)
        if over is not None and self.merge_over is not None:
            self.merge_over(value, message, over.value)
        else:
            self.merge(value, message)
        return message

    def pack(self, message: M) -> bytes:
        """The bytes to store of a message as it is."""
        plain = message.SerializeToString(deterministic=True)
        return _packed(plain) if 0 < self.packed_from_bytes <= len(plain) else plain

    def put(self, key: str, value: T, over: Stored[T, M] | None = None) -> Put:
        return Put(key, self.encode(value, over))


def _packed(plain: bytes) -> bytes:
    fast = _PACKED + zlib.compress(plain, _LEVEL)
    return fast if len(fast) < _TIGHT_FROM_BYTES else _TIGHT + uuid_packing.pack(plain)


def _unpacked(value: bytes) -> bytes:
    """Never more than MAX_UNPACKED_BYTES, whatever is claimed."""
    try:
        if value.startswith(_TIGHT):
            return uuid_packing.unpack(value[len(_TIGHT) :], MAX_UNPACKED_BYTES)
        if not value.startswith(_PACKED):
            return value
        reader = zlib.decompressobj()
        plain = reader.decompress(value[len(_PACKED) :], MAX_UNPACKED_BYTES)
    except (zlib.error, ValueError) as error:
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
