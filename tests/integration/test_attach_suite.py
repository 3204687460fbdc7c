"""Inside of a running job of the real suite: what is carried, how fast, and what a killed agent leaves."""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time

import pytest

from tests.support.suite import running_suite, until
from whaleflux.cli import copying
from whaleflux.demo.fleet import Machine
from whaleflux.errors import Unavailable
from whaleflux.sdk.sessions import JobSession
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_agent.runtime import procfs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

NODE = Machine("onprem", "h200-a", "h200x8")
BIG = 64 << 20
# Sends back how many bytes came, after the caller's half of the connection has ended.
SERVER = f"""
import os, socket
open("big", "wb").write(os.urandom({BIG}))
listening = socket.create_server(("127.0.0.1", 0))
open("tmp", "w").write(str(listening.getsockname()[1])); os.replace("tmp", "port")
while True:
    connection, size = listening.accept()[0], 0
    while data := connection.recv(1 << 20):
        size += len(data)
    connection.sendall(str(size).encode())
    connection.close()
"""


def rate(size_bytes, began_s):
    return f"{size_bytes / (time.monotonic() - began_s) / 1e6:.0f} MB/s"


class Inside:
    """A suite with one node and one running job."""

    def __init__(self, suite, client):
        self.suite, self.client = suite, client

    async def submit(self, job_id, *command):
        spec = pb.JobSpec(command=command, gpus=1)
        request = pb.CreateJobRequest(parent="queues/default", job_id=job_id, job=pb.Job(spec=spec))
        return (await self.client.scheduler.CreateJob(request, timeout=10)).name

    async def reaches(self, name, state, timeout_s=60):
        """Seconds until the job is in the state."""

        async def there():
            return (await self.client.scheduler.GetJob(pb.GetJobRequest(name=name), timeout=5)).state == state

        return await until(there, f"{name} in {state}", timeout_s, every_s=0.01)

    async def cli(self, *args):
        argv = [sys.executable, "-m", "whaleflux.cli", "--context", str(self.suite.context_file), *args]
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, stderr=pipe)

    def session(self, name, *command):
        wanted = pb.AttachOpen(name=name, command=pb.AttachCommand(argv=command))
        return JobSession(self.client.scheduler, wanted)

    @contextlib.asynccontextmanager
    async def begun(self, name, *command):
        """The answers of a session, once the fleet takes one (a scheduler may just have been killed)."""
        session = self.session(name, *command)

        async def entered():
            await session.__aenter__()
            return True

        await until(entered, "a session", 60, every_s=0.2)
        try:
            yield session.responses()
        finally:
            await session.__aexit__()

    def read(self, name, path):
        return pb.AttachOpen(name=name, read=pb.AttachPath(path=path))


async def test_inside_of_a_job_of_the_real_suite(tmp_path):
    with running_suite() as suite:
        await suite.join([NODE])
        async with suite.client() as client:
            inside = Inside(suite, client)
            job = await inside.submit("served", "python3", "-c", SERVER)
            await inside.reaches(job, pb.JOB_STATE_RUNNING)
            await files_and_ports(inside, job, tmp_path)
            await a_caller_that_does_not_read_delays_no_report(inside, job)
            agent = inside.suite.fleet.agents[NODE.name]
            await who_is_killed_ends_the_session_and_leaves_nothing(
                inside, job, suite.pid("scheduler"), "the fleet changed"
            )
            await who_is_killed_ends_the_session_and_leaves_nothing(inside, job, agent.pid, "went away")
            agent.wait()
            await files_of_an_ended_job_outlive_a_restart_of_the_agent(inside, job, tmp_path)


async def files_and_ports(inside, job, tmp_path):
    process = await inside.cli(
        "exec", job, "--", "sh", "-c", "while [ ! -e port ]; do sleep 0.1; done; cat port; exit 4"
    )
    port, _ = await process.communicate()
    assert process.returncode == 4
    began_s = time.monotonic()
    await copying.fetch(inside.client, inside.read(job, "big"), str(tmp_path / "big"), replace=False)
    print("cp out:", rate(BIG, began_s))
    began_s = time.monotonic()
    back = pb.AttachOpen(name=job, write=pb.AttachPath(path="back", base_name="big"))
    await copying.send(inside.client, str(tmp_path / "big"), back)
    print("cp in:", rate(BIG, began_s))
    process = await inside.cli("exec", job, "--", "cmp", "big", "back")
    assert (await process.communicate(), process.returncode) == ((b"", b""), 0)
    process = await inside.cli("port-forward", job, f":{port.decode()}")
    here = int(re.match(rb"127\.0\.0\.1:(\d+) -> ", await process.stdout.readline())[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", here)
    began_s = time.monotonic()
    for _ in range(BIG >> 20):
        writer.write(bytes(1 << 20))
        await writer.drain()
    writer.write_eof()
    assert int(await reader.read()) == BIG
    print("port-forward:", rate(BIG, began_s))
    writer.close()
    process.send_signal(signal.SIGINT)
    await process.wait()


async def a_caller_that_does_not_read_delays_no_report(inside, job):
    """Reports of other tasks of the node: from submission to RUNNING, and to the end."""

    async def seconds(job_id):
        began_s = time.monotonic()
        name = await inside.submit(job_id, "true")
        await inside.reaches(name, pb.JOB_STATE_SUCCEEDED)
        return time.monotonic() - began_s

    alone_s = await seconds("alone")
    async with inside.session(job, "yes") as first, inside.session(job, "yes") as second:
        for session in (first, second):  # fills all that lies between, and is not read any further
            assert (await anext(session.responses())).data
        beside_s = await seconds("beside")
    print(f"submission to end: {alone_s:.2f} s alone, {beside_s:.2f} s beside callers that do not read")
    assert beside_s < alone_s + 8  # a second on a quiet machine


async def who_is_killed_ends_the_session_and_leaves_nothing(inside, job, pid, word):
    async with inside.begun(
        job, "env", "MARK=suite", "sh", "-c", "setsid sleep 600 & echo ready; sleep 600"
    ) as responses:
        assert (await anext(responses)).data == b"ready\n"
        assert procfs.find("MARK", "suite")
        began_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match=word):
            await asyncio.wait_for(anext(responses), 45)
        print(f"killed, {word}: {time.monotonic() - began_s:.2f} s")
    await until(lambda: not procfs.find("MARK", "suite"), "nothing of the session is left", 30)
    assert procfs.find("WHALEFLUX_JOB", job)  # the rank goes on


async def files_of_an_ended_job_outlive_a_restart_of_the_agent(inside, job, tmp_path):
    await inside.client.scheduler.CancelJob(pb.CancelJobRequest(name=job), timeout=10)
    process = await inside.cli("cp", f"{job}:port", str(tmp_path / "port"))
    _, err = await process.communicate()
    assert (process.returncode, f"{NODE.name}, where rank 0 of {job} is, is not connected now" in err.decode()) == (
        3,
        True,
    )
    inside.suite.fleet.restart(NODE)

    async def copied():
        await copying.fetch(inside.client, inside.read(job, "port"), str(tmp_path / "port"), replace=False)
        return True

    await until(copied, "the file came", 60)
    assert (tmp_path / "port").read_text().isdecimal()
