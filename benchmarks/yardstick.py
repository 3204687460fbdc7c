"""How fast is this host: five fixed loops that every benchmark measures first, so that figures of two hosts can be compared.

Hosts differ by a factor of three and more. A target in units per second (or in milliseconds) is therefore stated for the reference host,
the one of the figures in README.md, and read here through the loop that its work is most like: a host whose Python loop takes 2.6 times
as long as the reference's owes 1/2.6 of the decisions per second. Ratios to a peer of the same run need no yardstick.

Loops that compute count CPU time of their thread and keep the best of several rounds, so that neighbours on the host count little; the
loops that wait (disk, loopback) take the median. They take about five seconds in all, once per boot and set of versions.

`python -m benchmarks.yardstick` measures afresh and prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Loop = Literal["python", "numpy", "numba", "fsync", "loopback"]
LOOPS: tuple[Loop, ...] = ("python", "numpy", "numba", "fsync", "loopback")
REVISION = 1  # of the loops below: another number makes older measurements of the same boot void
CACHE = Path(__file__).resolve().parent.parent / ".build" / "yardstick.json"

ROUNDS = 5
WRITES = 200
EXCHANGES = 10_000


@dataclass(frozen=True, slots=True)
class Yardstick:
    """Seconds of each fixed loop on one host, and the load (1 min) under which they were measured."""

    python: float
    numpy: float
    numba: float
    fsync: float
    loopback: float
    load_1min: float = 0.0

    def slowness(self, loop: Loop) -> float:
        """How many times as long as on the reference host the loop takes: 1 there, 2.6 on a host 2.6 times slower."""
        seconds, reference = getattr(self, loop), getattr(REFERENCE, loop)
        return float(seconds / reference)


# The host of README.md's figures (two virtual Xeon cores, CPython 3.11, quiet), measured where the placement engine gave those figures.
REFERENCE = Yardstick(python=0.213, numpy=0.210, numba=0.187, fsync=0.063, loopback=0.0376)


def host_yardstick(cache: Path = CACHE, measure: Callable[[], Yardstick] | None = None) -> Yardstick:
    """What was measured since this boot with these versions, or else a measurement, which is kept in `cache`."""
    key = _key()
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept: Mapping[str, Any] = json.loads(cache.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return Yardstick(**kept["seconds"])
    found = (measure or measure_host)()
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"key": key, "seconds": asdict(found)}, indent=1) + "\n", encoding="utf-8")
    partial.replace(cache)
    return found


def _key() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = platform.node()
    return f"{boot} python {platform.python_version()} numpy {np.__version__} loops {REVISION}"


def facts(found: Yardstick) -> dict[str, Any]:
    """The host block of a result file: seconds of each loop, how many times the reference's they are, and the load."""
    return {
        "seconds": {loop: getattr(found, loop) for loop in LOOPS},
        "slowness": {loop: round(found.slowness(loop), 3) for loop in LOOPS},
        "load_1min": found.load_1min,
    }


def measure_host() -> Yardstick:
    load = round(os.getloadavg()[0], 2)
    compiled = _numba_loop()
    return Yardstick(
        python=_best(python_loop),
        numpy=_best(numpy_loop),
        numba=_best(compiled),
        fsync=_fsync_s(),
        loopback=_loopback_s(),
        load_1min=load,
    )


def _best(loop: Callable[[], object]) -> float:
    """CPU seconds of the fastest round: what disturbs a round only makes it longer."""
    rounds = []
    for _ in range(ROUNDS):
        begun = time.thread_time()
        loop()
        rounds.append(time.thread_time() - begun)
    return min(rounds)


class _Item:
    __slots__ = ("key", "value")

    def __init__(self, key: str, value: int) -> None:
        self.key = key
        self.value = value


def python_loop(rounds: int = 24) -> int:
    """What services do all day: objects, attributes, dicts, strings, sorting, calls."""
    total = 0
    for salt in range(rounds):
        items = [_Item(f"sites/a/nodes/n{i:05}", (i * 7919 + salt) % 10_007) for i in range(10_000)]
        by_key = {item.key: item for item in items}
        for item in sorted(items, key=lambda item: item.value)[::2]:
            total += len(by_key[item.key].key.partition("/")[2]) + item.value
    return total


def numpy_loop(rounds: int = 6_000) -> float:
    """Columns of a fleet of some thousand nodes: masks, gathers, reductions, a partial sort."""
    column = (np.arange(5_000, dtype=np.int64) * 7919) % 10_007
    total = 0.0
    for salt in range(rounds):
        mask = (column + salt) % 8 >= 3
        chosen = np.flatnonzero(mask)
        total += float(column[chosen].sum()) + float(np.partition(column, 64)[:64].mean())
    return total


def _numba_loop() -> Callable[[], object]:
    import numba  # here, because it takes a second, which a kept measurement does not need

    def spin(steps: int) -> float:
        state, total = np.uint64(88172645463325252), 0.0
        bins = np.zeros(1024)
        for _ in range(steps):
            state ^= state << np.uint64(13)
            state ^= state >> np.uint64(7)
            state ^= state << np.uint64(17)
            at = state & np.uint64(1023)
            bins[at] += 1.0
            total += bins[at]
        return total

    compiled: Callable[[int], float] = numba.njit(spin)
    compiled(1)
    return lambda: compiled(120_000_000)


def _fsync_s() -> float:
    """Seconds that `WRITES` appends of 4 KiB take with a fdatasync after each, as etcd's log does; in the folder for temporary files."""
    block, seconds = b"\0" * 4096, []
    with tempfile.TemporaryFile() as file:
        for _ in range(WRITES):
            begun = time.perf_counter()
            file.write(block)
            file.flush()
            os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) * WRITES


def _loopback_s() -> float:
    """Seconds of `EXCHANGES` messages of 256 bytes there and back over a TCP connection on 127.0.0.1, both ends in this thread."""
    message, seconds = b"\0" * 256, []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname(), timeout=10)
        far, _ = listening.accept()
    with near, far:
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(EXCHANGES):
            begun = time.perf_counter()
            near.sendall(message)
            far.sendall(far.recv(256, socket.MSG_WAITALL))
            near.recv(256, socket.MSG_WAITALL)
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) * EXCHANGES


def main() -> int:
    begun = time.perf_counter()
    found = measure_host()
    for loop in LOOPS:
        print(f"{loop:9} {getattr(found, loop):8.4f} s   {found.slowness(loop):6.2f} x the reference host's")
    print(f"load {found.load_1min}; measured in {time.perf_counter() - begun:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
