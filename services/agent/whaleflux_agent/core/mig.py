"""MIG: a GPU that is cut into instances is offered as these, each a device of its own with its own UUID. Pure.

The GPU itself cannot be given to anybody then, so it is not listed beside them. Who makes and destroys instances is the
operator (`nvidia-smi mig`); the agent uses those that exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from whaleflux.fleet.model import Gpu, Link

MOST_DEVICES = 64  # what placement takes of one node


def instance(
    parent: Gpu, uuid: str, profile: str, memory_bytes: int, *, healthy: bool = True, unhealthy_reason: str = ""
) -> Gpu:
    """One MIG instance of `parent`; its index is given by `devices`."""
    return replace(
        parent,
        uuid=uuid,
        model=f"{parent.model} {profile}",
        memory_bytes=memory_bytes,
        healthy=healthy,
        unhealthy_reason=unhealthy_reason,
        mig_profile=profile,
        parent_uuid=parent.uuid,
        parent_memory_bytes=parent.memory_bytes,
    )


def devices(gpus: Sequence[Gpu], instances: Mapping[str, Sequence[Gpu]]) -> tuple[Gpu, ...]:
    """What the machine offers: whole GPUs under their own index, the instances of the others behind them.

    `instances` is by the UUID of their GPU; what is wrong with the GPU is wrong with each of them.
    """
    whole = [gpu for gpu in gpus if not instances.get(gpu.uuid)]
    parts = [_of(gpu, part) for gpu in gpus for part in instances.get(gpu.uuid, ())]
    first = 1 + max((gpu.index for gpu in gpus), default=-1)
    numbered = [replace(part, index=first + at) for at, part in enumerate(parts)]
    return tuple(sorted((*whole, *numbered), key=lambda gpu: gpu.index))[:MOST_DEVICES]


def links_between(links: Iterable[Link], gpus: Iterable[Gpu]) -> tuple[Link, ...]:
    """Those between whole GPUs: instances do not reach one another by NVLink or as PCIe peers."""
    whole = {gpu.index for gpu in gpus if not gpu.mig_profile}
    return tuple(link for link in links if link.a in whole and link.b in whole)


def _of(gpu: Gpu, part: Gpu) -> Gpu:
    if gpu.healthy:
        return part
    return replace(part, healthy=False, unhealthy_reason=gpu.unhealthy_reason)
