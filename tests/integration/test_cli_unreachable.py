"""What the command line says when it cannot speak with the fleet: at once, in one line, with what to do."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from tests.support.etcd_server import free_ports
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.pki import CertificateAuthority, TlsFiles
from whaleflux.rpc.server import Server

CA, OTHER = (CertificateAuthority.create(datetime.now(UTC)) for _ in range(2))
TOLD_WITHIN_S = 3.0  # a call's own deadline is tens of seconds


def context(folder, server, authority=CA):
    files = TlsFiles.under(folder, "admin")
    files.save(authority.issue("admin", "ann", datetime.now(UTC)))
    paths = {"ca": files.roots, "cert": files.chain, "key": files.key}
    file = folder / "context.json"
    file.write_text(json.dumps({"server": server, **{key: str(path) for key, path in paths.items()}}))
    return file


def run(file, *command, **variables):
    """Exit code, stderr, and the seconds beyond those that the program itself needs to start."""
    program = [sys.executable, "-m", "whaleflux.cli"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WHALEFLUX_")}
    environment = {**clean, "WHALEFLUX_CONTEXT": str(file), **variables}

    def timed(*argv):
        began = time.monotonic()
        done = subprocess.run(
            [*program, *argv], env=environment, capture_output=True, text=True, timeout=90, check=False
        )
        return done, time.monotonic() - began

    start_s = min(timed("jobs", "--help")[1] for _ in range(2))
    for _ in range(4):  # a machine that is busy for a moment is not what is asked about
        done, took_s = timed(*command)
        if took_s - start_s < TOLD_WITHIN_S:
            break
    return done.returncode, done.stderr, took_s - start_s


async def serving(authority=CA):
    server = Server(authority.issue("frontdoor", "t", datetime.now(UTC)), Authority())
    server.bind("127.0.0.1:0")
    await server.start()
    return server


@pytest.mark.parametrize("command", [("jobs",), ("submit", "job.yaml"), ("logs", "j")])
def test_a_refused_connection_is_told_at_once(tmp_path, command):
    (tmp_path / "job.yaml").write_text("name: j\nrun: python x.py\ngpus: 1\n")
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = tuple(str(tmp_path / word) if word.endswith(".yaml") else word for word in command)
    code, told, took_s = run(context(tmp_path, address), *command)
    assert code == 3
    assert told.count("\n") == 1, told
    assert address in told
    assert "refuses the connection" in told
    assert "whaleflux up" in told
    assert took_s < TOLD_WITHIN_S


@pytest.mark.parametrize(
    ("server", "why"),
    [("no-such-host.invalid:7443", "has a name that is not known here"), ("[::1]:1", "refuses the connection|cannot be reached")],
)  # fmt: skip
def test_a_name_that_nobody_knows_and_a_port_without_a_server_are_told_at_once(tmp_path, server, why):
    proxies = dict.fromkeys(("https_proxy", "grpc_proxy", "all_proxy"), "http://127.0.0.1:9")
    code, told, took_s = run(context(tmp_path, server), "status", **proxies)
    assert code == 3
    assert re.search(rf"the fleet at {re.escape(server)} ({why})", told), told
    assert took_s < TOLD_WITHIN_S


async def test_an_authority_that_is_not_the_fleets_is_told_at_once_and_without_noise(tmp_path):
    server = await serving()
    try:
        file = context(tmp_path, f"127.0.0.1:{server.port}", OTHER)
        code, told, took_s = await asyncio.to_thread(run, file, "jobs")
    finally:
        await server.drain(0)
    assert code == 1
    assert told.count("\n") == 1, told
    assert "certificate" in told
    assert str(tmp_path / "ca.crt") in told
    assert took_s < TOLD_WITHIN_S


async def test_a_company_proxy_is_not_the_way_to_the_fleet(tmp_path):
    server = await serving()
    try:
        file = context(tmp_path, f"127.0.0.1:{server.port}")
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:9")
        code, told, _ = await asyncio.to_thread(run, file, "jobs", **proxies)
    finally:
        await server.drain(0)
    assert code == 1
    assert "does not know this call" in told, "the server itself has answered"


def start_agent(folder, address, authority=CA):
    """An agent that wants to join at `address`, with the CA of `authority`."""
    files = TlsFiles.under(folder, "admin")
    files.save(authority.issue("admin", "ann", datetime.now(UTC)))
    argv = [sys.executable, "-m", "whaleflux_agent", "--server", address, "--server-name", "frontdoor.whaleflux.local",
            "--ca-file", str(files.roots), "--state-dir", str(folder / "state"), "--site", "s", "--node-id", "n",
            "--profile", "rtx4090x1"]  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WHALEFLUX_")}
    return subprocess.Popen(
        argv, env=clean | {"WHALEFLUX_JOIN_TOKEN": "t.x"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


async def test_an_agent_with_another_fleets_ca_ends_and_says_what_to_give(tmp_path):
    server = await serving()
    try:
        agent = start_agent(tmp_path, f"127.0.0.1:{server.port}", OTHER)
        _, told = await asyncio.to_thread(agent.communicate, timeout=90)
    finally:
        await server.drain(0)
    assert agent.returncode == 2
    assert "shows a certificate that the given CA does not vouch for" in told
    assert "--ca-file" in told


def test_an_agent_says_that_nobody_answers_and_the_second_one_that_there_is_a_first(tmp_path):
    first = start_agent(tmp_path, f"127.0.0.1:{free_ports(1)[0]}")
    try:
        assert "trying again until it answers" in first.stderr.readline()
        second = start_agent(tmp_path, "127.0.0.1:1")
        try:
            assert "another agent runs on" in second.stderr.readline()
        finally:
            second.kill()
            second.communicate()
    finally:
        first.kill()
        first.communicate()
