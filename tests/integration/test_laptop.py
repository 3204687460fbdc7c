"""The path of a newcomer on a machine without GPUs: two commands to a job that has run, then everything ends and comes back."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


class Laptop:
    """A home of its own, and the program as people call it."""

    def __init__(self, folder):
        self.state, self.elsewhere = folder / "project" / ".whaleflux", folder / "elsewhere"
        self.elsewhere.mkdir()
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("WHALEFLUX_", "XDG_"))}
        self.environment = clean | {"HOME": str(folder / "home")}

    def up(self, *flags):
        log = (self.elsewhere / "up.log").open("w+")
        argv = [sys.executable, "-m", "whaleflux.cli", "up", "--state", str(self.state), *flags]
        process = subprocess.Popen(argv, env=self.environment, stdout=log, stderr=log, cwd=ROOT)
        deadline = time.monotonic() + 120
        while "stop with" not in (said := (self.elsewhere / "up.log").read_text()):
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        return process, said

    def whaleflux(self, *words):
        argv = [sys.executable, "-m", "whaleflux.cli", *words]
        return subprocess.run(
            argv, env=self.environment, cwd=self.elsewhere, capture_output=True, text=True, timeout=120, check=False
        )

    def until(self, words, *command):
        """What the command shows once it shows these words."""
        deadline = time.monotonic() + 90
        while words not in (shown := self.whaleflux(*command).stdout):
            assert time.monotonic() < deadline, shown
        return shown


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    return Laptop(tmp_path_factory.mktemp("laptop"))


@pytest.fixture(scope="module")
def up(laptop):
    process, said = laptop.up("--simulate", "rtx4090x2")
    yield said
    if process.poll() is None:
        process.terminate()
        process.wait(timeout=90)


def test_up_says_what_comes_next_and_that_its_gpus_are_simulated(up):
    assert "sites/local/nodes/rtx4090x2-1 plays rtx4090x2: its GPUs are simulated" in up
    assert "next, in another terminal: whaleflux submit examples/hello/job.yaml" in up
    assert "commands reach it from any folder, as project" in up


def test_the_second_command_runs_a_job_from_any_folder(laptop, up):
    done = laptop.whaleflux("submit", "--yes", str(ROOT / "examples" / "hello" / "job.yaml"))
    assert done.returncode == 0, done.stderr
    assert "SUCCEEDED" in done.stdout + done.stderr


def test_work_without_gpus_runs_and_sees_none(laptop, up, tmp_path):
    file = tmp_path / "sum.yaml"
    file.write_text(
        "name: sum\ngpus: 0\nranks: 2\ncpus_per_rank: 0.1\n"
        """run: [sh, -c, 'echo "rank $RANK of $WORLD_SIZE sees <$CUDA_VISIBLE_DEVICES>"']\n"""
    )
    done = laptop.whaleflux("submit", "--yes", str(file), "--rank", "1")
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2 sees <>" in done.stdout
    assert "2 ranks without GPUs on 1 node" in done.stdout + done.stderr
    assert json.loads(laptop.whaleflux("job", "sum", "-o", "json").stdout).get("cost_usd", 0) == 0


COUNTS = """
name: counts
gpus: 1
workdir: none
retry: {max_restarts: 1, backoff: 0.1 s}
run: |
  for i in $(seq 1 60); do echo attempt $TORCHELASTIC_RESTART_COUNT line $i; sleep 0.05; done
  exit $((1 - TORCHELASTIC_RESTART_COUNT))
