"""What an agent is asked to run and what it has, as frozen data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from whaleflux.manifests.job_fields import Spec


@dataclass(frozen=True, slots=True)
class Work:
    """One task as the control plane wants it; the contract's DesiredTask without what only the wire needs."""

    task: str  # {job}-{epoch}-{group rank}
    job: str  # queues/{queue}/jobs/{job}
    epoch: int
    gpu_uuids: tuple[str, ...]  # in rank order; a driver may number its GPUs anew at any start
    first_rank: int = 0
    group_rank: int = 0
    world_size: int = 1
    group_world_size: int = 1
    rendezvous: str = ""  # host:port; "": the agent of group rank 0 chooses
    start: bool = False
    restart_count: int = 0
    spec: Spec = field(default_factory=Spec)  # what its job asks for
    traceparent: str = ""
    checkpoint_location: str = ""
    restore_checkpoint: str = ""
    elsewhere: str = ""  # a node of the attempt that does not share loopback addresses with this one
    cpu_ranks: int = 0  # of a task that holds no GPUs
    remote_datasets: tuple[str, ...] = ()  # that are not pulled for it: its queue holds as much data as it may
    job_uid: str = ""  # a later job of the same name has another
    share_bytes: int = 0  # of each GPU's memory, others may have the rest; 0: its GPUs are its own alone
    global_ranks: tuple[int, ...] = ()  # of its GPUs, where they do not follow `first_rank`

    @property
    def ranks(self) -> Sequence[int]:
        """Global ranks on this node, rising."""
        return self.global_ranks or range(self.first_rank, self.first_rank + (len(self.gpu_uuids) or self.cpu_ranks))

    @property
    def processes(self) -> Sequence[int]:
        """The ranks as whose processes the command is started here: all of the node, or the first for all of them."""
        return self.ranks[:1] if self.spec.launch_once else self.ranks

    def process_of(self, rank: int) -> int:
        """The position, among those of this node, of the process that is `rank` or has started it."""
        return 0 if self.spec.launch_once else self.ranks.index(rank)


class Stage(Enum):
    """How far the agent is with a task; REPORTING of phases to the control plane is finer."""

    ACCEPTED = "accepted"  # nothing of it runs yet
    LAUNCHING = "launching"  # image, data, processes
    RUNNING = "running"
    STOPPING = "stopping"  # its end was ordered or has begun; processes may be left
    ENDED = "ended"  # every process is reaped, the result is known
    REFUSED = "refused"

    @property
    def holds(self) -> bool:
        """True while processes of the task may exist."""
        return self in (Stage.LAUNCHING, Stage.RUNNING, Stage.STOPPING)


@dataclass(frozen=True, slots=True)
class ActualTask:
    """One task that the agent knows."""

    task: str
    job: str
    epoch: int
    gpu_uuids: tuple[str, ...]
    stage: Stage
    share_bytes: int = 0
