"""What goes into the placement engine and what comes out: frozen data, no behaviour beyond derived sizes.

The engine itself is `whaleflux_scheduler.core.placement.engine.Engine`. A request names GPUs by what they can do, that
must hold together at a level of the topology tree; the answer is a `Placement` (nothing is reserved until it is applied) or a
`NoPlacement` that says what stands in the way. Bytes are bytes, bandwidths bytes per second in one direction, money USD.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from whaleflux.fleet.model import Level, LinkKind


@dataclass(frozen=True, slots=True)
class GpuOption:
    """One way to satisfy a request: `per_unit` GPUs of `model` ("" is any) for each GPU asked for.

    Each GPU given has a rank, and sizes of subgroups count ranks, whatever the option. `throughput` is the job's speed per GPU *asked for*
    relative to the job's reference GPU: "H200 or 2x A100" is `(GpuOption("H200"), GpuOption("A100-80GB", per_unit=2, throughput=0.9))`.
    """

    model: str = ""
    per_unit: int = 1
    throughput: float = 1.0


@dataclass(frozen=True, slots=True)
class GpuRequirement:
    """What each GPU, and the node it sits in, must offer. Zero and "" ask for nothing. CPU and host memory are taken per GPU."""

    any_of: tuple[GpuOption, ...] = (GpuOption(),)
    mig_profile: str = ""  # MIG instances of this profile; "": whole GPUs, unless an option's model names an instance
    min_memory_bytes: int = 0
    min_compute_capability: tuple[int, int] = (0, 0)
    cpu_millicores_per_gpu: int = 0
    host_memory_bytes_per_gpu: int = 0
    labels: tuple[tuple[str, str], ...] = ()  # every one must be on the node
    nvme: bool = False
    no_spot: bool = False  # no node that its owner may take back

    @property
    def of_node(self) -> bool:
        """Whether anything is asked of the node itself rather than of its GPUs."""
        return bool(self.labels or self.nvme or self.no_spot)


@dataclass(frozen=True, slots=True)
class Share:
    """A part of one GPU: device memory. `apart`: no two ranks on one device."""

    memory_bytes: int = 0
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Subgroup:
    """Each run of `size` consecutive ranks lies in one domain of `level` (tensor-parallel 8 in an `ISLAND`).

    A subgroup that is not required is kept together where that costs nothing else.
    """

    size: int
    level: Level = Level.ISLAND
    required: bool = True


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """The ranks: `gpus` in total.

    `level` must hold the whole group in one domain; `preferred` is tried before wider levels. With `share` each rank gets a part of
    a GPU, `gpus` counts ranks, and all ranks of one node may share a device.
    """

    gpus: int = 1
    level: Level | None = None
    preferred: Level | None = None
    subgroups: tuple[Subgroup, ...] = ()
    share: Share | None = None


class Goal(Enum):
    """What to optimise once the placement is feasible."""

    CLOSEST = "closest"  # least communication, then least cost, then least fragmentation
    CHEAPEST = "cheapest"  # least USD for the whole work within the deadline
    FASTEST = "fastest"  # least time for the whole work within the budget


@dataclass(frozen=True, slots=True)
class Preference:
    """Deadline and budget in terms of the work left: `work_gpu_s` GPU-seconds on the reference GPU (0: unknown).

    `deadline_s` counts from now; `comm_fraction` is the share of a step spent communicating when the gang is placed ideally.
    """

    goal: Goal = Goal.CLOSEST
    work_gpu_s: float = 0.0
    deadline_s: float | None = None
    budget_usd: float | None = None
    comm_fraction: float = 0.1


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """A gang: all of it or nothing. `id` names the attempt and must be new to the engine.

    `level` and `preferred` hold the whole job together; `min_nodes` spreads and `max_nodes` packs it (0: no bound). `near_nodes` are the
    nodes of the attempt before, which are preferred at equal cost, so that a recovered gang stays as close as before.
    """

    id: str
    group: GroupRequest = field(default_factory=GroupRequest)
    requirement: GpuRequirement = field(default_factory=GpuRequirement)
    level: Level | None = None
    preferred: Level | None = None
    min_nodes: int = 0
    max_nodes: int = 0
    priority: int = 0
    sites: tuple[str, ...] = ()  # allowed sites; () all
    exclude_nodes: tuple[str, ...] = ()
    near_nodes: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    data_reads: float = 1.0  # how often the job reads its datasets as a whole; a node that keeps them fetches them once
    hard_locality: bool = False  # only nodes that hold every dataset, and have the room to go on holding it
    preference: Preference = field(default_factory=Preference)
    without_gpus: bool = False  # its ranks get CPU and memory alone
    reservation: str = ""  # of those who ask: nothing to the engine, which is asked of that reservation's GPUs

    @property
    def units(self) -> int:
        """GPUs (or shares) asked for, before an option multiplies them."""
        return self.group.gpus


@dataclass(frozen=True, slots=True)
class NodeAssignment:
    """What the gang gets on one node: device indices in rank order, and the job-wide ranks that run on them.

    With `share`, an index repeats once for each rank on that device. Work without GPUs has ranks and no index.
    """

    node: str
    gpus: tuple[int, ...]
    ranks: tuple[int, ...]
    share: Share | None = None
    cpu_millicores: int = 0
    host_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """What the placement is modelled to cost. `run_s` and `total_usd` are None unless the request states its work."""

    step_communication_s: float = 0.0
    fetch_s: float = 0.0  # until every dataset is local
    usd_per_hour: float = 0.0
    run_s: float | None = None
    total_usd: float | None = None


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The slowest link on the gang's path: where it is and what it carries (bytes per second per GPU, one direction)."""

    level: Level  # the smallest domain that holds the gang
    link: LinkKind
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another place that was considered: where, at what cost, and why it was not taken."""

    where: str
    cost: Cost
    why_not: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Who runs where. Deterministic: the same engine state and request give an equal value."""

    id: str
    nodes: tuple[NodeAssignment, ...]
    option: GpuOption
    cost: Cost
    bottleneck: Bottleneck
    reasons: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    @property
    def gpus(self) -> int:
        """Ranks placed; each holds one GPU, or one share of one."""
        return sum(len(part.gpus) for part in self.nodes)

    @property
    def node_names(self) -> tuple[str, ...]:
        """Each node once, in rank order."""
        return tuple(dict.fromkeys(part.node for part in self.nodes))


