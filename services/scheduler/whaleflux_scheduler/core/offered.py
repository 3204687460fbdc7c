"""Jobs that wait, machines that can be rented and those that are, as renting looks at them. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from whaleflux import names
from whaleflux.fleet.gpu_types import GPU_TYPES

HOUR_S = 3600.0
_TYPES = {one.name: one for one in GPU_TYPES}


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that waits for GPUs: what it takes, and when it would start here.

    `wait_s`: seconds from now; None: nobody knows of an end that would let it start. `run_s`: how long it runs then, likely. `late_s`: seconds from
    now until its deadline; None: it has none. `models`: GPU types that will do; none: any. `sites`: ids; none: any. `per_unit`: GPUs for each of
    `gpus`, by type, where it is not one. `share_memory_bytes`: it takes so much of each of `gpus` GPUs and leaves the rest to others.
    `labels`, `nvme`: of the nodes that it takes.
    """

    name: str
    queue: str
    gpus: int
    wait_s: float | None
    run_s: float
    waited_s: float = 0.0
    late_s: float | None = None
    models: frozenset[str] = frozenset()
    sites: frozenset[str] = frozenset()
    least_memory_bytes: int = 0
    no_spot: bool = False
    one_node: bool = False
    min_nodes: int = 0
    per_unit: Mapping[str, int] = field(default_factory=dict)
    share_memory_bytes: int = 0
    least_capability: tuple[int, int] = (0, 0)
    labels: frozenset[tuple[str, str]] = frozenset()
    nvme: bool = False


class Kind(NamedTuple):
    """Where a machine is, and its GPUs."""

    site: str
    gpu_type: str
    gpus: int


@dataclass(frozen=True, slots=True)
class Offered:
    """An offer. `left`: machines that could still be rented; `usd_per_hour` of one."""

    name: str
    gpu_type: str
    gpus: int
    site: str
    usd_per_hour: float
    boot_s: float
    billing_unit_s: float
    left: int
    trust: float = 1.0
    spot: bool = False
    gpu_memory_bytes: int = 0

    @property
    def kind(self) -> Kind:
        """Machines of one kind may stand for one another."""
        return Kind(self.site, self.gpu_type, self.gpus)

    @property
    def again_s(self) -> float:
        """What renting a machine again costs, in seconds of it: its boot, and half a unit that is paid for nothing at the end."""
        return self.boot_s + self.billing_unit_s / 2


@dataclass(frozen=True, slots=True)
class Rented:
    """A machine that burst has rented. `begun_s`: since when it is paid for, seconds ago; `idle_s`: for how long nothing runs on it, None: it boots, or works.

    `closed_s`: for how long its node takes no work and has none (its agent is gone, it is sick, it was cordoned); None: that is not so.
    """

    lease: str
    offer: Offered
    queue: str
    begun_s: float
    coming: bool = False
    idle_s: float | None = None
    ending: bool = False
    closed_s: float | None = None

    @property
    def is_idle(self) -> bool:
        """It is there, and nothing runs on it."""
        return not self.coming and self.idle_s is not None

    @property
    def unit_left_s(self) -> float:
        """Until the billing unit ends that is paid for already."""
        unit_s = self.offer.billing_unit_s
        return unit_s - self.begun_s % unit_s


@dataclass(frozen=True, slots=True)
class BurstFacts:
    """What the planner knows that renting asks. `waiting`: in the order in which they would start.

    `busy`: rented nodes that have work or are kept for some; `known`: those that take work; `free`: GPUs of other nodes that nobody has, by type.
    """

    waiting: tuple[Waiting, ...]
    busy: frozenset[str]
    known: frozenset[str]
    free: Mapping[str, int]


def billed_usd(offer: Offered, used_s: float) -> float:
    """Of one machine, in whole billing units."""
    units = max(1, math.ceil(used_s / offer.billing_unit_s - 1e-9))
    return units * offer.billing_unit_s / HOUR_S * offer.usd_per_hour


def gpus_on(job: Waiting, offer: Offered) -> float:
    """GPUs of the offer's machines that it takes; of one that takes parts, the part of a machine that nobody else can have. inf: it cannot."""
    if not job.share_memory_bytes:
        return job.gpus * job.per_unit.get(offer.gpu_type, 1)
    beside = _memory_bytes(offer) // job.share_memory_bytes  # such parts of one GPU
    return job.gpus / beside if beside else math.inf


def machines_for(job: Waiting, offer: Offered) -> int:
    """Machines that it needs; ranks that take parts are each on a GPU of their own."""
    return max(math.ceil(max(gpus_on(job, offer), job.gpus) / offer.gpus - 1e-9), job.min_nodes, 1)


def fits(job: Waiting, offer: Offered) -> bool:
    """Whether the job's GPUs could be of that offer's machines."""
    known, memory = _TYPES.get(offer.gpu_type), _memory_bytes(offer)
    return (
        (not job.models or offer.gpu_type in job.models)
        and (not job.sites or offer.site in job.sites)
        and not (job.no_spot and offer.spot)
        and (not memory or memory >= job.least_memory_bytes)
        and (known is None or known.compute_capability >= job.least_capability)
        and job.labels <= {("rented", names.last(offer.name))}
        and not job.nvme  # nobody knows what disks it will have
        and gpus_on(job, offer) < math.inf
        and not (job.one_node and machines_for(job, offer) > 1)
    )


def _memory_bytes(offer: Offered) -> int:
    """Of one of its GPUs; 0: nobody knows."""
    known = _TYPES.get(offer.gpu_type)
    return offer.gpu_memory_bytes or (known.memory_bytes if known else 0)
