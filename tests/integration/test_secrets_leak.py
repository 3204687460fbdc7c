"""Secrets through the whole suite: jobs, a model, a dataset, rotation, failure, retry, preemption, exec. Then all that was written is searched."""

import asyncio
import hashlib
import json
import secrets as random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support import leaks
from tests.support.spans import collecting
from tests.support.suite import running_suite, until
from whaleflux.cli.__main__ import app
from whaleflux.demo.fleet import Machine
from whaleflux.embedded.processes import with_variables
from whaleflux.v1 import scheduler_pb2 as pb

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

NODE = Machine("onprem", "h200-a", "h200x8")
# Shows that it has what it should, by what nobody can turn back; then does as its file says.
WORK = """\
import hashlib, os, sys, time
token, path = os.environ["HF_TOKEN"], os.environ["KEY_FILE"]
print("has", hashlib.sha256(token.encode()).hexdigest()[:16], hashlib.sha256(open(path, "rb").read()).hexdigest()[:16], flush=True)
"""
FAIL_ONCE = (
    WORK
    + """
if not os.path.exists("again"):
    open("again", "w").close()
    sys.exit("401 for https://x:" + token + "@hub")
time.sleep(600)
"""
)
ENGINE = """\
import http.server, os
class Engine(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200 if os.environ.get("MODEL_TOKEN") else 500); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Engine).serve_forever()  # {port}
"""


def canary(name):
    """Not to be found by chance, and with what JSON, shells and URLs escape."""
    return f'cnry-{name}-"\\é/+{random.token_hex(12)}'


class Gated(BaseHTTPRequestHandler):
    """A web server that gives its data to who shows the token, and sends others of its own host on without it."""

    token, seen = "", []

    def do_GET(self):
        self.seen.append(self.headers.get("Authorization", ""))
        right = self.path != "/gated.bin" or self.seen[-1] == f"Bearer {self.token}"
        self.send_response(302 if right and self.path == "/gated.bin" else 200 if right else 401)
        if self.path == "/gated.bin":
            self.send_header("Location", "/elsewhere.bin")
        self.end_headers()
        self.wfile.write(b"data")

    def log_message(self, *_):
        pass


class Told:
    """The command line of an admin of this suite, and all that it ever printed."""

    def __init__(self, suite):
        self._context, self.printed = str(suite.context_file), []

    async def __call__(self, *words, input=None, code=0):
        done = await asyncio.to_thread(CliRunner().invoke, app, ["--context", self._context, *words], input=input)
        self.printed.append(f"{done.output} {done.exception!r}")
        assert done.exit_code == code, (words, done.output, done.exception)
        return done.output

    async def in_a_process(self, *words):
        """For a command that takes over its process."""
        argv = [sys.executable, "-m", "whaleflux.cli", "--context", self._context, *words]
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60, check=True)
        self.printed.append(done.stdout + done.stderr)
        return done.stdout


def job(name, script, gpus, more=""):
    uses = "[hf-token, {name: key, file: key.pem, env: KEY_FILE}]"
    run = json.dumps([sys.executable, "-c", script])
    return f"name: {name}\nworkdir: none\ngpus: {gpus}\nlaunch: once\nsecrets: {uses}\n{more}run: {run}\n"


@pytest.fixture(scope="module")
def told_of_traces():
    with collecting() as collector:
        yield collector


