"""The members of a tar archive that nobody is trusted to have made, one by one.

Python's tarfile takes into memory whatever a header says it has, keeps every header that it has seen, and follows sizes backwards;
here a header has 64 KiB, none is kept, and everything is read once, forwards.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, Any, cast

HEADER_BYTES = 64 << 10  # of one member, with all that extends it: the longest path has 4 KiB
_SKIP_BYTES = 64 << 10


def members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Each with the archive, from which its content may be read until the next one is asked for. Raises tarfile.TarError."""
    metered = _Metered(file)
    with tarfile.open(fileobj=cast("IO[bytes]", metered), mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            archive.pax_headers.clear()  # type: ignore[attr-defined]  # global ones
            if member.size < 0 or member.issparse():
                raise tarfile.ReadError(f"{member.name[:200]!r} has no size, or holes")
            metered.left_bytes = member.size
            yield archive, member
            metered.left_bytes = HEADER_BYTES


class _Metered:
    """What tarfile takes for a file, and no more of it than is allowed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._at, self.left_bytes = file, 0, HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left_bytes:
            raise tarfile.ReadError(f"a header has more than {HEADER_BYTES} bytes, or no size")
        self.left_bytes -= size
        return self._read(size)

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, *_: Any) -> int:
        """Forwards."""
        if to < self._at:
            raise tarfile.ReadError("it leads backwards")
        while self._at < to and self._read(min(_SKIP_BYTES, to - self._at)):
            pass
        return self._at

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._at += len(data)
        return data
