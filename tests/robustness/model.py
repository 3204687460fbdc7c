"""A small model of the fleet: fed with the store's history, it says what could not have happened."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.robustness import guarantees as g
from tests.robustness.guarantees import Guarantee
from tests.robustness.history import Change, CheckpointRecord, FenceRecord, Gpu, Holding, JobRecord

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
        return given_twice((held for job in self.jobs.values() for held in job.held), f"at revision {revision}")


def given_twice(held: Iterable[Holding], when: str) -> list[Violation]:
    """GPUs that are held by several jobs, twice by one attempt, or again by a job that may still use them elsewhere.

    Only the job itself may start again on GPUs where its own remains are being killed: its agent starts nothing before
    they are gone. A lost node's agent cannot, so lost GPUs are nobody's.
    """
    by_gpu: dict[Gpu, list[Holding]] = defaultdict(list)
    for each in held:
        by_gpu[each.gpu].append(each)
    return [
        Violation(
            g.NO_GPU_TWICE, f"GPU {gpu[1]} of {gpu[0]} {when}: {', '.join(f'{h.job}@{h.epoch}' for h in holders)}"
        )
        for gpu, holders in by_gpu.items()
        if len({h.job for h in holders}) > 1
        or len({h.epoch for h in holders}) < len(holders)
        or (len(holders) > 1 and any(h.lost for h in holders))
    ]


def _old(detail: str) -> Violation:
    return Violation(g.OLD_EPOCHS_CHANGE_NOTHING, detail)
