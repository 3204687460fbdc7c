"""Secrets on their way into ranks, setup and commands beside them, with real processes; and everywhere else where they must not be."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest

from tests.integration.test_agent_restart import agent_process, kill
from tests.support.fake_control_plane import desired, ranks_of, until
from whaleflux.v1 import scheduler_pb2
from whaleflux_agent.runtime.beside import place_of_rank

pytestmark = pytest.mark.integration

VALUES = {"secrets/hf-token": b"canary-hf-1", "secrets/key": b"canary-key\ncanary-line\n"}
RANK = """
import json, os, sys, time
seen = {name: os.environ.get(name) for name in ("HF_TOKEN", "KEY", "WHALEFLUX_SECRETS_DIR")}
seen["file"] = open(os.environ["KEY"]).read()
json.dump(seen, open("seen.json.tmp", "w")); os.rename("seen.json.tmp", "seen.json")
while not os.path.exists("go"): time.sleep(0.02)
sys.exit("401 for token " + os.environ["HF_TOKEN"] + ", as in " + open(os.environ["KEY"]).read())
"""


def wanted(folder, epoch=1):
    def edit(task):
        task.spec.working_directory = str(folder)
        task.spec.setup.extend([sys.executable, "-c", "import os; open('setup', 'w').write(os.environ['HF_TOKEN'])"])
        task.spec.secrets.add(secret="secrets/hf-token", variable="HF_TOKEN")
        task.spec.secrets.add(secret="secrets/key", variable="KEY", file="key.pem")

    return desired([sys.executable, "-c", RANK], epoch=epoch, edit=edit)


def files_with(folder, word):
    """Files below a folder that have a word in them."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_socket())
    return [str(path.relative_to(folder)) for path in paths if word in path.read_bytes()]


async def seen(folder):
    await until((folder / "seen.json").exists)
    return json.loads((folder / "seen.json").read_text())


async def test_ranks_have_their_secrets_and_no_record_of_the_agent_does(control, state, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    control.tasks.secrets = dict(VALUES)
    async with agent_process(control, state) as child:
        control.tasks.want(wanted(work))
        found = await seen(work)
        given = found.pop("WHALEFLUX_SECRETS_DIR")
        assert found == {"HF_TOKEN": "canary-hf-1", "KEY": f"{given}/key.pem", "file": "canary-key\ncanary-line\n"}
        assert (work / "setup").read_text() == "canary-hf-1"
        await kill(child)
    folder = next(path for path in (state / "tasks").iterdir())
    token = json.loads((folder / "meta.json").read_text())["token"]
    assert place_of_rank(folder, token, 0).environment["HF_TOKEN"] == "canary-hf-1", "a command beside it sees the same"
    assert files_with(state, b"canary") == []
    (rank,) = ranks_of(state)
    assert not [pid for pid, words in command_lines() if b"canary-hf" in words]
    async with agent_process(control, state):
        await until(lambda: len(control.tasks.hellos) == 2)
        assert control.tasks.hellos[1].tasks[0].phase == scheduler_pb2.TASK_PHASE_RUNNING
        assert rank.alive() and len(control.tasks.opened) == 1, "what is adopted needs no secrets"
        (work / "go").touch()
        await until(lambda: control.tasks.phases("train-1-0")[-1] == "EXITED")
        assert control.tasks.last("train-1-0").message.endswith("401 for token ***, as in ***")
        await until(lambda: not os.path.exists(os.path.dirname(given)))
        (work / "seen.json").unlink()
        control.tasks.secrets["secrets/hf-token"] = b"canary-hf-2"
        control.tasks.unwant("train-1-0")
        control.tasks.want(wanted(work, epoch=2))
        assert (await seen(work))["HF_TOKEN"] == "canary-hf-2", "the next attempt has the rotated value"
        assert [request.epoch for request in control.tasks.opened] == [1, 2]
        await until(lambda: control.tasks.phases("train-2-0")[-1:] == ["EXITED"])
        await until(lambda: not list((state / "secrets").iterdir()))
    assert not [report for report in control.tasks.reports if b"canary" in report.SerializeToString()]
    assert [path for path in files_with(state, b"canary") if not path.endswith(".log")] == [], (
        "its own output is the job's"
    )


def command_lines():
    """Of every process that there is."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                yield folder.name, (folder / "cmdline").read_bytes()
