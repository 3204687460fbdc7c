"""What the random histories hold jobs to: a job that depends on another, has a time limit, or sets up first is judged by that."""

import pytest

from tests.robustness import guarantees as g
from tests.robustness.random_histories import check
from tests.robustness.random_histories.jobs import ENDED, FAILED, SUCCEEDED, Submitted

OTHER, JOB = "queues/q/jobs/other", "queues/q/jobs/job"


@pytest.mark.parametrize(
    ("when", "other", "end"),
    [
        (SUCCEEDED, "SUCCEEDED", "SUCCEEDED"),
        (SUCCEEDED, "FAILED", "CANCELLED"),
        (FAILED, "CANCELLED", "SUCCEEDED"),
        (FAILED, "SUCCEEDED", "CANCELLED"),
        (ENDED, "CANCELLED", "SUCCEEDED"),
    ],
)
def test_a_job_that_depends_on_another_ends_by_the_end_of_that(when, other, end):
    job = Submitted(JOB, 0, after=OTHER, when=when)
    allowed = [
        state
        for state in ("SUCCEEDED", "FAILED", "CANCELLED", "GONE")
        if not check.acknowledged_end_as_they_must([job], {JOB: state, OTHER: other}, 0)
    ]
    assert allowed == [end]


def test_an_endless_job_must_have_failed():
    job = Submitted(JOB, 0, endless=True)
    assert not check.acknowledged_end_as_they_must([job], {JOB: "FAILED"}, 0)
    assert check.acknowledged_end_as_they_must([job], {JOB: "SUCCEEDED"}, 0)


def test_a_rank_that_began_without_its_setup_is_told():
    line = {"what": "not set up", "job": JOB, "epoch": 1, "rank": 0, "node": "sites/x/nodes/a", "times": 2}
    assert [str(found) for found in check.set_up_once([line])] == [
        f"{g.ATTEMPTS_RUN_ONCE.name}: {JOB} epoch 1 rank 0 began on sites/x/nodes/a after 2 setups"
    ]
