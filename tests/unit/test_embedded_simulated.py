"""Which machines `whaleflux up --simulate` plays."""

import json
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest

from whaleflux.context import Context
from whaleflux.embedded import helper, join_tokens
from whaleflux.embedded.layout import Layout, running_pid, write_pid
from whaleflux.embedded.processes import shims_below
from whaleflux.embedded.simulated import MOST, SimulatedNode, has_certificate, remember, remembered, wanted
from whaleflux.embedded.suite import run_down
from whaleflux.errors import InvalidArgument
from whaleflux.rpc.pki import CertificateAuthority, TlsFiles


def test_machines_are_numbered_within_their_site():
    assert wanted(["h200x8,h200x8,edge/rtx4090x2", "edge/h200x8"]) == [
        SimulatedNode("local", "h200x8-1", "h200x8"),
        SimulatedNode("local", "h200x8-2", "h200x8"),
        SimulatedNode("edge", "rtx4090x2-1", "rtx4090x2"),
        SimulatedNode("edge", "h200x8-1", "h200x8"),
    ]


def test_options_of_a_machine_stay_with_it():
    found = wanted(["onprem/h200x8:mig=3g.71gb,4*1g.18gb,rtx4090x1"])
    assert [one.profile for one in found] == ["h200x8:mig=3g.71gb,4*1g.18gb", "rtx4090x1"]
    assert found[0].node == "h200x8-1"
    mixed = wanted(["edge/h200x4+a100x4pcie:xid=79/0@60s"])
    assert [(one.site, one.profile) for one in mixed] == [("edge", "h200x4+a100x4pcie:xid=79/0@60s")]


def test_none_plays_nothing():
    assert wanted(["none"]) == []


def test_a_file_is_found_from_wherever_the_agent_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    machine = {"model": "X", "memory_bytes": 1, "compute_capability": [9, 0], "count": 1, "links": []}
    machine |= {"cpu_millicores": 1000, "host_memory_bytes": 1, "network_bytes_per_s": 1}
    (tmp_path / "mine.json").write_text(json.dumps(machine))
    assert wanted(["mine.json"]) == [SimulatedNode("local", "mine-1", str(tmp_path / "mine.json"))]


@pytest.mark.parametrize(
    "text", ["h900x8", "h200x8+what", "Bad_Site/h200x8", "h200x8:foo", "h200x8:mig=9g", "h200x8:lost=9", "no.json"]
)
def test_what_cannot_be_played_is_told(text):
    with pytest.raises(InvalidArgument) as wrong:
        wanted([text])
    assert wrong.value.violations[0].field == "--simulate"


def test_a_machine_plays_so_many_and_no_more():
    with pytest.raises(InvalidArgument, match=f"at most {MOST}"):
        wanted(["h200x8"] * (MOST + 1))


def test_they_are_the_same_at_the_next_start(tmp_path):
    nodes = wanted(["h200x8", "edge/rtx4090x2"])
    remember(tmp_path / "simulated.json", nodes)
    assert remembered(tmp_path / "simulated.json") == nodes


@pytest.mark.parametrize("content", [None, "{", "[1]", '[{"x": 1}]'])
def test_a_damaged_memory_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "simulated.json").write_text(content)
    assert remembered(tmp_path / "simulated.json") == []


def test_only_parents_of_ranks_are_found_by_their_folder_not_who_looks_at_it(tmp_path):
    (tmp_path / "shim.py").write_text("input()")
    agents = tmp_path / "agents"
    task = str(agents / "agent-local-h200x8-1" / "tasks" / "t")

    def process(*words, **variables):
        return subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, env=variables)

    shim = process("-I", "-S", str(tmp_path / "shim.py"), task, WHALEFLUX_SHIM_TOKEN="secret")
    others = [
        process("-c", "input()", f"{task}/rank-0.log"),  # somebody reads a log
        process("-I", "-S", str(tmp_path / "shim.py"), f"{tmp_path}/agents-of-another/t"),
    ]
    try:
        while shims_below(tmp_path / "agents-of-another").keys() != {others[1].pid}:
            pass  # until they have become what they are
        while (found := shims_below(agents)) == {}:
            pass
        assert found == {shim.pid: "secret"}
    finally:
        for one in (shim, *others):
            one.communicate(b"\n")


def test_ranks_that_a_killed_suite_left_behind_end_with_down(tmp_path):
    (tmp_path / "shim.py").write_text("input()")
    words = [
        sys.executable,
        "-I",
        "-S",
        str(tmp_path / "shim.py"),
        str(tmp_path / "agents" / "agent-a-b" / "tasks" / "t"),
    ]
    shim = subprocess.Popen(words, stdin=subprocess.PIPE, env={"WHALEFLUX_SHIM_TOKEN": "secret"})
    rank = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"WHALEFLUX_TASK_TOKEN": "secret"}
    )
    try:
        while shims_below(tmp_path / "agents").keys() != {shim.pid}:
            pass  # until it has become what it is
        reaped = [
            threading.Thread(target=one.wait) for one in (shim, rank)
        ]  # as init does it for what nobody else waits for
        for thread in reaped:
            thread.start()
        assert run_down(tmp_path)
        for thread in reaped:
            thread.join(10)
        assert (shim.returncode, rank.returncode) == (-signal.SIGTERM, -signal.SIGTERM)
        assert not run_down(tmp_path), "nothing is left"
    finally:
        for one in (shim, rank):
            one.kill()


def test_a_number_that_another_program_was_given_is_no_supervisor(tmp_path):
    layout = Layout(tmp_path)
    layout.create()
    write_pid(layout)
    assert running_pid(layout) == os.getpid()
    layout.pid_file.write_text(f"{os.getpid()} 1")  # began at another time
    assert running_pid(layout) is None


async def test_the_api_key_is_on_no_command_line(tmp_path, monkeypatch):
    shown = []

    async def run(*words, what):
        shown.extend(words)

    monkeypatch.setattr(helper, "run", run)
    context = Context("127.0.0.1:1", "ca", "cert", "key", api_key="secret")
    await join_tokens.made(context, {tmp_path / "join.token": "local"})
    assert "127.0.0.1:1" in " ".join(shown) and "secret" not in " ".join(shown)


def test_a_node_whose_certificate_has_ended_while_the_suite_was_down_is_admitted_again(tmp_path):
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert not has_certificate(tmp_path, now)
    TlsFiles.under(tmp_path / "identity", "agent").save(
        CertificateAuthority.create(now).issue("agent", "local/h200x8-1", now)
    )
    assert has_certificate(tmp_path, now + timedelta(hours=23))
    assert not has_certificate(tmp_path, now + timedelta(hours=25))
    (tmp_path / "identity" / "agent.crt").write_text("damaged")
    assert not has_certificate(tmp_path, now)
