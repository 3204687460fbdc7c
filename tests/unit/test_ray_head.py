"""What stands beside a Ray head: the words it says to its agent, what it starts, what is kept of a reading; and the agent's end of it."""

import argparse
import socket
import struct
import threading
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
    assert "--labels=whaleflux/gpu=H100-80GB,whaleflux/site=onprem,rack=a" in words
    assert '--resources={"gpu_memory": 163840, "accelerator_type:H100": 2}' in words


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
