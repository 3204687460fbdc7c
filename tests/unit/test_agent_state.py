"""What the agent keeps on disk, and what it says about ends."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import replace

import pytest

from whaleflux.errors import ResourceExhausted
from whaleflux.manifests.shell_text import as_command, passes_signals_on
from whaleflux.v1 import agent_pb2, scheduler_pb2
from whaleflux_agent import ports
from whaleflux_agent.exit_text import describe, error_path, error_text
from whaleflux_agent.reports import ReportLog
from whaleflux_agent.runtime import procfs
from whaleflux_agent.runtime.api import LaunchPlan, RankExit, RankPlan
from whaleflux_agent.runtime.docker import container_request, exit_code
from whaleflux_agent.state import StateDir, TaskMeta


@pytest.fixture
def state(tmp_path):
    folder = StateDir(tmp_path / "state")
    yield folder
    folder.close()


def report(task="t"):
    return agent_pb2.TaskReport(task=task, phase=scheduler_pb2.TASK_PHASE_RUNNING)


async def test_reports_are_numbered_without_a_repeat_across_agents(state):
    first = ReportLog(state)
    await first.open()
    for _ in range(3):
        await first.add(report())
    await first.acknowledge(2)
    second = ReportLog(state)
    await second.open()
    assert [kept.sequence for kept in second.after(0)] == [3]
    await second.add(report())
    numbers = [kept.sequence for kept in second.after(0)]
    assert numbers[0] == 3
    assert numbers[1] > 3
    await second.acknowledge(numbers[1])
    assert second.after(0) == []
    assert list((state.root / "reports").iterdir()) == []


async def test_numbers_go_on_when_a_block_is_used_up(state, monkeypatch):
    monkeypatch.setattr("whaleflux_agent.state.SEQUENCES_RESERVED", 2)
    log = ReportLog(state)
    await log.open()
    for _ in range(5):
        await log.add(report())
    numbers = [kept.sequence for kept in log.after(0)]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 5


def test_tasks_come_back_with_what_was_chosen_for_them(state):
    desired = agent_pb2.DesiredTask(task=scheduler_pb2.Task(id="a/../b.1"), job="j", epoch=4)
    meta = TaskMeta("secret", "h:1", "h:2", (2, 3), "00-a-b-01", "no longer desired", reaped=True)
    folder = state.save_task(desired, meta)
    assert folder.parent == state.root / "tasks"
    state.save_result(agent_pb2.TaskReport(task="a/../b.1", exit_code=3))
    (record,) = state.load_tasks()
    assert record.desired == desired
    assert record.meta == meta
    assert record.result is not None
    assert record.result.exit_code == 3


def test_damaged_files_do_not_stop_the_agent(state):
    desired = agent_pb2.DesiredTask(task=scheduler_pb2.Task(id="good"))
    state.save_task(desired, TaskMeta("t"))
    (state.save_task(agent_pb2.DesiredTask(task=scheduler_pb2.Task(id="bad")), TaskMeta("t")) / "meta.json").write_text(
        "{"
    )
    (state.root / "desired.pb").write_bytes(b"\xff\xff\xff")
    (state.root / "epochs.json").write_text("nonsense")
    (state.root / "reports" / "0000000000000001.pb").write_bytes(b"\xff\xff\xff")
    assert [record.desired.task.id for record in state.load_tasks()] == ["good"]
    assert state.load_desired() is None
    assert state.load_epochs() == {}
    assert state.load_reports() == []


def test_secrets_are_readable_by_the_owner_alone(state):
    folder = state.save_task(agent_pb2.DesiredTask(task=scheduler_pb2.Task(id="t")), TaskMeta("secret"))
    for path in (folder, folder / "meta.json", folder / "task.pb", state.root):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_old_folders_are_collected_and_used_ones_kept(state):
    for number in range(6):
        folder = state.save_task(agent_pb2.DesiredTask(task=scheduler_pb2.Task(id=f"t.{number}")), TaskMeta("x"))
        os.utime(folder, (number, number))
    assert state.collect(2, frozenset({"t.0"})) == ["t.1", "t.2", "t.3"]
    assert sorted(record.desired.task.id for record in state.load_tasks()) == ["t.0", "t.4", "t.5"]


def test_what_is_collected_is_deleted_beside_and_by_the_next_agent_at_the_latest(state, monkeypatch):
    deleted = []
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: deleted.append(folder))
    for number in range(2):
        folder = state.save_task(agent_pb2.DesiredTask(task=scheduler_pb2.Task(id=f"t.{number}")), TaskMeta("x"))
        os.utime(folder, (number, number))
    assert state.collect(1, frozenset()) == ["t.0"]
    assert deleted == [], "what jobs have written may be a million files"
    assert [record.desired.task.id for record in state.load_tasks()] == ["t.1"]
    StateDir(state.root).empty_trash()
    assert [folder.parent for folder in deleted] == [state.root / "trash"]


def test_the_newest_jobs_epochs_are_kept(state, monkeypatch):
    monkeypatch.setattr("whaleflux_agent.state.EPOCHS_KEPT", 2)
    state.save_epochs({"a": 1, "b": 2, "c": 3})
    assert state.load_epochs() == {"b": 2, "c": 3}


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (RankExit(3, 1), "rank 3 ended with exit code 1"),
        (RankExit(3, -9), "rank 3 was ended by SIGKILL"),
        (RankExit(3, -9, out_of_memory=True), "out of memory"),
        (RankExit(3, -9, known=False), "nobody saw"),
        (RankExit(3, -60), "signal 60"),
    ],
)
def test_an_end_is_said_in_one_line_with_the_last_words_below(ended, words):
    text = describe(ended, "x" * 5000)
    assert words in text.splitlines()[0]
    assert len(text) <= 2000
    assert describe(ended, "").count("\n") == 0


def test_the_programs_own_record_of_its_error_wins(tmp_path):
    log = tmp_path / "rank-0.log"
    log.write_text("last line\n")
    assert error_text(tmp_path, log, 0) == "last line"
    error_path(tmp_path, 0).parent.mkdir()
    error_path(tmp_path, 0).write_text('{"message": {"message": "ValueError: bad", "extraInfo": {}}}')
    assert error_text(tmp_path, log, 0) == "ValueError: bad"
    error_path(tmp_path, 0).write_text('{"message": "plain"}')
    assert error_text(tmp_path, log, 0) == "plain"
    error_path(tmp_path, 0).write_text("broken")
    assert error_text(tmp_path, log, 0) == "last line"


def test_ports_come_from_the_range_and_are_free():
    port = ports.choose(21000, 21050, set(), host="127.0.0.1")
    assert 21000 <= port <= 21050
    with pytest.raises(ResourceExhausted):
        ports.choose(port, port, {port}, host="127.0.0.1")


def test_a_process_is_named_by_pid_and_start_time():
    own = procfs.stat(os.getpid())
    assert own is not None
    assert procfs.Process(os.getpid(), own.start_time).alive()
    assert not procfs.Process(os.getpid(), own.start_time + 1).alive()
    procfs.Process(os.getpid(), own.start_time + 1).signal(signal.SIGKILL)  # not us: we go on
    assert procfs.Process(os.getpid(), own.start_time + 1).pidfd() is None


def test_a_container_is_asked_for_with_limits_labels_and_its_gpus(tmp_path):
    rank = RankPlan(
        3,
        ("python", "train.py"),
        (("WHALEFLUX_AGENT_SOCKET", "/run/rank.sock"), ("WHALEFLUX_CHECKPOINT_LOCATION", "/ckpt"),
         ("WHALEFLUX_DATASET_C4", "/cache/c4"), ("TORCHELASTIC_ERROR_FILE", str(error_path(tmp_path, 3)))),
        tmp_path / "rank-3.log",
    )  # fmt: skip
    plan = LaunchPlan("j-1-0", "secret", tmp_path, (rank,), "/work", "image:1", 2500, 1 << 30, ("GPU-a", "GPU-b"))
    request = container_request(plan, rank)
    assert request["image"] == "image:1"
    assert request["command"] == ["python", "train.py"]
    assert request["nano_cpus"] == 2_500_000_000
    assert request["mem_limit"] == request["memswap_limit"] == 1 << 30
    assert request["labels"]["dev.whaleflux.token"] == "secret"
    assert request["device_requests"][0]["device_ids"] == ["GPU-a", "GPU-b"]
    modes = {path: mount["mode"] for path, mount in request["volumes"].items()}
    # Not the folder itself: with the records in it a container would tell the next agent what its task is.
    assert modes == {"/work": "rw", f"{tmp_path}/errors": "rw", "/run": "ro", "/ckpt": "rw", "/cache/c4": "ro"}
    bare = container_request(LaunchPlan("j", "s", tmp_path, (rank,), "/w", "i"), rank)
    assert not {"nano_cpus", "mem_limit", "device_requests"} & set(bare)


def test_a_script_takes_the_place_of_an_image_s_entry_point(tmp_path):
    def asked(script):
        rank = RankPlan(0, passes_signals_on(as_command(script)), (), tmp_path / "log")
        return container_request(LaunchPlan("j", "s", tmp_path, (rank,), "/w", "i"), rank)

    alone, several = asked("python train.py"), asked("cd x\npython train.py")
    assert (alone["entrypoint"], alone["command"]) == (as_command("python train.py"), None)
    assert several["entrypoint"][:2] == ["bash", "-c"]
    assert several["entrypoint"][-1].endswith("cd x\npython train.py")
    assert "entrypoint" not in container_request(
        LaunchPlan("j", "s", tmp_path, (), "/w", "i"), RankPlan(0, ("serve",), (), tmp_path / "log")
    )


def test_what_an_engine_is_told_of_secrets_is_their_folder_and_a_shell_puts_them_into_variables(tmp_path):
    def asked(rank, image=None, **more):
        secret = {"secrets": "/run/wf/t", "secret_variables": ("HF_TOKEN",)} | more
        return container_request(LaunchPlan("j", "s", tmp_path, (rank,), "/w", "i", **secret), rank, image)

    own = {"Entrypoint": ["/serve"], "Cmd": ["--model", "m"]}
    words = RankPlan(0, ("--port", "1"), (), tmp_path / "log")
    request = asked(words, own)
    assert request["volumes"]["/run/wf/t"] == {"bind": "/run/wf/t", "mode": "ro"}
    assert request["entrypoint"][:2] == ["/bin/sh", "-c"] and request["command"] is None
    assert request["entrypoint"][3:] == ["/run/wf/t/env", "/serve", "--port", "1"]
    assert asked(RankPlan(0, (), (), tmp_path / "log"), own)["entrypoint"][3:] == [
        "/run/wf/t/env",
        "/serve",
        "--model",
        "m",
    ]
    script = asked(RankPlan(0, tuple(as_command("train.py")), (), tmp_path / "log"), own)
    assert script["entrypoint"][4:] == as_command("train.py")
    assert "entrypoint" not in asked(words, secret_variables=())


def test_the_shell_gives_values_as_they_are(tmp_path):
    values = {"A": "x y\n", "B": "$(id) `id` \\ 'q' \"", "C": "ü\n\nz", "EMPTY": ""}
    for name, value in values.items():
        (tmp_path / name).write_text(value)
    plan = LaunchPlan("j", "s", tmp_path, (), "/w", "i", secrets=str(tmp_path.parent), secret_variables=tuple(values))
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    rank = RankPlan(0, (sys.executable, "-c", show), (), tmp_path / "log")
    begin = container_request(plan, rank, {})["entrypoint"]
    begin[3] = str(tmp_path)
    done = subprocess.run(begin, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    found = json.loads(done.stdout)
    assert {name: found[name] for name in values} == values
    assert not [name for name in found if name.startswith("WF_")]


def test_a_container_gets_the_mig_instance_of_its_rank_alone(tmp_path):
    ranks = tuple(RankPlan(rank, ("x",), (), tmp_path / "log") for rank in (4, 5))
    plan = LaunchPlan("j-1-0", "secret", tmp_path, ranks, "/work", "image:1", gpu_uuids=("MIG-a", "MIG-b"))
    asked = [container_request(plan, rank)["device_requests"][0]["device_ids"] for rank in ranks]
    assert asked == [["MIG-a"], ["MIG-b"]]


def test_the_request_is_one_that_the_sdk_takes(tmp_path):
    docker = pytest.importorskip("docker")
    from docker.models.containers import _create_container_args

    rank = RankPlan(0, ("x",), (("A", "b"),), tmp_path / "log")
    plan = LaunchPlan("j-1-0", "secret", tmp_path, (rank,), "/work", "image:1", 1000, 1 << 30, ("GPU-a",))
    wall = {"core_bytes": 0, "uid": 2001000003, "gid": 2001000009, "groups": [44], "home": "/h", "shm": "/dev/shm/wf"}
    plan = replace(plan, wall=wall, processes_per_rank=500)
    request = {**container_request(plan, rank), "version": docker.constants.DEFAULT_DOCKER_API_VERSION}
    arguments = _create_container_args(request)
    host = arguments["host_config"]
    assert host["NetworkMode"] == "host"
    assert host["DeviceRequests"][0]["DeviceIDs"] == ["GPU-a"]
    assert host["LogConfig"]["Type"] == "json-file"
    assert host["NanoCpus"] == 1_000_000_000
    assert (host["CapDrop"], host["SecurityOpt"], host["PidsLimit"]) == (["ALL"], ["no-new-privileges:true"], 500)
    assert (arguments["user"], host["GroupAdd"]) == ("2001000003:2001000009", ["44"])
    assert {one["Name"]: (one["Soft"], one["Hard"]) for one in host["Ulimits"]} == {"core": (1, 1), "memlock": (-1, -1)}
    assert {"/h:/h:rw", "/dev/shm/wf:/dev/shm:rw"} <= set(host["Binds"])
    assert host["IpcMode"] == "private"
    assert not host.get("Privileged") and not any("docker.sock" in bind for bind in host["Binds"])


def test_a_container_whose_user_is_its_image_s_gives_up_the_rest_all_the_same(tmp_path):
    ranks = tuple(RankPlan(rank, ("x",), (), tmp_path / "log") for rank in (0, 1))
    plan = LaunchPlan("j", "s", tmp_path, ranks, "/w", "i", wall={"core_bytes": 0, "shm": ""})
    request = container_request(plan, ranks[1])
    assert not {"user", "group_add", "privileged", "pids_limit"} & set(request)
    assert (request["cap_drop"], request["ipc_mode"]) == (["ALL"], "host")
    assert not {"pid_mode", "userns_mode", "devices"} & set(request)


@pytest.mark.parametrize(
    ("status", "code"), [(0, 0), (1, 1), (127, 127), (128, 128), (137, -9), (143, -15), (255, 255)]
)
def test_exit_codes_of_containers_name_signals_as_processes_do(status, code):
    assert exit_code(status) == code
