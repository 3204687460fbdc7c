"""A small model of the fleet: fed with the store's history, it says what could not have happened."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from tests.robustness import guarantees as g
from tests.robustness.guarantees import Guarantee
from tests.robustness.history import Change, CheckpointRecord, FenceRecord, Gpu, JobRecord

# The states of a job, as its contract has them.
NEXT = {
    "QUEUED": {"STARTING", "CANCELLED"},
    "STARTING": {"RUNNING", "RECOVERING", "FAILED", "CANCELLED"},
    "RUNNING": {"SUCCEEDED", "FAILED", "CANCELLED", "RECOVERING", "SUSPENDING"},
    "RECOVERING": {"STARTING", "QUEUED", "FAILED", "CANCELLED"},
    "SUSPENDING": {"QUEUED", "CANCELLED"},
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

    def apply(self, changes: list[Change]) -> list[Violation]:
        """One transaction: all changes of one revision."""
        wrong: list[Violation] = []
        for change in changes:  # the fences first: they are compared as of the same transaction
            if isinstance(change.value, FenceRecord):
                wrong += self._fence(change.revision, change.value)
        for change in changes:
            match change.value:
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
        wrong = []
        if job.epoch < before.epoch:
            wrong.append(_old(f"{job.name} went from epoch {before.epoch} back to {job.epoch} at revision {revision}"))
        if job.state not in NEXT[before.state] | {before.state}:
            wrong.append(_old(f"{job.name} went from {before.state} to {job.state} at revision {revision}"))
        return wrong

    def _checkpoint(self, revision: int, new: CheckpointRecord) -> list[Violation]:
        before, self.checkpoints[new.name] = self.checkpoints.get(new.name), new
        was = before.state if before else ""
        if new.state != "COMMITTED" or was == "COMMITTED" or self.fences.get(new.job) == new.epoch:
            return []
        now = self.fences.get(new.job)
        return [_old(f"{new.name} of epoch {new.epoch} was committed at revision {revision}, in epoch {now}")]

    def _double(self, revision: int) -> list[Violation]:
        holders: dict[Gpu, list[str]] = defaultdict(list)
        for job in self.jobs.values():
            for gpu in job.held:
                holders[gpu].append(f"{job.name} ({job.state}, epoch {job.epoch})")
        return [
            Violation(g.NO_GPU_TWICE, f"GPU {index} of {node} at revision {revision} is held by {', '.join(by)}")
            for (node, index), by in holders.items()
            if len(by) > 1
        ]


def _old(detail: str) -> Violation:
    return Violation(g.OLD_EPOCHS_CHANGE_NOTHING, detail)
