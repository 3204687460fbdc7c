"""The whole suite as users start it (`whaleflux up`) with agents as processes, for tests that break it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path

from whaleflux.context import Context
from whaleflux.demo.fleet import DemoFleet, Machine
from whaleflux.embedded.layout import Layout
from whaleflux.embedded.processes import with_variables
from whaleflux.errors import StatusError
from whaleflux.sdk.client import AsyncClient
from whaleflux.store.etcd import EtcdStore
from whaleflux.v1 import health_pb2

READY_S = 120.0  # on two busy cores; an idle machine takes ten seconds
PORT_OF = {"envoy": "frontdoor"}


class RunningSuite:
    """Pids, ports and the client's context of a suite that is up."""

    def __init__(self, state: Path, otlp_endpoint: str = "", settings: Mapping[str, str] | None = None) -> None:
        self.state = state
        self._otlp_endpoint, self._settings = otlp_endpoint, settings or {}
        self.process = self._up()
        self.context = self._ready()
        self.fleet = DemoFleet(state, self.context, otlp_endpoint)

    def _up(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "whaleflux.cli", "up", "--no-register", "--state", str(self.state)]
        if self._otlp_endpoint:
            argv += ["--otlp-endpoint", self._otlp_endpoint]
        # These tests lose more than half of a small fleet within minutes; the breaker against that has tests of its own.
        environment = {**os.environ, "WHALEFLUX_BREAKER_SHARE": "1", **self._settings}
        with (self.state / "up.log").open("ab") as log:
            return subprocess.Popen(
                argv, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _ready(self) -> Context:
        deadline = time.monotonic() + READY_S
        while not self.context_file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                words = (self.state / "up.log").read_text()[-3000:]
                self.stop()
                raise AssertionError(f"the suite did not start:\n{words}")
            time.sleep(0.05)
        return Context.load(self.context_file)

    @property
    def context_file(self) -> Path:
        return self.state / "context.json"

    def client(self) -> AsyncClient:
        return AsyncClient.from_context(self.context_file)

    def pid(self, name: str) -> int:
        """Pid of a part ("scheduler", "etcd", ...), as its supervisor last wrote it."""
        return int((self.state / "run" / f"{name}.pid").read_text())

    def port(self, name: str) -> int:
        import json

        return int(json.loads((self.state / "ports.json").read_text())[PORT_OF.get(name, name)])

    def store(self) -> EtcdStore:
        """Its etcd, as one of its services sees it."""
        return EtcdStore([f"127.0.0.1:{self.port('etcd')}"], tls=Layout(self.state).store_tls("inventory"))

    def send(self, name: str, number: signal.Signals) -> int:
        """Sends a signal to one part by its pid; returns the pid."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def listens(self, name: str) -> bool:
        """Whether somebody accepts connections on the part's port."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port(name)), timeout=0.5):
            return True
        return False

    async def join(self, machines: Sequence[Machine]) -> None:
        """Starts an agent for each machine and waits until all are READY."""
        async with self.client() as client:
            await self.fleet.join(client, machines)
            names = {machine.name for machine in machines}
            await until(lambda: ready_nodes(client, names), f"{len(names)} nodes READY", 120)

    def stop_control_plane(self) -> None:
        """What `up` started; agents and their tasks run on."""
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def start_control_plane(self) -> None:
        """The same state on the same ports."""
        self.context_file.unlink(missing_ok=True)
        self.process = self._up()
        self.context = self._ready()

    def stop(self) -> None:
        """Ends agents, their tasks and the suite, by pid; kills what does not end."""
        if hasattr(self, "fleet"):
            self.fleet.stop()
        self.stop_control_plane()
        for pid in self._left_over():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left_over(self) -> set[int]:
        """Services, agents and ranks that name this state folder in their environment."""
        marks = ("WHALEFLUX_PORT_FILE", "WHALEFLUX_STATE_DIR", "WHALEFLUX_AGENT_SOCKET")
        return {pid for mark in marks for pid in with_variables(f"{mark}={self.state}")}


@contextlib.contextmanager
def state_folder() -> Iterator[Path]:
    """A short path, since sockets lie below it; kept when KEEP_TEST_STATE is set."""
    folder = Path(tempfile.mkdtemp(prefix="wf-"))
    try:
        yield folder
    finally:
        if not os.environ.get("KEEP_TEST_STATE"):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_suite(otlp_endpoint: str = "", settings: Mapping[str, str] | None = None) -> Iterator[RunningSuite]:
    """A suite for the length of the block, on free ports, with its state in a fresh folder."""
    with state_folder() as state:
        suite = RunningSuite(state, otlp_endpoint, settings)
        try:
            yield suite
        finally:
            suite.stop()


async def ready_nodes(client: AsyncClient, names: set[str]) -> bool:
    """Whether all of these nodes are READY."""
    listed = await client.health.ListNodeHealth(health_pb2.ListNodeHealthRequest(), timeout=2)
    return names <= {n.name for n in listed.node_health if n.phase == health_pb2.NODE_PHASE_READY}


async def until(
    true: Callable[[], Awaitable[object]] | Callable[[], object], what: str, timeout_s: float, every_s: float = 0.05
) -> float:
    """Polls until `true`; an error counts as not yet. Returns the seconds it took, fails with `what` after the limit."""
    began = time.monotonic()
    last: object = None
    while True:
        try:
            found = true()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return time.monotonic() - began
        except StatusError as error:
            last = error
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:g} s: {what}; last error: {last!r}"
        await asyncio.sleep(every_s)