async def test_no_value_is_found_anywhere_after_a_full_run(told_of_traces, tmp_path):
    token, rotated, key = canary("token"), canary("rotated"), canary("key") + "\nsecond line\n"
    model, source, plain = random.token_hex(20), random.token_hex(20), random.token_hex(20)
    Gated.token = source
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def file(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    with running_suite(told_of_traces.endpoint) as suite:
        await suite.join([NODE])
        told = Told(suite)
        async with suite.client() as client:

            async def state(name):
                return (
                    await client.scheduler.GetJob(pb.GetJobRequest(name=f"queues/default/jobs/{name}"), timeout=5)
                ).state

            async def reaches(name, wanted):
                async def there():
                    return await state(name) == wanted

                await until(there, f"{name} is {wanted}", 60)

            await told("secrets", "add", "hf-token", token, code=1)  # refused, without a word of it
            await told("secrets", "add", "hf-token", input=token + "\n")
            await told("secrets", "add", "key", "--from-file", file("key", key))
            (tmp_path / "key").unlink()
            await told("secrets", "add", "model-token", input=model)
            await told("secrets", "add", "source-token", input=source)
            uri = f"http://127.0.0.1:{server.server_address[1]}/gated.bin"
            await told("datasets", "add", "gated", "--source", uri, "--secret", "source-token", "--size", "4")

            # a failure that prints it, and a retry
            low = job(
                "low",
                FAIL_ONCE,
                7,
                "data: [gated]\nretry: {backoff: 0.1 s}\nenvironment: {PLAIN_TOKEN: " + plain + "}\n",
            )
            said = await told("submit", file("low.yaml", low), "-y", "-d")
            assert "PLAIN_TOKEN in environment look like secrets" in said and plain not in said
            await until(lambda: _attempt(client, "low", 2), "it is tried again", 60)
            await reaches("low", pb.JOB_STATE_RUNNING)
            assert len(with_variables(f"HF_TOKEN={token}")) == 1
            memory = (suite.fleet.folder(NODE.name) / "secrets").resolve()
            await until(
                lambda: [path.name for path in memory.iterdir()] == ["default.low.2.0"],
                "what an attempt was given ends with it",
                60,
            )
            exec_ = await told.in_a_process(
                "exec", "low", "--", "sh", "-c", 'printf %s "$HF_TOKEN" | sha256sum; stat -c %a "$KEY_FILE"'
            )
            assert _digest(token) in exec_ and "400" in exec_
            assert set(filter(None, Gated.seen)) == {f"Bearer {source}"}, (
                "shown to the server, and not where it sends us"
            )

            # a model, while all is at work
            await told("serve", file("m.yaml", _model()), "-y")
            await until(lambda: bool(with_variables(f"MODEL_TOKEN={model}")), "a replica runs with its secret", 60)
            assert not [value for value in (token, key, model, source) if leaks.command_lines(value)]
            pids = [suite.pid("inventory"), suite.pid("scheduler"), suite.fleet.agents[NODE.name].pid]
            assert [pid for pid in pids if not _leaves_no_core(pid)] == []

            # rotation takes effect with the next attempt, which a preemption brings
            await told("secrets", "rotate", "hf-token", input=rotated)
            high = f"name: high\nworkdir: none\ngpus: 7\npriority: 100\nrun: {json.dumps(['sleep', '600'])}\n"
            await told("submit", file("high.yaml", high), "-y", "-d")
            await reaches("high", pb.JOB_STATE_RUNNING)
            await told("cancel", "high", "-y")
            await until(lambda: bool(with_variables(f"HF_TOKEN={rotated}")), "it is back with the new value", 60)
            await told("secrets", "rewrap")
            for words in (
                ("secrets", "ls"), ("secrets", "show", "hf-token"), ("jobs", "-a"), ("job", "low"), ("events", "-n", "1000"), ("history",),
                ("models",), ("replicas",), ("datasets", "ls"), ("datasets", "show", "gated"), ("queues",), ("nodes",), ("incidents", "-a"),
            ):  # fmt: skip
                await told(*words, "-o", "json")
            for words in (
                ("describe", "job/low"),
                ("explain", "low"),
                ("job", "low"),
                ("secrets", "show", "hf-token", "-o", "table"),
            ):
                await told(*words)

            async def shown():  # its process is there before its first line is
                logs = await told("logs", "low", "--rank", "0")
                return _digest(rotated)[:16] in logs and _digest(key)[:16] in logs

            await until(shown, "it shows the new value, and the key", 60)
            await told("cancel", "low", "-y")
            await until(
                lambda: not list(memory.glob("default.low*")), "it has ended, and what it was given is gone", 60
            )
            await told("unserve", "m", "-y")
            await until(lambda: not with_variables(f"MODEL_TOKEN={model}"), "its replica has ended", 60)
            await told("secrets", "rm", "key", "-y")
        suite.stop()
        server.shutdown()
        own_output = ("rank-0.log", "errors/error-0.json")  # what a rank prints is its own
        secret = (token, rotated, key.partition("\n")[0], model, source)
        found = leaks.found_in(suite.state, (*secret, plain))
        printed, spans = "".join(told.printed).encode(), repr(told_of_traces.spans).encode()
        for value in secret:
            where = [path for path in found[value] if not (value == token and path.endswith(own_output))]
            assert where == [], value[:12]
            assert not [form for form in leaks.forms(value) if form in printed or form in spans]
        assert any(path.startswith("etcd/") for path in found[plain]), (
            "a variable of a job file is found: the search works, and the docs are right"
        )
        assert not memory.exists()


def _leaves_no_core(pid):
    limits = (Path("/proc") / str(pid) / "limits").read_text().splitlines()
    return next(line.split()[4] for line in limits if line.startswith("Max core file size")) == "1"


def _model():
    return f"model: m\nengine:\n  run: {json.dumps([sys.executable, '-c', ENGINE])}\n  gpus: 1\n  health: /\n  secrets: [model-token]\n"


def _digest(value):
    return hashlib.sha256(value.encode()).hexdigest()


async def _attempt(client, name, number):
    found = await client.scheduler.GetJob(pb.GetJobRequest(name=f"queues/default/jobs/{name}"), timeout=5)
    return found.attempt.number >= number
