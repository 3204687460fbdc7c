"""Following a job: states and output side by side, attempt after attempt, and the final line after all of it."""

import pytest

from whaleflux.cli.following import ending, follow, state_line
from whaleflux.errors import Unavailable
from whaleflux.v1 import scheduler_pb2 as pb

NAME = "queues/default/jobs/j"


def job(state, attempt=0, *, message="", epoch=None, tasks=()):
    made = pb.Job(name=NAME, state=pb.JobState.Value(f"JOB_STATE_{state}"), state_message=message)
    for number in range(1, attempt):
        made.past_attempts.add(epoch=number, number=number)
    if attempt:
        made.attempt.epoch = made.attempt.number = attempt
        made.attempt.tasks.extend(tasks or [pb.Task(node="sites/s/nodes/a")])
    return made


class Fleet:
    """Gives these states, and for each attempt this output; an error in either is raised there."""

    def __init__(self, states, outputs=None):
        self.states, self.outputs, self.asked = states, outputs or {}, []

    def _each(self, items):
        for item in items:
            if isinstance(item, BaseException):
                raise item
            yield item

    def follow_job(self, name):
        return self._each(self.states)

    def read_logs(self, request, outage_s):
        self.asked.append((request.attempt, request.rank, request.all_ranks, request.follow))
        for item in self._each(self.outputs.get(request.attempt, [])):
            yield pb.StreamLogsResponse(data=item, attempt=request.attempt)


def test_all_output_comes_before_the_final_line_in_the_order_of_attempts(capfd):
    fleet = Fleet(
        [job("QUEUED"), job("RUNNING", 1), job("RECOVERING", 1, message="node lost"), job("RUNNING", 2), job("SUCCEEDED", 2)],
        {1: [b"one\n", b"two\n"], 2: [b"three\n"]},
    )  # fmt: skip
    assert follow(fleet, NAME) == 0
    out, err = capfd.readouterr()
    assert out == "one\ntwo\nthree\n"
    states = err.splitlines()
    assert [line.split(":")[0] for line in states] == [
        "-- QUEUED",
        "-- RUNNING on sites/s/nodes/a",
        "-- RECOVERING on sites/s/nodes/a",
        "-- RUNNING attempt 2 on sites/s/nodes/a",
        "-- SUCCEEDED",
    ]
    assert fleet.asked == [(1, 0, False, True), (2, 0, False, True)]


def test_an_attempt_that_came_and_went_unseen_is_read_too(capfd):
    assert follow(Fleet([job("SUCCEEDED", 3)], {1: [b"a\n"], 2: [b"b\n"], 3: [b"c\n"]}), NAME) == 0
    assert capfd.readouterr().out == "a\nb\nc\n"


def test_output_that_stays_on_a_lost_node_does_not_keep_the_rest_back(capfd):
    gone = Unavailable("the output is not complete without sites/s/nodes/a")
    assert follow(Fleet([job("SUCCEEDED", 2)], {1: [b"a\n", gone], 2: [b"b\n"]}), NAME) == 0
    out, err = capfd.readouterr()
    assert out == "a\nb\n"
    assert "the output of attempt 1 is not shown to its end: the output is not complete without" in err


def test_ctrl_c_says_how_to_go_on_and_how_to_end_the_job(capfd):
    assert follow(Fleet([job("RUNNING", 1), KeyboardInterrupt()]), NAME) == 130
    err = capfd.readouterr().err
    assert "the job goes on" in err
    assert f"whaleflux logs -f {NAME}" in err
    assert f"whaleflux cancel {NAME}" in err


def test_a_failure_shows_the_last_words_of_the_rank_that_failed_and_what_is_next(capfd):
    task = pb.Task(
        node="sites/s/nodes/a", exit_code=1, message="rank 3 ended with exit code 1\nTraceback\nValueError: x"
    )
    failed = job("FAILED", 1, message="rank 3 ended with exit code 1; it was restarted once", tasks=[task])
    assert follow(Fleet([failed], {1: [b"a\n"]}), NAME) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("-- FAILED: rank 3 ended with exit code 1")
    assert lines[1:4] == ["-- last lines of rank 3:", "--   Traceback", "--   ValueError: x"]
    assert lines[-1] == f"-- next: whaleflux logs --rank -1 --tail 50 {NAME} | whaleflux job {NAME}"


@pytest.mark.parametrize("shown_rank", [3, -1])
def test_last_words_that_were_shown_are_not_said_again(shown_rank):
    task = pb.Task(node="sites/s/nodes/a", exit_code=1, message="rank 3 ended with exit code 1\nValueError: x")
    assert not [line for line in ending(job("FAILED", 1, tasks=[task]), shown_rank=shown_rank) if "ValueError" in line]


def test_a_job_that_never_ran_says_its_cause_alone(capfd):
    assert follow(Fleet([job("CANCELLED", message="cancelled by ann")]), NAME) == 1
    assert capfd.readouterr().err == "-- CANCELLED: cancelled by ann\n"


def test_what_a_job_says_is_one_harmless_line():
    assert "\x1b" in state_line(job("RUNNING", 1, message="\x1b[2J")), "made harmless where it is shown"


def test_states_cannot_be_forged_by_what_a_job_says(capfd):
    follow(Fleet([job("RUNNING", 1, message="x\n-- SUCCEEDED\x1b[2J"), job("FAILED", 1)]), NAME)
    err = capfd.readouterr().err
    assert "\x1b" not in err
    assert not [line for line in err.splitlines() if line.startswith("-- SUCCEEDED")]
