"""Values larger than one commit carries, such as the allocation of a 16,000-rank job.

The pieces are written first, under a generation of their own that nobody reads yet; one last commit flips the head key
to it, under the caller's conditions. Readers see the old value or the new one, never a mixture; what a crash leaves
behind is removed by the next write of that key.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from whaleflux.errors import FieldViolation, Invalid, Refusal, Unavailable
from whaleflux.store.api import Absent, Condition, Delete, Entry, Equals, Held, Present, Put, Store
from whaleflux.store.keys import ROOT

CHUNKS = ROOT + "chunks/"  # {the head's key}/{generation}/{number}; written by the owner of the head
CHUNK_BYTES = 1_000_000
MAX_CHUNKS = 100  # the flip compares each, within one commit's operations
_MAGIC = b"\0chunks\0"  # no protobuf message begins with 0, so a small value is told from a head


@dataclass(frozen=True, slots=True)
class Large:
    """A value read whole; `head` is the entry for conditions on it."""

    value: bytes
    head: Entry


async def put_large(store: Store, key: str, value: bytes, *, when: Sequence[Condition] = ()) -> int:
    """Writes `value` of up to 100 MB and returns the flip's revision; raises what `commit` raises."""
    if len(value) <= CHUNK_BYTES and not value.startswith(_MAGIC):
        return await _flip(store, key, value, "", when)
    pieces = [value[start : start + CHUNK_BYTES] for start in range(0, len(value), CHUNK_BYTES)]
    if len(pieces) > MAX_CHUNKS:
        limit = (
            f"{len(value)} bytes are more than the {MAX_CHUNKS * CHUNK_BYTES} of one chunked value; keep it elsewhere"
        )
        raise Invalid(FieldViolation("value", limit))
    generation = os.urandom(8).hex()
    keys = [f"{_folder(key)}{generation}/{number:06}" for number in range(len(pieces))]
    for piece_key, piece in zip(keys, pieces, strict=True):
        await store.commit(Put(piece_key, piece))
    head = _MAGIC + f"{generation} {len(pieces)} {hashlib.sha256(value).hexdigest()}".encode()
    return await _flip(store, key, head, generation, [*when, *map(Present, keys)])


async def get_large(store: Store, key: str, *, attempts: int = 5) -> Large | None:
    """The value under `key`, put together; Unavailable when writers replaced it faster than it could be read."""
    for _ in range(attempts):
        head = await store.get(key)
        if head is None:
            return None
        if not head.value.startswith(_MAGIC):
            return Large(head.value, head)
        generation, count, digest = head.value.removeprefix(_MAGIC).decode().split()
        pieces = (await store.list(f"{_folder(key)}{generation}/")).entries
        value = b"".join(piece.value for piece in pieces)
        if len(pieces) == int(count) and hashlib.sha256(value).hexdigest() == digest:
            return Large(value, head)
    raise Unavailable(f"{key} changed {attempts} times while it was read", reason="STORE_CONTENDED")


async def delete_large(store: Store, key: str, *, when: Sequence[Condition] = ()) -> int:
    revision = await store.commit(Delete(key), when=when)
    await _sweep(store, key, "", [Absent(key), *_leaderships(when)])
    return revision


async def _flip(store: Store, key: str, head: bytes, generation: str, when: Sequence[Condition]) -> int:
    revision = await store.commit(Put(key, head), when=when)
    await _sweep(store, key, generation, [Equals(key, head), *_leaderships(when)])
    return revision


def _leaderships(when: Sequence[Condition]) -> list[Condition]:
    return [condition for condition in when if isinstance(condition, Held)]


def _folder(key: str) -> str:
    return CHUNKS + key.removeprefix(ROOT) + "/"


async def _sweep(store: Store, key: str, current: str, when: Sequence[Condition]) -> None:
    """Removes other generations than `current` as far as it can; the next write removes the rest."""
    kept = f"{_folder(key)}{current}/"
    with contextlib.suppress(Refusal):  # the value is written: a failure here must not look like one of the write
        entries = (await store.list(_folder(key))).entries
        old = [Delete(entry.key) for entry in entries if not entry.key.startswith(kept)]
        for start in range(0, len(old), MAX_CHUNKS):
            await store.commit(*old[start : start + MAX_CHUNKS], when=when)
