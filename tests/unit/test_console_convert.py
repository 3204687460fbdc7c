"""What the console reads out of owners' records."""

import pytest

from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_console.convert import job_facts


@pytest.mark.parametrize(("kind", "failed"), [(pb.JOB_KIND_TRAINING, True), (pb.JOB_KIND_SERVICE, False)])
def test_what_a_replica_served_is_not_lost_by_its_end_and_a_trainings_work_is(kind, failed):
    attempt = pb.Attempt(number=1, end_reason="exit_code: 1")
    attempt.allocate_time.FromSeconds(100)
    attempt.end_time.FromSeconds(200)
    job = pb.Job(name="queues/q/jobs/j", uid="u", spec=pb.JobSpec(kind=kind), state=pb.JOB_STATE_CANCELLED)
    job.attempt.CopyFrom(attempt)
    (found,) = job_facts(job, "", 300_000).attempts
    assert found.failed is failed
