"""Settings of the health monitor."""

from __future__ import annotations

from pydantic import Field

from whaleflux.config import ServiceSettings


class HealthSettings(ServiceSettings):
    """The health monitor: what is alive, what is broken, what is being done about it."""

    suspect_s: float = Field(1.75, ge=0.5, le=600, description="Silence that makes a node suspect, seconds.")
    fence_s: float = Field(5.0, ge=1, le=3600, description="Silence of agent and ranks that fences a node, seconds.")
    restart_s: float = Field(60.0, ge=1, le=3600, description="The same for an agent that announced a restart.")
    breaker_share: float = Field(
        0.5, gt=0, le=1, description="Share of the fleet that may be fenced in 5 minutes without a person."
    )
