"""The validation finds what it is there to find: a sound history passes, each kind of damage is named."""

from dataclasses import replace

import pytest

from tests.robustness import guarantees as g
from tests.robustness import validate
from tests.robustness.history import (
    Change,
    CheckpointRecord,
    FenceRecord,
    History,
    Holding,
    JobRecord,
    Listing,
    NodeRecord,
    Outage,
    Seen,
    Step,
    Submission,
)

A, B = "queues/q/jobs/a", "queues/q/jobs/b"
GPU, OTHER_GPU = "GPU-1", "GPU-2"
BY_A, BY_B = Holding(GPU, A, 1), Holding(GPU, B, 1)


def sound() -> History:
    saved = CheckpointRecord(f"{A}/checkpoints/s1-e1", "WRITING", 1)
    return History(
        submissions=[Submission(A, 0.0, acknowledged=True), Submission(B, 0.0, acknowledged=False)],
        watched=[Seen(A, 1), Seen(A, 2), Seen(A, 4)],
        listings=[Listing(0.0, ()), Listing(1.0, (BY_A, Holding(OTHER_GPU, A, 1)))],
        truth=[
            Change(1, A, JobRecord(A, "QUEUED", 0)),
            Change(2, f"fences/{A}", FenceRecord(A, 1)),
            Change(2, A, JobRecord(A, "STARTING", 1, (BY_A,))),
            Change(3, saved.name, saved),
            Change(4, A, JobRecord(A, "RUNNING", 1, (BY_A,))),
            Change(5, saved.name, replace(saved, state="COMMITTED")),
        ],
    )


def broken(history: History) -> set[str]:
    return {violation.guarantee.name for violation in validate.validate(history)}


def test_a_sound_history_breaks_nothing():
    assert validate.validate(sound()) == []


def test_guarantees_have_distinct_names_and_quote_their_contract():
    assert len({guarantee.name for guarantee in g.ALL}) == len(g.ALL) == 9
    assert all(guarantee.contract and guarantee.source for guarantee in g.ALL)


@pytest.mark.parametrize(
    ("change", "guarantee"),
    [
        (Change(6, B, JobRecord(B, "STARTING", 1, (BY_B,))), g.NO_GPU_TWICE),
        (Change(6, A, JobRecord(A, "RECOVERING", 0)), g.OLD_EPOCHS_CHANGE_NOTHING),
        (Change(6, A, JobRecord(A, "QUEUED", 1)), g.OLD_EPOCHS_CHANGE_NOTHING),
        (Change(6, f"fences/{A}", FenceRecord(A, 0)), g.OLD_EPOCHS_CHANGE_NOTHING),
        (Change(6, "c", CheckpointRecord(f"{A}/checkpoints/s2-e0", "COMMITTED", 0)), g.OLD_EPOCHS_CHANGE_NOTHING),
        (Change(6, A, None), g.ACKNOWLEDGED_JOBS_STAY),
        (Change(6, A, JobRecord(A, "RUNNING", 1, (BY_A, BY_A))), g.NO_GPU_TWICE),
    ],
)
def test_damage_in_the_store_is_named(change, guarantee):
    history = sound()
    history.truth.append(change)
    assert guarantee.name in broken(history)


def test_a_lost_checkpoint_that_a_later_attempt_finds_intact_is_no_commit_of_its_old_epoch():
    history, saved = sound(), CheckpointRecord(f"{A}/checkpoints/s1-e1", "LOST", 1)
    history.truth += [
        Change(6, f"fences/{A}", FenceRecord(A, 2)),
        Change(7, saved.name, saved),
        Change(8, saved.name, replace(saved, state="COMMITTED")),
    ]
    assert validate.validate(history) == []


def test_commits_are_told_by_job_and_revision_and_come_before_or_after_the_fence():
    late = CheckpointRecord(f"{A}/checkpoints/s2-e1", "COMMITTED", 1, step=2)
    others = CheckpointRecord(f"{B}/checkpoints/s9-e3", "COMMITTED", 3, step=9)
    truth = sound().truth
    with pytest.raises(LookupError):
        validate.fenced_at(truth, A, epoch=1)
    truth += [
        Change(6, f"fences/{B}", FenceRecord(B, 3)),
        Change(7, f"fences/{A}", FenceRecord(A, 2)),
        Change(8, late.name, late),
        Change(8, others.name, others),
        Change(9, late.name, late),
    ]
    assert validate.fenced_at(truth, A, epoch=1) == 7
    assert [(c.epoch, c.revision) for c in validate.commits(truth, A)] == [(1, 5), (1, 8)]


