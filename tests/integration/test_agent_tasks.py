"""The agent against a control plane in this process, with real processes as tasks."""

import contextlib
import json
import signal
import socket
import sys
from functools import partial

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.support.fake_control_plane import JOB, NODE, agent, desired, ranks_of, until
from whaleflux import telemetry
from whaleflux.v1 import agent_pb2, health_pb2, scheduler_pb2
from whaleflux_agent.runtime import procfs

pytestmark = pytest.mark.integration


@pytest.fixture
def spans():
    exporter = InMemorySpanExporter()
    telemetry.setup_tracing("agent", exporter=exporter)
    yield exporter
    telemetry.setup_tracing("agent")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


SLEEP = ["/bin/sleep", "600"]
PRINT_ENVIRONMENT = "import json, os; print(json.dumps(dict(os.environ)))"


async def test_registers_what_the_profile_says_and_beats(control, state):
    async with agent(control, state):
        await until(lambda: control.inventory.registered and len(control.health.heartbeats) > 2)
    (request,) = control.inventory.registered
    assert request.name == NODE
    assert request.boot_id == procfs.boot_id()
    assert request.facts.simulated
    assert request.facts.driver_version == "simulated"
    assert [gpu.model for gpu in request.facts.gpus] == ["H200"] * 4
    assert len(request.facts.links) == 6
    assert "process" in request.facts.runtimes
    assert control.health.hellos[0].probe_address == request.facts.address
    assert [heartbeat.sequence for heartbeat in control.health.heartbeats[:3]] == [1, 2, 3]


async def test_a_task_runs_to_its_end_with_torchruns_environment(control, state):
    async with agent(control, state):
        control.tasks.want(desired(python(PRINT_ENVIRONMENT), gpus=(2, 0), first_rank=2, world_size=4))
        await until(lambda: "EXITED" in control.tasks.phases("train-1-0"))
        control.tasks.tell(agent_pb2.SyncResponse(logs=agent_pb2.LogRequest(request="r", job=JOB, rank=-1)))
        await until(lambda: any(chunk.end for chunk in control.tasks.logs))
    assert control.tasks.phases("train-1-0") == ["ACCEPTED", "STARTING", "RUNNING", "EXITED"]
    assert control.tasks.last("train-1-0").exit_code == 0
    printed = {chunk.rank: chunk.data.decode() for chunk in control.tasks.logs if chunk.data}
    assert sorted(printed) == [2, 3]
    rank3 = json.loads(printed[3])
    assert {k: rank3[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")} == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
    }
    accepted = next(r for r in control.tasks.reports if r.phase == scheduler_pb2.TASK_PHASE_ACCEPTED)
    assert f"{rank3['MASTER_ADDR']}:{rank3['MASTER_PORT']}" == accepted.rendezvous
    assert rank3["CUDA_VISIBLE_DEVICES"] == ""
    assert rank3["WHALEFLUX_JOB"] == JOB


async def test_waits_after_acceptance_until_it_is_told_to_start(control, state):
    async with agent(control, state):
        control.tasks.want(desired(SLEEP, start=False))
        await until(lambda: control.tasks.phases("train-1-0") == ["ACCEPTED"])
        rendezvous = control.tasks.last("train-1-0").rendezvous
        heartbeats = len(control.health.heartbeats)
        await until(lambda: len(control.health.heartbeats) > heartbeats + 3)
        assert control.tasks.phases("train-1-0") == ["ACCEPTED"]
        control.tasks.want(desired(SLEEP, edit=lambda task: setattr(task, "rendezvous", rendezvous)))
        await until(lambda: control.tasks.phases("train-1-0")[-1] == "RUNNING")
        await until(lambda: any(task.alive for task in control.health.heartbeats[-1].tasks))
        control.tasks.unwant("train-1-0")
        await until(lambda: control.tasks.phases("train-1-0")[-1] == "KILLED")
        assert control.tasks.last("train-1-0").exit_code == -signal.SIGTERM


async def test_a_failing_rank_is_reported_at_once_and_its_peers_are_ended(control, state):
    code = (
        "import os, sys, time, signal\n"
        "if os.environ['RANK'] == '1': sys.exit('no more data')\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(600)"
    )
    async with agent(control, state):
        control.tasks.want(desired(python(code), gpus=(0, 1), grace_s=0.5))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["EXITED"])
        report = control.tasks.last("train-1-0")
        assert (report.exit_code, report.failed_rank) == (1, 1)
        assert "no more data" in report.message
        assert "exit code 1" in report.message
        await until(lambda: control.health.observations)
        assert control.health.observations[0].kind == "TASK_EXIT"
        assert control.health.observations[0].job == JOB
        await until(lambda: not ranks_of(state))
    assert control.tasks.phases("train-1-0").count("EXITED") == 1
    assert "KILLED" not in control.tasks.phases("train-1-0")


