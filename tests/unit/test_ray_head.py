"""What stands beside a Ray head: the words it says to its agent, what it starts, what is kept of a reading; and the agent's end of it."""

import argparse
import socket
import struct
import threading
from pathlib import Path
from types import SimpleNamespace as Message

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.clock import VirtualClock
from whaleflux.errors import InvalidArgument
from whaleflux.ray_cluster import head, worker
from whaleflux.v1 import agent_pb2
from whaleflux_agent.core.work import Work
from whaleflux_agent.ray_readings import MOST_BYTES, MOST_TASKS, RayReadings


@given(
    st.text(max_size=40), st.integers(0, 2**40), st.binary(max_size=300), st.text(max_size=20), st.integers(0, 2**20)
)
def test_what_is_said_is_the_contract(token, number, demand, dashboard, known):
    said = agent_pb2.RankRequest.FromString(head.request(token, number, demand, dashboard, known))
    asked = agent_pb2.ReportRayRequest(number=number, demand=demand, dashboard=dashboard, known_decision=known)
    assert (said.token, said.WhichOneof("call"), said.report_ray) == (token, "report_ray", asked)


@given(st.booleans(), st.integers(0, 2**40), st.binary(max_size=300))
def test_and_what_comes_back_is_understood(again, number, decision):
    answer = agent_pb2.ReportRayResponse(again=again, decision_number=number, decision=decision)
    found = head.fields(answer.SerializeToString())
    assert (bool(found.get(1)), found.get(2, 0), found.get(3, b"")) == (again, number, decision)


def test_a_call_over_the_socket_and_a_refusal(tmp_path):
    path = str(tmp_path / "s")
    answers = [
        agent_pb2.RankResponse(report_ray=agent_pb2.ReportRayResponse(decision_number=3, decision=b"{}")),
        agent_pb2.RankResponse(error=agent_pb2.RankError(code="UNAUTHENTICATED", message="not the token of a task")),
    ]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve():
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    (size,) = struct.unpack("!I", connection.recv(4))
                    connection.recv(size)
                    content = answer.SerializeToString()
                    connection.sendall(struct.pack("!I", len(content)) + content)

        serving = threading.Thread(target=serve)
        serving.start()
        said = head.request("t", 1, b"x", "", 0)
        assert head.ask(path, said) == {2: 3, 3: b"{}"}
        with pytest.raises(OSError, match="not the token"):
            head.ask(path, said)
        serving.join()


def test_what_is_started():
    words = head.command("10.0.0.5", 20_017, 35_121, 35_122, "/tmp/f", 10**10)
    assert {"--head", "--block", "--no-monitor", "--num-cpus=0", "--num-gpus=0", "--port=20017"} <= {*words}
    assert "--dashboard-port=35121" in words
    assert "--object-store-memory=2000000000" in words
    first, second = head.free_ports("127.0.0.1", 2)
    assert first != second


def test_a_worker_says_what_its_node_has():
    asked = argparse.Namespace(
        address="h:1", gpus=2, cpus=8, gpu_memory_mib=81920, gpu_type="H100-80GB", site="onprem", memory_bytes=7, label=["rack=a"]
    )  # fmt: skip
    words = worker.command(asked, "/tmp/f")
    assert {"--address=h:1", "--num-gpus=2", "--num-cpus=8", "--memory=7"} <= {*words}
    assert f"--object-store-memory={worker.LEAST_STORE_BYTES}" in words
    assert "--labels=whaleflux/gpu=H100-80GB,whaleflux/site=onprem,rack=a" in words
    assert '--resources={"gpu_memory": 163840, "accelerator_type:H100": 2}' in words


def test_all_nodes_of_a_host_hold_objects_within_its_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(worker.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(worker.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**28}.__getitem__)
    host_bytes = 2**40
    assert 64 * worker.object_store_bytes(0, 1) <= host_bytes / 4, (
        "Ray by itself would take nineteen times what there is"
    )
    assert worker.object_store_bytes(0, 1, 1) == worker.object_store_bytes(0, 1), "how many GPUs there are is not known"
    for n in range(8):
        (tmp_path / f"0000:{n:02}").touch()
    monkeypatch.setattr(worker, "HOST_GPUS", tmp_path)
    assert host_bytes / 50 < worker.object_store_bytes(0, 1, 1) < host_bytes / 8
    assert worker.object_store_bytes(10**10, 1, 1) == 2 * 10**9


