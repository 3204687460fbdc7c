"""The common main as a process: port file, probes, SIGTERM, lost loops, bad settings."""

import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.etcd_server import EtcdServer, free_ports
from tests.support.toy_rpc import CA, Stub, text
from whaleflux import errors
from whaleflux.rpc.channel import connect
from whaleflux.rpc.pki import TlsFiles, server_name
from whaleflux.rpc.retry_policy import CallPolicy

ROOT = Path(__file__).parents[2]


class Process:
    """One toy service and the files it writes."""

    def __init__(self, folder, process):
        self.folder, self.process = folder, process

    @property
    def ports(self):
        return json.loads((self.folder / "ports.json").read_text())

    @property
    def diary(self):
        path = self.folder / "diary"
        return path.read_text().splitlines() if path.exists() else []

    async def log(self):
        return [json.loads(line) for line in (await self.process.stdout.read()).decode().splitlines()]

    async def ended(self):
        async with asyncio.timeout(45):
            return await self.process.wait()

    def dial(self):
        tls = CA.issue("user", "ann", datetime.now(UTC))
        target = f"127.0.0.1:{self.ports['grpc']}"
        return connect(target, tls, server=server_name("scheduler"), policy=CallPolicy(attempts=1))


async def until(condition, timeout_s=45.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # another process's file has no event to wait for
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(folder, *argv, ready=True):
    files = TlsFiles.under(folder, "scheduler")
    files.save(CA.issue("scheduler", "1", datetime.now(UTC)))
    flags = {
        "tls-key": files.key,
        "tls-cert": files.chain,
        "tls-ca": files.roots,
        "port-file": folder / "ports.json",
        "diary": folder / "diary",
        "store": "memory://",
        "nats": "memory://",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.support.toy_service"),
        *(f"--{name}={value}" for name, value in flags.items()),
        *argv,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith(("WHALEFLUX_", "OTEL_"))},
    )
    try:
        if ready:
            await until(lambda: (folder / "ports.json").exists() or process.returncode is not None)
        yield Process(folder, process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def fetch(port, path, scheme="http"):
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(
            f"{scheme}://127.0.0.1:{port}{path}", timeout=30, context=unverified if scheme == "https" else None
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def test_sigterm_ends_it_in_order(tmp_path):
    async with running(tmp_path) as toy:
        assert set(toy.ports) == {"grpc", "metrics", "extra", "pid"}
        assert toy.ports["pid"] == toy.process.pid
        async with toy.dial() as channel:
            stub = Stub(channel)
            assert (await stub.unary("GetIt")(text())).value == f"scheduler at 127.0.0.1:{toy.ports['grpc']}"
            port = toy.ports["metrics"]
            assert await asyncio.to_thread(fetch, port, "/readyz") == (200, "ready\n")
            assert await asyncio.to_thread(fetch, port, "/healthz") == (200, "ok\n")
            assert (await asyncio.to_thread(fetch, port, "/nonsense"))[0] == 404
            _, metrics = await asyncio.to_thread(fetch, port, "/metrics")
            assert 'whaleflux_rpc_requests_total{code="OK",method="/test.v1.ToyService/GetIt"} 1.0' in metrics
            assert "whaleflux_certificate_expiry_seconds " in metrics

            stream = stub.stream("Watch")(text())
            await anext(stream)
            slow = asyncio.create_task(stub.unary("Slow")(text()))
            await until(lambda: "slow began" in toy.diary)
            toy.process.send_signal(signal.SIGTERM)
            with pytest.raises(errors.Unavailable) as caught:
                await anext(stream)
            assert caught.value.reason == "DRAINING"
            assert (await slow).value == "done"
        assert await toy.ended() == 0
        assert toy.diary == ["slow began", "watch ended", "slow ended", "loop handed back", "stopped"]
        assert not (tmp_path / "ports.json").exists()
        events = [line["event"] for line in await toy.log()]
        assert events == ["service_started", "service_stopping", "service_stopped"]


async def test_a_lost_loop_ends_the_process_with_an_error(tmp_path):
    async with running(tmp_path, "--crash", "--metrics-listen=0.0.0.0:0") as toy:
        probe = await asyncio.to_thread(fetch, toy.ports["metrics"], "/healthz", "https")
        assert probe == (200, "ok\n"), "what others can reach is not plain; a kubelet has no certificate"
        assert (await asyncio.to_thread(fetch, toy.ports["metrics"], "/metrics", "https"))[0] == 403
        async with toy.dial() as channel:
            await Stub(channel).unary("GetIt")(text())
        assert await toy.ended() == 1
        lost = [line for line in await toy.log() if line["event"] == "loop_lost"]
        assert [line["exception"][0]["exc_value"] for line in lost] == ["the loop is lost"]
        assert not (tmp_path / "ports.json").exists()


async def test_a_loop_that_hangs_does_not_keep_it_beyond_the_grace_time(tmp_path):
    async with running(tmp_path, "--hang", "--drain-grace-s=0.5") as toy:
        toy.process.send_signal(signal.SIGTERM)
        assert await toy.ended() == 1
        assert "loop handed back" in toy.diary


async def test_a_second_signal_does_not_wait(tmp_path):
    async with running(tmp_path, "--hang", "--drain-grace-s=600") as toy:
        toy.process.send_signal(signal.SIGTERM)
        await until(lambda: "loop handed back" in toy.diary)
        toy.process.send_signal(signal.SIGTERM)
        assert await toy.ended() == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--listn=x"], "scheduler: --listn: is not a known flag; did you mean --listen"),
        (["--drain-grace-s=-1"], "scheduler: drain_grace_s: "),
    ],
)
async def test_bad_settings_are_told_in_one_line_each(tmp_path, argv, message):
    async with running(tmp_path, *argv, ready=False) as toy:
        assert await toy.ended() == 2
        stderr = (await toy.process.stderr.read()).decode()
        assert stderr.startswith(message)
        assert stderr.count("\n") == 1


