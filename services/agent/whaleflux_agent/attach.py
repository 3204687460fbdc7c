"""Sessions with this node's tasks: each is ordered by the scheduler and has a stream of its own, which this agent opens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from whaleflux import telemetry
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.channel import Channel
from whaleflux.telemetry import Event
from whaleflux.v1 import agent_pb2, agent_pb2_grpc
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_agent.attach_command import run_command
from whaleflux_agent.attach_files import read_files, write_files
from whaleflux_agent.attach_link import CallerGone, Link, Refused
from whaleflux_agent.attach_port import carry_connection
from whaleflux_agent.core.work import Stage
from whaleflux_agent.task_runner import Task

SESSIONS = 128
LOOK_S = 0.2  # whether the attempt still runs
_JOIN_S, _LAST_WORD_S = 10.0, 10.0
_log = telemetry.get_logger("whaleflux.agent")


class AttachSessions:
    """All that are open. `find` gives a task by its id."""

    def __init__(self, channel: Channel, node: str, find: Callable[[str], Task | None]) -> None:
        self._stub = agent_pb2_grpc.TaskServiceStub(channel)
        self._node, self._find = node, find
        self._open: set[asyncio.Task[None]] = set()

    def start(self, order: agent_pb2.AttachOrder) -> None:
        """Begins a session; beyond the limit nobody opens it, and the scheduler says so."""
        if len(self._open) >= SESSIONS:
            return
        session = asyncio.create_task(self._serve(order))
        self._open.add(session)
        session.add_done_callback(self._open.discard)

    async def close(self) -> None:
        """Ends all; returns when nothing of them is left."""
        sessions = list(self._open)
        for session in sessions:
            session.cancel()
        await asyncio.gather(*sessions, return_exceptions=True)

    async def _serve(self, order: agent_pb2.AttachOrder) -> None:
        link = Link(order, self._node)
        beside = [asyncio.create_task(link.listen(self._stub)), asyncio.create_task(link.keep_alive())]
        try:
            async with asyncio.timeout(_JOIN_S):
                await link.until_joined()
            await link.send(pb.AttachJobResponse(result=await self._result(order, link)))
            link.finish()
            async with asyncio.timeout(_LAST_WORD_S):
                await link.gone.wait()
        except (CallerGone, TimeoutError):
            pass
        except Exception as bug:
            _log.error(Event.SESSION_ENDED, job=order.job, reason=repr(bug)[:300])
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _result(self, order: agent_pb2.AttachOrder, link: Link) -> pb.AttachResult:
        try:
            return await self._done(order, link)
        except Refused as refusal:
            return pb.AttachResult(error=str(refusal), reason=refusal.reason)
        except OSError as error:
            return pb.AttachResult(error=f"on {self._node}: {error}", reason=ErrorReason.WRONG_STATE)

    async def _done(self, order: agent_pb2.AttachOrder, link: Link) -> pb.AttachResult:
        """Raises Refused, CallerGone, OSError."""
        opened, begun = order.open, pb.AttachOpened(node=self._node, epoch=order.epoch)
        task = self._find(order.task)
        if task is None or (task.work.job, task.work.epoch, task.work.job_uid) != (
            order.job,
            order.epoch,
            order.job_uid,
        ):
            raise Refused(f"that attempt of {order.job} is not known on {self._node} any more", ErrorReason.FILES_GONE)
        match opened.WhichOneof("what"):
            case "command":
                return await self._while_it_runs(task, link, run_command(link, task, opened, begun))
            case "port":
                return await self._while_it_runs(task, link, carry_connection(link, opened.port, begun))
            case "read":
                return await until_gone(link, read_files(link, task, opened.read, begun))
            case "write":
                return await until_gone(link, write_files(link, task, opened.write, begun))
        raise Refused("this agent is too old for what is asked; update it")

    async def _while_it_runs(
        self, task: Task, link: Link, work: Coroutine[Any, Any, pb.AttachResult]
    ) -> pb.AttachResult:
        """What `work` returns; it ends with the attempt."""
        watching = asyncio.create_task(_over(task))
        try:
            return await until_gone(link, work, watching)
        except AttemptOver:
            raise Refused(
                f"the attempt of {task.work.job} ended, and the session with it; see why with: whaleflux job {task.work.job}",
                ErrorReason.JOB_NOT_RUNNING,
            ) from None
        finally:
            watching.cancel()


class AttemptOver(Exception):  # named for what happened
    """The task's ranks have ended, or are being ended."""


async def _over(task: Task) -> None:
    while task.stage is Stage.RUNNING:
        await asyncio.sleep(LOOK_S)


async def until_gone(
    link: Link, work: Coroutine[Any, Any, pb.AttachResult], over: asyncio.Task[None] | None = None
) -> pb.AttachResult:
    """What `work` returns. Raises CallerGone, and AttemptOver once `over` is done; nothing of the work is left then."""
    doing, gone = asyncio.create_task(work), asyncio.create_task(link.gone.wait())
    try:
        await asyncio.wait({doing, gone, *([over] if over else [])}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise CallerGone if gone.done() else AttemptOver
    finally:
        gone.cancel()
        doing.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)
