"""The environment of a rank: torchrun's contract to the letter, then ours; and what torchrun itself needs on a node.

A script that runs under torchrun runs here unchanged: same variables, same values. See
https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables. torchrun takes its options from PET_ variables:
https://github.com/pytorch/pytorch/blob/main/torch/distributed/run.py (`env` of torch.distributed.argparse_util).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whaleflux import hostport
from whaleflux.manifests import shell_text
from whaleflux.manifests.job_fields import RESERVED_ENVIRONMENT
from whaleflux_agent.core.work import Work

# Settings of the agent itself and of what it runs under are not the ranks' business, whoever lets them pass (`inherited`).
_PRIVATE_PREFIXES = ("WHALEFLUX_", "OTEL_", "NOTIFY_SOCKET", "TORCHELASTIC_", "PET_")
PORT_MARK, WEIGHTS_MARK = "{port}", "{weights}"
MIG_UUID = "MIG-"
SHARE_VARIABLE = "WHALEFLUX_GPU_MEMORY_BYTES"  # the SDK reads it


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """What the node adds to a task's environment."""

    node: str  # sites/{site}/nodes/{node}
    token: str  # of the task
    agent_socket: str  # path of the agent's Unix socket
    gpu_uuids: tuple[str, ...]  # of the task's GPUs in rank order; empty: simulated, none is visible
    traceparent: str  # of the launch span
    ports: tuple[int, ...] = ()  # one per local rank, for services
    # Each: datasets/{dataset}, where it is read, and of a part where the rest is, or for ranks that share it the folder with the list of all.
    datasets: tuple[tuple[str, str, str], ...] = ()
    secrets_dir: str = ""  # folder of the job's secrets that are files; values of variables are nobody's business here


def rank_environment(
    work: Work, context: LaunchContext, local_rank: int, *, inherited: Mapping[str, str], error_file: str
) -> dict[str, str]:
    """Everything that rank `local_rank` of this node finds in its environment.

    Raises InvalidArgument for a rendezvous that is no host:port.
    """
    user = _users(work, inherited)
    one_of_several = {"OMP_NUM_THREADS": "1"} if len(work.ranks) > 1 else {}
    ours = _ours(work, context, local_rank)
    return _defaults(work, user) | one_of_several | user | _torchrun(work, local_rank, error_file) | ours


def node_environment(
    work: Work, context: LaunchContext, *, inherited: Mapping[str, str], error_file: str
) -> dict[str, str]:
    """What a command finds that is started once on this node: no rank's variables, and what a launcher needs to meet the others.

    Raises InvalidArgument for a rendezvous that is no host:port.
    """
    user = {name: value for name, value in _users(work, inherited).items() if name not in RESERVED_ENVIRONMENT}
    return _defaults(work, user) | user | _for_launchers(work, error_file) | _ours(work, context, 0)


def _users(work: Work, inherited: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in inherited.items() if not k.startswith(_PRIVATE_PREFIXES)} | dict(work.spec.environment)


def _defaults(work: Work, user: Mapping[str, str]) -> dict[str, str]:
    """What the user may set otherwise. Unbuffered output makes `logs -f` live and keeps a traceback last.

    The fault handler prints where Python is when it crashes, and when somebody sends SIGABRT to a rank that hangs:
    https://docs.python.org/3/library/faulthandler.html
    """
    chosen = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    if _is_loopback(work.rendezvous) and "NCCL_SOCKET_IFNAME" not in user:
        chosen["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo asks the resolver for the host's name
    return chosen


def _meeting_point(work: Work) -> tuple[str, str]:
    """Host and port of the rendezvous, empty while there is none."""
    found = hostport.parse(work.rendezvous, "rendezvous") if work.rendezvous else None
    return ("", "") if found is None else (found.host, str(found.port))


def _for_launchers(work: Work, error_file: str) -> dict[str, str]:
    host, port = _meeting_point(work)
    return {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "PET_NNODES": str(work.group_world_size),
        "PET_NPROC_PER_NODE": str(len(work.ranks)),
        "PET_NODE_RANK": str(work.group_rank),
        "PET_MASTER_ADDR": host,
        "PET_MASTER_PORT": port,
        "PET_RDZV_ID": f"{work.job.rpartition('/')[2]}-{work.epoch}",
        "TORCHELASTIC_ERROR_FILE": error_file,  # torchrun copies there what ended its first failed process
    }


def _torchrun(work: Work, local_rank: int, error_file: str) -> dict[str, str]:
    host, port = _meeting_point(work)
    rank, local_world = str(work.ranks[local_rank]), str(len(work.ranks))
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
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": str(work.restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(work.spec.allowed_restarts),
        "TORCHELASTIC_RUN_ID": work.job.rpartition("/")[2],
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 hosts the store of its own attempt
        "TORCHELASTIC_ERROR_FILE": error_file,
    }


