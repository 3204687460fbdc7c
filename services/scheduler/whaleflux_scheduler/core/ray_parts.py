"""The jobs of a Ray cluster: which are to be made and which to end, whatever waits in it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum

from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.core.ray_clusters import RayCluster, RayClusterState

AGAIN_S = 10.0  # from the end of a head to the next one
DRAIN_S = 300.0  # longest wait for what workers have left on nodes, before the head ends
_FAMILY = "accelerator_type:"


class Role(IntEnum):
    """As in the contract."""

    HEAD = 1
    READER = 2
    WORKER = 3

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker is given. `cpus` and `memory_bytes` are what Ray may count on, `..._held` what its job asks for."""

    gpus: int = 0
    gpu_type: str = ""
    gpu_memory_mib: int = 0
    cpus: int = 1
    cpus_held: int = field(default=1, compare=False)
    memory_bytes: int = 0
    memory_bytes_held: int = field(default=0, compare=False)
    site: str = ""
    labels: tuple[tuple[str, str], ...] = ()  # of the node it has to be on

    @property
    def kind(self) -> str:
        """For people, and Ray's name of its type of node."""
        return f"{self.gpu_type or 'cpu'}x{self.gpus}"

    @property
    def total(self) -> dict[str, float]:
        """As Ray will tell it."""
        found: dict[str, float] = {"CPU": self.cpus}
        if self.memory_bytes:
            found["memory"] = self.memory_bytes
        if self.gpus:
            memory = self.gpus * self.gpu_memory_mib
            family = self.gpu_type.partition("-")[0]
            found |= {"GPU": self.gpus, "gpu_memory": memory, f"{_FAMILY}{family}": self.gpus}
        return found


@dataclass(frozen=True, slots=True)
class Part:
    """A job of the cluster as it stands. `since`: when it came into its state; `gone`: it has ended and holds nothing any more."""

    job: str
    role: Role
    state: JobState
    since: datetime
    ended: bool = False
    gone: bool = False
    worker: Worker = field(default_factory=Worker)
    address: str = ""  # that a worker joins; where a head that runs is reached
    session: str = ""  # of the head that a worker was made for; "": not known


@dataclass(frozen=True, slots=True)
class Make:
    """A head or a reader."""

    role: Role


@dataclass(frozen=True, slots=True)
class End:
    """A job."""

    job: str
    why: str


@dataclass(frozen=True, slots=True)
class Forget:
    """The record: nothing of the cluster is left."""


Act = Make | End | Forget


def first_role(cluster: RayCluster) -> Role:
    """The part that reads it."""
    return Role.READER if cluster.address else Role.HEAD


def acts(cluster: RayCluster, parts: Sequence[Part], session: str, since: datetime, now: datetime) -> Iterator[Act]:
    """What is to be done. `session`: the head's as it was read last, "" where that is not known; `since`: of the cluster's state."""
    if cluster.state is RayClusterState.ENDING:
        yield from _down(parts, long_enough=now - since > timedelta(seconds=DRAIN_S))
        return
    role = first_role(cluster)
    firsts = [part for part in parts if part.role is role]
    live = [part for part in firsts if not part.ended]
    if not live and all((now - part.since).total_seconds() >= AGAIN_S for part in firsts):
        yield Make(role)
    yield from _of_other_heads(cluster, parts, live, session)


def _down(parts: Sequence[Part], *, long_enough: bool) -> Iterator[Act]:
    """Workers first, with the head there for them to drain from; then the head; then the record."""
    workers = [part for part in parts if part.role is Role.WORKER]
    rest = [part for part in parts if part.role is not Role.WORKER]
    yield from (End(part.job, "the Ray cluster is taken down") for part in workers if not part.ended)
    if not all(part.gone or (part.ended and long_enough) for part in workers):
        return
    yield from (End(part.job, "the Ray cluster is taken down") for part in rest if not part.ended)
    if all(part.gone or (part.ended and long_enough) for part in rest):
        yield Forget()


def _of_other_heads(cluster: RayCluster, parts: Sequence[Part], firsts: Sequence[Part], session: str) -> Iterator[End]:
    """Workers of a head that is not there any more: they wait for it in vain, and hold GPUs."""
    address = cluster.address or next((part.address for part in firsts if part.address), "")
    for part in parts:
        if part.role is not Role.WORKER or part.ended:
            continue
        if address and part.address != address:
            yield End(part.job, f"its head is gone; the cluster's is at {address} now")
        elif session and part.session and part.session != session:
            yield End(part.job, "its head was started anew")
