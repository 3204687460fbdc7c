"""The quick way to make a record from another gives what `dataclasses.replace` gives."""

from dataclasses import fields, replace
from datetime import UTC, datetime

import pytest

from whaleflux_scheduler.core.changed import changed
from whaleflux_scheduler.core.model import Attempt, Job, JobState, SchedulingDecision, Spec

NOW = datetime(2026, 5, 1, tzinfo=UTC)
JOB = Job("queues/q/jobs/a", Spec(command=("x",), gpus=2), JobState.QUEUED, NOW, uid="u")


@pytest.mark.parametrize(
    "record", [JOB, Attempt(3, (), NOW, usd_per_hour=2.0), SchedulingDecision(NOW, True, "here", ahead=("a",))]
)
def test_each_field_can_be_changed_and_the_others_stay(record):
    assert changed(record) == record
    for field in fields(record):
        other = changed(record, **{field.name: "other"})
        assert other == replace(record, **{field.name: "other"})
        assert type(other) is type(record) and record != other


def test_the_first_record_is_as_it_was_and_no_field_is_made_up():
    after = changed(JOB, state=JobState.STARTING, epoch=1)
    assert (JOB.state, JOB.epoch, after.state, after.epoch) == (JobState.QUEUED, 0, JobState.STARTING, 1)
    with pytest.raises(KeyError):
        changed(JOB, sate=JobState.STARTING)
