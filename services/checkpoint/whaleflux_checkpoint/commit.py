"""A checkpoint becomes COMMITTED here, in one transaction that compares the epoch of its job (`fence_of`).

An attempt that is over cannot commit, whatever its clocks and caches say: the scheduler has raised the job's fence before the next
attempt was made, and the comparison is made by the store.
"""

from __future__ import annotations

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import Aborted
from whaleflux.reasons import ErrorReason
from whaleflux.store.api import ConditionFailed, Equals, Put, Store, Unchanged
from whaleflux.telemetry import Metric
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux_checkpoint import convert, records
from whaleflux_checkpoint.core import resharding, state_machine
from whaleflux_checkpoint.core.state_machine import State
from whaleflux_checkpoint.moves import move

RACES = 20  # compare-and-swaps that may be lost in a row before the caller has to try again


def fence_of(job: str, epoch: int) -> Equals:
    """The job's present attempt is still `epoch`."""
    return Equals(convert.fence_key(job), str(epoch).encode())


def refuse_if_fenced(lost: ConditionFailed, job: str, epoch: int) -> None:
    """Raises Aborted (EPOCH_FENCED) when it was the fence that did not hold."""
    if any(isinstance(condition, Equals) for condition in lost.failed):
        raise fenced(job, epoch) from lost


def fenced(job: str, epoch: int) -> Aborted:
    """The refusal of an attempt that is over."""
    telemetry.counter(Metric.CHECKPOINT_COMMITS).labels("fenced").inc()
    return Aborted(
        f"epoch {epoch} of {job} is over; a newer attempt runs, this one must stop",
        reason=ErrorReason.EPOCH_FENCED,
        metadata={"job": job, "epoch": str(epoch)},
    )


class Commit:
    """See the module."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def if_complete(self, name: str) -> pb.Checkpoint:
        """WRITING -> COMMITTED once every rank has reported its pieces; the checkpoint as it is then, without pieces."""
        key = convert.checkpoint_key(name)
        for _ in range(RACES):
            entry = await records.existing(self._store, key, name)
            known, reports = convert.decode(entry), await records.reports(self._store, name)
            complete = {rank for report in reports for rank in report.complete_ranks}
            if convert.state_of(known) is not State.WRITING or not state_machine.is_complete(
                known.world_size, complete
            ):
                return known
            known.state = pb.CHECKPOINT_STATE_COMMITTED
            pieces = convert.pieces_of(reports)
            known.size_bytes = sum(piece.size_bytes for piece in pieces)
            said = resharding.settled(convert.resharding_of(known), (piece.path for piece in pieces))
            known.resharding = convert.resharding_number(said)
            known.commit_time.FromDatetime(self._clock.now())
            fence = fence_of(convert.job_of(name), known.epoch)
            try:
                await self._store.commit(Put(key, convert.encode(known)), when=[Unchanged(entry), fence])
            except ConditionFailed as lost:
                refuse_if_fenced(lost, convert.job_of(name), known.epoch)
                continue  # another report committed it first: look again
            telemetry.counter(Metric.CHECKPOINT_COMMITS).labels("committed").inc()
            await self._retain(known)
            return known
        raise Aborted(f"{name} changes too fast; report again", retry_after_s=1.0)

    async def _retain(self, committed: pb.Checkpoint) -> None:
        """Expires what is beyond the job's `keep`. Losing a race here is no harm: the next commit does it.

        Only while its attempt is the job's present one: the next may be restoring what this one would expire.
        """
        known = (await records.of_job(self._store, convert.job_of(committed.name))).values
        entries, saved = {entry.key: entry for entry, _ in known}, [convert.saved_of(one) for _, one in known]
        plan = state_machine.retain(saved, convert.saved_of(committed))
        fence = fence_of(convert.job_of(committed.name), committed.epoch)
        for old, state in [(s, State.EXPIRED) for s in plan.expire] + [(s, State.ABANDONED) for s in plan.abandon]:
            try:
                entry = entries[convert.checkpoint_key(old.name)]
                await move(self._store, entry, state, f"replaced by {committed.name}", when=[fence])
            except ConditionFailed:
                continue
