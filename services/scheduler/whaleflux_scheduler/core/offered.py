"""Jobs that wait, machines that can be rented and those that are, as renting looks at them. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that waits for GPUs: what it takes, and when it would start here.

    `wait_s`: seconds from now; None: nobody knows of an end that would let it start. `run_s`: how long it runs then, likely. `late_s`: seconds from
    now until its deadline; None: it has none. `models`: GPU types that will do; none: any. `sites`: ids; none: any.
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
    """A machine that burst has rented. `begun_s`: since when it is paid for, seconds ago; `idle_s`: for how long nothing runs on it, None: it boots, or works."""

    lease: str
    offer: Offered
    queue: str
    begun_s: float
    coming: bool = False
    idle_s: float | None = None
    ending: bool = False

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


def fits(job: Waiting, offer: Offered) -> bool:
    """Whether the job's GPUs could be of that offer's machines."""
    return (
        (not job.models or offer.gpu_type in job.models)
        and (not job.sites or offer.site in job.sites)
        and not (job.no_spot and offer.spot)
        and (not offer.gpu_memory_bytes or offer.gpu_memory_bytes >= job.least_memory_bytes)
        and (job.gpus <= offer.gpus or job.gpus % offer.gpus == 0)
    )
