"""Whether a wrong byte of a dataset ever comes through, whatever dies, tears, flips, fills up or lies on the way.

Each run is one pull by the agent's own code with one fault: SIGKILL to the process that pulls, a partial copy or another copy on the node
that was torn, a source that flips bits or ends early, a disk that is full or fails in the middle of a write or under a resumed pull; and
beside one honest peer (a real agent process, mTLS) one that is killed, flips bits, stalls, breaks off in mid chunk, rots on its disk or says
that it has what it has not. Each goes on until it is done and is then compared byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import structlog

from benchmarks.common import ROOT, Options, Report, Row, Target, main
from benchmarks.dataset_lab import faulty_peer
from whaleflux.data import manifest as manifests
from whaleflux.data.hashing import hashed
from whaleflux.data.manifest import Manifest
from whaleflux.data.sources import Found, Local, Readable, SourceFailed
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_agent import dataset_files, dataset_peers, dataset_pull, piece_order
from whaleflux_agent.dataset_files import FIXED_NS, finish
from whaleflux_agent.dataset_peers import Peers
from whaleflux_agent.dataset_progress import Pace, Progress
from whaleflux_agent.dataset_pull import Pull
from whaleflux_agent.dataset_wanted import Wanted, found_out
from whaleflux_agent.datasets import DatasetCache
from whaleflux_agent.runtime.api import LaunchFailed

RUNS = {"quick": 65, "full": 1001}
CHUNK_BYTES, SIZE_BYTES = 64 << 10, 1 << 20
ALONE = ("kill -9", "torn", "flipped", "cut off", "ENOSPC", "EIO", "other copy torn")
AMONG_PEERS = ("peer killed", "peer flips", "peer stalls", "peer breaks off", "peer rots", "peer claims all")
KINDS = ALONE + AMONG_PEERS
_TRIES = 6
_NODE, _NAME = "sites/lab/nodes/n0", "datasets/c4"


class Faulty(Local):
    """Flips a bit or ends early once, by `kind`; `struck` says that it did."""

    def __init__(self, root: Path, kind: str, chance: random.Random) -> None:
        super().__init__(root)
        self._kind, self._chance, self._lock, self.struck = kind, chance, threading.Lock(), False

    @contextlib.contextmanager
    def open(self, found: Found, offset: int, length: int) -> Iterator[Readable]:
        with self._lock:
            kind = "" if self.struck or self._kind not in ("flipped", "cut off") else self._kind
            self.struck = self.struck or bool(kind)
        with super().open(found, offset, length) as stream:
            yield _Spoiled(stream, kind, self._chance) if kind else stream


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


@dataclass(slots=True)
class FailingDisk:
    """In the block one write takes a part of its bytes and then fails, or one read does, when `left` others have gone well."""

    number: int
    left: int
    struck: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def _strikes(self) -> bool:
        with self.lock:
            self.left -= 1
            strikes = not self.struck and self.left < 0
            self.struck = self.struck or strikes
        return strikes

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        write, digest = dataset_files.write, dataset_files.digest_of

        def writes(number: int, data: memoryview, at: int) -> None:
            if self._strikes():
                write(number, data[: len(data) // 2], at)
                raise OSError(self.number, os.strerror(self.number))
            write(number, data, at)

        def reads(*which: Any) -> bytes:
            if self.number == errno.EIO and self._strikes():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return digest(*which)

        with mock.patch.multiple(dataset_pull, write=writes, digest_of=reads):
            yield


def killed(wanted: Wanted, source: Local, folder: Path, after_s: float) -> bool:
    """Pulls and finishes in a child that gets SIGKILL after so long; whether it was killed before it was done."""
    child = os.fork()
    if not child:
        Pull(wanted, source, folder / "partial", pace=Pace(8 << 20)).run()
        finish(folder / "partial", folder / "copy")
        os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0


def tear(folder: Path, chance: random.Random) -> None:
    """Bytes of files that are not what was written, under the times that they had."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        os.chmod(file, 0o644)
        with open(file, "r+b") as torn:
            torn.seek(chance.randrange(max(1, file.stat().st_size - 512)))
            torn.write(chance.randbytes(512))
        os.utime(file, ns=(FIXED_NS, FIXED_NS))


def wrong_files(folder: Path, original: Path, known: Manifest) -> int:
    return sum((folder / file.path).read_bytes() != (original / file.path).read_bytes() for file in known.files)


