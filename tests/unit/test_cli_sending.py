"""Who interrupts the sending of a job is told whether it is there."""

import pytest

from whaleflux import fingerprint
from whaleflux.cli import sending
from whaleflux.errors import Unavailable
from whaleflux.v1 import scheduler_pb2 as pb

REQUEST = pb.CreateJobRequest(parent="queues/q", job_id="j", request_id="r1", job=pb.Job(spec=pb.JobSpec(gpus=1)))


class Scheduler:
    """Interrupts the sender; lists these jobs afterwards, or raises."""

    def __init__(self, *listed):
        self.listed, self.scheduler = list(listed), self

    def CreateJob(self, request, timeout):
        raise KeyboardInterrupt

    def ListJobs(self, request, timeout):
        found = self.listed.pop(0) if self.listed else []
        if isinstance(found, Exception):
            raise found
        return pb.ListJobsResponse(jobs=found)


def stored(mark):
    return pb.Job(name="queues/q/jobs/j", request_fingerprint=mark)


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([[stored(fingerprint.of_request(REQUEST))]], "queues/q/jobs/j was submitted; follow it: whaleflux logs -f"),
        ([[], [stored(fingerprint.of_request(REQUEST))]], "queues/q/jobs/j was submitted"),
        ([[stored("of an earlier one of that name")]] * 3, "it was not submitted"),
        ([Unavailable("gone")], "it is not known whether it was submitted (gone); see: whaleflux jobs"),
    ],
)
def test_ctrl_c_while_it_is_sent(capsys, monkeypatch, listed, said):
    monkeypatch.setattr(sending, "LOOK_AGAIN_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        sending.created(Scheduler(*listed), REQUEST)
    assert said in capsys.readouterr().err