async def test_missing_certificates_are_bad_settings_too(tmp_path):
    async with running(tmp_path, "--tls-key=/nowhere.key") as toy:
        assert await toy.ended() == 2
        (line,) = await toy.log()
        assert "cannot read /nowhere.key" in line["reason"]


async def test_a_folder_for_the_audit_trail_that_cannot_be_one_is_a_bad_setting(tmp_path):
    (tmp_path / "file").write_text("")
    async with running(tmp_path, f"--audit-dir={tmp_path / 'file'}", ready=False) as toy:
        assert await toy.ended() == 2
        assert "audit_dir: cannot be written to: Not a directory" in (await toy.log())[-1]["reason"]


async def test_a_bus_that_does_not_answer_is_told_without_a_trace(tmp_path):
    async with running(
        tmp_path, "--nats=nats://127.0.0.1:1", "--plain-loopback", "--nats-timeout-s=0.5", ready=False
    ) as toy:
        assert await toy.ended() == 1
        last = (await toy.log())[-1]
        assert "cannot connect to the event bus within 0.5 s" in last["reason"]
        assert not await toy.process.stderr.read()


async def test_a_service_without_its_store_is_not_ready_and_becomes_it_when_the_store_is_there(tmp_path):
    etcd, (metrics,) = EtcdServer(tmp_path), free_ports(1)
    flags = (f"--store=http://{etcd.endpoint}", "--plain-loopback", f"--metrics-listen=127.0.0.1:{metrics}")

    def probe(path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics}{path}", timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as refused:
            return refused.code
        except OSError:
            return 0

    async def answered(path, status):
        async with asyncio.timeout(60):
            while await asyncio.to_thread(probe, path) != status:
                await asyncio.sleep(0.05)

    async with running(tmp_path, *flags, ready=False) as toy:
        await answered("/healthz", 200)
        assert await asyncio.to_thread(probe, "/readyz") == 503
        assert not (tmp_path / "ports.json").exists(), "its presence says that it serves"
        await etcd.start()
        try:
            await answered("/readyz", 200)
            await until((tmp_path / "ports.json").exists)
            etcd.stop()
            await answered("/readyz", 503)
            etcd.resume()
            await answered("/readyz", 200)
        finally:
            etcd.kill()
        await answered("/readyz", 503)
        assert toy.process.returncode is None, "it waits for its store"
