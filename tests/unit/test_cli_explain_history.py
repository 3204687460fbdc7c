"""`whaleflux explain --history`: one line for each decision, the time between them, and why the job waits now."""

from whaleflux.cli import decision_history
from whaleflux.v1 import scheduler_pb2 as pb


def test_each_decision_is_one_line_with_its_time_place_and_reason(capsys):
    answer = pb.ExplainJobResponse(job=pb.Job(name="queues/q/jobs/j", state=pb.JOB_STATE_QUEUED))
    answer.job.create_time.FromSeconds(1_000_000)
    for after_s, kind, message, more in (
        (2, pb.DECISION_KIND_WAITS, "no free GPU: 4 nodes", {"position": 3}),
        (210, pb.DECISION_KIND_PLACED, "8 x H200 on 1 node", {"attempt": 1, "gpus": 8}),
        (5_000, pb.DECISION_KIND_PREEMPTED, "makes room for\nqueues/q/jobs/\x1b[31mhigh", {"attempt": 1}),
    ):
        one = answer.history.add(kind=kind, message=message, **more)
        one.time.FromSeconds(1_000_000 + after_s)
    answer.decision.summary, answer.decision.position = "waits: no free GPU: 4 nodes", 1
    decision_history.show(answer)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "queues/q/jobs/j is QUEUED"
    assert [line.split("  ")[-1].strip() for line in lines[3:5]] == ["no free GPU: 4 nodes", "8 x H200 on 1 node"]
    assert "+3m28s" in lines[4]
    assert "placed (1)" in lines[4]
    assert "preempted (1)" in lines[5]
    assert "\x1b" not in lines[5]
    assert lines[6].startswith("now")
    assert lines[6].endswith("waits          1         no free GPU: 4 nodes")
    assert len(lines) == 7


def test_a_job_that_runs_waits_for_nothing(capsys):
    answer = pb.ExplainJobResponse(job=pb.Job(name="queues/q/jobs/j", state=pb.JOB_STATE_RUNNING))
    answer.decision.summary = "4 x H100 on 1 node"
    decision_history.show(answer)
    assert "now" not in capsys.readouterr().out
