"""What an agent is asked to run and what it has, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Work:
    """One task as the control plane wants it; the contract's DesiredTask without what only the wire needs."""

    task: str  # {job}-{epoch}-{group rank}
    job: str  # queues/{queue}/jobs/{job}
    epoch: int
    gpu_indices: tuple[int, ...]  # in rank order
    first_rank: int = 0
    group_rank: int = 0
    world_size: int = 1
    group_world_size: int = 1
    rendezvous: str = ""  # host:port; "": the agent of group rank 0 chooses
    start: bool = False
    restart_count: int = 0
    max_restarts: int = 0
    command: tuple[str, ...] = ()
    image: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    service: bool = False
    working_directory: str = ""
    datasets: tuple[str, ...] = ()
    cpu_millicores_per_rank: int = 0
    memory_bytes_per_rank: int = 0
    stop_grace_s: float = 30.0
    traceparent: str = ""
    checkpoint_location: str = ""
    restore_checkpoint: str = ""
    keep_checkpoints: int = 0
    every_steps: int = 0

    @property
    def ranks(self) -> range:
        """Global ranks on this node."""
        return range(self.first_rank, self.first_rank + len(self.gpu_indices))


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
class Have:
    """One task that the agent knows."""

    task: str
    job: str
    epoch: int
    gpu_indices: tuple[int, ...]
    stage: Stage
