"""Workers leave a Ray cluster while tasks come: a thousand scale-downs, and whether any task failed.

Some leave because they were idle, some because they were told to go while they work. All of it is decided by the worker's own program
(`whaleflux.ray_cluster.worker`). The first `--real` of them leave a real Ray cluster (`make ray`; simulated GPUs), in which a program submits tasks that Ray tries once only;
nodes start slowly, so the others leave a model of a raylet that answers as a real one was seen to: it lets an idle node go and refuses a busy one, lets a
preempted one finish what runs, and work comes in the moment between the look and the question. What is told to go has its notice; a task that takes longer
than the notice is lost, and is not among these.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from benchmarks.common import ROOT, Options, Report, Row, Target, main
from whaleflux.ray_cluster import worker

ALL, REAL, QUICK_ALL, QUICK_REAL = 1_000, 12, 60, 2
AT_ONCE, TOLD, IDLE_S, GRACE_S = 3, 0.25, 1.0, 60.0  # real workers at one time; the share that is told to go
START_S = 240.0  # for a head, and for a worker's whole life, on a busy host
MODEL_IDLE_S, MODEL_LOOK_S = 0.03, 0.01
RUNNING, DRAINING = 1, 4  # NodeStatus of Ray


@dataclass(slots=True)
class Found:
    """How workers went, and what became of the tasks."""

    left: Counter[str] = field(default_factory=Counter)
    done: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    refused: int = 0  # drains that the raylet refused because work had come

    @property
    def scale_downs(self) -> int:
        return self.left["idle"] + self.left["told to go"]

    @property
    def not_joined(self) -> int:
        """Workers whose node never came up: Ray gives up on it after half a minute on a busy host."""
        return self.left[f"exit {worker.JOINS_NOT}"]

    @property
    def otherwise(self) -> int:
        return self.left.total() - self.scale_downs - self.not_joined


def measure(options: Options) -> Report:
    real_wanted = 0 if not options.extra.ray_python.exists() else QUICK_REAL if options.quick else options.extra.real
    if not options.extra.ray_python.exists():
        print(f"{options.extra.ray_python} is not there: no real Ray; make it with: make ray", file=sys.stderr)
    real = _real(options, real_wanted) if real_wanted else Found()
    model = _modelled(options.seed, (QUICK_ALL if options.quick else ALL) - real.scale_downs)
    both = (real, model)
    targets = [
        Target(
            "scale_downs",
            sum(one.scale_downs for one in both),
            QUICK_ALL if options.quick else ALL,
            "scale-downs",
            better="higher",
        ),
        Target("tasks_that_failed", sum(one.failed.total() for one in both), 0, "tasks"),
        Target("workers_that_ended_otherwise", sum(one.otherwise for one in both), 0, "workers"),
    ]
    return Report(
        rows=[_row("real Ray", real), _row("model of a raylet", model)],
        targets=targets,
        simulated=f"GPUs; and of these scale-downs the raylets of {model.scale_downs}, as the table says",
    )


def _row(who: str, found: Found) -> Row:
    return {
        "raylets": who,
        "left_idle": found.left["idle"],
        "told_to_go": found.left["told to go"],
        "did_not_join": found.not_joined,
        "ended_otherwise": found.otherwise,
        "drains_refused": found.refused,
        "tasks_done": found.done,
        "tasks_failed": found.failed.total(),
    }


# real Ray


def _real(options: Options, wanted: int) -> Found:
    found, folder = Found(), Path(tempfile.mkdtemp(prefix="rd"))  # Ray's sockets need a short path
    python = options.extra.ray_python
    try:
        with _head(python, folder) as address, _program(python, address, options.seed) as program:
            _leave(python, address, folder, wanted, random.Random(options.seed), program, found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


@contextlib.contextmanager
def _head(python: Path, folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        python.with_name("ray"), "start", "--head", f"--port={port}", "--num-cpus=0", "--num-gpus=0", "--include-dashboard=false", "--block",
        f"--temp-dir={folder}", "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", "--object-store-memory=80000000",
        "--dashboard-agent-listen-port=0",
    ]  # fmt: skip
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        worker.end(head)


@contextlib.contextmanager
def _program(python: Path, address: str, seed: int) -> Iterator[subprocess.Popen[str]]:
    """Submits tasks until its input ends."""
    until, program = time.monotonic() + START_S, _started_program(python, address, seed)
    while program.stdout is None or program.stdout.readline().strip() != "ready":
        program.wait(60)
        if time.monotonic() > until:
            raise RuntimeError(f"no program could join the Ray cluster at {address} within {START_S:g} s")
        time.sleep(1)
        program = _started_program(python, address, seed)
    try:
        yield program
    finally:
        program.kill()
        program.wait(60)


def _started_program(python: Path, address: str, seed: int) -> subprocess.Popen[str]:
    script, pipe = str(Path(__file__).with_name("ray_drain_program.py")), subprocess.PIPE
    return subprocess.Popen(
        [str(python), script, address, str(seed)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    log: Path
    tell_at: float
    told: bool = False


def _leave(
    python: Path,
    address: str,
    folder: Path,
    wanted: int,
    draw: random.Random,
    program: subprocess.Popen[str],
    found: Found,
) -> None:
    """Keeps a few workers in the cluster until so many have left, and then until the program has what it waits for."""
    running, number = list[_Running](), 0
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        while program.poll() is None:
            while len(running) < AT_ONCE:
                number += 1
                tell_s = draw.uniform(20.0, 40.0) if draw.random() < TOLD else START_S
                running.append(_worker(python, address, folder / f"w{number}.log", number, tell_s))
            running = [one for one in running if not _has_left(one, found)]
            if found.scale_downs >= wanted and not program.stdin.closed:
                program.stdin.close()
            if found.left.total() > 3 * wanted + 10:
                raise RuntimeError(f"workers do not join: {dict(found.left)}")
            time.sleep(0.2)
        lines = [line for line in program.stdout.read().splitlines() if line.startswith("{")]  # Ray prints there, too
        said = json.loads(lines[-1]) if lines else {}
        found.done, found.failed = said.get("done", 0), Counter(said.get("failed", {"the program": 1}))
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait(120)


def _worker(python: Path, address: str, log: Path, number: int, tell_s: float) -> _Running:
    environment = {**os.environ, "WHALEFLUX_JOB": f"queues/q/jobs/w{number}", "WHALEFLUX_EPOCH": "1"}
    words = [str(python), str(worker.__file__), f"--address={address}", "--gpus=1", "--cpus=1", "--gpu-memory-mib=1024", "--gpu-type=H200",
             "--site=onprem", f"--idle-s={IDLE_S}", f"--grace-s={GRACE_S}"]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out)
    return _Running(process, log, time.monotonic() + tell_s)


def _has_left(one: _Running, found: Found) -> bool:
    if one.process.poll() is None:
        if not one.told and time.monotonic() >= one.tell_at:
            one.process.send_signal(signal.SIGTERM)
            one.told = True
        return False
    said = one.log.read_text(errors="replace")
    found.refused += said.count("stays: ")
    how = "idle" if "leaves: idle" in said else "told to go" if one.told else "otherwise"
    found.left[how if one.process.returncode == 0 else f"exit {one.process.returncode}"] += 1
    return True


# a model of a raylet


class Raylet:
    """A node with one GPU, tasks that come at any time, and answers as a real raylet gives them."""

    def __init__(self, draw: random.Random, found: Found, lock: threading.Lock) -> None:
        self._draw, self._found, self._count = draw, found, lock
        self._lock, self._over = threading.Lock(), threading.Event()
        self._busy, self._draining, self._dead, self._idle_at = False, False, False, time.monotonic()
        self._tasks = threading.Thread(target=self._work)
        self._tasks.start()

    def _work(self) -> None:
        """Tasks, one after another, as long as Ray sends some here."""
        while not self._over.wait(self._draw.uniform(0.0, 1.4 * MODEL_IDLE_S)):
            with self._lock:
                if self._draining or self._dead:
                    return  # it is sent elsewhere
                self._busy = True
            self._over.wait(self._draw.uniform(0.0, 2 * MODEL_IDLE_S))
            with self._lock:
                killed, self._busy, self._idle_at = self._dead, False, time.monotonic()
                self._dead = self._dead or self._draining
            with self._count:
                self._found.done += not killed
                self._found.failed["its node was gone"] += killed

    def state(self) -> SimpleNamespace:
        """As the GCS tells it."""
        with self._lock:
            status = (
                worker.DEAD_STATUS
                if self._dead
                else DRAINING
                if self._draining
                else RUNNING
                if self._busy
                else worker.IDLE_STATUS
            )
            idle_ms = 0 if self._busy else (time.monotonic() - self._idle_at) * 1000
            return SimpleNamespace(status=status, idle_duration_ms=idle_ms)

    def drain(self, state: object, reason: int, words: str, within_s: float) -> bool:
        """An idle node ends at once, a busy one stays or, preempted, ends after what runs. Work may come before the question arrives."""
        time.sleep(self._draw.uniform(0.0, MODEL_LOOK_S))
        with self._lock:
            if reason == worker.IDLE and self._busy:
                with self._count:
                    self._found.refused += 1
                return False
            self._draining = True
            self._dead = self._dead or not self._busy
            return True

    def poll(self) -> int | None:
        """Of the process `ray start`."""
        return 0 if self._dead else None

    returncode = 0
    cluster = SimpleNamespace(cluster_resource_constraints=(), node_states=())

    def is_wanted(self) -> bool:
        """Now and then others wait for its GPU."""
        return self._draw.random() < 0.1

    def kill(self) -> None:
        """The worker has ended it."""
        with self._lock:
            self._dead = True
        self._over.set()
        self._tasks.join()


def _modelled(seed: int, wanted: int) -> Found:
    """Workers' lives, thirty times as fast as real ones."""
    found, lock, look_s = Found(), threading.Lock(), worker.LOOK_S
    worker.LOOK_S = MODEL_LOOK_S
    try:
        with ThreadPoolExecutor(8) as threads, contextlib.redirect_stdout(io.StringIO()):
            lives = (random.Random(seed * 100_003 + n) for n in range(max(0, wanted)))
            found.left.update(threads.map(lambda draw: _one_life(draw, found, lock), lives))
    finally:
        worker.LOOK_S = look_s
    return found


def _one_life(draw: random.Random, found: Found, lock: threading.Lock) -> str:
    """One worker, from its node's start to its end."""
    raylet, asked = Raylet(draw, found, lock), argparse.Namespace(idle_s=MODEL_IDLE_S, grace_s=GRACE_S)
    one = worker.Worker(asked)
    told = draw.random() < TOLD
    telling = threading.Timer(draw.uniform(0.0, 20 * MODEL_IDLE_S) if told else START_S, one.stop)
    telling.start()
    try:
        code = one.watch(raylet, raylet, time.monotonic() + START_S)
    finally:
        was_told = not telling.is_alive()
        telling.cancel()
        raylet.kill()
    return f"exit {code}" if code else "told to go" if was_told else "idle"


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray-python", type=Path, default=ROOT / ".venv-ray" / "bin" / "python", help="an interpreter that has Ray"
    )
    parser.add_argument(
        "--real", type=int, default=REAL, help="how many scale-downs of a real cluster; each takes seconds"
    )


if __name__ == "__main__":
    sys.exit(main("ray_drain", measure, add_arguments=options_of))
