"""Sessions with a job, all real but the scheduler's store: its broker, an agent in this process, and the command line as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.support.fake_control_plane import JOB, NODE, ControlPlane, Tasks, admit, agent, desired, until
from whaleflux.cli import copying
from whaleflux.clock import SystemClock
from whaleflux.manifests.job_fields import Spec
from whaleflux.rpc.pki import TlsFiles
from whaleflux.sdk.client import AsyncClient
from whaleflux.sdk.sessions import JobSession, SessionOver
from whaleflux.v1 import agent_pb2, scheduler_pb2, scheduler_pb2_grpc
from whaleflux_scheduler.agent_sessions import AgentSession
from whaleflux_scheduler.attach import AttachBroker, opening
from whaleflux_scheduler.core import model


class AttachedTasks(Tasks):
    """Passes the orders of a real broker on to the agent, and its streams back."""

    def __init__(self, broker: AttachBroker) -> None:
        super().__init__()
        self._broker = broker

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        hello = (await anext(requests)).hello
        async for response in self._broker.join(hello, requests):
            yield response


class AttachedScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """One job, as its agent last reported it."""

    def __init__(self, broker: AttachBroker, tasks: AttachedTasks) -> None:
        self._broker, self._tasks = broker, tasks
        self.state = model.JobState.RUNNING

    def job(self) -> model.Job:
        (wanted,) = (task for task in self._tasks.desired.values() if task.job == JOB)
        last = self._tasks.last(wanted.task.id)
        task = model.Task(wanted.task.id, NODE, tuple(wanted.task.gpu_uuids), 0, 0, phase=model.TaskPhase(last.phase))
        now = datetime.now(UTC)
        return model.Job(
            JOB, Spec(), self.state, now, attempt=model.Attempt(wanted.epoch, (task,), now), uid=wanted.job_uid
        )

    async def AttachJob(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        opened = await opening(requests)
        async for response in self._broker.serve(self.job(), opened, requests):
            yield response


class _ToAgent(AgentSession):
    """What is sent to it goes down the fake's stream."""

    def __init__(self, tasks: AttachedTasks) -> None:
        super().__init__(NODE, lambda node: ({}, 0))
        self._tasks = tasks

    def send(self, response: agent_pb2.SyncResponse) -> None:
        self._tasks.tell(response)


class AttachWorld:
    """`async with attach_world(folder, command) as world`: the job runs `command`, with two ranks unless asked otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        sessions: dict[str, AgentSession] = {}
        self.broker = AttachBroker(_Connected(sessions), SystemClock())  # type: ignore[arg-type]  # all that it asks for
        self.tasks = AttachedTasks(self.broker)
        sessions[NODE] = _ToAgent(self.tasks)
        self.scheduler = AttachedScheduler(self.broker, self.tasks)
        self.control = ControlPlane(folder, tasks=self.tasks, scheduler=self.scheduler)
        self.context = folder / "context.json"

    def write_context(self) -> None:
        files = TlsFiles.under(self.folder, "user")
        files.save(self.control.ca.issue("user", "ann", datetime.now(UTC)))
        content = {
            "server": f"127.0.0.1:{self.control.port}",
            "ca": files.roots,
            "cert": files.chain,
            "key": files.key,
        }
        self.context.write_text(json.dumps({key: str(value) for key, value in content.items()}))

    def client(self) -> AsyncClient:
        return AsyncClient.from_context(self.context)

    async def start(self, *args: str, **options: Any) -> asyncio.subprocess.Process:
        """The command line as a process; input and output are pipes unless `options` say otherwise."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
        argv = [sys.executable, "-m", "whaleflux.cli", "--context", str(self.context), *args]
        environment = {**os.environ, "TERM": "xterm"}
        return await asyncio.create_subprocess_exec(*argv, env=environment, **{**pipes, **options})

    async def cli(self, *args: str, input: bytes = b"") -> tuple[int, bytes, str]:
        """Exit code, output and error text of one command."""
        async with asyncio.timeout(60):
            process = await self.start(*args)
            out, err = await process.communicate(input)
        assert process.returncode is not None
        return process.returncode, out, err.decode()

    async def exec(self, *argv: str, rank: int = 0, input: bytes = b"") -> tuple[int, bytes, str]:
        """The same of a command beside a rank, without a process for the command line."""
        out, err = b"", b""
        async with self.client() as client, self.session(client, *argv, rank=rank) as session:
            sending = asyncio.create_task(_send(session, input))
            async for response in session.responses():
                out, err = out + response.data, err + response.error_data
            await sending
        assert session.result is not None
        return session.result.exit_code, out, err.decode()

    def session(self, client: AsyncClient, *argv: str, rank: int = 0) -> JobSession:
        """A session with a command; enter it."""
        command = scheduler_pb2.AttachCommand(argv=argv)
        return JobSession(client.scheduler, scheduler_pb2.AttachOpen(name=JOB, rank=rank, command=command))

    async def fetch(self, path: str, local: Path, *, replace: bool = False) -> None:
        """`whaleflux cp train:PATH LOCAL`."""
        wanted = scheduler_pb2.AttachOpen(name=JOB, read=scheduler_pb2.AttachPath(path=path))
        async with self.client() as client:
            await copying.fetch(client, wanted, str(local), replace=replace)

    async def send(self, local: Path, path: str) -> None:
        """`whaleflux cp LOCAL train:PATH`."""
        target = scheduler_pb2.AttachPath(path=path, base_name=local.name)
        async with self.client() as client:
            await copying.send(client, str(local), scheduler_pb2.AttachOpen(name=JOB, write=target))

    @property
    def work(self) -> Path:
        """The job's working directory."""
        return self.state / "work" / quote(JOB, safe="")


async def _send(session: JobSession, data: bytes) -> None:
    with contextlib.suppress(SessionOver):  # it has ended without reading all of it
        await session.send(data)
        await session.end_input()


class _Connected:
    def __init__(self, connected: dict[str, AgentSession]) -> None:
        self.connected = connected


@contextlib.asynccontextmanager
async def attach_world(folder: Path, command: list[str], ranks: int = 2, *flags: str) -> AsyncIterator[AttachWorld]:
    """`flags` are more of the agent's command line."""
    world = AttachWorld(folder)
    await world.control.start()
    world.write_context()
    admit(world.control, world.state)
    try:
        async with agent(world.control, world.state, *flags):
            world.tasks.want(desired(command, gpus=tuple(range(ranks))))
            await until(lambda: "RUNNING" in world.tasks.phases("train-1-0"))
            yield world
            world.tasks.unwant("train-1-0")
            await until(lambda: world.tasks.phases("train-1-0")[-1] in ("KILLED", "EXITED"))
    finally:
        await world.control.stop()
