"""How fast an agent pulls a dataset, and what of a new version it pulls.

Rate: the pull that agents use (chunks compared by SHA-256, room reserved, all on the disk before it counts) beside a plain copy of the same
bytes to the same disk, in turns; from a folder, and from a web server on loopback. What this machine's cores allow stands beside it: the
same bytes read, hashed and written with nothing else around, by one thread and by one for each core. A new version of weights in which every
tenth tensor changed is pulled by a node that holds the last one. Whether a wrong byte ever comes through: `dataset_faults`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.server
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.dataset_faults import Records, record_of
from whaleflux.data import manifest as manifests
from whaleflux.data.hashing import hashed
from whaleflux.data.manifest import Manifest
from whaleflux.data.sources import Found, Local, Readable, Source, Web
from whaleflux_agent.dataset_files import finish
from whaleflux_agent.dataset_pull import LANES, Pull
from whaleflux_agent.dataset_wanted import found_out
from whaleflux_agent.datasets import DatasetCache

RATE_BYTES = {"quick": 96 << 20, "full": 1 << 30}
ROUNDS = {"quick": 5, "full": 7}
RATE_SHARE, MOST_CHANGED = 0.8, 0.15
_PIECE = 1 << 20


class Ranges(http.server.BaseHTTPRequestHandler):
    """One file, by ranges."""

    protocol_version = "HTTP/1.1"
    path_of = Path()

    def do_GET(self) -> None:
        size = self.path_of.stat().st_size
        first, last = (self.headers.get("Range") or f"bytes=0-{size - 1}").removeprefix("bytes=").split("-")
        count = min(int(last), size - 1) - int(first) + 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(count))
        self.end_headers()
        with open(self.path_of, "rb") as file:
            self.wfile.flush()
            sent = 0
            while sent < count:
                sent += os.sendfile(self.connection.fileno(), file.fileno(), int(first) + sent, count - sent)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@contextlib.contextmanager
def serving(path: Path) -> Iterator[str]:
    """The URL of a web server in a process of its own."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Ranges,), {"path_of": path}))
    child = os.fork()
    if not child:
        server.serve_forever()
    try:
        yield f"http://127.0.0.1:{server.server_port}/{path.name}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        server.server_close()


