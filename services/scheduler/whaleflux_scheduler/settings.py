"""What the scheduler can be told."""

from __future__ import annotations

from pydantic import Field

from whaleflux.config import ServiceSettings
from whaleflux_scheduler.core.observed import Limits


class Settings(ServiceSettings):
    """Who runs where, and why."""

    accept_s: float = Field(20.0, gt=0, description="Seconds that agents have to accept the tasks of a gang.")
    start_s: float = Field(120.0, gt=0, description="Seconds from allocation until all ranks must run.")
    fetch_s: float = Field(3600.0, gt=0, description="The same while images are pulled or data is fetched, seconds.")
    partition_wait_s: float = Field(600.0, ge=0, description="How long jobs wait for a silent site, seconds.")
    shun_s: float = Field(60.0, ge=0, description="How long a job avoids a node that refused or failed it, seconds.")
    keep_ended_jobs: int = Field(10_000, ge=0, description="Ended jobs that are kept; the oldest are deleted.")

    def limits(self) -> Limits:
        """As the core wants them."""
        return Limits(self.accept_s, self.start_s, self.fetch_s, self.partition_wait_s, self.shun_s)
