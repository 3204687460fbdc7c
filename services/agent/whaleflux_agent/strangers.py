"""Processes that bear this node's name and the token of no task that its agent knows: the record of their task was damaged.

They cannot be proven to be the agent's own, so they are left alone; but nobody else gets the GPUs that they were given.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from whaleflux_agent.core.environment import SHARE_VARIABLE
from whaleflux_agent.core.work import ActualTask, Stage
from whaleflux_agent.runtime import procfs
from whaleflux_agent.runtime.procfs import Process


@dataclass(frozen=True, slots=True)
class Stranger:
    """One such process, and what it was bound to when it began."""

    process: Process
    gpu_uuids: tuple[str, ...]
    share_bytes: int = 0

    @property
    def actual(self) -> ActualTask:
        """As a task that is not this agent's to stop, and whose GPUs are taken."""
        return ActualTask(f"process {self.process.pid}", "", 0, self.gpu_uuids, Stage.STOPPING, self.share_bytes)


def find_strangers(node: str, tokens: Collection[str]) -> list[Stranger]:
    """Living processes of `node` with a token that is not in `tokens`. Blocks: reads all of /proc."""
    found = [(process, _variables(process)) for process in procfs.find("WHALEFLUX_NODE", node)]
    return [
        Stranger(
            process,
            tuple(filter(None, variables.get("CUDA_VISIBLE_DEVICES", "").split(","))),
            _bytes(variables.get(SHARE_VARIABLE, "")),
        )
        for process, variables in found
        if variables.get(procfs.TASK_TOKEN) and variables[procfs.TASK_TOKEN] not in tokens
    ]


def _bytes(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _variables(process: Process) -> dict[str, str]:
    entries = (entry.decode("utf-8", "replace").partition("=") for entry in procfs.environment(process.pid))
    return {name: value for name, _, value in entries}