def test_a_session_leaves_no_folder_and_takes_away_what_a_killed_one_left(tmp_path, monkeypatch):
    monkeypatch.setattr(worker.os, "access", lambda *_: False)
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    left = tmp_path / "wfrayleft"
    for folder, lock in ((left, True), (tmp_path / "wfraynew", False), (tmp_path / "others", True)):
        (folder / "session").mkdir(parents=True)
        if lock:
            (folder / worker.IN_USE).touch()
    with worker.short_folder() as first, worker.short_folder() as second:
        assert not left.exists()
        assert Path(first).is_dir() and Path(second).is_dir(), "what is in use stays"
        assert Path(first).stat().st_mode & 0o7777 == 0o1777
    assert sorted(one.name for one in tmp_path.iterdir()) == ["others", "wfraynew"]


class Gcs:
    """The node of a worker, whose GCS answers only when it is asked for the `answers`-th time."""

    cluster = None

    def __init__(self, answers):
        self.left, self.drained = answers, []

    def state(self):
        self.left -= 1
        return (
            Message(status=worker.RUNNING_STATUS if not self.drained else worker.DEAD_STATUS)
            if self.left <= 0
            else None
        )

    def drain(self, state, reason, words, within_s):
        self.drained.append((reason, within_s))
        return True


def told_worker(monkeypatch):
    monkeypatch.setattr(worker, "LOOK_S", 0.0)
    one = worker.Worker(argparse.Namespace(idle_s=60.0, grace_s=25.0))
    one.joined = True
    one.stop()
    return one


def test_who_has_to_go_while_the_gcs_is_away_for_a_moment_drains_all_the_same(monkeypatch):
    node, raylet = Gcs(answers=5), Message(poll=lambda: None, returncode=0)
    assert told_worker(monkeypatch).watch(raylet, node, 0.0) == 0
    ((reason, within_s),) = node.drained
    assert reason == worker.PREEMPTED
    assert 20.0 < within_s <= 25.0, "what runs has its notice"


def test_and_goes_without_where_it_stays_away(monkeypatch):
    monkeypatch.setattr(worker, "DRAIN_S", 0.01)
    node, raylet = Gcs(answers=10**9), Message(poll=lambda: None, returncode=0)
    assert told_worker(monkeypatch).watch(raylet, node, 0.0) == 0
    assert not node.drained


def test_a_question_that_fails_ends_no_worker():
    class Client:
        def drain_node(self, *_):
            raise RuntimeError("Deadline Exceeded")

    node = worker.Node.__new__(worker.Node)
    node.client = Client()
    assert not node.drain(Message(node_id=b"a"), worker.IDLE, "idle", 0)


def test_a_node_leaves_only_where_what_is_to_be_held_is_there_without_it():
    def a_node(name, idle_ms, status=worker.IDLE_STATUS):
        total = {"GPU": 1.0, "CPU": 4.0}
        return Message(node_id=name, idle_duration_ms=idle_ms, status=status, instance_id="j", total_resources=total)

    def cluster(gpus, *nodes):
        asked = Message(request=Message(resources_bundle={"GPU": 1.0}), count=gpus)
        held = [Message(resource_requests=[asked])] if gpus else []
        return Message(cluster_resource_constraints=held, node_states=nodes)

    long, short, busy = a_node(b"a", 90), a_node(b"b", 60), a_node(b"c", 0, worker.RUNNING_STATUS)
    assert worker.is_spare(cluster(0, long, short), short), "nothing is to be held"
    assert not worker.is_spare(cluster(2, long, short), long), "it would be missed"
    assert worker.is_spare(cluster(2, long, short, busy), long)
    assert not worker.is_spare(cluster(2, long, short, busy), short), "another is idle for longer"
    gone = a_node(b"d", 0, worker.DEAD_STATUS)
    assert not worker.is_spare(cluster(1, long, gone), long)


