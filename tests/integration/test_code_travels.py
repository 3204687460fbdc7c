"""A folder goes with a job, from the command line through the store of code to the nodes that start in it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.suite import RunningSuite, state_folder, until
from whaleflux import names
from whaleflux.demo.fleet import Machine
from whaleflux.v1 import scheduler_pb2 as pb

pytestmark = pytest.mark.integration
EXAMPLES = Path(__file__).parents[2] / "examples"
NODES = [Machine("lab", "a", "rtx4090x2"), Machine("lab", "b", "rtx4090x2")]


@pytest.fixture(scope="module")
def suite():
    with state_folder() as state:
        suite = RunningSuite(state)
        try:
            asyncio.run(suite.join(NODES))
            yield suite
        finally:
            suite.stop()


@pytest.fixture
def whaleflux(suite):
    def call(*arguments, check=True):
        environment = {**os.environ, "WHALEFLUX_CONTEXT": str(suite.context_file)}
        argv = [sys.executable, "-m", "whaleflux.cli", *map(str, arguments)]
        done = subprocess.run(argv, check=False, env=environment, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0 or not check, done.stderr + done.stdout
        return done

    return call


def folder(path, name, script, **more):
    """A job file beside code, and beside what must stay behind."""
    path.mkdir(exist_ok=True)
    (path / "show.sh").write_text(textwrap.dedent(script))
    (path / ".gitignore").write_text("*.secret\n")
    (path / "key.secret").write_text("secret")
    (path / "lib").mkdir(exist_ok=True)
    (path / "lib" / "words.txt").write_text(f"words of {name}")
    fields = "".join(f"{key}: {value}\n" for key, value in more.items())
    (path / "job.yaml").write_text(f"name: {name}\nrun: bash show.sh\n{fields}")
    return path / "job.yaml"


def test_both_nodes_start_in_the_folder_and_it_is_sent_once(suite, whaleflux, tmp_path):
    script = """\
        cat lib/words.txt; echo " on $WHALEFLUX_NODE"; test ! -e key.secret; echo $RANK > out.txt
        """
    file = folder(tmp_path, "first", script, gpus=4, nodes="{min: 2}")
    planned = json.loads(whaleflux("submit", file, "--dry-run", "-o", "json").stdout)["workdir"]
    assert planned["files"] == 4 and planned["left_out"] == [{"path": "key.secret", "why": "ignored"}]
    done = whaleflux("submit", file, "-y", "-d")
    assert f"{tmp_path} (4 files" in done.stdout and "sent " in done.stderr
    assert asyncio.run(ended(suite, "first")) == "SUCCEEDED"
    said = whaleflux("logs", "first", "--rank", "-1").stdout
    assert all(f"words of first on sites/lab/nodes/{node}" in said for node in "ab"), said
    assert "has this code already" in whaleflux("submit", file, "-y", "-d", "--name", "second").stderr


def test_an_outage_of_the_event_bus_is_waited_out_and_said(suite, whaleflux, tmp_path):
    file = folder(tmp_path, "patient", "cat lib/words.txt; sleep 0.1", gpus=1)
    whaleflux("submit", folder(tmp_path / "full", "full", "sleep 60", gpus=4), "-y", "-d")
    whaleflux("submit", file, "-y", "-d")
    suite.send("nats", signal.SIGSTOP)
    try:
        whaleflux("cancel", "full", "-y")
        asyncio.run(says(suite, "patient", "cannot be had now"))
    finally:
        suite.send("nats", signal.SIGCONT)
    assert asyncio.run(ended(suite, "patient")) == "SUCCEEDED"


def test_a_sweep_from_one_file_and_its_second_submission(suite, whaleflux):
    file, four = EXAMPLES / "sweep" / "job.yaml", ["--set", "matrix={lr: [0.1, 0.03], seed: [1, 2]}", "-y"]
    planned = whaleflux("submit", file, *four).stdout
    assert "4 jobs alike, queues/default/jobs/sweep-0 to sweep-3, at most 3 at a time; each:" in planned
    assert {asyncio.run(ended(suite, f"sweep-{n}")) for n in range(4)} == {"SUCCEEDED"}
    said = json.loads(whaleflux("logs", "sweep-3").stdout)
    assert (said["index"], said["lr"], said["seed"]) == (3, 0.03, 2)
    every = [json.loads(line) for line in whaleflux("logs", "sweep", "-o", "jsonl").stdout.splitlines()]
    assert [(line["job"], line["rank"], json.loads(line["text"])["index"]) for line in every] == [
        (f"queues/default/jobs/sweep-{n}", 0, n) for n in range(4)
    ]
    assert "queues/default/jobs/sweep[4]  4 SUCCEEDED" in whaleflux("jobs").stdout
    assert "4 were there already" in whaleflux("submit", file, *four).stderr
    assert whaleflux("submit", file, *four, "--replace").stderr.count("submitted queues/default/jobs/sweep-") == 4
    whaleflux("cancel", "sweep", "-y")


async def job(client, name):
    return await client.scheduler.GetJob(pb.GetJobRequest(name=names.job("default", name)), timeout=10)


async def ended(suite, name):
    async with suite.client() as client:
        async with asyncio.timeout(60):
            found = await client.wait(names.job("default", name))
    return pb.JobState.Name(found.state).removeprefix("JOB_STATE_")


async def says(suite, name, words):
    async with suite.client() as client:

        async def said():
            return words in (await job(client, name)).state_message

        await until(said, f"{name} says {words}", 60)
