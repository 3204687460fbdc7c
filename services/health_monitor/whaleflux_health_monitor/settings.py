"""Settings of the health monitor."""

from __future__ import annotations

from pydantic import Field

from whaleflux.config import ServiceSettings
from whaleflux_health_monitor.core.timing import Timing

_DEFAULTS = Timing()


class Settings(ServiceSettings):
    """The health monitor: what is alive, what is broken, what is being done about it."""

    suspect_s: float = Field(
        _DEFAULTS.suspect_s, ge=0.5, le=600, description="Silence that makes a node suspect, seconds."
    )
    fence_s: float = Field(
        _DEFAULTS.fence_s, ge=1, le=3600, description="Silence of agent and ranks that fences a node, seconds."
    )
    restart_s: float = Field(
        _DEFAULTS.restart_s,
        ge=1,
        le=3600,
        description="How long an agent is waited for that announced a restart, or died alone on a host that lives, seconds.",
    )
    breaker_share: float = Field(
        _DEFAULTS.breaker_share,
        gt=0,
        le=1,
        description="Share of the fleet that may be fenced in 5 minutes without a person.",
    )
