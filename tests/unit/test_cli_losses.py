"""What a job loses when it is stopped: the work since its last checkpoint that can be restored."""

import pytest

from whaleflux.cli.losses import loss, of_jobs
from whaleflux.errors import NotFound, Unavailable
from whaleflux.v1 import checkpoint_pb2 as ckpt
from whaleflux.v1 import scheduler_pb2 as pb

NOW = 10_000


def job(began_s=NOW - 600, kind=pb.JOB_KIND_TRAINING):
    made = pb.Job(name="queues/q/jobs/j", state=pb.JOB_STATE_RUNNING)
    made.spec.kind = kind
    if began_s:
        made.attempt.run_time.FromSeconds(began_s)
    return made


def saved(at_s, step=100, state=ckpt.CHECKPOINT_STATE_COMMITTED):
    made = ckpt.Checkpoint(state=state, step=step)
    made.commit_time.FromSeconds(at_s)
    return made


@pytest.mark.parametrize(
    ("made", "checkpoints", "said"),
    [
        (job(), [saved(NOW - 90), saved(NOW - 400, 50)], "loses 1m30s of work, goes on from its checkpoint at step 100"),
        (job(), [saved(NOW - 9000)], "loses 10m of work, goes on from its checkpoint at step 100"),
        (job(), [], "has no checkpoint: it begins anew and loses 10m of work"),
        (job(), [saved(NOW - 90, state=ckpt.CHECKPOINT_STATE_WRITING)], "has no checkpoint: it begins anew and loses 10m of work"),
        (job(0), [], "does not run yet, so it loses nothing"),
        (job(kind=pb.JOB_KIND_SERVICE), [], "a service, which starts again elsewhere"),
        (job(), [saved(NOW + 5)], "loses 0s of work, goes on from its checkpoint at step 100"),
    ],
)  # fmt: skip
def test_the_loss_is_counted_from_the_last_checkpoint_of_this_run(made, checkpoints, said):
    assert loss(made, checkpoints, NOW) == said


class Client:
    """A fleet in which only job j exists, without checkpoints."""

    def __init__(self):
        self.scheduler = self.checkpoint = self

    def GetJob(self, request, timeout):
        if request.name != "queues/q/jobs/j":
            raise NotFound("job", request.name)
        return job(0)

    def ListCheckpoints(self, request, timeout):
        return ckpt.ListCheckpointsResponse()


def test_a_job_that_is_gone_meanwhile_is_left_out_and_a_long_list_is_cut():
    assert of_jobs(Client(), ["queues/q/jobs/gone", "queues/q/jobs/j", "queues/q/jobs/j"]) == [
        "queues/q/jobs/j: does not run yet, so it loses nothing"
    ]
    assert of_jobs(Client(), [f"queues/q/jobs/{i}" for i in range(13)]) == ["and 3 more"]


def test_a_loss_that_nobody_can_tell_now_is_said_and_stops_nobody():
    class Silent(Client):
        def ListCheckpoints(self, request, timeout):
            raise Unavailable("checkpoint does not answer")

    (line,) = of_jobs(Silent(), ["queues/q/jobs/j"])
    assert line == "queues/q/jobs/j: what it loses is not known (checkpoint does not answer)"
