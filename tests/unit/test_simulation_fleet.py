"""`--from-fleet`: what inventory and scheduler tell of a fleet, as the beginning of a simulation."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.json_format import MessageToDict

from tests.unit.fleets import node
from whaleflux.convert import facts_to_proto
from whaleflux.errors import InvalidArgument
from whaleflux.v1 import inventory_pb2, scheduler_pb2
from whaleflux_scheduler.simulation import fleet_file
from whaleflux_scheduler.simulation.__main__ import main

NOW = datetime(2027, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def listed(intent=inventory_pb2.NODE_INTENT_ACTIVE, name="n0"):
    fact = node(name)
    return inventory_pb2.Node(name=fact.name, facts=facts_to_proto(fact), intent=intent)


def job(name, state, *, at=NOW, gpus=8, **spec):
    made = scheduler_pb2.Job(name=f"queues/a/jobs/{name}", state=state, uid=name)
    made.spec.gpus = gpus
    made.spec.command[:] = ["true"]
    for field, value in spec.items():
        getattr(made.spec, field).FromTimedelta(value)
    made.create_time.FromDatetime(at)
    return made


def running(name, *, since, **spec):
    made = job(name, scheduler_pb2.JOB_STATE_RUNNING, at=since, **spec)
    made.epoch = made.attempt.epoch = 1
    made.attempt.allocate_time.FromDatetime(since)
    made.attempt.run_time.FromDatetime(since)
    task = made.attempt.tasks.add(id=f"a.{name}.1.0", node="sites/a/nodes/n0", phase=scheduler_pb2.TASK_PHASE_RUNNING)
    task.gpu_uuids[:] = [f"n0-{at}" for at in range(8)]
    return made


@pytest.fixture
def snapshot(tmp_path):
    def write(*jobs, nodes=()):
        queues = [scheduler_pb2.Queue(name="queues/a", weight=2.0)]
        content = {"nodes": nodes or (listed(),), "queues": queues, "jobs": jobs}
        rows = {
            key: [MessageToDict(one, preserving_proto_field_name=True) for one in value]
            for key, value in content.items()
        }
        path = tmp_path / "fleet.json"
        path.write_text(json.dumps({"time": NOW.isoformat(), **rows}))
        return path

    return write


def test_what_runs_goes_on_for_what_is_left_of_it_and_what_waits_follows(snapshot, capsys):
    path = snapshot(
        running("runs", since=NOW - HOUR, time_limit=3 * HOUR),
        job("waits", scheduler_pb2.JOB_STATE_QUEUED, time_limit=HOUR),
    )
    assert main([f"--fleet={path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["summary"]
    assert found["succeeded"] == 2
    assert found["makespan_s"] == (2.7 - 1 + 0.9) * 3600.0
    assert found["overall"]["wait_most_s"] == 1.7 * 3600.0


def test_jobs_that_say_nothing_take_as_long_as_is_assumed(snapshot):
    fleet = fleet_file.read(snapshot(job("waits", scheduler_pb2.JOB_STATE_QUEUED)), 7200.0)
    assert [one.run_s for one in fleet.waiting] == [7200.0]
    assert [queue.weight for queue in fleet.cluster.queues.values()] == [2.0]


def test_nodes_that_take_no_work_are_left_out_with_what_runs_there(snapshot):
    nodes = (listed(inventory_pb2.NODE_INTENT_CORDONED), listed(name="n1"))
    fleet = fleet_file.read(snapshot(running("runs", since=NOW - HOUR), nodes=nodes), 7200.0)
    assert [one.name for one in fleet.cluster.nodes] == ["sites/a/nodes/n1"]
    assert not fleet.running


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "fleet.json").write_text("{")
    with pytest.raises(InvalidArgument, match="cannot read"):
        fleet_file.read(tmp_path / "fleet.json", 7200.0)
