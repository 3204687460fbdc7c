"""A suite of its own for a demo: started, waited for, ended; and who tells what happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from whaleflux.context import Context
from whaleflux.demo.fleet import DemoFleet, Machine
from whaleflux.embedded.layout import Layout, running_pid
from whaleflux.embedded.supervisor import end_with_parent
from whaleflux.errors import FailedPrecondition, Unavailable
from whaleflux.foreign_text import in_one_line
from whaleflux.sdk.client import AsyncClient
from whaleflux.services import ROLES
from whaleflux.v1 import health_pb2

T = TypeVar("T")


class Teller:
    """Lines with the time since the start, on stdout."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, line: str) -> None:
        print(in_one_line(f"{time.monotonic() - self._began:6.1f} s  {line}"), flush=True)


@contextlib.contextmanager
def running_suite(
    state: Path,
    say: Callable[[str], None],
    *,
    keep: bool,
    otlp_endpoint: str = "",
    settings: Mapping[str, str] | None = None,
) -> Iterator[DemoFleet]:
    """A fleet without machines on a suite of its own in the folder `state`; both end with the block, unless they are kept.

    Raises FailedPrecondition while one that was kept still runs, Unavailable when the suite does not start.
    """
    _fresh_state(state)
    suite = _start_suite(state, keep, otlp_endpoint, settings or {})
    fleet = DemoFleet(state, Context("", "", "", ""), otlp_endpoint)
    try:
        fleet.context = _wait_for_context(suite, state, say)
        yield fleet
        if keep:
            _say_kept(fleet, state)
    finally:
        if not keep:
            fleet.stop()
            suite.terminate()
            suite.wait(timeout=60)


async def within(what: Awaitable[T], timeout_s: float, named: str) -> T:
    """Its result; raises Unavailable saying what never came."""
    try:
        return await asyncio.wait_for(what, timeout_s)
    except TimeoutError:
        raise Unavailable(f"waited {timeout_s:g} s in vain for {named}; logs are under the state folder") from None


def _fresh_state(state: Path) -> None:
    """A demo starts from nothing. Raises FailedPrecondition while one that was kept still runs."""
    if (pid := running_pid(Layout(state))) is not None:
        raise FailedPrecondition(
            f"a demo that was kept still runs (pid {pid}); stop it with: whaleflux down --state {state}"
        )
    if state.exists():
        shutil.rmtree(state)
    state.mkdir(parents=True, exist_ok=True)


def _start_suite(state: Path, keep: bool, otlp_endpoint: str, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """`whaleflux up`; `settings` as variables of its environment. A killed demo leaves no suite behind unless it is kept."""
    argv = [sys.executable, "-m", "whaleflux.cli", "up", "--no-register", "--state", str(state)]
    if otlp_endpoint:
        argv += ["--otlp-endpoint", otlp_endpoint]
    with (state / "up.log").open("ab") as log:
        return subprocess.Popen(
            argv,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=None if keep else end_with_parent,  # noqa: PLW1509 - no threads yet
        )


def _wait_for_context(suite: subprocess.Popen[bytes], state: Path, say: Callable[[str], None]) -> Context:
    """Raises Unavailable with the end of its log when the suite does not start within two minutes."""
    say("START etcd, NATS, Envoy, " + ", ".join(ROLES))
    deadline = time.monotonic() + 120
    while not (state / "context.json").exists():
        if suite.poll() is not None or time.monotonic() > deadline:
            raise Unavailable(f"the suite did not start:\n{(state / 'up.log').read_text()[-2000:]}")
        time.sleep(0.05)
    return Context.load(state / "context.json")


async def join(client: AsyncClient, fleet: DemoFleet, machines: Sequence[Machine], say: Callable[[str], None]) -> None:
    """Starts the machines' agents and waits until all are READY."""
    say(
        f"JOIN  {len(machines)} simulated nodes in {len({m.site for m in machines})} sites: "
        + ", ".join(f"{m.name} ({m.profile})" for m in machines)
    )
    await fleet.join(client, machines)
    ready: set[str] = set()
    async with asyncio.timeout(60):
        while len(ready) < len(machines):
            listed = await client.health.ListNodeHealth(health_pb2.ListNodeHealthRequest(), timeout=10)
            ready = {n.name for n in listed.node_health if n.phase == health_pb2.NODE_PHASE_READY}
            await asyncio.sleep(0.1)
    say(f"      all {len(ready)} nodes are READY")


def _say_kept(fleet: DemoFleet, state: Path) -> None:
    """How to look around in what was left running, and how to stop it."""
    print(
        f"\nEverything still runs. Look around with: export WHALEFLUX_CONTEXT={state / 'context.json'}; whaleflux status"
    )
    pids = " ".join(str(process.pid) for process in fleet.agents.values())
    print(f"Stop it with: kill {pids}; whaleflux down --state {state}")
