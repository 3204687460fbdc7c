"""Checks a history against the guarantees; each function returns every violation that it finds."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping

from tests.robustness import guarantees as g
from tests.robustness.history import Change as Truth
from tests.robustness.history import (
    CheckpointRecord,
    Commit,
    FenceRecord,
    History,
    JobRecord,
    Listing,
    Outage,
    Seen,
    Step,
    Submission,
)
from tests.robustness.model import Model, Violation, given_twice


def validate(history: History) -> list[Violation]:
    """What holds for any history, whatever was broken."""
    return [
        *replay(history.truth),
        *listed_once(history.listings),
        *acknowledged_kept(history.submissions, history.truth),
        *watch_whole(history.watched, history.truth),
    ]


def replay(truth: Iterable[Truth], held: Iterable[Truth] = ()) -> list[Violation]:
    """The store's history through the model: states, epochs, fences, GPUs; `held` is what the store held before."""
    model = Model()
    model.begin(held)
    by_revision = itertools.groupby(truth, key=lambda change: change.revision)
    return [wrong for _, changes in by_revision for wrong in model.apply(list(changes))]


def commits(truth: Iterable[Truth], job: str) -> list[Commit]:
    """The first commit of each of the job's checkpoints, in their order; other jobs' are none of them."""
    found: dict[str, Commit] = {}
    for change in truth:
        match change.value:
            case CheckpointRecord(state="COMMITTED") as saved if saved.job == job:
                found.setdefault(saved.name, Commit(saved.name, saved.epoch, change.revision))
    return list(found.values())


def fenced_at(truth: Iterable[Truth], job: str, epoch: int) -> int:
    """The revision from which on the job's attempt `epoch` may write no more. Raises LookupError when it always may."""
    for change in truth:
        match change.value:
            case FenceRecord() as fence if fence.job == job and fence.epoch > epoch:
                return change.revision
    raise LookupError(f"epoch {epoch} of {job} was never fenced")


def listed_once(listings: Iterable[Listing]) -> list[Violation]:
    """No answer of ListAllocations shows a GPU twice."""
    return [wrong for listing in listings for wrong in given_twice(listing.held, "in ListAllocations")]


def acknowledged_kept(submissions: Iterable[Submission], truth: Iterable[Truth]) -> list[Violation]:
    """Every acknowledged job was stored once and is there to the end (these tests delete none)."""
    kept: dict[str, int] = {}
    for change in truth:
        if isinstance(change.value, JobRecord):
            kept.setdefault(change.name, 1)
        elif change.value is None:
            kept.pop(change.name, None)
    return [
        Violation(g.ACKNOWLEDGED_JOBS_STAY, f"{made.name} was acknowledged and is not in the store")
        for made in submissions
        if made.acknowledged and made.name not in kept
    ]


def watch_whole(watched: Iterable[Seen], truth: Iterable[Truth]) -> list[Violation]:
    """For each job, the watch showed exactly the store's changes, in their order."""
    seen: dict[str, list[int]] = defaultdict(list)
    true: dict[str, list[int]] = defaultdict(list)
    for message in watched:
        seen[message.name].append(message.revision)
    for change in truth:
        if isinstance(change.value, JobRecord):
            true[change.name].append(change.revision)
    return [
        Violation(g.WATCHES_ARE_WHOLE, f"{name}: {_difference(seen[name], true[name])}")
        for name in sorted({*seen, *true})
        if seen[name] != true[name]
    ]


def _difference(seen: list[int], true: list[int]) -> str:
    if missed := sorted(set(true) - set(seen)):
        return f"missed revisions {missed[:5]}"
    if strange := sorted(set(seen) - set(true)):
        return f"showed revisions {strange[:5]} that the store never had"
    return f"showed {seen[:20]}, the store had {true[:20]}"


def training_went_on(steps: Iterable[Step], longest_gap_s: float) -> list[Violation]:
    """Each rank made every step once, in one epoch, never waiting longer than `longest_gap_s`."""
    wrong = []
    by_rank: dict[int, list[Step]] = defaultdict(list)
    for step in steps:
        by_rank[step.rank].append(step)
    if not by_rank:
        wrong.append(Violation(g.TRAINING_GOES_ON, "no rank made a step"))
    for rank, made in by_rank.items():
        for before, after in itertools.pairwise(made):
            if after.epoch != before.epoch:
                wrong.append(_stopped(f"rank {rank} was restarted: epoch {before.epoch} became {after.epoch}"))
            elif after.step != before.step + 1:
                wrong.append(_stopped(f"rank {rank} went from step {before.step} to {after.step}"))
            elif after.at_s - before.at_s > longest_gap_s:
                wrong.append(_stopped(f"rank {rank} stood still for {after.at_s - before.at_s:.1f} s"))
    return wrong


def _stopped(detail: str) -> Violation:
    return Violation(g.TRAINING_GOES_ON, detail)


def converged(outages: Iterable[Outage], limit_s: float) -> list[Violation]:
    """All was well within `limit_s` of each return."""
    return [
        Violation(
            g.CONVERGES, f"{o.part}: {o.converged_s - o.back_s:.1f} s after its return; {o.missing or 'all well'}"
        )
        for o in outages
        if o.converged_s - o.back_s > limit_s
    ]


def restorable(faults: Mapping[str, str]) -> list[Violation]:
    """No checkpoint that counts as committed has damaged or missing files; `faults` by name, "" for none."""
    return [Violation(g.CHECKPOINTS_RESTORE, f"{name}: {fault}") for name, fault in faults.items() if fault]