def test_a_reading_is_bounded_and_without_the_dead():
    bundles = [{"resources": {"CPU": n + 1}, "count": n + 1} for n in range(2000)]
    nodes = [{"id": "a", "status": "DEAD"}, {"id": "b", "status": "IDLE"}]
    gangs = [{"bundles": [{"count": 1}] * 60, "count": n} for n in range(20)]
    found = head.bounded({"bundles": bundles, "gangs": gangs, "constraints": bundles, "nodes": nodes, "session": "s"})
    kept = len(found["bundles"]) + len(found["constraints"]) + sum(len(gang["bundles"]) for gang in found["gangs"])
    assert kept <= 1000
    assert found["bundles"][0]["count"] == 2000, "what waits most often is told"
    assert [node["id"] for node in found["nodes"]] == ["b"]


def test_decisions_for_ray_say_what_comes_and_what_never_does():
    class Answer(dict):
        def __init__(self, **fields):
            super().__init__(fields)

        def SerializeToString(self):
            return repr(self).encode()

    pb = argparse.Namespace(AutoscalingState=Answer, PendingInstanceRequest=Answer, ResourceRequest=Answer)
    decision = {
        "version": 5, "pending": [{"type": "H200x1", "count": 2}], "infeasible": [{"resources": {"gpu_memory": 9e9}, "count": 10**6}],
    }  # fmt: skip
    state = eval(head.autoscaling_state(decision, pb, 12.0))
    assert state["pending_instance_requests"][0] | {} == {
        "instance_type_name": "H200x1", "ray_node_type_name": "H200x1", "count": 2, "request_ts": 12,
    }  # fmt: skip
    assert len(state["infeasible_resource_requests"]) == 100


# the agent's end


def work(n=1, epoch=1):
    return Work(f"t{n}", f"queues/q/jobs/j{n}", epoch, ())


def report(number, demand=b"", known=0):
    return agent_pb2.ReportRayRequest(number=number, demand=demand, known_decision=known)


class TestAgent:
    def test_a_reading_goes_whole_once_and_then_that_nothing_changed(self):
        clock = VirtualClock()
        readings = RayReadings(clock)
        assert readings.report(work(), report(1)).again, "it has none of that number"
        assert not readings.report(work(), report(1, b"x")).again
        assert [one.demand for one in readings.take()] == [b"x"]
        assert not readings.take()
        readings.report(work(), report(1))
        assert not readings.take(), "two messages of a task are a little apart"

    async def test_after_a_while_and_on_a_new_stream(self):
        clock = VirtualClock()
        readings = RayReadings(clock)
        readings.report(work(), report(1, b"x"))
        readings.take()
        await clock.advance(1.0)
        readings.report(work(), report(1))
        (said,) = readings.take()
        assert (said.number, said.demand, said.job) == (1, b"", "queues/q/jobs/j1")
        readings.begin()
        await clock.advance(1.0)
        assert [one.demand for one in readings.take()] == [b"x"], "another scheduler has nothing of it"

    def test_decisions_go_back_to_their_own_task(self):
        readings = RayReadings(VirtualClock())
        readings.report(work(1), report(1, b"x"))
        readings.report(work(2), report(1, b"y"))
        readings.decided(agent_pb2.RayDecision(job="queues/q/jobs/j1", epoch=1, number=4, decision=b"{}"))
        readings.decided(agent_pb2.RayDecision(job="queues/q/jobs/j1", epoch=2, number=5, decision=b"other"))
        mine, others = readings.report(work(1), report(1)), readings.report(work(2), report(1))
        assert (mine.decision_number, mine.decision) == (4, b"{}")
        assert (others.decision_number, others.decision) == (0, b"")
        assert not readings.report(work(1), report(1, known=4)).decision, "it has that"

    def test_it_is_bounded(self):
        readings = RayReadings(VirtualClock())
        with pytest.raises(InvalidArgument, match="at most"):
            readings.report(work(), report(1, b"x" * (MOST_BYTES + 1)))
        for n in range(MOST_TASKS + 5):
            readings.report(work(n), report(1, b"x"))
        assert len(readings.take()) == MOST_TASKS
        assert readings.report(work(0), report(1)).again
