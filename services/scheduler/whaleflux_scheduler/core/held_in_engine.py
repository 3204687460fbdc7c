"""What jobs hold and claim, as the placement engine has it by position: a job's GPUs, and of its claim what nobody else holds.

Two who hold one GPU are no reason to stop deciding for the others: what the engine cannot take is disputed, and said.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from whaleflux.errors import Aborted, AlreadyExists
from whaleflux.fleet.model import Level, LinkKind
from whaleflux_scheduler.core.devices import NOTHING, Devices, Gpus
from whaleflux_scheduler.core.model import Claim, Job
from whaleflux_scheduler.core.placement.api import Bottleneck, Cost, GpuOption, NodeAssignment, Placement, Share
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.request import share

log = logging.getLogger(__name__)
_CLAIM, KEPT, EXTRA = "!claim", "!kept", "!extra"


class HeldInEngine:
    """See the module. Who holds and claims what is recorded by `holdings`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.devices = Devices(lambda uuid: next(iter(self._holders.get(uuid, {}).values()), ""))
        self._jobs: dict[str, Job] = {}  # jobs that hold or claim something
        self._held: dict[str, Gpus] = {}
        self._claims: dict[str, Claim] = {}
        self._claimed: dict[str, Gpus] = {}
        self._holders: dict[str, dict[str, str]] = {}  # by UUID: jobs with their nodes; several only of shares
        self._claimant: dict[str, str] = {}  # by UUID
        self._disputed: set[str] = set()  # what the engine could not take

    def _take_out(self, jobs: Iterable[str]) -> None:
        for id_ in (id_ for job in jobs for id_ in self._ids(job)):
            self._disputed.discard(id_)
            if id_ in self._engine.placements:
                self._engine.release(id_)

    def _ids(self, job: str) -> tuple[str, ...]:
        """What the engine may know of the job."""
        return (job, claim_id(job)) if job in self._claims or self._claimed.get(job) else (job,)

    def _put_in(self, jobs: Iterable[str], beside: Iterable[str] = (), nodes: Collection[str] = ()) -> None:
        """`beside`: others whose claims are as before, and of which they keep more or less on these nodes."""
        for name in jobs:
            for node, uuids in self._held.get(name, NOTHING).items():
                for uuid in uuids:
                    self._join(uuid, name, node)
            for uuid in (uuid for uuids in self._claimed.get(name, NOTHING).values() for uuid in uuids):
                if self._goes_first(name, self._claimant.setdefault(uuid, name)):
                    self._claimant[uuid] = name
        for name in beside:
            self._amend(name, nodes)
        for name in jobs:
            if held := self._held.get(name):
                self._apply(self.as_placement(name, self._jobs[name], held))
            if name in self._claimed and (kept := self._kept(name)).nodes:
                self._apply(kept)

    def _amend(self, claimant: str, nodes: Collection[str]) -> None:
        """What its claim keeps on these nodes; a large claim is not to be taken out as a whole for each job that leaves it."""
        id_ = claim_id(claimant)
        if id_ in self._disputed:
            self._take_out([claimant])
            self._put_in([claimant])
            return
        kept = self._kept(claimant, nodes=nodes)
        if id_ not in self._engine.placements:
            if kept.nodes:
                self._apply(kept)
            return
        try:
            self._engine.amend(id_, nodes, kept.nodes)
        except Aborted as twice:
            log.error("%s holds GPUs that another job holds: %s", id_, twice)
            self._engine.release(id_)
            self._disputed.add(id_)

    def _join(self, uuid: str, name: str, node: str) -> None:
        """One more holder, unless the GPU is somebody else's alone, or would have to be."""
        jobs = self._holders.setdefault(uuid, {})
        if not jobs or name in jobs or all(self._share_bytes(job) for job in (*jobs, name)):
            jobs.setdefault(name, node)

    def _goes_first(self, name: str, other: str) -> bool:
        """Of two that claim one GPU: the one that makes way, or is lower, has not heard of it yet, and is about to lose its claim."""
        makes_way, has_it = self._makes_way(other, name), self._makes_way(name, other)
        if makes_way != has_it:
            return makes_way
        return name != other and self._jobs[name].spec.priority > self._jobs[other].spec.priority

    def _makes_way(self, name: str, claimant: str) -> bool:
        claim = self._claims.get(claimant)
        return claim is not None and name in claim.victims

    def _apply(self, placement: Placement) -> None:
        try:
            self._engine.apply(placement)
            self._disputed.discard(placement.id)
        except (AlreadyExists, Aborted) as twice:  # keep deciding for the others, and say so loudly
            log.error("%s holds GPUs that another job holds: %s", placement.id, twice)
            self._disputed.add(placement.id)

    def _settle_disputes(self) -> None:
        jobs = set(map(job_of, self._disputed))
        self._take_out(sorted(jobs))
        self._put_in(sorted(jobs))

    def _kept(self, claimant: str, as_if_free: str = "", nodes: Collection[str] | None = None) -> Placement:
        """What the claim itself keeps on these nodes: what nobody holds, and the rest of GPUs of which others have shares.

        The job `as_if_free` counts as holding nothing.
        """
        cover = self._cover(claimant, as_if_free, nodes)
        kept = self.as_placement(claim_id(claimant), self._jobs[claimant], cover)
        rests = tuple(self._rests(claimant, as_if_free, nodes))
        return replace(kept, nodes=(*kept.nodes, *rests)) if rests else kept

    def _rests(self, claimant: str, as_if_free: str, nodes: Collection[str] | None) -> Iterator[NodeAssignment]:
        claimed = self._claimed.get(claimant, NOTHING)
        for node in claimed if nodes is None else [node for node in nodes if node in claimed]:
            for uuid in sorted(uuid for uuid in claimed[node] if self._claimant.get(uuid) == claimant):
                rest, at = self._rest(node, uuid, claimant, as_if_free), self.devices.indices(node, (uuid,))
                if rest > 0 and at:
                    yield NodeAssignment(node, at, (), Share(rest))

    def _rest(self, node: str, uuid: str, claimant: str, as_if_free: str) -> int:
        """Bytes of a GPU that are to be nobody else's until enough of those leave who have shares of it."""
        others = self._holders.get(uuid, {}).keys() - {as_if_free}
        shares = [self._share_bytes(job) for job in others]
        if not shares or not all(shares) or claimant in others or self._free(node, uuid, claimant, as_if_free):
            return 0
        memory = self.devices.memory_bytes(node, uuid)
        return min(self._share_bytes(claimant) or memory, memory - sum(shares))

    def _cover(self, claimant: str, as_if_free: str, nodes: Collection[str] | None) -> Gpus:
        """What of a claim nobody holds, on these nodes."""
        cover, claimed = {}, self._claimed.get(claimant, NOTHING)
        for node in claimed if nodes is None else [node for node in nodes if node in claimed]:
            uuids = claimed[node]
            mine = (u for u in uuids if self._claimant.get(u) == claimant)
            if free := frozenset(u for u in mine if self._free(node, u, claimant, as_if_free)):
                cover[node] = free
        return cover

    def _free(self, node: str, uuid: str, claimant: str, as_if_free: str) -> bool:
        """Whether what the claimant wants of the GPU is free beside those who stay."""
        others = self._holders.get(uuid, {}).keys() - {as_if_free}
        if not others:
            return True
        shares = [self._share_bytes(job) for job in (*others, claimant)]
        return all(shares) and sum(shares) <= self.devices.memory_bytes(node, uuid)

    def _share_bytes(self, job: str) -> int:
        return self._jobs[job].spec.share_memory_bytes

    def _widen(self, claimant: str, as_if_free: str) -> None:
        id_ = claim_id(claimant)
        if id_ in self._engine.placements:
            self._engine.release(id_)
        self._engine.apply(self._kept(claimant, as_if_free))

    def as_placement(self, id_: str, job: Job, gpus: Gpus) -> Placement:
        """GPUs that a node does not report now take no position there, but their share of its CPU and memory.

        What is only kept has no ranks: nothing is sent between its nodes.
        """
        parts, rank, part_of, runs = [], 0, share(job.spec), id_ == job.name
        for node, uuids in gpus.items():
            indices = self.devices.indices(node, uuids)
            parts.append(
                NodeAssignment(
                    node,
                    indices,
                    tuple(range(rank, rank + len(indices))) if runs else (),
                    part_of,
                    cpu_millicores=len(uuids) * job.spec.counted_cpu_millicores,
                    host_memory_bytes=len(uuids) * job.spec.memory_bytes_per_rank,
                )
            )
            rank += len(indices)
        return Placement(id_, tuple(parts), GpuOption(), Cost(), Bottleneck(Level.NODE, LinkKind.PCIE_HOST, 0.0))


def claim_id(job: str) -> str:
    """What the engine calls the claim of a job."""
    return job + _CLAIM


def is_reservation(claimant: str) -> bool:
    """Whether GPUs are claimed by a reservation: no job, and nobody that makes room."""
    return claimant.startswith("reservations/")


def job_of(id_: str) -> str:
    """The job that the engine's id means, its claim's, or that of what it may have to give."""
    return id_.removesuffix(_CLAIM).removesuffix(EXTRA)
