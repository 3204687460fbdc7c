"""A worker joins a real Ray cluster, its work runs, and it leaves: idle by itself, told to go after what runs has ended.

Needs Ray in an environment of its own (`make ray`); skipped without.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from whaleflux.ray_cluster import reading, worker

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-ray" / "bin" / "python"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.exists(), reason="Ray is not installed: make ray"),
]
WITHIN_S = 200.0  # Ray's own start takes half a minute on a busy host, and is tried three times
TASKS = """
import ray, sys, time
address, seconds, folder = sys.argv[1], float(sys.argv[2]), sys.argv[3]
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
@ray.remote(num_cpus=0, num_gpus=0.5, resources={"gpu_memory": 60000}, max_retries=0)
def task(n): open(f"{folder}/runs-{n}", "w").close(); time.sleep(seconds); return 1
found = [task.remote(n) for n in range(2)]
print("submitted", flush=True)
print("done", ray.get(found, timeout=300), flush=True)
"""


def until(condition, what):
    end = time.monotonic() + WITHIN_S
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} within {WITHIN_S} s"
        time.sleep(0.5)
    return found


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """The address of a head without GPUs."""
    folder, port = Path(tempfile.mkdtemp(prefix="ray")), free_port()  # Ray's sockets need a short path
    command = [
        PYTHON.with_name("ray"), "start", "--head", f"--port={port}", "--num-cpus=1", "--num-gpus=0", "--include-dashboard=false",
        f"--temp-dir={folder}", "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", "--block",
        "--object-store-memory=80000000", "--dashboard-agent-listen-port=0",
    ]  # fmt: skip
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, start_new_session=True)
    address = f"127.0.0.1:{port}"
    try:
        until(lambda: head.poll() is not None or _answers(address), "the head answers")
        assert head.poll() is None, (folder / "head.log").read_text()
        yield address
    finally:
        worker.end(head)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(address):
    try:
        return any(node["status"] == "IDLE" for node in reading.read_once(address, str(PYTHON))["nodes"])
    except Exception:  # not yet
        return False


def started(address, folder, *words):
    environment = {**os.environ, "WHALEFLUX_JOB": f"queues/q/jobs/{folder.name}", "WHALEFLUX_EPOCH": "1"}
    program = Path(worker.__file__)
    command = [
        PYTHON, program, f"--address={address}", "--gpus=1", "--cpus=1", "--gpu-memory-mib=144384", "--gpu-type=H200", "--site=onprem", *words,
    ]  # fmt: skip
    with (folder / "worker.log").open("wb") as log:
        return subprocess.Popen([str(word) for word in command], env=environment, stdout=log, stderr=log)


def tasks(address, folder, seconds):
    (folder / "tasks.py").write_text(TASKS)
    command = [str(PYTHON), str(folder / "tasks.py"), address, str(seconds), str(folder)]
    return subprocess.Popen(command, stdout=(folder / "tasks.log").open("wb"), stderr=subprocess.STDOUT)


@pytest.mark.parametrize("told", [False, True], ids=["idle", "preempted"])
def test_it_joins_works_and_leaves(cluster, tmp_path, told):
    running = tasks(cluster, tmp_path, 20 if told else 1)
    waits = until(lambda: reading.read_once(cluster, str(PYTHON))["bundles"], "the demand is seen")
    assert [(one["resources"], one["count"]) for one in waits] == [({"GPU": 0.5, "gpu_memory": 60000.0}, 2)]
    joined = started(cluster, tmp_path, "--idle-s=5" if not told else "--idle-s=600", "--grace-s=120")
    try:
        if told:
            until(lambda: len([*tmp_path.glob("runs-*")]) == 2, "its work runs")
            joined.send_signal(signal.SIGTERM)
        assert joined.wait(WITHIN_S) == 0, (tmp_path / "worker.log").read_text()
        assert running.wait(WITHIN_S) == 0, (tmp_path / "tasks.log").read_text()
    finally:
        for process in (joined, running):
            process.terminate()
            process.wait(60)
    assert "done [1, 1]" in (tmp_path / "tasks.log").read_text()
    dead = [
        node
        for node in reading.read_once(cluster, str(PYTHON))["nodes"]
        if node["instance"].endswith(f"{tmp_path.name}/1")
    ]
    assert [node["status"] for node in dead] == ["DEAD"], json.dumps(dead)
