"""Settings of the console service."""

from __future__ import annotations

from pydantic import Field

from whaleflux.config import ServiceSettings


class Settings(ServiceSettings):
    """What everything costs, and what of it was wasted."""

    ledger_folder: str = Field(
        "",
        description="Where the usage ledger's files lie: an absolute path, or s3://bucket/prefix; empty: none is kept.",
    )
    ledger_endpoint: str = Field("", description="Of an object store that is not AWS: host:port or URL.")
    ledger_region: str = Field("", description="Region of the object store.")
    ledger_memory_bytes: int = Field(512 << 20, ge=64 << 20, description="Most memory that answers are worked out in.")
    ledger_threads: int = Field(2, ge=1, le=64, description="Threads that they are worked out by.")
    ledger_tick_s: float = Field(15.0, gt=0, le=600, description="How often owners' changes go into the ledger.")
    ledger_close_after_s: float = Field(
        900.0, ge=0, le=86_400, description="How long after its end an hour is closed, seconds: reports come late."
    )
    ledger_raw_days: int = Field(14, ge=1, le=3660, description="How long reports are kept as they came.")
    ledger_minute_days: int = Field(90, ge=1, le=3660, description="How long they are kept by minute.")
    ledger_hour_days: int = Field(
        1_096, ge=35, le=36_600, description="How long hours of cards are kept; days are for good."
    )
    ledger_rebuild: bool = Field(
        False,
        description="Begin with an empty folder, or another one, in place of the one that the ledger's head names: its files are lost for good.",
    )