"""


def test_output_is_shown_once_and_to_its_end_through_a_restart_and_the_loss_of_the_scheduler(laptop, up):
    """Two attempts of one job; the leader is killed while the first is shown."""
    (laptop.elsewhere / "counts.yaml").write_text(COUNTS)
    argv = [sys.executable, "-m", "whaleflux.cli", "submit", "counts.yaml", "-y"]
    shown, said = laptop.elsewhere / "shown", laptop.elsewhere / "said"
    with shown.open("wb") as out, said.open("wb") as err:
        following = subprocess.Popen(argv, env=laptop.environment, cwd=laptop.elsewhere, stdout=out, stderr=err)
    try:
        while "line 20" not in shown.read_text():
            assert following.poll() is None, said.read_text()
            time.sleep(0.05)
        os.kill(int((laptop.state / "run" / "scheduler.pid").read_text()), signal.SIGKILL)
        following.wait(timeout=100)
    finally:
        following.kill()
    states = said.read_text()
    lines = [line for line in shown.read_text().splitlines() if line.startswith("attempt ")]
    assert lines == [f"attempt {restart} line {i}" for restart in range(2) for i in range(1, 61)], states
    assert following.returncode == 0
    assert states.splitlines()[-1].startswith("-- SUCCEEDED")
    assert "-- RUNNING attempt 2 on sites/local/nodes/rtx4090x2-1" in states


def test_output_is_kept_by_attempt_with_its_times(laptop, up):
    def logs(*flags):
        return laptop.whaleflux("logs", "counts", *flags)

    assert logs("--tail", "1").stdout == "attempt 1 line 60\n"
    assert (
        logs("--previous", "--tail", "1").stdout
        == logs("--attempt", "1", "--tail", "1").stdout
        == "attempt 0 line 60\n"
    )
    timed = [line.split(" ", 1) for line in logs("--timestamps").stdout.splitlines()]
    assert [line for _, line in timed] == [f"attempt 1 line {i}" for i in range(1, 61)]
    times = [datetime.fromisoformat(stamp) for stamp, _ in timed]
    assert times == sorted(times)
    assert 2 < (times[-1] - times[0]).total_seconds() < 30, "of lines that took three seconds"
    middle = times[30].isoformat()
    assert len(logs("--since", middle).stdout.splitlines()) == sum(time >= times[30] for time in times)
    assert logs("-f").stdout == logs().stdout, "following ends with the job"
    assert "has printed nothing of what was asked for" in logs("--since", "2126-01-01T00:00Z").stderr
    absent = logs("--attempt", "9")
    assert absent.returncode == 2
    assert "--attempt: 9: queues/default/jobs/counts has attempts 1 to 2" in absent.stderr


def test_a_running_job_is_requeued_held_and_released_and_another_waits_for_its_end(laptop, up, tmp_path):
    (tmp_path / "first.yaml").write_text("name: first\nrun: sleep 100\ngpus: 0\ncpus_per_rank: 0.1\nstop_grace: 1 s\n")
    (tmp_path / "after.yaml").write_text(
        "name: after\nrun: sleep 100\ngpus: 0\ncpus_per_rank: 0.1\ntime_limit: 1 s\nstop_grace: 1 s\n"
        "depends_on: {job: first, when: failed}\n"
    )
    for name in ("first", "after"):
        assert laptop.whaleflux("submit", "-y", "-d", str(tmp_path / f"{name}.yaml")).returncode == 0
    laptop.until("waits: for queues/default/jobs/first to end without success", "job", "after")
    laptop.until("RUNNING", "job", "first")
    assert "SUSPENDING" in laptop.whaleflux("requeue", "first", "--hold", "-y").stderr
    laptop.until("held by", "job", "first")
    laptop.whaleflux("release", "first")
    laptop.until("RUNNING", "job", "first")
    laptop.whaleflux("cancel", "first", "-y")
    ended = laptop.until("FAILED", "job", "after")
    assert "its time_limit of 1s is over" in ended


def test_lists_are_narrowed_ordered_and_machine_readable(laptop, up):
    assert laptop.whaleflux("nodes", "--gpu", "4090", "-o", "name").stdout == "sites/local/nodes/rtx4090x2-1\n"
    assert laptop.whaleflux("nodes", "--gpu", "h200", "-o", "name").stdout == ""
    row = laptop.whaleflux("gpus", "--free", "-o", "csv").stdout.splitlines()[1].split(",")
    assert row[0] == "RTX4090"
    assert row[-1] == "simulated"
    wrong = laptop.whaleflux("jobs", "--state", "runing")
    assert wrong.returncode == 2
    assert "--state: RUNING is not one of" in wrong.stderr


def test_the_command_line_costs_little_beside_what_any_client_of_grpc_costs(laptop, up):
    """Generous: figures are `make bench NAME=cli_latency`'s; a library that is imported by every command shows here."""

    def cpu_s(*argv):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *argv],
            env=laptop.environment,
            cwd=laptop.elsewhere,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    floor_s = min(cpu_s("-c", "import grpc") for _ in range(3))
    assert min(cpu_s("-m", "whaleflux.cli", "--help") for _ in range(2)) < 5 * floor_s
    assert min(cpu_s("-m", "whaleflux.cli", "status") for _ in range(2)) < 10 * floor_s


def test_the_fleet_has_a_name(laptop, up):
    listed = json.loads(laptop.whaleflux("config", "list", "-o", "json").stdout)
    assert [(one["name"], one["in_use"]) for one in listed] == [("project", True)]
    assert laptop.whaleflux("--context", "project", "status").returncode == 0


def test_a_second_suite_in_the_same_folder_is_refused(laptop, up):
    again = laptop.whaleflux("up", "--state", str(laptop.state))
    assert again.returncode == 1
    assert "already runs here" in again.stderr
    assert "whaleflux down" in again.stderr


def test_down_ends_it_and_commands_say_how_to_start_it_again(laptop, up):
    assert str(laptop.state) in laptop.whaleflux("down").stderr
    told = laptop.whaleflux("status")
    assert told.returncode == 3
    assert f"start it with: whaleflux up --state {laptop.state}" in told.stderr
