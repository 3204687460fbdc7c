"""Reads all of a source to find out what it consists of, to the byte. Blocking: for threads, and for commands."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from whaleflux.data.manifest import Chunk, Manifest, draft
from whaleflux.data.sources import Found, Source, SourceChanged, SourceFailed

LANES = 4
RUN_BYTES = 64 << 20  # asked of a source at once
_PIECE_BYTES = 256 << 10


def hashed(source: Source, read: Callable[[int], None] = lambda _: None) -> Manifest:
    """The manifest of what a source has; `read` hears of bytes as they come, from threads. Raises SourceFailed, ManifestWrong, OSError."""
    found = sorted(source.scan(), key=lambda one: one.path)
    made, stop = draft((one.path, one.size_bytes) for one in found), threading.Event()

    def digests(run: list[Chunk]) -> list[bytes]:
        return [] if stop.is_set() else list(_digests(source, found[run[0].file], run, read, stop))

    with ThreadPoolExecutor(LANES) as pool:
        try:
            parts = list(pool.map(digests, _runs(made, RUN_BYTES if source.ranged else made.size_bytes)))
        finally:
            stop.set()  # whoever gives up does not wait for what nobody wants
    if sorted(source.scan(), key=lambda one: one.path) != found:
        raise SourceChanged("its source was changed while it was read; try again when nobody writes there")
    return made.known([digest for part in parts for digest in part])


def _runs(made: Manifest, most_bytes: int) -> Iterator[list[Chunk]]:
    """Chunks that follow one another in one file, as far as one request goes."""
    run = list[Chunk]()
    for chunk in made.chunks():
        if run and (chunk.file != run[0].file or chunk.offset + chunk.size_bytes - run[0].offset > most_bytes):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run


def _digests(
    source: Source, found: Found, run: list[Chunk], read: Callable[[int], None], stop: threading.Event
) -> Iterator[bytes]:
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with source.open(found, run[0].offset, sum(chunk.size_bytes for chunk in run)) as stream:
        for chunk in run:
            digest, left = hashlib.sha256(), chunk.size_bytes
            while left and not stop.is_set():
                count = stream.readinto(buffer[:left])
                if not count:
                    raise SourceFailed(f"{found.path} ended before its end")
                digest.update(buffer[:count])
                left -= count
                read(count)
            yield digest.digest()
