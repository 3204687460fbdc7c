"""A suite with its machines that many histories use one after another, and how it is made whole between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.robustness.random_histories.machines import Machine, Mount
from tests.support.suite import RunningSuite, ready_nodes, state_folder, until
from whaleflux.embedded.layout import Layout
from whaleflux.errors import StatusError
from whaleflux.sdk.client import AsyncClient
from whaleflux.store.etcd import EtcdStore
from whaleflux.v1 import health_pb2, inventory_pb2, scheduler_pb2

END_S = 5.0
WHOLE_S = 90.0
ENDED = frozenset(
    {scheduler_pb2.JOB_STATE_SUCCEEDED, scheduler_pb2.JOB_STATE_FAILED, scheduler_pb2.JOB_STATE_CANCELLED}
)


@dataclass
class World:
    """`timeline` counts restored backups: what was acknowledged after the backup is gone then, by intent."""

    suite: RunningSuite
    machines: list[Machine] = field(default_factory=list)
    mount: Mount = field(init=False)
    timeline: int = 0
    broken: bool = False  # a history left it in a state that is no fair start for the next

    def __post_init__(self) -> None:
        self.mount = Mount(self.suite.state)
        self.machines = [Machine(self.suite, site, name) for site, name in (("x", "a"), ("x", "b"), ("y", "c"))]
        (self.suite.state / "jobs").mkdir()

    @property
    def state(self) -> Path:
        return self.suite.state

    @property
    def journal_file(self) -> Path:
        return self.state / "jobs" / "journal"

    def journal(self, after: int = 0) -> list[dict[str, Any]]:
        """What the ranks wrote from byte `after` on; a last line without its end is not there yet."""
        if not self.journal_file.exists():
            return []
        text = self.journal_file.read_bytes()[after:]
        return [json.loads(line) for line in text.split(b"\n")[:-1]]

    @property
    def _etcd_files(self) -> Path:
        return Layout(self.state).data("etcd")

    def store(self) -> EtcdStore:
        return self.suite.store()

    async def make_whole(self, client: AsyncClient) -> str:
        """Every machine as it was built, its agent running and READY; "" or what is missing after `WHOLE_S`."""
        self.mount.come_back()
        for machine in self.machines:
            machine.lost.clear()
            if machine.alias or machine.turned:
                machine.end(signal.SIGTERM)
                machine.leave_alias()
                machine.turned = 0
            machine.go_on()
            machine.write_hardware()
        try:
            async with asyncio.timeout(WHOLE_S):
                await retried(lambda: self._start_all(client))
            await until(lambda: ready_nodes(client, {m.node for m in self.machines}), "all nodes READY", WHOLE_S, 0.2)
        except (AssertionError, TimeoutError) as never:
            return f"{str(never) or 'agents did not start'}; {await self._not_ready(client)}"
        return ""

    async def _not_ready(self, client: AsyncClient) -> str:
        """What health says of each machine that is not READY, and whether its agent runs."""
        try:
            listed = await client.health.ListNodeHealth(health_pb2.ListNodeHealthRequest(), timeout=5)
        except StatusError as error:
            return f"health does not say why: {error}"
        said = {n.name: n for n in listed.node_health if n.phase != health_pb2.NODE_PHASE_READY}
        return "; ".join(
            f"{machine.node} (agent {'runs' if machine.agent and machine.agent.poll() is None else 'does not run'}): "
            + " ".join(str(said[machine.node]).split())
            for machine in self.machines
            if machine.node in said
        )

    async def _start_all(self, client: AsyncClient) -> None:
        for machine in self.machines:
            await machine.start(client)

    async def retire_aliases(self, client: AsyncClient) -> None:
        """Names that machines had for a while, and have no more, are said to be gone for good, as an operator would."""
        listed = await client.inventory.ListNodes(inventory_pb2.ListNodesRequest(page_size=100), timeout=10)
        for node in listed.nodes:
            if node.name not in {machine.node for machine in self.machines}:
                with contextlib.suppress(StatusError):
                    await client.inventory.RetireNode(inventory_pb2.RetireNodeRequest(name=node.name), timeout=10)

    def back_up(self) -> Path:
        """A copy of etcd's files as of one instant: what a snapshot of its disk is."""
        copy = self.state / "backup"
        shutil.rmtree(copy, ignore_errors=True)
        pid = self.suite.send("etcd", signal.SIGSTOP)
        try:
            shutil.copytree(self._etcd_files, copy)
        finally:
            os.kill(pid, signal.SIGCONT)
        return copy

    def restore(self, copy: Path) -> None:
        """As docs tell operators: the control plane is stopped, etcd's files are replaced, all is started again."""
        self.suite.stop_control_plane()
        shutil.rmtree(self._etcd_files)
        shutil.copytree(copy, self._etcd_files)
        self.suite.start_control_plane()
        self.timeline += 1

    def stop(self) -> None:
        """Ends all of it; fails when a machine without its agent, or the suite that was asked to end, leaves a process behind."""
        for machine in self.machines:
            machine.go_on()
            machine.power_cut()
        self.suite.stop_control_plane()
        left = self._left_over()
        self.suite.stop()
        assert not left, f"processes outlived their world: {left}"

    def _left_over(self) -> dict[int, str]:
        """Command lines of the processes that name this folder in their environment and do not end within `END_S`."""
        deadline = time.monotonic() + END_S
        while (left := with_value(f"{self.state}")) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


async def retried(work: Callable[[], Awaitable[None]], pause_s: float = 0.2) -> None:
    """Until it goes through: services come and go while histories run."""
    while True:
        try:
            await work()
        except StatusError:
            await asyncio.sleep(pause_s)
        else:
            return


def with_value(start: str) -> dict[int, str]:
    """Command lines of the processes that have a variable whose value begins so."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ends meanwhile
            if f"={start}".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


@contextlib.contextmanager
def new_world() -> Iterator[World]:
    with state_folder() as state:
        # a job whose every node failed it, and one whose machine went away under another name, wait so long
        world = World(RunningSuite(state, settings={"WHALEFLUX_AVOID_S": "3", "WHALEFLUX_RESTART_S": "15"}))
        try:
            yield world
        finally:
            world.stop()
