"""Settings of the agent."""

from __future__ import annotations

import socket
from pathlib import Path

from pydantic import Field, SecretStr

from whaleflux.config import ServiceSettings


class AgentSettings(ServiceSettings):
    """whaleflux-agent: runs this node's part of the fleet's work."""

    server: str = Field("", description="The front door, host:port; each service can be named by itself instead.")
    server_name: str = Field("", description="Name in the front door's certificate; empty: the host that is dialled.")
    ca_file: Path | None = Field(None, description="The fleet's CA, PEM; needed to join.")
    join_token: SecretStr = Field(SecretStr(""), description="Single-use token; needed at the first start only.")
    join_token_file: Path | None = Field(None, description="File that holds the token instead; keeps it out of `ps`.")
    site: str = Field("", description="Site of this node; the join token decides, this only checks.")
    node_id: str = Field("", description="Id of this node within its site; empty: the host's name.")
    state_dir: Path = Field(Path(".whaleflux/agent"), description="Identity, logs and everything to survive a restart.")

    profile: str = Field("", description="Play this machine instead of reading the driver (h200x8, or a file).")
    zone: str = Field("", description="Zone within the site; empty: one zone.")
    spine: str = Field("", description="Spine within the zone; empty: one spine.")
    leaf: str = Field("", description="Leaf switch within the spine; empty: one leaf.")
    labels: dict[str, str] = Field({}, description='Labels as JSON: {"rack": "r7"}.')
    price_kind: str = Field("", description="owned, on_demand, reserved or spot; empty: as the profile says, or owned.")
    usd_per_gpu_hour: float = Field(-1.0, description="Price of one GPU for an hour; negative: as the profile says.")
    host_address: str = Field("", description="Address for ranks on other nodes; empty: the way to the front door.")

    run: bool = Field(True, description="Take work; --no-run only senses: GPUs, health, heartbeats.")
    heartbeat_every_s: float = Field(0.5, gt=0, le=60, description="Seconds between signs of life.")
    checkpoint_root: Path | None = Field(
        None, description="Folder for checkpoints of jobs that name none; others may be deleted below it only."
    )
    dataset_root: Path | None = Field(None, description="Cache of datasets; empty: in the state directory.")
    dataset_bytes: int = Field(1 << 40, gt=0, description="Most bytes that the cache of datasets may hold.")
    first_port: int = Field(20000, ge=1024, le=65535, description="First port for rendezvous and services.")
    last_port: int = Field(29999, ge=1024, le=65535, description="Last port for rendezvous and services.")
    log_bytes_per_rank: int = Field(64 << 20, ge=1 << 16, description="Most bytes that the log of a rank may occupy.")
    kept_tasks: int = Field(20, ge=0, le=10_000, description="Ended tasks whose logs are kept.")
    cgroups: bool = Field(True, description="Use control groups where the host lets us.")
    docker: bool = Field(True, description="Use a container engine where there is one.")

    @property
    def own_id(self) -> str:
        """Id of this node within its site."""
        return self.node_id or socket.gethostname().partition(".")[0].lower()

    @property
    def checkpoints(self) -> Path:
        """Default folder for checkpoints."""
        return self.checkpoint_root or self.state_dir / "checkpoints"

    def address_for_ranks(self) -> str:
        """What ranks on other nodes dial: as set, else the local address of the way to the control plane."""
        if self.host_address:
            return self.host_address
        target = self.server or self.scheduler or self.inventory
        host, _, port = target.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
            family, kind, protocol, _, address = found[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing; chooses the route
                return str(probe.getsockname()[0])
        except (OSError, ValueError, IndexError):
            return "127.0.0.1"
