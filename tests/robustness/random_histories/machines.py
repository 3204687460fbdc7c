"""Three machines of four GPUs each: agents that can be stopped, killed, renamed, and whose GPUs get lost or change their order."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.suite import RunningSuite
from whaleflux.embedded.processes import with_variables
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import inventory_pb2

GPUS = 4


@dataclass(slots=True)
class Machine:
    """One physical machine; `node` is the name that its agent has at present."""

    suite: RunningSuite
    site: str
    id: str
    agent: subprocess.Popen[bytes] | None = None
    alias: str = ""
    lost: set[str] = field(default_factory=set)
    turned: int = 0  # by how many places the GPUs are numbered otherwise

    @property
    def node_id(self) -> str:
        return self.alias or self.id

    @property
    def node(self) -> str:
        return f"sites/{self.site}/nodes/{self.node_id}"

    @property
    def gpus(self) -> list[str]:
        found = [f"GPU-{self.id}-0000-0000-0000-{index:012d}" for index in range(GPUS)]
        return found[self.turned :] + found[: self.turned]

    @property
    def _hardware(self) -> Path:
        return self.suite.state / f"hardware-{self.id}.json"

    def _folder(self) -> Path:
        return self.suite.state / "agents" / f"{self.site}-{self.node_id}"

    def write_hardware(self) -> None:
        part = self._hardware.with_suffix(".part")
        part.write_text(json.dumps({"gpus": self.gpus, "lost": sorted(self.lost)}))
        part.replace(self._hardware)

    async def start(self, client: AsyncClient) -> None:
        """An agent under the present name, joined when this name never was."""
        if self.agent is not None and self.agent.poll() is None:
            return
        self.write_hardware()
        folder = self._folder()
        token = ""
        if not folder.exists():
            request = inventory_pb2.CreateJoinTokenRequest(site=f"sites/{self.site}", ttl_s=600)
            token = (await client.inventory.CreateJoinToken(request, timeout=10)).secret
            folder.mkdir(parents=True)
        context = self.suite.context
        settings = {
            "server": context.server,
            "server_name": context.server_name,
            "ca_file": context.ca,
            "join_token": token,
            "node_id": self.node_id,
            "site": self.site,
            "state_dir": str(folder),
            "checkpoint_root": str(self.suite.state / "mount" / "checkpoints"),
        }
        variables = {f"WHALEFLUX_{key.upper()}": value for key, value in settings.items() if value}
        self._run({**os.environ, **variables})

    def _run(self, environment: dict[str, str]) -> None:
        with (self.suite.state / f"agent-{self.node_id}.log").open("ab") as log:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "tests.support.nvml_agent", str(self._hardware)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def end(self, number: signal.Signals) -> bool:
        """Ends the agent alone; its ranks live on. False when it was not running."""
        if self.agent is None or self.agent.poll() is not None:
            return False
        self.agent.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.agent.wait(15)
        self.agent.kill()
        self.agent.wait()
        return True

    def pause(self) -> bool:
        if self.agent is None or self.agent.poll() is not None:
            return False
        self.agent.send_signal(signal.SIGSTOP)
        return True

    def go_on(self) -> None:
        if self.agent is not None and self.agent.poll() is None:
            self.agent.send_signal(signal.SIGCONT)

    def power_cut(self) -> None:
        """The agent and everything that this machine runs, at once."""
        pids = {*self.ranks(), *([self.agent.pid] if self.agent and self.agent.poll() is None else [])}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.agent is not None:
            self.agent.wait()

    def leave_alias(self) -> None:
        """Its own name again. What ran under the other ends with it: its agent never comes back, and a rank that saves waits for that."""
        if self.alias:
            left = with_variables(f"WHALEFLUX_NODE={self.node}", f"WHALEFLUX_CHECKPOINT_LOCATION={self.suite.state}/")
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.alias = ""

    def ranks(self) -> set[int]:
        """Pids of the tasks of this machine under any of its names, their shims among them."""
        names = {f"sites/{self.site}/nodes/{self.id}", self.node}
        below = f"WHALEFLUX_CHECKPOINT_LOCATION={self.suite.state}/"
        return {pid for name in names for pid in with_variables(f"WHALEFLUX_NODE={name}", below)}


class Mount:
    """The folder that all nodes reach, and what is there when it is not mounted."""

    def __init__(self, state: Path) -> None:
        self._at, self._away = state / "mount", state / "mount.away"
        (self._at / "checkpoints").mkdir(parents=True)

    @property
    def there(self) -> bool:
        return not self._away.exists()

    def vanish(self, *, leave_empty: bool) -> None:
        """An unmounted file system leaves an empty mount point, or an automounter leaves nothing."""
        if self.there:
            self._at.rename(self._away)
            if leave_empty:
                self._at.mkdir()

    def come_back(self) -> None:
        while not self.there:
            # What was written into the mount point is covered by the mount; a rank may write there at this very instant.
            shutil.rmtree(self._at, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._away.rename(self._at)
