"""Settings of the agent."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, SecretStr

from whaleflux import hostport
from whaleflux.config import ServiceSettings
from whaleflux.errors import InvalidArgument
from whaleflux_agent.core.task_users import IsolationSettings, parse_range


class Settings(ServiceSettings):
    """whaleflux-agent: runs this node's part of the fleet's work."""

    examples: ClassVar[tuple[str, ...]] = (
        "  WHALEFLUX_JOIN_TOKEN=... whaleflux agent --server fleet.example:7443 --ca-file ca.crt --site onprem",
        "  WHALEFLUX_JOIN_TOKEN=... whaleflux agent ... --node-id n7 --profile h200x8    # plays that machine",
        "  whaleflux agent --state-dir /var/lib/whaleflux                                # again, with the identity there",
        "",
        "The token is printed by: whaleflux token create --site NAME. Each flag is also a variable and a key of a file.",
        "",
    )
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Joining": ("server", "server_name", "ca_file", "join_token", "join_token_file", "site", "node_id", "host_name", "state_dir"),
        "The machine": (
            "profile", "zone", "spine", "leaf", "labels", "price_kind", "usd_per_gpu_hour", "machine_notices",
            "host_address", "advertise", "listen",
        ),
        "Work": (
            "run", "checkpoint_root", "dataset_root", "dataset_bytes", "dataset_bytes_per_s", "code_bytes", "first_port", "last_port", "log_bytes_per_rank",
            "kept_tasks", "pass_environment", "secrets_dir", "cgroups", "docker",
        ),
        "Isolation of work": (
            "task_isolation", "task_uids", "task_users", "task_groups", "task_processes", "private_folders", "shm_bytes",
            "own_checkpoint_folders", "core_dump_bytes", "container_root",
        ),
        "The agent itself": (
            "heartbeat_every_s", "usage_every_s", "usage_bytes", "dcgm_url", "metrics_listen", "otlp_endpoint", "log_level", "drain_grace_s",
        ),
    }  # fmt: skip

    server: str = Field("", description="The front door, host:port; each service can be named by itself instead.")
    server_name: str = Field("", description="Name in the front door's certificate; empty: the host that is dialled.")
    ca_file: Path | None = Field(None, description="The fleet's CA, PEM; needed to join.")
    join_token: SecretStr = Field(SecretStr(""), description="Single-use token; needed at the first start only.")
    join_token_file: Path | None = Field(None, description="File that holds the token instead; keeps it out of `ps`.")
    site: str = Field("", description="Site of this node; the join token decides, this only checks.")
    node_id: str = Field("", description="Id of this node within its site; empty: the host's name.")
    host_name: str = Field(
        "",
        description="The host's name where this process sees another one, as in a container; its first label counts.",
    )
    state_dir: Path = Field(Path(".whaleflux/agent"), description="Identity, logs and everything to survive a restart.")

    profile: str = Field(
        "", description="Play this machine instead of reading the driver: one of `whaleflux profiles`, or a file."
    )
    zone: str = Field("", description="Zone within the site; empty: one zone.")
    spine: str = Field("", description="Spine within the zone; empty: one spine.")
    leaf: str = Field("", description="Leaf switch within the spine; empty: one leaf.")
    labels: dict[str, str] = Field({}, description='Labels as JSON: {"rack": "r7"}.')
    price_kind: str = Field("", description="owned, on_demand, reserved or spot; empty: as the profile says, or owned.")
    usd_per_gpu_hour: float = Field(
        -1.0,
        le=10_000,
        allow_inf_nan=False,
        description="Price of one GPU for an hour, at most 10,000; negative: as the profile says.",
    )
    machine_notices: Literal["none", "ec2"] = Field(
        "none",
        description="Where it is asked whether the machine is taken away: EC2's metadata service, or nowhere. Machines that are rented of EC2 are told.",
    )
    host_address: str = Field("", description="Address for ranks on other nodes; empty: the way to the front door.")

    run: bool = Field(True, description="Take work; --no-run only senses: GPUs, health, heartbeats.")
    heartbeat_every_s: float = Field(0.5, gt=0, le=60, description="Seconds between signs of life.")
    usage_every_s: float = Field(
        10.0, ge=1, le=3600, description="Seconds between two readings of what GPUs did, for the ledger of costs."
    )
    usage_bytes: int = Field(
        64 << 20,
        ge=1 << 20,
        description="Most bytes of such readings that wait on this disk while nobody takes them; the oldest go first, and are counted.",
    )
    dcgm_url: str = Field(
        "http://127.0.0.1:9400/metrics",
        max_length=1024,
        pattern="^(https?://.*)?$",
        description="Metrics of a DCGM exporter: where one answers it is read, and NVML's performance counters are left to it. Empty: never asked.",
    )
    checkpoint_root: Path | None = Field(
        None, description="Folder for checkpoints of jobs that name none; others may be deleted below it only."
    )
    dataset_root: Path | None = Field(None, description="Cache of datasets; empty: in the state directory.")
    dataset_bytes: int = Field(1 << 40, gt=0, description="Most bytes that the cache of datasets may hold.")
    dataset_bytes_per_s: int = Field(
        0, ge=0, description="Most bytes a second that datasets are pulled with; 0: no limit."
    )
    code_bytes: int = Field(
        2 << 30, ge=1 << 28, description="Most bytes of packed code that are kept to be unpacked again."
    )
    first_port: int = Field(20000, ge=1024, le=65535, description="First port for rendezvous and services.")
    last_port: int = Field(29999, ge=1024, le=65535, description="Last port for rendezvous and services.")
    log_bytes_per_rank: int = Field(64 << 20, ge=1 << 16, description="Most bytes that the log of a rank may occupy.")
    kept_tasks: int = Field(20, ge=0, le=10_000, description="Ended tasks whose logs are kept.")
    pass_environment: str = Field(
        "",
        max_length=4096,
        description="More of the agent's own variables that ranks find beside PATH, CUDA_* and the like: NAME,PREFIX_*; none that is secret.",
    )
    secrets_dir: Path | None = Field(
        None,
        description="Folder for what tasks are given of secrets, the agent's alone; without it a tmpfs (/run, /dev/shm): memory only. On a disk they would outlive it.",
    )
    task_isolation: Literal["auto", "none", "required"] = Field(
        "auto",
        description="Ranks as users of their own, one for each queue: where the agent is root and may (auto), or no work at all (required), or as the agent (none).",
    )
    task_uids: str = Field(
        "2001000000-2001065535", max_length=64, description="Ids of users and groups that are tasks' alone, FIRST-LAST."
    )
    task_users: dict[str, str] = Field({}, description='System users of queues as JSON: {"research": "ml-research"}.')
    task_groups: str = Field(
        "", max_length=1024, description="Groups that all tasks are in, for shared storage: NAME,NAME."
    )
    task_processes: int = Field(
        32768,
        ge=0,
        le=4_194_304,
        description="Most processes and threads of a rank, where it can be limited; 0: no limit.",
    )
    private_folders: bool = Field(
        True,
        description="Each isolated task has a /tmp and /dev/shm of its own, and sees nothing of the state folder but its part.",
    )
    shm_bytes: int = Field(0, ge=0, description="Most bytes of such a /dev/shm; 0: half of the machine's memory.")
    own_checkpoint_folders: bool = Field(
        True,
        description="Give the folder of a job below checkpoint_root to the job's user; off: the storage's permissions decide.",
    )
    core_dump_bytes: int = Field(
        0, ge=0, description="Most bytes of a core file, which may hold secrets; 0: none is written."
    )
    container_root: bool = Field(False, description="Let containers run as root where their image says so.")
    cgroups: bool = Field(True, description="Use control groups where the host lets us.")
    docker: bool = Field(True, description="Use a container engine where there is one.")

    @property
    def own_id(self) -> str:
        """Id of this node within its site."""
        return self.node_id or (self.host_name or socket.gethostname()).partition(".")[0].lower()

    @property
    def passed_environment(self) -> tuple[str, ...]:
        """Names, with * for anything, of what ranks find of the agent's environment beside the usual."""
        return tuple(name for part in self.pass_environment.split(",") if (name := part.strip()))

    @property
    def isolation(self) -> IsolationSettings:
        """What is said of isolation. Raises InvalidArgument."""
        return IsolationSettings(
            wanted=self.task_isolation,
            ids=parse_range(self.task_uids),
            users=tuple(self.task_users.items()),
            groups=tuple(name for part in self.task_groups.split(",") if (name := part.strip())),
            processes=self.task_processes,
            core_bytes=self.core_dump_bytes,
            shm_bytes=self.shm_bytes,
            private_folders=self.private_folders,
            own_checkpoint_folders=self.own_checkpoint_folders,
            container_root=self.container_root,
        )

    @property
    def checkpoints(self) -> Path:
        """Default folder for checkpoints."""
        return self.checkpoint_root or self.state_dir / "checkpoints"

    def address_for_ranks(self) -> str:
        """What ranks on other nodes dial: as set, else the local address of the way to the control plane."""
        if self.host_address:
            return self.host_address
        target = self.server or self.scheduler or self.inventory
        try:
            host, port = hostport.parse(target)
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
            family, kind, protocol, _, address = found[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing; chooses the route
                return str(probe.getsockname()[0])
        except (OSError, InvalidArgument, IndexError):
            return "127.0.0.1"
