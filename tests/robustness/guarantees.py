"""What WhaleFlux promises whatever breaks: each guarantee by name, with the contract's own words.

Every violation that `validate` finds names one of these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Guarantee:
    """`source` says where the contract makes the promise."""

    name: str
    contract: str
    source: str


NO_GPU_TWICE = Guarantee(
    "no GPU is given twice",
    "GPUs of an unreachable node are not given away: the allocation stays, marked LOST, until the node's agent reports "
    "the task gone or the node is retired.",
    "scheduler.proto, Task.lost",
)
ACKNOWLEDGED_JOBS_STAY = Guarantee(
    "no acknowledged job is lost",
    "etcd is the truth: a CreateJob is answered after its transaction is committed, under a name that is kept.",
    "scheduler.proto, CreateJob; architecture, section 2",
)
ATTEMPTS_RUN_ONCE = Guarantee(
    "no attempt is run twice",
    "An attempt whose intent is written is adopted or proven gone, never started a second time in its epoch.",
    "agent/README.md; seams, section 4",
)
OLD_EPOCHS_CHANGE_NOTHING = Guarantee(
    "an old epoch changes nothing",
    "Counts attempts; everything an older epoch tries to write is refused.",
    "scheduler.proto, Job.epoch",
)
CHECKPOINTS_RESTORE = Guarantee(
    "a committed checkpoint restores or is reported lost",
    "WRITING -> COMMITTED -> CERTIFIED -> EXPIRED; LOST when no intact copy is left.",
    "checkpoint.proto, Checkpoint.state",
)
WATCHES_ARE_WHOLE = Guarantee(
    "a watch misses nothing and repeats nothing",
    "Every change after the revision: ordered, unique, complete; a broken stream resumes after its last message.",
    "scheduler.proto, WatchJobs; store/api.py, watch",
)
PARTITIONED_SITES_KEEP_JOBS = Guarantee(
    "a partitioned site keeps its jobs",
    "Stream lost: keep running the last desired set. Nothing is rerouted until the job's on_partition policy says so.",
    "scheduler.proto, PartitionPolicy; agent/README.md",
)
TRAINING_GOES_ON = Guarantee(
    "training does not stop for the control plane",
    "Any service can be killed at any time; training never waits for the control plane.",
    "agent/README.md, failure rule",
)
CONVERGES = Guarantee(
    "everything converges after an outage",
    "After its return everything converges within 10 s: reads answer, nodes are READY, a new job runs.",
    "architecture, section 2",
)

ALL = tuple(value for value in globals().values() if isinstance(value, Guarantee))
