"""Which nodes the newest attempt of each job is placed on: what tells the agents that act for it from all others.

The scheduler alone writes it, beside the job's fence and in the transaction that places the attempt; an attempt's nodes never change.
So whoever compares the fence in its own transaction may know a placement from before, and asks the store once per attempt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from whaleflux import names
from whaleflux.store import keys
from whaleflux.store.api import Put, Store
from whaleflux.v1 import scheduler_pb2 as pb

_KEPT_NODES = 200_000  # names, of all attempts that are remembered together: some 20 MB


@dataclass(frozen=True, slots=True)
class Placement:
    """One attempt of one job. `nodes` are resource names; `checkpoint_location` is the job's own, "" where it names none."""

    epoch: int
    job_uid: str
    nodes: frozenset[str]
    checkpoint_location: str = ""

    @property
    def sites(self) -> frozenset[str]:
        """Ids of the sites that the attempt is on."""
        return frozenset(names.top(node) for node in self.nodes)


def key_of(job: str) -> str:
    """Where the placement of a job is kept."""
    return keys.of_name(keys.JOB_PLACEMENTS, job)


def put(job: str, epoch: int, job_uid: str, nodes: Iterable[str], checkpoint_location: str = "") -> Put:
    """What records it."""
    by_site: dict[str, list[str]] = {}
    for node in sorted(set(nodes)):
        site, node_id = names.split(node, "sites", "nodes")
        by_site.setdefault(site, []).append(node_id)
    message = pb.JobPlacement(
        epoch=epoch,
        job_uid=job_uid,
        nodes=[pb.SiteNodes(site=site, nodes=ids) for site, ids in by_site.items()],
        checkpoint_location=checkpoint_location,
    )
    return Put(key_of(job), message.SerializeToString(deterministic=True))


def read(value: bytes) -> Placement:
    """What `put` stored."""
    message = pb.JobPlacement.FromString(value)
    nodes = frozenset(name for of in message.nodes for name in names.stored_nodes(of.site, of.nodes))
    return Placement(message.epoch, message.job_uid, nodes, message.checkpoint_location)


def epoch_of(value: bytes) -> int:
    """Of the attempt that `put` stored."""
    return pb.JobPlacement.FromString(value).epoch


class Placements:
    """Reads placements, each attempt's once: all nodes of a gang ask about the one record that names them all."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stored: dict[str, bytes] = {}  # what `_known` was read from
        self._known: OrderedDict[str, Placement] = OrderedDict()  # by job, the one that was used longest ago first
        self._size = 0

    async def newest(self, job: str) -> Placement | None:
        """As it is in the store now; None: no attempt of the job was placed yet, or it is deleted."""
        entry = await self._store.get(key_of(job))
        if entry is not None and self._stored.get(job) == entry.value:
            self._known.move_to_end(job)
            return self._known[job]
        self._forget(job)
        if entry is None:
            return None
        found = self._known[job] = read(entry.value)
        self._stored[job] = entry.value
        self._size += len(found.nodes)
        while self._size > _KEPT_NODES and len(self._known) > 1:
            self._forget(next(iter(self._known)))
        return found

    async def of(self, job: str, epoch: int) -> Placement | None:
        """Of that attempt, or of the newest if that is another one."""
        known = self._known.get(job)
        if known is None or known.epoch != epoch:
            return await self.newest(job)
        self._known.move_to_end(job)
        return known

    def _forget(self, job: str) -> None:
        if (gone := self._known.pop(job, None)) is not None:
            self._size -= len(gone.nodes)
            del self._stored[job]
