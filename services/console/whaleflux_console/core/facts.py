"""What the ledger is told, as plain data: who was there, who held it, what it did, at what price.

Instants are whole milliseconds since 1970-01-01 UTC; intervals hold their start and not their end. Shares and ratios are whole millionths
(ppm), money is whole micro-dollars: no fraction is ever rounded twice. What is not known is None, never 0.

A *card* is a physical GPU and is what is paid for; a *device* is what work can hold: the card itself, or a MIG instance of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

HOUR_MS = 3_600_000
WHOLE_PPM = 1_000_000


class PriceKind(StrEnum):
    """How a card is paid for."""

    ON_DEMAND = "on_demand"
    RESERVED = "reserved"
    SPOT = "spot"
    OWNED = "owned"


@dataclass(frozen=True, slots=True)
class Presence:
    """A device was part of the fleet; `available` is False while nobody could be given it (quarantined, broken, in repair, cut off)."""

    card: str  # UUID of the physical GPU
    device: str  # UUID of what work holds: the card, or an instance of it
    node: str  # sites/{site}/nodes/{node}
    gpu_class: str  # catalogue name of the card
    part_ppm: int  # what of the card the device is, by memory
    start_ms: int
    end_ms: int
    available: bool = True
    goes_on: bool = False  # when it was told it still was so


@dataclass(frozen=True, slots=True)
class Holding:
    """An attempt of a job held a device, or a share of it."""

    device: str
    job: str  # queues/{queue}/jobs/{job}
    uid: str
    attempt: int  # from 1
    share_ppm: int  # of the device
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How an attempt was split, as far as its shape explains time: see `planning`."""

    pipeline: int = 1
    virtual_stages: int = 1
    micro_batches: int = 1
    recompute_share_ppm: int = 0  # of the time that computes: forward work that is done again


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a job: its times, how far it came, from where it began, what its placement costs in communication."""

    job: str
    uid: str
    attempt: int  # from 1
    queue: str
    user: str  # role/name
    model: str  # models/{model} that it serves; empty: none
    allocate_ms: int
    run_ms: int | None
    first_step_ms: int | None  # when its first step began
    end_ms: int | None  # None: it is on
    failed: bool = False  # it ended otherwise than by success or by a save that was asked for
    restored_step: int | None = None  # it began behind this step; None: from the beginning
    last_step: int | None = None
    last_saved_step: int | None = None  # of the newest checkpoint that it committed
    last_saved_ms: int | None = None
    communication_s: float | None = None  # modelled, per step: as placed
    best_communication_s: float | None = None  # on the best placement of an empty fleet
    best_free_communication_s: float | None = None  # on the best of what was free when it was placed
    of_its_model: bool = True  # these seconds are of its own model; else of a yardstick: only how they compare counts
    epoch: int = 0  # by which ranks and agents name it
    cross_node: bool = False
    plan: Plan | None = None  # None: nobody knows whether it is a pipeline; one that is none has Plan()


@dataclass(frozen=True, slots=True)
class Steps:
    """What one rank did between two reports: whole steps, and of their time what was not computing. None: it does not say."""

    uid: str
    attempt: int
    rank: int
    device: str
    start_ms: int
    end_ms: int
    first_step: int
    last_step: int
    data_ms: int | None = None  # waited for the next batch
    host_ms: int | None = None  # the GPU waited for the CPU otherwise
    save_ms: int | None = None
    comm_in_node_ms: int | None = None  # exposed: nothing else ran
    comm_cross_ms: int | None = None
    tokens: int | None = None
    flops: float | None = None  # of the model, without recomputation


@dataclass(frozen=True, slots=True)
class Sample:
    """What counters said of a device between two instants."""

    device: str
    start_ms: int
    end_ms: int
    tensor_ppm: int | None = None  # tensor pipes active x mean SM clock / highest
    sm_active_ppm: int | None = None
    idle_power: bool | None = None  # it drew no more than idle + 15 %
    source: str = ""  # "gpm", "dcgm", "nvml", "simulated"
    busy_ppm: int | None = None  # any kernel ran


@dataclass(frozen=True, slots=True)
class Fragmented:
    """A free device that no waiting gang could use, although they would have fitted on the free devices together."""

    device: str
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class PriceSpan:
    """What a card cost while this held."""

    card: str
    start_ms: int
    end_ms: int
    micros_per_hour: int
    kind: PriceKind
    source: str  # whose figure, and its date


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What an invoice says more (or, negative, less) than the prices, over the cells of its window that match."""

    name: str
    micros: int
    start_ms: int
    end_ms: int
    site: str = ""  # its id alone; empty: all
    gpu_class: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """What a replica of a model served, of one hour, by its engine's counters; `read_*` are these as they were read last in it.

    Tokens are None where nobody knows how many of those that are counted are of this hour.
    """

    uid: str  # of the replica's job
    attempt: int
    hour_ms: int
    input_tokens: int | None
    output_tokens: int | None
    read_input: int | None
    read_output: int | None


class Ending(StrEnum):
    """How a job that was to end ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A job that was to end, unlike one that serves, has ended."""

    uid: str
    ending: Ending


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that is known of a window.

    For the bill of an hour: what touches that hour; of reports and samples also the last before and the first behind it (by them a silence
    across its edge is judged); of each job all attempts. Prices keep their own beginning, which may be long ago: it is counted from there.
    Told twice is told once, and the order does not matter. Nothing tells the future: what goes on is told until now, and told again later.
    """

    presences: tuple[Presence, ...] = ()
    holdings: tuple[Holding, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    steps: tuple[Steps, ...] = ()
    samples: tuple[Sample, ...] = ()
    fragmented: tuple[Fragmented, ...] = ()
    prices: tuple[PriceSpan, ...] = ()
    adjustments: tuple[Adjustment, ...] = ()
    served: tuple[Served, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