def make_original(folder: Path, chance: random.Random) -> Manifest:
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "sub/c")):
        (folder / name).write_bytes(chance.randbytes(SIZE_BYTES * (number + 1) // 6))
    return hashed(Local(folder))


def alone(kind: str, known: Manifest, original: Path, folder: Path, chance: random.Random) -> Row:
    """One pull with one fault on the node or at the source, and what came of it."""
    source, partial, progress = Faulty(original, kind, chance), folder / "partial", Progress()
    wanted, struck = Wanted(known, found_out(source).found), False
    disk = FailingDisk(errno.ENOSPC if kind == "ENOSPC" else errno.EIO, chance.randrange(12))
    if kind in ("kill -9", "torn") or (kind == "EIO" and chance.random() < 0.5):
        struck = killed(wanted, Local(original), folder, chance.uniform(0.0, 0.12)) and kind != "EIO"
    if kind == "torn" and (partial / "journal").exists():
        tear(partial / "files", chance)
        with open(partial / "journal", "ab") as journal:
            journal.write(chance.randbytes(chance.randrange(36)))
    if not (folder / "copy").exists():  # the killed one may have come to its end
        with disk.failing() if kind in ("ENOSPC", "EIO") else contextlib.nullcontext():
            _until_done(lambda: Pull(wanted, source, partial, progress=progress).run())
        finish(partial, folder / "copy")
    wrong = wrong_files(folder / "copy", original, known)
    shutil.rmtree(folder / "copy")
    shutil.rmtree(partial, ignore_errors=True)
    return {"struck": struck or source.struck or disk.struck, "wrong": wrong, "kept": progress.here_bytes / SIZE_BYTES}


def _until_done(pull: Callable[[], Any]) -> None:
    for tried in range(_TRIES):
        try:
            pull()
            return
        except (SourceFailed, OSError):
            if tried == _TRIES - 1:
                raise


class Records:
    """Inventory, of some datasets whose manifests are known; what agents report is noted nowhere."""

    def __init__(self, *datasets: tuple[pb.Dataset, Manifest]) -> None:
        self.datasets = {found.name: (found, known) for found, known in datasets}
        self.told = ""  # what agents reported

    async def GetDataset(self, request: Any, timeout: float) -> pb.Dataset:
        return self.datasets[request.name][0]

    async def GetDatasetManifest(self, request: Any, timeout: float) -> pb.DatasetManifest:
        return self.datasets[request.name][1].to_proto()

    async def ReportCachedDataset(self, request: Any, timeout: float) -> pb.Dataset:
        self.told += request.copy.message
        return self.datasets[request.dataset][0]

    async def ListNodePins(self, request: Any, timeout: float) -> pb.ListNodePinsResponse:
        return pb.ListNodePinsResponse()


def record_of(name: str, original: Path, known: Manifest) -> pb.Dataset:
    return pb.Dataset(name=name, uri=str(original), size_bytes=known.size_bytes, manifest_digest=known.digest)


async def other_copy_torn(known: Manifest, original: Path, folder: Path, chance: random.Random) -> Row:
    """The node has another dataset's copy with the same chunks, and its disk lost some of them."""
    records = Records(*((record_of(name, original, known), known) for name in ("datasets/old", _NAME)))
    cache = DatasetCache(folder / "cache", 1 << 40, _NODE, records, frozenset)  # type: ignore[arg-type]
    tear(Path(await cache.fetch("datasets/old")), chance)
    copy = Path(await cache.fetch(_NAME))
    wrong = wrong_files(copy, original, known)
    shutil.rmtree(folder / "cache")
    return {"struck": True, "wrong": wrong, "kept": 0.0}


class PeerProcess:
    """Another agent of the site that holds all of it."""

    def __init__(self, folder: Path, node: str, kind: str, seed: int) -> None:
        self.node, self._folder = node, folder
        words = [str(folder), kind, str(seed), str(CHUNK_BYTES)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.dataset_lab.faulty_peer", *words],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address, f"{kind}: the peer ended"

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()

    def struck(self) -> int:
        """How often its fault has struck."""
        marks = self._folder / "struck"
        return marks.stat().st_size if marks.exists() else 0


@dataclass(slots=True)
class Site:
    """A puller's surroundings: one honest peer, and one with a fault."""

    folder: Path
    original: Path
    known: Manifest
    chance: random.Random
    authority: CertificateAuthority = field(default_factory=lambda: CertificateAuthority.create(datetime.now(UTC)))
    peers: dict[str, PeerProcess] = field(default_factory=dict)
    started: int = 0

    def start(self, kind: str) -> PeerProcess:
        self.started += 1
        number = self.started
        node, folder = f"sites/lab/nodes/n{number}", self.folder / f"peer-{self.chance.getrandbits(64):x}"
        folder.mkdir(mode=0o700)
        tls = self.authority.issue("agent", f"lab/n{number}", datetime.now(UTC))
        for name, data in (("peer.key", tls.key), ("peer.crt", tls.chain), ("ca.crt", tls.roots)):
            (folder / name).write_bytes(data)
        record = record_of(_NAME, self.original, self.known)
        (folder / "record").write_bytes(record.SerializeToString())
        (folder / "node").write_text(node)
        self._fill(folder / "cache", node)
        if kind == "peer rots":
            tear(next((folder / "cache").glob("c4@*")), self.chance)
        said = kind.removeprefix("peer ")
        shown = said if said in faulty_peer.KINDS else faulty_peer.KINDS[0]
        self.peers[kind] = PeerProcess(folder, node, shown, self.chance.getrandbits(32))
        return self.peers[kind]

    def _fill(self, root: Path, node: str) -> None:
        records = Records((record_of(_NAME, self.original, self.known), self.known))
        asyncio.run(DatasetCache(root, 1 << 40, node, records, frozenset).fetch(_NAME))  # type: ignore[arg-type]

    def one(self, kind: str) -> Row:
        """One pull beside a peer with that fault."""
        honest = self.peers.get("") or self.start("")
        faulty = self.peers.get(kind) or self.start(kind)
        row = asyncio.run(self._pull(kind, honest, faulty))
        if kind == "peer killed":
            self.peers.pop(kind).kill()
        return row

    async def _pull(self, kind: str, honest: PeerProcess, faulty: PeerProcess) -> Row:
        record, root = record_of(_NAME, self.original, self.known), self.folder / "puller"
        for peer in (faulty, honest):
            copy = pb.DatasetCopy(node=peer.node, address=peer.address, present_bytes=SIZE_BYTES)
            copy.manifest_digest, copy.state = self.known.digest, pb.DATASET_COPY_STATE_READY
            record.copies.append(copy)
        records, tls = Records((record, self.known)), self.authority.issue("agent", "lab/n0", datetime.now(UTC))
        peers = Peers(_NODE, tls, "whaleflux", records)  # type: ignore[arg-type]
        cache = DatasetCache(root, 1 << 40, _NODE, records, frozenset, peers=peers, pace=Pace(16 << 20))  # type: ignore[arg-type]
        before = faulty.struck()
        fetching = asyncio.create_task(self._fetched(cache))
        struck = kind == "peer killed" and await self._killed(faulty, fetching)
        wrong = wrong_files(await fetching, self.original, self.known)
        shutil.rmtree(root)
        struck = struck or faulty.struck() > before or "gave wrong bytes" in records.told
        return {"struck": struck, "wrong": wrong, "kept": 0.0}

    async def _fetched(self, cache: DatasetCache) -> Path:
        for _ in range(_TRIES - 1):
            with contextlib.suppress(LaunchFailed):
                return Path(await cache.fetch(_NAME))
        return Path(await cache.fetch(_NAME))

    async def _killed(self, peer: PeerProcess, fetching: asyncio.Task[Path]) -> bool:
        """Kills it some time after a pull began; whether that was still under way."""
        await asyncio.sleep(self.chance.uniform(0.0, 0.15))
        running = not fetching.done()
        await asyncio.to_thread(peer.kill)
        return running

    def close(self) -> None:
        for peer in self.peers.values():
            peer.kill()


@contextlib.contextmanager
def small_and_soon() -> Iterator[None]:
    """Many chunks of few bytes, and waits that are as short as they may be here; as before afterwards."""
    changed: list[tuple[Any, str, Any]] = [
        (manifests, "MIN_CHUNK_BYTES", CHUNK_BYTES),
        (dataset_pull, "RUN_BYTES", CHUNK_BYTES),
        (dataset_pull, "PAUSE_S", 0.0),
        (dataset_peers, "LIST_EVERY_S", 0.05),
        (dataset_peers, "READ_S", 0.5),
        (piece_order, "REST_S", 0.2),
        (piece_order, "PATIENCE_S", 1.0),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changed]
    for module, name, value in changed:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def with_faults(folder: Path, runs: int, seed: int) -> list[Row]:
    """Each kind so often in turns, and how many files were wrong in the end."""
    chance, original, rows = random.Random(seed), folder / "original", list[Row]()
    with small_and_soon():
        known = make_original(original, chance)
        for kind in ALONE:  # before there is a thread that a child process would lack
            if kind == "other copy torn":
                found = [asyncio.run(other_copy_torn(known, original, folder, chance)) for _ in range(runs)]
            else:
                found = [alone(kind, known, original, folder, chance) for _ in range(runs)]
            rows.append(summed(kind, found))
        site = Site(folder, original, known, chance)
        try:
            rows += [summed(kind, [site.one(kind) for _ in range(runs)]) for kind in AMONG_PEERS]
        finally:
            site.close()
    return rows


def summed(kind: str, runs: list[Row]) -> Row:
    return {
        "what": kind,
        "pulls": len(runs),
        "struck": sum(bool(run["struck"]) for run in runs),
        "wrong files": sum(run["wrong"] for run in runs),
        "went on with, mean share": statistics.mean(run["kept"] for run in runs),
    }


def measure(options: Options) -> Report:
    """Pulls through faults, by kind."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory(prefix="wf-", dir=Path.cwd() / ".build") as name:
        rows = with_faults(Path(name), RUNS["quick" if options.quick else "full"] // len(KINDS), options.seed)
    return Report(
        rows=rows,
        targets=[
            Target(
                "wrong files", sum(row["wrong files"] for row in rows), 0, f"of {sum(r['pulls'] for r in rows)} pulls"
            ),
            Target("kinds that never struck", sum(not row["struck"] for row in rows), 0, f"of {len(rows)}"),
        ],
        simulated=(
            "inventory; a disk that is full or fails (raised under the agent's writes and reads), what sources and peers do wrong. Real: SIGKILL "
            "to pullers and peers, torn files, agents' processes, mTLS"
        ),
    )


if __name__ == "__main__":
    sys.exit(main("dataset_faults", measure))
