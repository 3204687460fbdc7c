"""Settings of the inference router."""

from __future__ import annotations

from pydantic import Field

from whaleflux import hostport
from whaleflux.config import ServiceSettings
from whaleflux.errors import InvalidArgument
from whaleflux.hostport import HostPort
from whaleflux.services import ROLES


class Settings(ServiceSettings):
    """Where each inference request goes."""

    policy_listen: str = Field(
        "127.0.0.1:0", description="Where the front door asks, host:port; HTTP over mTLS, for the front door alone."
    )
    model_networks: str = Field(
        "ordinary",
        description='Where models may have their servers: networks (CIDR), comma separated, and "ordinary" for all that is not '
        "loopback, link-local, multicast or reserved; a cloud's metadata service only where it is named alone (/32).",
    )
    control_addresses: str = Field(
        "",
        description="host:port of further parts of the control plane, comma separated: no model may name them. Its services, etcd and NATS "
        "are known from the other settings.",
    )
    open_access: bool = Field(False, description="Serve requests without an API key.")

    def own_addresses(self) -> tuple[HostPort, ...]:
        """host:port of the control plane, as far as this process was told."""
        listening = (self.listen, self.metrics_listen, self.policy_listen, self.advertise)
        services = (getattr(self, role) for role in ROLES)
        servers = (url.rpartition("://")[2] for url in (*_items(self.store), *_items(self.nats), self.otlp_endpoint))
        found = [text.rpartition("@")[2].rstrip("/") for text in (*listening, *services, *servers) if text]
        told = [hostport.parse(text, "control_addresses") for text in _items(self.control_addresses)]
        return (*told, *(known for text in found if (known := _parsed(text)) is not None))


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _parsed(text: str) -> HostPort | None:
    """None: no address that a model could name (memory://, a port that is chosen later)."""
    try:
        host, port = hostport.parse(text, listening=True)
    except InvalidArgument:
        return None
    return HostPort(host or "0.0.0.0", port)
