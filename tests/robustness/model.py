"""A small model of the fleet: fed with the store's history, it says what could not have happened."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.robustness import guarantees as g
from tests.robustness.guarantees import Guarantee
from tests.robustness.history import Change, CheckpointRecord, FenceRecord, Gpu, Holding, JobRecord, NodeRecord

# The states of a job, as its contract has them.
NEXT = {
    "QUEUED": {"STARTING", "SUCCEEDED", "CANCELLED"},
    "STARTING": {"RUNNING", "RECOVERING", "SUCCEEDED", "FAILED", "CANCELLED"},
    "RUNNING": {"SUCCEEDED", "FAILED", "CANCELLED", "RECOVERING", "SUSPENDING"},
    "RECOVERING": {"STARTING", "QUEUED", "SUCCEEDED", "FAILED", "CANCELLED"},
    "SUSPENDING": {"QUEUED", "SUCCEEDED", "CANCELLED"},
    "SUCCEEDED": set(),
    "FAILED": set(),
    "CANCELLED": set(),
}


@dataclass(frozen=True, slots=True)
class Violation:
    """A guarantee that was broken, and how."""

    guarantee: Guarantee
    detail: str

    def __str__(self) -> str:
        return f"{self.guarantee.name}: {self.detail}"


@dataclass(slots=True)
class Model:
    """The state after the changes so far."""

    jobs: dict[str, JobRecord] = field(default_factory=dict)
    checkpoints: dict[str, CheckpointRecord] = field(default_factory=dict)
    fences: dict[str, int] = field(default_factory=dict)
    memory_bytes: dict[Gpu, int] = field(default_factory=dict)

    def begin(self, held: Iterable[Change]) -> None:
        """What the store holds when the history begins; it is what it is."""
        for change in held:
            match change.value:
                case FenceRecord() as fence:
                    self.fences[fence.job] = fence.epoch
                case JobRecord() as job:
                    self.jobs[job.name] = job
                case NodeRecord() as node:
                    self.memory_bytes |= node.memory_bytes
                case CheckpointRecord() as checkpoint:
                    self.checkpoints[checkpoint.name] = checkpoint

    def apply(self, changes: list[Change]) -> list[Violation]:
        """One transaction: all changes of one revision."""
        wrong: list[Violation] = []
        for change in changes:  # the fences first: they are compared as of the same transaction
            if isinstance(change.value, FenceRecord):
                wrong += self._fence(change.revision, change.value)
        for change in changes:
            match change.value:
                case NodeRecord() as node:
                    self.memory_bytes |= node.memory_bytes
                case JobRecord() as job:
                    wrong += self._job(change.revision, job)
                case CheckpointRecord() as checkpoint:
                    wrong += self._checkpoint(change.revision, checkpoint)
                case None:
                    self.jobs.pop(change.name, None)
                    self.checkpoints.pop(change.name, None)
        if any(isinstance(change.value, JobRecord) for change in changes):
            wrong += self._double(changes[0].revision)
        return wrong

    def _fence(self, revision: int, fence: FenceRecord) -> list[Violation]:
        before, self.fences[fence.job] = self.fences.get(fence.job, 0), fence.epoch
        if fence.epoch >= before:
            return []
        return [_old(f"fence of {fence.job} went from {before} back to {fence.epoch} at revision {revision}")]

    def _job(self, revision: int, job: JobRecord) -> list[Violation]:
        before, self.jobs[job.name] = self.jobs.get(job.name), job
        if before is None:
            return []
        wrong = self._given_on_a_lost_node(revision, before, job)
        if job.epoch < before.epoch:
            wrong.append(_old(f"{job.name} went from epoch {before.epoch} back to {job.epoch} at revision {revision}"))
        if job.state not in NEXT[before.state] | {before.state}:
            wrong.append(_old(f"{job.name} went from {before.state} to {job.state} at revision {revision}"))
        return wrong

    def _given_on_a_lost_node(self, revision: int, before: JobRecord, job: JobRecord) -> list[Violation]:
        """GPUs that this job gets while an attempt, its own or another's, may still use them on a lost node."""
        new = {(held.gpu, held.epoch) for held in job.held} - {(held.gpu, held.epoch) for held in before.held}
        lost = {held.gpu for each in self.jobs.values() for held in each.held if held.lost}
        return [
            Violation(g.NO_GPU_TWICE, f"{gpu} of a lost node was given to {job.name}@{epoch} at revision {revision}")
            for gpu, epoch in sorted(new)
            if gpu in lost
        ]

    def _checkpoint(self, revision: int, new: CheckpointRecord) -> list[Violation]:
        before, self.checkpoints[new.name] = self.checkpoints.get(new.name), new
        was = before.state if before else ""
        if new.state != "COMMITTED" or self.fences.get(new.job) == new.epoch:
            return []
        if was in (
            "COMMITTED",
            "LOST",
        ):  # it was committed in its own epoch; a later attempt may find a lost one intact
            return []
        now = self.fences.get(new.job)
        return [_old(f"{new.name} of epoch {new.epoch} was committed at revision {revision}, in epoch {now}")]

    def _double(self, revision: int) -> list[Violation]:
        held = (held for job in self.jobs.values() for held in job.held)
        return given_twice(held, f"at revision {revision}", self.memory_bytes)


def given_twice(held: Iterable[Holding], when: str, memory_bytes: Mapping[Gpu, int] | None = None) -> list[Violation]:
    """GPUs that are held by several jobs, twice by one attempt, or again by a job that may still use them elsewhere.

    Shares of one GPU may have several holders, within its memory where that is known.

    Only the job itself may start again on GPUs where its own remains are being killed: its agent starts nothing before
    they are gone. A lost node's agent cannot, so what is lost is given to nobody; what was given before is lost with it.
    """
    by_gpu: dict[Gpu, list[Holding]] = defaultdict(list)
    for each in held:
        by_gpu[each.gpu].append(each)
    return [
        Violation(g.NO_GPU_TWICE, f"{gpu} {when}: {', '.join(f'{h.job}@{h.epoch}' for h in holders)}")
        for gpu, holders in by_gpu.items()
        if (len({h.job for h in holders}) > 1 and not _fit_together(holders, (memory_bytes or {}).get(gpu)))
        or len({(h.job, h.epoch) for h in holders}) < len(holders)
        or any(len({h.lost for h in holders if h.job == job}) > 1 for job in {h.job for h in holders})
    ]


def _fit_together(holders: list[Holding], memory_bytes: int | None) -> bool:
    """Whether they are shares that fit; a job that starts again where its remains are being killed counts once."""
    shares = {h.job: h.share_bytes for h in holders}
    return all(shares.values()) and (memory_bytes is None or sum(shares.values()) <= memory_bytes)


def _old(detail: str) -> Violation:
    return Violation(g.OLD_EPOCHS_CHANGE_NOTHING, detail)
