"""The store of code in memory: the model of what a store promises, and the fake for unit tests and for `memory://`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from whaleflux import names
from whaleflux.clock import Clock, SystemClock
from whaleflux.code.api import StoredCode
from whaleflux.errors import Aborted, NotFound, ResourceExhausted
from whaleflux.reasons import ErrorReason


@dataclass(slots=True)
class _Archive:
    record: StoredCode
    chunks: dict[tuple[str, int], bytes] = field(default_factory=dict)  # by upload and index


class MemoryCode:
    """See `api.CodeStore`."""

    def __init__(self, clock: Clock | None = None, max_bytes: int = 1 << 30) -> None:
        self._clock, self.max_bytes = clock or SystemClock(), max_bytes
        self._archives: dict[str, _Archive] = {}
        self._versions = itertools.count(1)

    async def find(self, digest: str) -> StoredCode | None:
        known = self._archives.get(digest)
        return known.record if known is not None and known.record.whole else None

    async def begin(self, digest: str, size_bytes: int) -> str:
        if await self.keep(digest):
            return ""
        known = self._archives.get(digest)
        record = StoredCode(digest, size_bytes, False, self._clock.now(), next(self._versions))
        self._archives[digest] = _Archive(record, known.chunks if known else {})
        return names.ulid()

    async def write(self, digest: str, upload: str, index: int, chunk: bytes) -> None:
        held = sum(len(piece) for one in self._archives.values() for piece in one.chunks.values())
        if held + len(chunk) > self.max_bytes:
            raise store_full(self.max_bytes)
        if (known := self._archives.get(digest)) is not None:
            known.chunks[upload, index] = chunk

    async def finish(self, digest: str, upload: str, size_bytes: int) -> StoredCode:
        if (known := self._archives.get(digest)) is None:
            raise deleted_meanwhile(digest)
        if known.record.whole:
            await self.abandon(digest, upload)
        else:
            known.record = StoredCode(digest, size_bytes, True, self._clock.now(), next(self._versions), upload)
        return known.record

    async def abandon(self, digest: str, upload: str) -> None:
        if (known := self._archives.get(digest)) is not None:
            known.chunks = {at: chunk for at, chunk in known.chunks.items() if at[0] != upload}

    async def read(self, code: StoredCode, index: int) -> bytes:
        known = self._archives.get(code.digest)
        if known is None or (code.upload, index) not in known.chunks:
            raise NotFound("code", code.digest)
        return known.chunks[code.upload, index]

    async def keep(self, digest: str, holder: str = "") -> bool:
        known = self._archives.get(digest)
        if known is None or not known.record.whole or (holder and holder not in known.record.holders):
            return False
        known.record = replace(known.record, kept=self._clock.now(), version=next(self._versions))
        return True

    async def admit(self, digest: str, holder: str) -> bool:
        known = self._archives.get(digest)
        if known is None or not known.record.whole:
            return False
        known.record = replace(known.record, holders=known.record.with_holder(holder))
        return await self.keep(digest)

    async def list(self) -> list[StoredCode]:
        return [one.record for one in self._archives.values()]

    async def delete(self, code: StoredCode) -> bool:
        known = self._archives.get(code.digest)
        if known is None or known.record.version != code.version:
            return False
        del self._archives[code.digest]
        return True


def store_full(max_bytes: int) -> ResourceExhausted:
    """The answer to a chunk that does not fit any more."""
    return ResourceExhausted(
        f"the store of code is full ({max_bytes:,} bytes); code of jobs that are deleted goes after code_grace_s, "
        "or give the scheduler more with code_store_bytes",
        reason=ErrorReason.CODE_STORE_FULL,
        metadata={"limit_bytes": str(max_bytes)},
    )


def deleted_meanwhile(digest: str) -> Aborted:
    """The answer to a writer whose archive was taken for abandoned."""
    return Aborted(f"code {digest[:12]} was deleted while it was written; send it again", metadata={"digest": digest})
