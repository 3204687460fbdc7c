"""How fast an agent pulls a dataset, and whether a wrong byte ever comes through.

Rate: the pull that agents use (chunks compared by SHA-256, room reserved, all on the disk before it counts) beside a plain copy of the same
bytes to the same disk, in turns; from a folder, and from a web server on loopback. Faults: pulls that are killed with SIGKILL, whose partial
copy is torn, whose source flips bits or ends early, whose disk is full; each goes on until it is done and is then compared byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import Options, Report, Row, Target, main
from whaleflux.data import manifest as manifests
from whaleflux.data.manifest import Manifest
from whaleflux.data.sources import Found, Local, Readable, Source, SourceFailed, Web
from whaleflux_agent import dataset_pull
from whaleflux_agent.dataset_files import finish
from whaleflux_agent.dataset_progress import Pace, Progress
from whaleflux_agent.dataset_pull import Pull
from whaleflux_agent.dataset_wanted import Wanted, found_out

RATE_BYTES = {"quick": 96 << 20, "full": 1 << 30}
ROUNDS = {"quick": 3, "full": 5}
FAULTS = {"quick": 60, "full": 1000}
RATE_SHARE = 0.8
SMALL_CHUNK = 64 << 10  # of the pulls with faults, so that each has many chunks
SMALL_BYTES = 1 << 20
KINDS = ("kill -9", "torn", "flipped", "cut off", "ENOSPC")
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


def bounds(original: Path, folder: Path, rounds: int) -> list[Row]:
    """What reading, SHA-256 and writing cost without a pull around them, by threads."""
    rows, size = list[Row](), original.stat().st_size
    for threads in (1, os.cpu_count() or 1):
        took = list[float]()
        for _ in range(rounds):
            forget(original)
            took.append(hashed_copy(original, folder / "plain", threads))
        rows.append({"what": f"bound: read, SHA-256, write; {threads} thread(s)", "MB": size / 1e6})
        rows[-1]["MB/s"] = size / 1e6 / statistics.median(took)
    return rows


def rate(
    what: str, source: Callable[[], Source], opened: Callable[[], Any], original: Path, folder: Path, rounds: int
) -> Row:
    """Median rates of both, in turns; the original is read from the disk, not from the page cache."""
    ours, plain, size = list[float](), list[float](), original.stat().st_size
    for _ in range(rounds):
        forget(original)
        plain.append(plain_copy(opened, folder / "plain"))
        forget(original)
        ours.append(pull(source(), folder))
    ours_s, plain_s = statistics.median(ours), statistics.median(plain)
    return {
        "what": what,
        "MB": size / 1e6,
        "MB/s": size / 1e6 / ours_s,
        "plain copy MB/s": size / 1e6 / plain_s,
        "share": plain_s / ours_s,
    }


class Faulty(Local):
    """Flips a bit, ends early or finds a full disk once, by `kind`."""

    def __init__(self, root: Path, kind: str, chance: random.Random) -> None:
        super().__init__(root)
        self._kind, self._chance, self._lock, self._left = kind, chance, threading.Lock(), 1

    @contextlib.contextmanager
    def open(self, found: Found, offset: int, length: int) -> Iterator[Readable]:
        with self._lock:
            kind, self._left = (self._kind if self._left else ""), 0
        with super().open(found, offset, length) as stream:
            if kind == "ENOSPC":
                raise OSError(errno.ENOSPC, "No space left on device")
            yield _Spoiled(stream, kind, self._chance) if kind in ("flipped", "cut off") else stream


class _Spoiled:
    def __init__(self, stream: Readable, kind: str, chance: random.Random) -> None:
        self._stream, self._kind, self._chance = stream, kind, chance

    def readinto(self, buffer: memoryview, /) -> int:
        count = self._stream.readinto(buffer) or 0
        at = self._chance.randrange(count) if count else 0
        if self._kind == "cut off":
            return at if self._chance.random() < 0.9 else 0
        buffer[at] ^= 1 << self._chance.randrange(8)
        return count


def killed(wanted: Wanted, source: Source, partial: Path, after_s: float) -> bool:
    """Pulls in a child that gets SIGKILL after so long; whether it was killed before it was done."""
    child = os.fork()
    if not child:
        Pull(wanted, source, partial, pace=Pace(8 << 20)).run()
        os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0


def tear(partial: Path, chance: random.Random) -> None:
    """Bytes of a partial copy that are not what was written, and half a record in its journal."""
    for file in (path for path in (partial / "files").rglob("*") if path.is_file()):
        with open(file, "r+b") as torn:
            torn.seek(chance.randrange(max(1, file.stat().st_size - 512)))
            torn.write(chance.randbytes(512))
    with open(partial / "journal", "ab") as journal:
        journal.write(chance.randbytes(chance.randrange(36)))


def one_fault(kind: str, known: Manifest, original: Path, folder: Path, chance: random.Random) -> Row:
    """One pull with one fault, and what came of it."""
    source, partial, progress = Faulty(original, kind, chance), folder / "partial", Progress()
    wanted, struck = Wanted(known, found_out(source).found), True
    if kind in ("kill -9", "torn"):
        struck = killed(wanted, Local(original), partial, chance.uniform(0.0, 0.12))
        if kind == "torn" and (partial / "journal").exists():
            tear(partial, chance)
    for _ in range(5):
        try:
            Pull(wanted, source, partial, progress=progress).run()
            break
        except (SourceFailed, OSError):
            continue
    finish(partial, folder / "copy")
    wrong = sum((folder / "copy" / f.path).read_bytes() != (original / f.path).read_bytes() for f in known.files)
    shutil.rmtree(folder / "copy")
    return {"struck": struck, "wrong": wrong, "here": progress.here_bytes / known.size_bytes}


def with_faults(folder: Path, count: int, seed: int) -> list[Row]:
    """Each kind so often, and how many files were wrong in the end."""
    chance, original = random.Random(seed), folder / "original"
    (original / "sub").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "sub/c")):
        (original / name).write_bytes(chance.randbytes(SMALL_BYTES * (number + 1) // 6))
    source = Local(original)
    known = Pull(found_out(source), source, folder / "first").run()
    rows = []
    for kind in KINDS:
        runs = [one_fault(kind, known, original, folder, chance) for _ in range(count // len(KINDS))]
        rows.append(
            {
                "what": kind,
                "pulls": len(runs),
                "struck": sum(bool(run["struck"]) for run in runs),
                "wrong files": sum(run["wrong"] for run in runs),
                "resumed, mean share": statistics.mean(run["here"] for run in runs),
            }
        )
    return rows


def measure(options: Options) -> Report:
    """Rates of pulls beside plain copies, and pulls through faults."""
    mode = "quick" if options.quick else "full"
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
        original.unlink()
        manifests.MIN_CHUNK_BYTES = dataset_pull.RUN_BYTES = SMALL_CHUNK
        dataset_pull.PAUSE_S = 0.0
        faults = with_faults(folder, FAULTS[mode], options.seed)
    wrong = sum(row["wrong files"] for row in faults)
    return Report(
        rows=[*limits, *rates, *faults],
        targets=[
            *(
                Target(f"rate ({row['what']})", row["share"], RATE_SHARE, "of a plain copy's rate", "higher")
                for row in rates
            ),
            Target("wrong files after faults", wrong, 0, f"of {sum(row['pulls'] for row in faults)} pulls"),
        ],
        simulated="of the faults: a full disk, flipped bits and streams that end early are made by the source; SIGKILL and torn files are real",
        notes=["a plain copy compares nothing; a pull computes SHA-256 of every byte and reserves its room first"],
    )


if __name__ == "__main__":
    sys.exit(main("dataset_pull", measure))
