"""Settings of the console service."""

from __future__ import annotations

from whaleflux.config import ServiceSettings


class Settings(ServiceSettings):
    """What everything costs, and what of it was wasted."""
