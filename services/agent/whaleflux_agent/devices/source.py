"""One interface for real and played machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from whaleflux.fleet.model import Node


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found. `node` has no place in the tree yet: that is the operator's to say."""

    node: Node
    driver_version: str  # "simulated" for profiles


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """Something that the driver reported of one GPU."""

    kind: str  # "XID", "GPU_LOST"
    gpu_index: int
    code: int
    detail: str


class DevicesUnreadable(Exception):
    """The driver did not answer, or not in time; the text says what was asked."""


class DeviceSource(Protocol):
    """Where the facts about GPUs come from."""

    async def read(self, name: str) -> Machine:
        """What is there now, as node `name` (sites/{site}/nodes/{node}). Raises DevicesUnreadable."""
        ...

    async def next_events(self) -> list[GpuEvent]:
        """Waits for events, at most a few seconds; may be empty."""
        ...

    async def close(self) -> None:
        """Frees the driver."""
        ...
