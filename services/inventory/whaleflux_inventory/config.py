"""Settings of inventory."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from whaleflux.config import ServiceSettings


class InventorySettings(ServiceSettings):
    """The inventory service: sites, nodes, datasets, and who may join."""

    ca_cert: Path | None = Field(
        None, description="CA certificate, PEM; without it joining is left to another certificate manager."
    )
    ca_key: Path | None = Field(None, description="The CA's private key, PEM; readable by inventory alone.")
    leaf_sites: str = Field("", description="Sites with a NATS server of their own, comma separated; empty: none.")