def _ours(work: Work, context: LaunchContext, local_rank: int) -> dict[str, str]:
    ours = {
        "CUDA_VISIBLE_DEVICES": ",".join(visible_devices(context.gpu_uuids, local_rank)),
        "WHALEFLUX_GPU_UUID": "".join(work.gpu_uuids[local_rank : local_rank + 1]),
        "WHALEFLUX_AGENT_SOCKET": context.agent_socket,
        "WHALEFLUX_TASK_TOKEN": context.token,
        "WHALEFLUX_JOB": work.job,
        "WHALEFLUX_EPOCH": str(work.epoch),
        "WHALEFLUX_NODE": context.node,
        "WHALEFLUX_CHECKPOINT_LOCATION": work.checkpoint_location,
        "WHALEFLUX_TRACEPARENT": context.traceparent,
        "WHALEFLUX_NODES": str(work.group_world_size),
        "WHALEFLUX_NODE_RANK": str(work.group_rank),
        "WHALEFLUX_GPUS": str(work.world_size),
        "WHALEFLUX_GPUS_PER_NODE": str(len(work.gpu_uuids)),  # on this node
    }
    if work.spec.array_name:
        ours |= {
            "WHALEFLUX_ARRAY": work.spec.array_name,
            "WHALEFLUX_ARRAY_INDEX": str(work.spec.array_index),
            "WHALEFLUX_ARRAY_SIZE": str(work.spec.array_size),
        }
    if work.share_bytes:
        ours[SHARE_VARIABLE] = str(work.share_bytes)
    for dataset, path, home in context.datasets:
        name = dataset.rpartition("/")[2].upper().replace("-", "_")
        ours["WHALEFLUX_DATASET_" + name] = path
        if home:
            kind = "WHALEFLUX_DATAFILES_" if dataset in work.spec.datasets_by_rank else "WHALEFLUX_DATASOURCE_"
            ours[kind + name] = home
    if context.secrets_dir:
        ours["WHALEFLUX_SECRETS_DIR"] = context.secrets_dir
        paths = ((use.variable, f"{context.secrets_dir}/{use.file}") for use in work.spec.secrets if use.file)
        ours |= {variable: path for variable, path in paths if variable}
    if context.ports:
        ours["PORT"] = str(context.ports[local_rank])
    return ours


def visible_devices(gpu_uuids: Sequence[str], local_rank: int) -> tuple[str, ...]:
    """What a rank may see of its task's devices: all, as under torchrun; of MIG instances its own alone, as its device 0.

    CUDA lets a process use one MIG instance, whatever it is shown: https://docs.nvidia.com/datacenter/tesla/mig-user-guide
    """
    own = tuple(gpu_uuids[local_rank : local_rank + 1])
    return own if any(uuid.startswith(MIG_UUID) for uuid in own) else tuple(gpu_uuids)


def rank_command(work: Work, context: LaunchContext, local_rank: int) -> tuple[str, ...]:
    """The command line of a rank, for services with {port} and {weights}, the folder of its first dataset, replaced.

    What its setup does in a container, it does first.
    """
    command: Sequence[str] = work.spec.command
    if work.spec.setup and work.spec.image:
        command = shell_text.one_after_the_other(work.spec.setup, command)
    command = shell_text.passes_signals_on(command)
    if not context.ports:
        return tuple(command)
    weights = context.datasets[0][1] if context.datasets else WEIGHTS_MARK
    if shell_text.script_of(work.spec.command) is not None and context.datasets:
        weights = shlex.quote(weights)
    return tuple(
        word.replace(PORT_MARK, str(context.ports[local_rank])).replace(WEIGHTS_MARK, weights) for word in command
    )


def unreachable(work: Work, host_address: str) -> str:
    """Why ranks elsewhere cannot meet at this node's address, "" when they can, or nothing says that they cannot."""
    if work.group_rank or not work.elsewhere or not _is_loopback(hostport.join(host_address, 1)):
        return ""
    return (
        f"ranks on {work.elsewhere} cannot reach {host_address}, the address for ranks of this node, which only its own"
        " host can dial: start this agent with --host-address and an address that other hosts reach"
    )


def _is_loopback(endpoint: str) -> bool:
    address = hostport.parse(endpoint, "rendezvous").ip if endpoint else None
    return address is not None and address.is_loopback