@pytest.mark.parametrize(
    "watched",
    [
        [Seen(A, 1), Seen(A, 4)],  # missed
        [Seen(A, 1), Seen(A, 2), Seen(A, 2), Seen(A, 4)],  # repeated
        [Seen(A, 1), Seen(A, 4), Seen(A, 2)],  # out of order
        [Seen(A, 1), Seen(A, 2), Seen(A, 4), Seen(B, 4)],  # invented
    ],
)
def test_a_watch_that_is_not_whole_is_named(watched):
    history = sound()
    history.watched = watched
    assert broken(history) == {g.WATCHES_ARE_WHOLE.name}


def test_a_listing_that_shows_a_gpu_twice_is_named():
    history = sound()
    history.listings.append(Listing(2.0, (BY_A, BY_B)))
    assert broken(history) == {g.NO_GPU_TWICE.name}


def test_a_job_may_start_again_where_its_remains_are_being_killed_but_not_where_they_are_lost():
    again = replace(BY_A, epoch=2)
    assert validate.listed_once([Listing(0.0, (BY_A, again))]) == []
    assert validate.listed_once([Listing(0.0, (replace(BY_A, lost=True), again))])


def test_shares_of_a_gpu_may_have_several_holders_within_its_memory_and_nobody_else_has_it():
    ours, theirs = replace(BY_A, share_bytes=60), replace(BY_B, share_bytes=50)
    records = [Change(6, A, JobRecord(A, "RUNNING", 1, (ours,))), Change(7, B, JobRecord(B, "STARTING", 1, (theirs,)))]
    for memory, wrong in ((110, set()), (100, {g.NO_GPU_TWICE.name})):
        known = Change(1, "nodes/n", NodeRecord({GPU: memory}))
        assert {v.guarantee.name for v in validate.replay([known, *sound().truth, *records])} == wrong
    for listing in ((ours, BY_B), (ours, ours)):
        assert validate.listed_once([Listing(0.0, listing)])


def test_an_acknowledged_job_that_was_never_stored_is_named():
    history = sound()
    history.submissions.append(Submission(B, 1.0, acknowledged=True))
    assert broken(history) == {g.ACKNOWLEDGED_JOBS_STAY.name}


def test_a_gpu_may_be_handed_on_in_one_transaction():
    history = sound()
    history.truth += [
        Change(6, A, JobRecord(A, "SUCCEEDED", 1)),
        Change(6, B, JobRecord(B, "STARTING", 1, (BY_B,))),
    ]
    history.watched += [Seen(A, 6), Seen(B, 6)]
    assert validate.validate(history) == []


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [Step(0, 0.0, 1, 1), Step(0, 0.1, 3, 1)],
        [Step(0, 0.0, 1, 1), Step(0, 0.1, 1, 1)],
        [Step(0, 0.0, 1, 1), Step(0, 0.1, 2, 2)],
        [Step(0, 0.0, 1, 1), Step(0, 9.0, 2, 1)],
    ],
)
def test_training_that_stopped_is_named(steps):
    assert validate.training_went_on(steps, 1.0)


def test_training_that_went_on_is_not():
    assert validate.training_went_on([Step(r, 0.1 * s, s, 1) for r in (0, 1) for s in (1, 2, 3)], 1.0) == []


def test_slow_convergence_is_named():
    well = Outage("etcd", 0.0, 2.0, 5.0)
    assert validate.converged([well], 10) == []
    assert validate.converged([replace(well, converged_s=12.5)], 10)


def test_a_committed_checkpoint_with_damaged_files_is_named():
    assert validate.restorable({"c1": "", "c2": ""}) == []
    assert validate.restorable({"c1": "", "c2": "rank-0.json is damaged"})
