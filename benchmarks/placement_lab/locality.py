"""Which datasets stay on which node's NVMe: held while a job needs them, then kept until their room is needed.

A book of holds, pure and exact: the scheduler asks it when it starts or ends a job and tells agents what to fetch and what to drop. It
never refuses a job: what does not fit, or exceeds its owner's quota, is read from where it lives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum


class Source(Enum):
    """Where a job reads a dataset on one node."""

    LOCAL = "local"  # a copy is there already
    FETCH = "fetch"  # read once from its home and kept for the rest of the job
    REMOTE = "remote"  # read from its home each time: no room, no NVMe, or the owner's quota is used up


@dataclass(frozen=True, slots=True)
class Hold:
    """What a job got on one node, and which idle copies give way to it."""

    node: str
    dataset: str
    source: Source
    evicted: tuple[str, ...] = ()


@dataclass(slots=True)
class _Copy:
    size_bytes: int
    used_s: float
    holders: dict[str, str] = field(default_factory=dict)  # job -> owner


class PinBook:
    """Copies on nodes, and who holds them. `quotas` bounds the bytes an owner's running jobs may hold over the fleet."""

    def __init__(self, quotas: dict[str, int] | None = None) -> None:
        self.quotas = dict(quotas or {})
        self._capacity: dict[str, int] = {}
        self._copies: dict[str, dict[str, _Copy]] = {}
        self._held: dict[str, int] = {}  # bytes by owner
        self._by_job: dict[str, list[tuple[str, str]]] = {}

    def set_capacity(self, node: str, capacity_bytes: int) -> tuple[str, ...]:
        """The node's room for datasets, also when it changes; returns idle copies that must go. Held copies stay until released."""
        self._capacity[node] = capacity_bytes
        return self._evict(node, 0) or ()

    def remove_node(self, node: str) -> None:
        """The node is gone and its copies with it; jobs that held them hold nothing there."""
        for dataset in list(self._copies.get(node, {})):
            for job in list(self._copies[node][dataset].holders):
                self._release(job, node, dataset)
        self._copies.pop(node, None)
        self._capacity.pop(node, None)

    def hold(self, job: str, owner: str, node: str, dataset: str, size_bytes: int, now_s: float) -> Hold:
        """The job starts on the node and needs the dataset there."""
        copies = self._copies.setdefault(node, {})
        if dataset in copies:
            if job in copies[dataset].holders:
                return Hold(node, dataset, Source.LOCAL)
            if self._within_quota(owner, copies[dataset].size_bytes):
                self._hold(job, owner, node, dataset, now_s)
            copies[dataset].used_s = now_s  # beyond the quota it may read the copy but does not keep it
            return Hold(node, dataset, Source.LOCAL)
        if not self._within_quota(owner, size_bytes):
            return Hold(node, dataset, Source.REMOTE)
        evicted = self._evict(node, size_bytes)
        if evicted is None:
            return Hold(node, dataset, Source.REMOTE)
        copies[dataset] = _Copy(size_bytes, now_s)
        self._hold(job, owner, node, dataset, now_s)
        return Hold(node, dataset, Source.FETCH, evicted)

    def _within_quota(self, owner: str, size_bytes: int) -> bool:
        return owner not in self.quotas or self._held.get(owner, 0) + size_bytes <= self.quotas[owner]

    def _hold(self, job: str, owner: str, node: str, dataset: str, now_s: float) -> None:
        copy = self._copies[node][dataset]
        copy.holders[job], copy.used_s = owner, now_s
        self._held[owner] = self._held.get(owner, 0) + copy.size_bytes
        self._by_job.setdefault(job, []).append((node, dataset))

    def release(self, job: str) -> None:
        """The job ended: its copies stay where they are until somebody needs the room, or the node has shrunk meanwhile."""
        for node, dataset in list(self._by_job.get(job, ())):
            self._release(job, node, dataset)
            self._evict(node, 0)

    def _release(self, job: str, node: str, dataset: str) -> None:
        copy = self._copies[node][dataset]
        owner = copy.holders.pop(job)
        self._held[owner] -= copy.size_bytes
        self._by_job[job].remove((node, dataset))
        if not self._by_job[job]:
            del self._by_job[job]

    def _evict(self, node: str, size_bytes: int) -> tuple[str, ...] | None:
        """Drops idle copies, longest unused first, until `size_bytes` fit; None, and nothing dropped, when they cannot."""
        copies, capacity = self._copies.setdefault(node, {}), self._capacity.get(node, 0)
        excess = sum(c.size_bytes for c in copies.values()) + size_bytes - capacity
        gone: list[str] = []
        for name in sorted((n for n, c in copies.items() if not c.holders), key=lambda n: (copies[n].used_s, n)):
            if excess <= 0:
                break
            gone.append(name)
            excess -= copies[name].size_bytes
        if excess > 0 and size_bytes:
            return None
        for name in gone:
            del copies[name]
        return tuple(gone)

    def holders_of(self, dataset: str) -> tuple[str, ...]:
        """Nodes with a copy, in order of name: what `DatasetFact.cached_on` wants."""
        return tuple(sorted(node for node, copies in self._copies.items() if dataset in copies))

    def room_bytes(self, node: str) -> int:
        """What could be stored on the node now: its capacity less what jobs hold."""
        held = sum(c.size_bytes for c in self._copies.get(node, {}).values() if c.holders)
        return max(0, self._capacity.get(node, 0) - held)

    def held_bytes(self, owner: str) -> int:
        return self._held.get(owner, 0)

    def datasets_on(self, node: str) -> Iterable[str]:
        return tuple(sorted(self._copies.get(node, ())))

    def check(self) -> None:
        """Raises AssertionError when a capacity, a quota or a count does not hold."""
        held: dict[str, int] = {}
        for node, copies in self._copies.items():
            total = sum(c.size_bytes for c in copies.values())
            pinned = sum(c.size_bytes for c in copies.values() if c.holders)
            assert total <= max(self._capacity.get(node, 0), pinned), f"{node} holds more than it has room for"
            for copy in copies.values():
                for owner in copy.holders.values():
                    held[owner] = held.get(owner, 0) + copy.size_bytes
        assert held == {o: b for o, b in self._held.items() if b}, "bytes held by owners do not add up"
        for owner, quota in self.quotas.items():
            assert held.get(owner, 0) <= quota, f"{owner} holds more than its quota"