async def test_a_command_that_does_not_exist_ends_with_the_reason(control, state):
    async with agent(control, state):
        control.tasks.want(desired(["/no/such/program"]))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["EXITED"])
    assert control.tasks.last("train-1-0").exit_code == 127
    assert "/no/such/program" in control.tasks.last("train-1-0").message


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda task: task.task.gpu_uuids.append("GPU-gone"), "GPU GPU-gone"),
        (lambda task: setattr(task.spec, "image", "registry.example/train:1"), "container engine"),
        (lambda task: task.spec.command.pop(), "neither a command"),
        (lambda task: setattr(task.spec, "working_directory", "/no/such/folder"), "/no/such/folder"),
    ],
)
async def test_what_cannot_run_here_is_refused_with_the_reason(control, state, edit, word):
    async with agent(control, state, "--no-docker"):
        control.tasks.want(desired(["x"], edit=edit, world_size=8))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["REFUSED"])
    assert word in control.tasks.last("train-1-0").message


async def test_an_agent_that_only_senses_beats_and_takes_no_work(control, state):
    async with agent(control, state, "--no-run"):
        await until(lambda: control.inventory.registered and len(control.health.heartbeats) > 2)
    assert list(control.inventory.registered[0].facts.runtimes) == []
    assert control.tasks.hellos == []  # the scheduler gives work only to agents that it hears


async def test_an_old_epoch_is_refused_also_by_the_next_agent(control, state):
    async with agent(control, state):
        control.tasks.want(desired(SLEEP, epoch=5))
        await until(lambda: control.tasks.phases("train-5-0")[-1:] == ["RUNNING"])
        control.tasks.unwant("train-5-0")
        await until(lambda: control.tasks.phases("train-5-0")[-1:] == ["KILLED"])
    async with agent(control, state):
        control.tasks.want(desired(SLEEP, epoch=4))
        await until(lambda: control.tasks.phases("train-4-0")[-1:] == ["REFUSED"])
        assert "epoch 4 is over" in control.tasks.last("train-4-0").message


async def test_the_next_epoch_starts_only_when_the_one_before_is_reaped(control, state):
    stubborn = python("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")
    marks = python("import time; print(time.time(), flush=True); time.sleep(600)")
    async with agent(control, state):
        control.tasks.want(desired(stubborn, grace_s=0.5))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        control.tasks.desired.clear()
        control.tasks.desired["train-2-0"] = desired(marks, epoch=2)
        whole = agent_pb2.DesiredTasks(tasks=control.tasks.desired.values(), revision=2)
        control.tasks.tell(agent_pb2.SyncResponse(desired=whole))
        await until(lambda: control.tasks.phases("train-2-0")[-1:] == ["RUNNING"])
    order = [(r.task, scheduler_pb2.TaskPhase.Name(r.phase)) for r in control.tasks.reports]
    assert order.index(("train-1-0", "TASK_PHASE_KILLED")) < order.index(("train-2-0", "TASK_PHASE_STARTING"))


async def test_minds_may_be_changed_faster_than_the_disk_writes(control, state):
    async with agent(control, state):
        await until(lambda: control.tasks.hellos)
        for epoch in range(1, 31):
            control.tasks.want(desired(SLEEP, epoch=epoch))
            if epoch % 3 == 0:
                await until(lambda: control.tasks.reports)
            control.tasks.unwant(f"train-{epoch}-0")
        control.tasks.want(desired(SLEEP, epoch=99))
        await until(lambda: control.tasks.phases("train-99-0")[-1:] == ["RUNNING"])
        await until(lambda: len(ranks_of(state)) == 1)


async def test_gpus_of_a_living_task_are_not_given_to_another_job(control, state):
    async with agent(control, state):
        control.tasks.want(desired(SLEEP, gpus=(0, 1)))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        control.tasks.want(desired(SLEEP, job="queues/default/jobs/other", gpus=(1, 2)))
        await until(lambda: control.tasks.phases("other-1-0") == ["ACCEPTED"])
        heartbeats = len(control.health.heartbeats)
        await until(lambda: len(control.health.heartbeats) > heartbeats + 3)
        assert control.tasks.phases("other-1-0") == ["ACCEPTED"]
        control.tasks.unwant("train-1-0")
        await until(lambda: control.tasks.phases("other-1-0")[-1] == "RUNNING")


async def test_a_service_gets_a_port_and_reports_its_endpoint(control, state):
    def service(task):
        task.spec.kind = scheduler_pb2.JOB_KIND_SERVICE

    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "{port}"]
    async with agent(control, state):
        control.tasks.want(desired(command, edit=service))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        host, _, port = control.tasks.last("train-1-0").endpoint.rpartition(":")

        await until(partial(listens, host, int(port)))


