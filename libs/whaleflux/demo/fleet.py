"""A simulated hybrid fleet: real agent processes that play the profiles of machines, in three sites."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from whaleflux import names
from whaleflux.context import Context
from whaleflux.embedded.processes import forget_secrets, shims_below, with_variables
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import inventory_pb2


@dataclass(frozen=True, slots=True)
class Machine:
    """One simulated node: where it stands and whose profile its agent plays."""

    site: str
    node: str
    profile: str
    labels: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()  # further ones of its agent

    @property
    def name(self) -> str:
        return names.node(self.site, self.node)


FLEET = (
    Machine("onprem", "h200-a", "h200x8"),
    Machine("onprem", "h200-b", "h200x8"),
    Machine("cloud", "a100-a", "a100x8"),
    Machine("edge", "rtx-a", "rtx4090x2"),
    Machine("edge", "rtx-b", "rtx4090x2"),
)


def gpu_of_profile(profile: str) -> str:
    """The catalogue name of a machine's GPUs."""
    found = CATALOGUE.profile(profile)
    assert found is not None, profile
    return found[0].name


@dataclass(slots=True)
class DemoFleet:
    """Agents that this process started; all of them are ended by `stop`, by pid, with what they run."""

    state: Path
    context: Context
    otlp_endpoint: str = ""
    agents: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    async def join(self, client: AsyncClient, machines: Sequence[Machine]) -> None:
        """A token and an agent process for each machine."""
        for machine in machines:
            token = await client.inventory.CreateJoinToken(
                inventory_pb2.CreateJoinTokenRequest(site=names.site(machine.site), ttl_s=600), timeout=10
            )
            self.agents[machine.name] = self._start(machine, token.secret)

    def restart(self, machine: Machine) -> None:
        """Starts the agent of a machine anew, under the identity that it has."""
        self.agents[machine.name] = self._start(machine, token="")

    def kill_node(self, name: str) -> list[int]:
        """What a power cut does to a machine: SIGKILL to its agent and to everything that it runs, at once."""
        process = self.agents.pop(name)
        pids = {process.pid, *self.processes_on(name)}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        return sorted(pids)

    def processes_on(self, name: str) -> list[int]:
        """Pids of a machine's ranks and of their parents; of this fleet alone, others may use the same names."""
        return [*with_variables(f"WHALEFLUX_NODE={name}", self._mark()), *shims_below(self.folder(name))]

    def processes_of_job(self, job: str) -> list[int]:
        """Pids of a job's ranks, on this fleet alone."""
        return with_variables(f"WHALEFLUX_JOB={job}", self._mark())

    def _mark(self) -> str:
        return f"WHALEFLUX_CHECKPOINT_LOCATION={self.state}/"

    def stop(self) -> None:
        """Ends all agents and whatever tasks are left of this fleet."""
        for process in self.agents.values():
            process.terminate()
        for process in self.agents.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.kill()
        for pid in {*with_variables(self._mark()), *shims_below(self.state / "agents")}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        forget_secrets(self.state / "agents")

    def folder(self, name: str) -> Path:
        """Where the agent of that machine keeps its state."""
        _, site, _, node = name.split("/")
        return self.state / "agents" / f"{site}-{node}"

    def _start(self, machine: Machine, token: str) -> subprocess.Popen[bytes]:
        folder = self.folder(machine.name)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "server": self.context.server,
            "server_name": self.context.server_name,
            "ca_file": self.context.ca,
            "join_token": token,
            "node_id": machine.node,
            "site": machine.site,
            "profile": machine.profile,
            "state_dir": str(folder),
            "checkpoint_root": str(self.state / "checkpoints"),  # one folder that all nodes reach, as a shared mount
            "otlp_endpoint": self.otlp_endpoint,
            **dict(machine.settings),
        }
        variables = {f"WHALEFLUX_{key.upper()}": value for key, value in settings.items() if value}
        with (folder / "agent.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "whaleflux_agent"],
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
