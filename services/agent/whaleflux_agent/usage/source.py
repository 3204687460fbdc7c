"""One interface for the counters of real and played machines."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from whaleflux_agent.core.usage import DeviceUsage


class UsageSource(Protocol):
    """Where it is read what devices do. Nothing raises: what is not answered is not known."""

    async def tick(self) -> None:
        """Reads what is a value of the moment, so that an interval has a mean of it; once a second."""
        ...

    async def sample(self, devices: Sequence[str], held: Collection[str]) -> list[DeviceUsage]:
        """What each device (UUID) did since the last call, as far as that is known. `held`: those that work has now."""
        ...

    async def close(self) -> None:
        """Frees what is held."""
        ...
