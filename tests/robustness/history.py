"""What was done to a suite and what was seen of it: plain records, so that validation needs no servers."""

from __future__ import annotations

from dataclasses import dataclass, field

Gpu = str  # its UUID, wherever it sits


@dataclass(frozen=True, slots=True)
class Holding:
    """A GPU held by an attempt of a job; `lost`: its node is unreachable, so it may still be in use there.

    `share_bytes` of its memory only, 0: the whole GPU.
    """

    gpu: Gpu
    job: str
    epoch: int
    lost: bool = False
    share_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Submission:
    """A CreateJob; `acknowledged` False: refused or unanswered, so the job may exist or not."""

    name: str
    at_s: float
    acknowledged: bool


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as the store had it at one revision."""

    name: str
    state: str
    epoch: int
    held: tuple[Holding, ...] = ()  # one per task that holds a GPU, so that a repetition shows


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A checkpoint as the store had it at one revision."""

    name: str
    state: str
    epoch: int
    step: int = 0

    @property
    def job(self) -> str:
        return self.name.partition("/checkpoints/")[0]


@dataclass(frozen=True, slots=True)
class FenceRecord:
    """The epoch of a job that may write."""

    job: str
    epoch: int


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """Memory of a node's GPUs, bytes."""

    memory_bytes: dict[Gpu, int]


Value = JobRecord | CheckpointRecord | FenceRecord | NodeRecord


@dataclass(frozen=True, slots=True)
class Change:
    """One key's change in the store; `value` None: deleted."""

    revision: int
    name: str  # of the resource
    value: Value | None


@dataclass(frozen=True, slots=True)
class Commit:
    """A checkpoint became restorable, in the store's transaction `revision`."""

    checkpoint: str
    epoch: int  # of the attempt that saved it
    revision: int


@dataclass(frozen=True, slots=True)
class Seen:
    """One message of a watch over jobs: which job, as of which revision (0 for a deletion)."""

    name: str
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """One answer of ListAllocations."""

    at_s: float
    held: tuple[Holding, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A rank has made a step."""

    rank: int
    at_s: float
    step: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Outage:
    """A part was killed or stopped, came back, and everything was well again; monotonic seconds."""

    part: str
    began_s: float
    back_s: float
    converged_s: float = float("inf")
    missing: str = ""  # what had not converged when the waiting ended


@dataclass(slots=True)
class History:
    """Everything of one test. `truth` is the store's own history in revision order."""

    submissions: list[Submission] = field(default_factory=list)
    watched: list[Seen] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    truth: list[Change] = field(default_factory=list)
