"""The environment of a rank: torchrun's contract to the letter, then ours.

A script that runs under torchrun runs here unchanged: same variables, same values. See
https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from whaleflux_agent.core.work import Work

# Secrets and settings of the agent itself are not the ranks' business.
_PRIVATE_PREFIXES = ("WHALEFLUX_", "OTEL_", "NOTIFY_SOCKET", "TORCHELASTIC_", "PET_")
PORT_MARK = "{port}"


@dataclass(frozen=True, slots=True)
class Place:
    """What the node adds to a task's environment."""

    node: str  # sites/{site}/nodes/{node}
    token: str  # of the task
    agent_socket: str  # path of the agent's Unix socket
    gpu_uuids: tuple[str, ...]  # of the task's GPUs in rank order; empty: simulated, none is visible
    traceparent: str  # of the launch span
    ports: tuple[int, ...] = ()  # one per local rank, for services
    datasets: tuple[tuple[str, str], ...] = ()  # datasets/{dataset}, local path


def rank_environment(
    work: Work, place: Place, local_rank: int, *, inherited: Mapping[str, str], error_file: str
) -> dict[str, str]:
    """Everything that rank `local_rank` of this node finds in its environment."""
    user = {k: v for k, v in inherited.items() if not k.startswith(_PRIVATE_PREFIXES)} | dict(work.environment)
    return _defaults(work, user) | user | _torchrun(work, local_rank, error_file) | _ours(work, place, local_rank)


def _defaults(work: Work, user: Mapping[str, str]) -> dict[str, str]:
    """What the user may set otherwise. Unbuffered output makes `logs -f` live and keeps a traceback last."""
    chosen = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "PYTHONUNBUFFERED": "1"}
    if len(work.gpu_indices) > 1:
        chosen["OMP_NUM_THREADS"] = "1"
    if _is_loopback(work.rendezvous) and "NCCL_SOCKET_IFNAME" not in user:
        chosen["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo asks the resolver for the host's name
    return chosen


def _torchrun(work: Work, local_rank: int, error_file: str) -> dict[str, str]:
    host, _, port = work.rendezvous.rpartition(":")
    rank, local_world = str(work.first_rank + local_rank), str(len(work.gpu_indices))
    world = str(work.world_size)
    return {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": local_world,
        "GROUP_RANK": str(work.group_rank),
        "GROUP_WORLD_SIZE": str(work.group_world_size),
        "ROLE_NAME": "default",
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": world,
        "MASTER_ADDR": host.strip("[]"),
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": str(work.restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(work.max_restarts),
        "TORCHELASTIC_RUN_ID": work.job.rpartition("/")[2],
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 hosts the store of its own attempt
        "TORCHELASTIC_ERROR_FILE": error_file,
    }


def _ours(work: Work, place: Place, local_rank: int) -> dict[str, str]:
    ours = {
        "CUDA_VISIBLE_DEVICES": ",".join(place.gpu_uuids),
        "WHALEFLUX_AGENT_SOCKET": place.agent_socket,
        "WHALEFLUX_TASK_TOKEN": place.token,
        "WHALEFLUX_JOB": work.job,
        "WHALEFLUX_EPOCH": str(work.epoch),
        "WHALEFLUX_NODE": place.node,
        "WHALEFLUX_CHECKPOINT_LOCATION": work.checkpoint_location,
        "WHALEFLUX_TRACEPARENT": place.traceparent,
    }
    for dataset, path in place.datasets:
        ours["WHALEFLUX_DATASET_" + dataset.rpartition("/")[2].upper().replace("-", "_")] = path
    if place.ports:
        ours["PORT"] = str(place.ports[local_rank])
    return ours


def rank_command(work: Work, place: Place, local_rank: int) -> tuple[str, ...]:
    """The command line of a rank, with {port} replaced for services."""
    if not place.ports:
        return work.command
    return tuple(word.replace(PORT_MARK, str(place.ports[local_rank])) for word in work.command)


def _is_loopback(endpoint: str) -> bool:
    try:
        return ipaddress.ip_address(endpoint.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:
        return False