@dataclass(frozen=True, slots=True)
class Blocked:
    """One constraint and how many nodes it alone rules out ("gpu memory < 80 GB", 12).

    `field` is the request's field that asks for it, "" when the fleet's state is the reason.
    """

    constraint: str
    nodes: int
    field: str = ""


@dataclass(frozen=True, slots=True)
class NoPlacement:
    """Why a request cannot be placed now.

    `blocked` counts each node once, under the first constraint it fails, in the order they are checked. `nearest_miss` is the domain that
    came closest and what it lacks. `smallest_change` is the least single change of the request that would admit it now, "" if none does.
    `ever` is False when the fleet could not hold the request even empty.
    """

    id: str
    blocked: tuple[Blocked, ...]
    nearest_miss: str
    smallest_change: str
    ever: bool
    wanted_gpus: int
    free_matching_gpus: int
    total_matching_gpus: int


@dataclass(frozen=True, slots=True)
class Victim:
    """Placed work that may be stopped: lower `priority` goes first, then what is `reclaimed`, then less `lost_gpu_s`.

    The last is work since its last checkpoint. What is reclaimed is stopped whatever its priority.
    """

    id: str
    priority: int
    lost_gpu_s: float = 0.0
    reclaimed: bool = False


class Limit(Protocol):
    """What counts beside the devices: how much the one who asks may take while others have it."""

    def leaves(self, id_: str) -> None:
        """As if this victim had left."""

    def stays(self, id_: str) -> None:
        """As if it had not."""

    def enough(self) -> bool:
        """Whether what is asked for may be taken so."""


@dataclass(frozen=True, slots=True)
class PreemptionPlan:
    """Stop these, then the placement holds. Minimal: sparing any one of the victims would not leave room."""

    victims: tuple[str, ...]
    placement: Placement
    lost_gpu_s: float


@dataclass(frozen=True, slots=True)
class DatasetFact:
    """A dataset: its size, the nodes that hold it on local storage, and how fast others fetch it from where it lives."""

    name: str
    size_bytes: int
    cached_on: tuple[str, ...] = ()
    origin_bytes_per_s: float = 1.25e9
    held_on: tuple[str, ...] = ()  # nodes where its room is taken for good: pinned, or read by a task
    charged_on: tuple[tuple[str, str], ...] = ()  # of pins that a queue's quota counts: queue and node
    # Its source is shown a secret, which only a task is given: it is not pulled ahead, nor read from afar.
    for_tasks_only: bool = False
