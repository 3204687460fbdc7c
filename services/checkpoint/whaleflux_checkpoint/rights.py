"""Whose checkpoints may be touched.

An agent acts for attempts that are placed on its node, reads what belongs to them, and deletes what its site wrote; people see those of
queues that are for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from whaleflux import names
from whaleflux.errors import NotFound, PermissionDenied
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth
from whaleflux.store.api import Store
from whaleflux.store.placements import Placement, Placements
from whaleflux.trust.ownership import Access, note_asked
from whaleflux.trust.sight import Sight
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux_checkpoint.commit import fenced

_LISTED = "list what exists with: whaleflux checkpoints"


class Rights:
    """Asks the scheduler's records of placements, which also hold while the scheduler is away."""

    def __init__(self, store: Store, queue_access: Callable[[str], Access]) -> None:
        self._placements, self._queue_access = Placements(store), queue_access

    async def check_acts_for(self, job: str, epoch: int) -> Placement | None:
        """The attempt's placement, which has a task on the caller's node; None for callers that are no agents (by the roles: none).

        Raises PermissionDenied, or Aborted (EPOCH_FENCED) when a later attempt was placed. That the epoch is still the job's newest is
        for the transaction to compare.
        """
        note_asked()
        if not (node := auth.caller().node):
            return None
        found = await self._placements.of(job, epoch)
        if found is not None and found.epoch == epoch and node not in found.nodes:
            found = await self._placements.newest(job)  # the store may have gone back to a backup
        if found is not None and found.epoch > epoch:
            raise fenced(job, epoch)
        if found is None or found.epoch < epoch or node not in found.nodes:
            raise _refused(f"no task of {job} in epoch {epoch} is placed on {node}")
        return found

    async def check_reads(self, job: str, resource: str, name: str, hint: str = _LISTED) -> Placement | None:
        """Where the job is placed, for an agent with a task of its newest attempt, else PermissionDenied; None for other callers.

        Raises NotFound for who may not see its queue.
        """
        if not (node := auth.caller().node):
            if not self._sees(job):
                raise NotFound(resource, name, hint)
            return None
        note_asked()
        found = await self._placements.newest(job)  # not what is remembered: that may be an earlier job's
        if found is None or node not in found.nodes:
            raise _refused(f"no task of {job[:200]} is placed on {node}")
        return found

    async def lists(self, parent: str) -> Callable[[pb.Checkpoint], bool]:
        """What a listing may show: to an agent, which names one job of its own, what belongs to that; to others what they may see."""
        if auth.caller().node:
            placed = await self.check_reads(parent, "checkpoint", parent)
            return lambda known: is_of(known, placed)
        note_asked()
        sight = Sight(auth.principal(), self._queue_access)
        return lambda known: sight.sees_queue(names.top(known.name))

    @staticmethod
    def check_own(known: pb.Checkpoint, placed: Placement | None) -> None:
        """Raises PermissionDenied for what an earlier job of the name has left: it may be somebody else's."""
        if not is_of(known, placed):
            raise _refused(f"{known.name} belongs to an earlier job of that name")

    def _sees(self, job: str) -> bool:
        return Sight(auth.principal(), self._queue_access).sees_queue(names.top(job))

    @staticmethod
    def deletes() -> Callable[[Collection[str]], bool]:
        """Whether the caller may delete what an attempt on these sites wrote: its storage outlives the nodes that wrote to it.

        Of records of an earlier version the sites are not known.
        """
        note_asked()
        node = auth.caller().node
        return lambda sites: not node or not sites or names.top(node) in sites

    def check_deletes(self, known: Iterable[pb.Checkpoint]) -> None:
        """Raises PermissionDenied for an agent of another site than those that wrote one of them."""
        may_delete = self.deletes()
        for one in known:
            if not may_delete(one.sites):
                raise _refused(
                    f"{one.name} was written by agents of {', '.join(one.sites)}, not of {names.top(auth.caller().node)}"
                )


def is_of(known: pb.Checkpoint, placed: Placement | None) -> bool:
    """Whether the checkpoint is of the job that is placed there, not of an earlier one of its name."""
    return placed is None or known.job_uid in ("", placed.job_uid)


def _refused(what: str) -> PermissionDenied:
    node = auth.caller().node
    return PermissionDenied(
        f"{what}; an agent acts for tasks that the scheduler has placed on its node",
        reason=ErrorReason.NOT_OWN_NODE,
        metadata={"node": node},
    )