async def test_reports_survive_the_control_plane_and_the_agent(control, state):
    async with agent(control, state):
        control.tasks.want(desired(python("import time; time.sleep(0.5)")))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        await control.stop()
        await until((state / "tasks" / "train-1-0" / "result.pb").exists)
    async with agent(control, state):
        await control.start()
        await until(lambda: "EXITED" in control.tasks.phases("train-1-0"))
        await until(lambda: not list((state / "reports").glob("*.pb")))
    assert control.tasks.last("train-1-0").exit_code == 0
    first_told = list(dict.fromkeys(report.sequence for report in control.tasks.reports))
    assert first_told == sorted(first_told)


async def test_a_lost_control_plane_stops_nothing(control, state):
    async with agent(control, state):
        control.tasks.want(desired(SLEEP))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        await control.stop()
        (rank,) = ranks_of(state)
        await control.start()
        await until(lambda: len(control.tasks.hellos) == 2)
        assert rank.alive()
        (told,) = control.tasks.hellos[1].tasks
        assert told.phase == scheduler_pb2.TASK_PHASE_RUNNING


async def test_an_agent_that_stops_waits_until_its_goodbye_is_on_record(control, state):
    control.health.store_takes_s = 0.5
    async with agent(control, state) as stopping:
        await until(lambda: control.health.heartbeats)
        stopping.set()
    assert [goodbye.kind for goodbye in control.health.goodbyes] == [health_pb2.STOP_KIND_AGENT_RESTART]


async def test_goodbye_is_said_on_an_orderly_stop_and_work_goes_on(control, state):
    async with agent(control, state) as stopping:
        control.tasks.want(desired(SLEEP))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        await until(lambda: control.health.heartbeats)
        stopping.set()
    assert [goodbye.kind for goodbye in control.health.goodbyes] == [health_pb2.STOP_KIND_AGENT_RESTART]
    (rank,) = ranks_of(state)
    assert rank.alive()


async def test_logs_are_followed_until_the_task_ends(control, state):
    code = "import os, sys, time\nfor i in range(5):\n print('line', i)\n time.sleep(0.1)"
    async with agent(control, state):
        control.tasks.want(desired(python(code)))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        asked = agent_pb2.LogRequest(request="f", job=JOB, rank=0, follow=True)
        control.tasks.tell(agent_pb2.SyncResponse(logs=asked))
        await until(lambda: any(chunk.end for chunk in control.tasks.logs))
        none = agent_pb2.LogRequest(request="g", job="queues/default/jobs/none", rank=-1)
        control.tasks.tell(agent_pb2.SyncResponse(logs=none))
        await until(lambda: control.tasks.logs[-1].request == "g")
    data = b"".join(chunk.data for chunk in control.tasks.logs if chunk.request == "f")
    assert data.decode().splitlines() == [f"line {i}" for i in range(5)]
    assert "is not kept any more" in control.tasks.logs[-1].error


async def test_logs_are_kept_when_the_result_is_forgotten(control, state):
    async with agent(control, state):
        control.tasks.want(desired(python("print('hello')")))
        await until(lambda: "EXITED" in control.tasks.phases("train-1-0"))
        control.tasks.unwant("train-1-0")
        asked = agent_pb2.LogRequest(request="a", job=JOB, rank=-1, tail_lines=1)
        control.tasks.tell(agent_pb2.SyncResponse(logs=asked))
        await until(lambda: any(chunk.end for chunk in control.tasks.logs))
    async with agent(control, state):
        await until(lambda: len(control.tasks.hellos) == 2)
        asked.request = "b"
        control.tasks.tell(agent_pb2.SyncResponse(logs=asked))
        await until(lambda: control.tasks.logs[-1].request == "b" and control.tasks.logs[-1].end)
    for request in ("a", "b"):
        assert b"".join(chunk.data for chunk in control.tasks.logs if chunk.request == request) == b"hello\n"


async def test_launch_and_failure_are_in_the_trace_of_the_cause(control, state, spans):
    cause = telemetry.new_traceparent()
    async with agent(control, state):
        failing = desired(python("raise SystemExit(3)"), edit=lambda task: setattr(task, "traceparent", cause))
        control.tasks.want(failing)
        await until(lambda: "EXITED" in control.tasks.phases("train-1-0"))
        running = next(r for r in control.tasks.reports if r.phase == scheduler_pb2.TASK_PHASE_RUNNING)
        await until(lambda: telemetry.flush() and "agent.exit" in {span.name for span in spans.get_finished_spans()})
    launch = next(span for span in spans.get_finished_spans() if span.name == "agent.launch")
    ended = next(span for span in spans.get_finished_spans() if span.name == "agent.exit")
    assert f"{launch.parent.span_id:016x}" == cause.split("-")[2]
    assert running.traceparent.split("-")[2] == f"{launch.context.span_id:016x}"
    assert ended.parent.span_id == launch.context.span_id
    assert ended.status.status_code is StatusCode.ERROR
    assert launch.attributes["whaleflux.simulated"] is True
