"""One interface for real and played machines."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from whaleflux.fleet.model import Node

GpuMemory = Mapping[str, Mapping[int, int]]
"""By GPU UUID: bytes by pid."""


@dataclass(frozen=True, slots=True)
class MachineCondition:
    """Something that is wrong with the machine beside its single GPUs."""

    type: str  # CamelCase, what does not hold: "DriverWorks"
    reason: str  # UPPER_SNAKE
    message: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found. `node` has no place in the tree yet: that is the operator's to say."""

    node: Node
    driver_version: str  # "simulated" for profiles, "" where no driver answered
    conditions: tuple[MachineCondition, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """Something that the driver reported of one GPU. `gpu_index` is -1 where it does not say of which."""

    kind: str  # "XID", "GPU_LOST"
    gpu_index: int
    code: int
    detail: str


class DevicesUnreadable(Exception):
    """The driver did not answer, or not in time; the text says what was asked."""


class DeviceSource(Protocol):
    """Where the facts about the machine come from."""

    async def read(self, name: str) -> Machine:
        """What is there now, as node `name` (sites/{site}/nodes/{node}); what cannot be read is in it, with its reason."""
        ...

    async def computing(self, gpu_uuids: Collection[str]) -> frozenset[int]:
        """Pids of the processes with work on these GPUs, as the driver numbers them. Raises DevicesUnreadable.

        A driver that does not offer the question gives none; one that does not answer it raises.
        """
        ...

    async def memory_used(self, gpu_uuids: Collection[str]) -> GpuMemory:
        """What each process with work on these GPUs has of their memory. Raises DevicesUnreadable.

        Where the driver does not say how much a process has, the process is left out.
        """
        ...

    async def next_events(self) -> list[GpuEvent]:
        """Waits for events, at most a minute; may be empty. It never returns at once twice in a row."""
        ...

    async def close(self) -> None:
        """Frees the driver."""
        ...
