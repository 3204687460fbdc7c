"""The store of packed code: archives by the sha256 of their bytes, in chunks, each kept until nobody has wanted it for a while.

Each upload writes chunks of its own: whoever sends other bytes under a digest harms nobody's. An archive counts once a writer has said that
it is whole, and is that writer's from then on; until then, and after it was deleted, nobody finds it. What is found stays for as long as it is kept
again now and then: `delete` fails for what was kept since it was listed. It is for its holders, who each have shown its bytes: to know a digest is
not to have the code.

`memory.MemoryCode` is the model and the fake, `events.nats_code.NatsCode` the real one; one contract suite runs over both.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from whaleflux.code.limits import CHUNK_BYTES

MOST_HOLDERS = 1_000


@dataclass(frozen=True, slots=True)
class StoredCode:
    """One archive, or what is left of one."""

    digest: str
    size_bytes: int
    whole: bool  # False: it is being written, or its writer went, or it is being deleted
    kept: datetime  # UTC, when somebody last wanted it
    version: int  # changes with each of these
    upload: str = ""  # whose chunks it consists of, once it is whole
    holders: tuple[str, ...] = ()  # who may start jobs with it, at most `MOST_HOLDERS`, the last to come last

    def with_holder(self, holder: str) -> tuple[str, ...]:
        """The holders with one more; who came first goes first, and has to show the bytes again."""
        return (*(one for one in self.holders if one != holder), holder)[-MOST_HOLDERS:]

    @property
    def chunks(self) -> int:
        """In how many pieces it is kept."""
        return -(-self.size_bytes // CHUNK_BYTES)


class CodeStore(Protocol):
    """Every method raises Unavailable where the store does not answer."""

    max_bytes: int  # that it takes in all

    async def find(self, digest: str) -> StoredCode | None:
        """The archive if it is whole."""
        ...

    async def begin(self, digest: str, size_bytes: int) -> str:
        """Announces that chunks will be written; the new upload's name, "": it is there already (and is kept)."""
        ...

    async def write(self, digest: str, upload: str, index: int, chunk: bytes) -> None:
        """Stores one chunk, again if need be. Raises ResourceExhausted where the store is full."""
        ...

    async def finish(self, digest: str, upload: str, size_bytes: int) -> StoredCode:
        """All chunks are written and their bytes have the digest: from now on it is found. Raises Aborted if it was deleted meanwhile.

        Where another upload was finished meanwhile it is that one's, and these chunks are dropped.
        """
        ...

    async def abandon(self, digest: str, upload: str) -> None:
        """Drops the chunks of an upload that will not be finished."""
        ...

    async def read(self, code: StoredCode, index: int) -> bytes:
        """One chunk of what was found. Raises NotFound when it is gone."""
        ...

    async def keep(self, digest: str, holder: str = "") -> bool:
        """Somebody wants it now; False: it is not there, or `holder` is none of its holders ("": is not asked for)."""
        ...

    async def admit(self, digest: str, holder: str) -> bool:
        """One more of its holders, who has shown its bytes, and wants it now; False: it is not there."""
        ...

    async def list(self) -> list[StoredCode]:
        """Everything that takes room, whole or not."""
        ...

    async def delete(self, code: StoredCode) -> bool:
        """Deletes what was listed; False: somebody has wanted it since, it stays."""
        ...
