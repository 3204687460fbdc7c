"""What must hold at the end of any history: pure over the ranks' journal, the store's history and the last listings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.robustness import guarantees as g
from tests.robustness.history import Change, CheckpointRecord, JobRecord
from tests.robustness.model import Violation
from tests.robustness.random_histories.jobs import Submitted

Line = Mapping[str, Any]


def gpus_held_once(journal: Iterable[Line]) -> list[Violation]:
    """The kernel's word: a rank found its GPU's lock held by another living rank."""
    return [
        Violation(
            g.NO_GPU_TWICE, f"{line['job']} epoch {line['epoch']} started on {line['gpu']}, held by {line['holder']}"
        )
        for line in journal
        if line["what"] == "twice"
    ]


def attempts_run_once(journal: Iterable[Line], timeline_starts_s: Sequence[float] = ()) -> list[Violation]:
    """Each rank of each attempt was started once; a restored backup begins a new count."""
    starts = Counter(
        (line["job"], line["epoch"], line["rank"], sum(line["at_s"] >= at_s for at_s in timeline_starts_s))
        for line in journal
        if line["what"] == "start"
    )
    return [
        Violation(g.ATTEMPTS_RUN_ONCE, f"{job} epoch {epoch} rank {rank} was started {count} times")
        for (job, epoch, rank, _), count in starts.items()
        if count > 1
    ]


def set_up_once(journal: Iterable[Line]) -> list[Violation]:
    """What a rank found when it began."""
    return [
        Violation(
            g.ATTEMPTS_RUN_ONCE,
            f"{line['job']} epoch {line['epoch']} rank {line['rank']} began on {line['node']} after {line['times']} setups",
        )
        for line in journal
        if line["what"] == "not set up"
    ]


def acknowledged_end_as_they_must(
    jobs: Iterable[Submitted], states: Mapping[str, str], timeline: int
) -> list[Violation]:
    """What was acknowledged is there and has ended: well, unless it was cancelled, fails by itself, or waited in vain for another."""
    wrong = []
    for job in jobs:
        state = states.get(job.name, "GONE")
        allowed = {
            job.own_end if job.may_run(states.get(job.after, "GONE")) else "CANCELLED",
            *(["CANCELLED", "SUCCEEDED", "FAILED"] if job.cancelled else []),
        }
        if job.timeline < timeline:  # it may have been acknowledged after the backup, or cancelled before it
            allowed |= {"GONE", "CANCELLED", "SUCCEEDED", "FAILED"}
        if state not in allowed:
            wrong.append(
                Violation(g.ACKNOWLEDGED_JOBS_STAY, f"{job.name} is {state}, not {' or '.join(sorted(allowed))}")
            )
    return wrong


def checkpoints_kept(truth: Iterable[Change], at_the_end: Mapping[str, str]) -> list[Violation]:
    """No checkpoint that was ever committed is LOST at the end: every file is on a disk that is there again."""
    committed = {
        change.name
        for change in truth
        if isinstance(change.value, CheckpointRecord) and change.value.state == "COMMITTED"
    }
    return [
        Violation(g.CHECKPOINTS_RESTORE, f"{name} is LOST though its files are there")
        for name, state in at_the_end.items()
        if state == "LOST" and name in committed
    ]


def restored_newest(truth: Iterable[Change], journal: Iterable[Line]) -> list[Violation]:
    """No attempt begins behind a checkpoint that was committed before the attempt was made."""
    newest: dict[str, int] = defaultdict(int)
    due: dict[tuple[str, int], int] = {}
    for change in truth:
        match change.value:
            case CheckpointRecord(state="COMMITTED", step=step) as checkpoint:
                newest[checkpoint.job] = max(newest[checkpoint.job], step)
            case JobRecord() as job:
                due.setdefault((job.name, job.epoch), newest[job.name])
    return [
        Violation(
            g.CHECKPOINTS_RESTORE,
            f"{line['job']} epoch {line['epoch']} began at step {line['step']}; {needed} was committed",
        )
        for line in journal
        if line["what"] == "restored" and line["step"] < (needed := due.get((line["job"], line["epoch"]), 0))
    ]
