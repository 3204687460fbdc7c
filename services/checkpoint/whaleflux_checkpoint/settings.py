"""Settings of the checkpoint service."""

from __future__ import annotations

from pydantic import Field

from whaleflux.config import ServiceSettings


class Settings(ServiceSettings):
    """What can be restored, and from where."""

    deleted_job_grace_s: float = Field(
        86_400.0, ge=0, description="How long checkpoints of a deleted job are kept, seconds."
    )