def forget(path: Path) -> None:
    """Its pages, so that who reads it next has it from the disk."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_copy(opened: Callable[[], Any], target: Path) -> float:
    """Seconds for the same bytes onto the same disk with nothing compared: what the pull is held against."""
    begun = time.perf_counter()
    with opened() as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, _PIECE)
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - begun
    target.unlink()
    return took


def pull(source: Source, folder: Path) -> float:
    """Seconds for a pull, from the look at the source to the copy that appears."""
    begun = time.perf_counter()
    Pull(found_out(source), source, folder / "partial").run()
    finish(folder / "partial", folder / "copy")
    took = time.perf_counter() - begun
    shutil.rmtree(folder / "copy")
    return took


def hashed_copy(original: Path, target: Path, threads: int) -> float:
    """Seconds to read, hash and write the same bytes with as little else as can be: what this machine's cores allow."""
    size = original.stat().st_size
    share = -(-size // threads // _PIECE) * _PIECE
    begun = time.perf_counter()
    with open(original, "rb") as source, open(target, "wb") as file, ThreadPoolExecutor(threads) as pool:
        os.posix_fallocate(file.fileno(), 0, size)
        parts = [(at, min(size, at + share)) for at in range(0, size, share)]
        list(pool.map(lambda part: _hashed_part(source.fileno(), file.fileno(), *part), parts))
        os.fsync(file.fileno())
    took = time.perf_counter() - begun
    target.unlink()
    return took


def _hashed_part(source: int, target: int, at: int, end: int) -> None:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE // 4))
    while at < end:
        data = buffer[: os.preadv(source, [buffer[: end - at]], at)]
        digest.update(data)
        at += os.pwrite(target, data, at)


def lanes_copy(source: Source, target: Path) -> float:
    """The same by as many lanes as a pull has, into a file that has its room: the more of a busy host, and nothing compared either."""
    begun = time.perf_counter()
    (found,) = source.scan()
    share = -(-found.size_bytes // LANES // _PIECE) * _PIECE
    with open(target, "wb") as file, ThreadPoolExecutor(LANES) as pool:
        os.posix_fallocate(file.fileno(), 0, found.size_bytes)
        ends = [(at, min(found.size_bytes, at + share)) for at in range(0, found.size_bytes, share)]
        list(pool.map(lambda part: _copied_part(source, found, file.fileno(), *part), ends))
        os.fsync(file.fileno())
    took = time.perf_counter() - begun
    target.unlink()
    return took


def _copied_part(source: Source, found: Found, target: int, at: int, end: int) -> None:
    buffer = memoryview(bytearray(_PIECE // 4))
    with source.open(found, at, end - at) as stream:
        while at < end:
            at += os.pwrite(target, buffer[: stream.readinto(buffer[: end - at])], at)


def bounds(original: Path, folder: Path, rounds: int) -> list[Row]:
    """What reading, SHA-256 and writing cost without a pull around them, by threads."""
    rows, size = list[Row](), original.stat().st_size
    for threads in (1, os.cpu_count() or 1):
        took, cpu_s = list[float](), list[float]()
        for _ in range(rounds):
            forget(original)
            before_s = time.process_time()
            took.append(hashed_copy(original, folder / "plain", threads))
            cpu_s.append(time.process_time() - before_s)
        rows.append({"what": f"bound: read, SHA-256, write; {threads} thread(s)", "MB": size / 1e6})
        rows[-1] |= {"MB/s": size / 1e6 / statistics.median(took), "CPU s/GB": statistics.median(cpu_s) / size * 1e9}
    return rows


def rate(
    what: str, source: Callable[[], Source], opened: Callable[[], Any], original: Path, folder: Path, rounds: int
) -> Row:
    """Median rates in turns, and a pull's share of the faster of both copies next to it; the original is not in the page cache."""
    ours, plain, size, cpu_s = list[float](), list[float](), original.stat().st_size, list[float]()
    for _ in range(rounds):
        forget(original)
        alone = plain_copy(opened, folder / "plain")
        forget(original)
        plain.append(min(alone, lanes_copy(source(), folder / "plain")))
        forget(original)
        before_s = time.process_time()
        ours.append(pull(source(), folder))
        cpu_s.append(time.process_time() - before_s)
    ours_s, plain_s = statistics.median(ours), statistics.median(plain)
    return {
        "what": what,
        "MB": size / 1e6,
        "MB/s": size / 1e6 / ours_s,
        "plain copy MB/s": size / 1e6 / plain_s,
        "CPU s/GB": statistics.median(cpu_s) / size * 1e9,
        "share": statistics.median(one / other for one, other in zip(plain, ours, strict=True)),
    }


def new_version(folder: Path, size: int) -> Row:
    """Weights of which every tenth tensor changed in place, pulled where the last version is: bytes that are read at the source."""
    tensor, old, new = size // 40, folder / "weights-1", folder / "weights-2"
    manifests.MIN_CHUNK_BYTES = 1 << (size.bit_length() - 8)  # 8 MiB of 1 GiB, as in earnest
    for weights in (old, new):
        weights.mkdir()
    shutil.copy(folder / "big", old / "model")
    shutil.copy(folder / "big", new / "model")
    with open(new / "model", "r+b") as file:
        for number in range(0, 40, 10):
            file.seek(number * tensor)
            file.write(os.urandom(tensor))
    records = Records(*((record_of(f"datasets/{one.name}", one, known), known) for one, known in _hashed(old, new)))
    read = [0]

    class Counted(Local):
        @contextlib.contextmanager
        def open(self, found: Found, offset: int, length: int) -> Iterator[Readable]:
            read[0] += length
            with super().open(found, offset, length) as stream:
                yield stream

    async def pulled() -> float:
        cache = DatasetCache(
            folder / "cache",
            1 << 40,
            "sites/lab/nodes/n0",
            records,  # type: ignore[arg-type]
            frozenset,
            open_source=lambda uri, _, act_as: Counted(Path(uri), act_as),
        )
        await cache.fetch("datasets/weights-1")
        read[0], begun = 0, time.perf_counter()
        copy = Path(await cache.fetch("datasets/weights-2"))
        took = time.perf_counter() - begun
        assert digest_file(copy / "model") == digest_file(new / "model")
        return took

    took = asyncio.run(pulled())
    return {
        "what": "new version, 10 % changed",
        "MB": size / 1e6,
        "MB/s": size / 1e6 / took,
        "read at its source": read[0] / size,
    }


def _hashed(*folders: Path) -> list[tuple[Path, Manifest]]:
    return [(folder, hashed(Local(folder))) for folder in folders]


def digest_file(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def measure(options: Options) -> Report:
    """Rates of pulls beside plain copies, and what a new version moves."""
    mode = "quick" if options.quick else "full"
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory(prefix="wf-", dir=Path.cwd() / ".build") as name:
        folder, size = Path(name), RATE_BYTES[mode]
        original = folder / "big"
        with open(original, "wb") as file:
            for _ in range(size // _PIECE):
                file.write(os.urandom(_PIECE))
            os.fsync(file.fileno())
        limits = bounds(original, folder, ROUNDS[mode])
        with serving(original) as url:
            rates = [
                rate("disk", lambda: Local(original), lambda: open(original, "rb"), original, folder, ROUNDS[mode]),  # noqa: SIM115  # closed by who opens
                rate("loopback", lambda: Web(url), lambda: urllib.request.urlopen(url), original, folder, ROUNDS[mode]),  # noqa: S310
            ]
        changed = new_version(folder, size)
    return Report(
        rows=[*limits, *rates, changed],
        targets=[
            *(
                Target(f"rate ({row['what']})", row["share"], RATE_SHARE, "of a plain copy's rate", "higher")
                for row in rates
            ),
            Target("read at its source", changed["read at its source"], MOST_CHANGED, "of a version with 10 % changed"),
        ],
        simulated="inventory, where a new version is pulled",
        notes=[
            "a plain copy compares nothing, and is the faster of one thread's and four threads'; a pull computes SHA-256 of every byte and reserves its room first",
            "the new version: 40 tensors of one size, each tenth changed; chunks are 1/128 of the set",
        ],
    )


if __name__ == "__main__":
    sys.exit(main("dataset_pull", measure))
