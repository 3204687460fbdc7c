"""torchrun: how many ranks start on each node, and their environment. Whoever starts ranks otherwise (a WhaleFlux job) needs none of it."""

from __future__ import annotations

from whaleflux.planning.emit.planned import Emitted, Planned
from whaleflux.planning.wish import ALLOCATOR, GROWING


def torchrun(planned: Planned) -> Emitted:
    """A script that runs what it is given (`bash torchrun.sh train.py --lr 1e-4`) on each of the plan's nodes."""
    notes = (
        f"run it once on each of {planned.nodes} nodes" if planned.nodes > 1 else "",
        "MASTER_ADDR (the first node's address) must be set, MASTER_PORT may be" if planned.nodes > 1 else "",
        f"tensor parallelism {planned.split.tp} spans nodes of {planned.node_gpus} GPUs"
        if planned.split.tp > planned.per_node
        else "",
        *planned.uneven(),
    )
    text = "\n".join([*head(planned), *environment(planned), f'exec {" ".join(launcher(planned))} "$@"', ""])
    return Emitted("torchrun.sh", text, tuple(one for one in notes if one))


def head(planned: Planned) -> list[str]:
    """The first lines of a script."""
    return ["#!/usr/bin/env bash", f"# {planned.title()}", "set -euo pipefail"]


def environment(planned: Planned, *, sharded: bool = False) -> list[str]:
    """As lines of a script. `sharded`: FSDP, whose collectives want queues of their own.

    One hardware queue keeps collectives of tensor and context parallelism in the order in which they were launched, which their overlap
    rests on (Megatron-LM asks for it on GPUs before Blackwell).
    """
    return exports(one_queue=(planned.split.tp > 1 or planned.split.cp > 1) and not sharded)


def exports(*, one_queue: bool) -> list[str]:
    """The same, where it is known whether collectives share one queue."""
    return [
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}",
        f"export {ALLOCATOR}=${{{ALLOCATOR}:-{GROWING}}}",
        *(["export CUDA_DEVICE_MAX_CONNECTIONS=1"] if one_queue else []),
    ]


def launcher(planned: Planned) -> list[str]:
    """Words of a command line."""
    if planned.nodes == 1:
        return ["torchrun", "--standalone", "--nnodes=1", f"--nproc-per-node={planned.per_node}"]
    return [
        "torchrun", f"--nnodes={planned.nodes}", f"--nproc-per-node={planned.per_node}", "--rdzv-backend=c10d",
        '--rdzv-endpoint="${MASTER_ADDR:?the first node}:${MASTER_PORT:-29500}"', '--rdzv-id="${RUN_ID:-planned}"',
    ]  # fmt: skip
