"""The ranks' Unix socket: frames in, frames out, who calls is whose token it is."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from whaleflux import telemetry
from whaleflux.errors import (
    DeadlineExceeded,
    FieldViolation,
    InvalidArgument,
    PermissionDenied,
    StatusError,
    Unauthenticated,
)
from whaleflux.reasons import ErrorReason, What
from whaleflux.telemetry import Event
from whaleflux.v1 import agent_pb2
from whaleflux_agent.rank_servicer import RankServicer
from whaleflux_agent.supervisor import Supervisor
from whaleflux_agent.task_runner import Task, own_socket

_MOST_BYTES = 16 << 20
_MOST_CONNECTIONS = 1024
_IDLE_S = 60.0
_DEFAULT_S, _LONGEST_S = 10.0, 300.0
_LENGTH = struct.Struct("!I")
_log = telemetry.get_logger("whaleflux.agent")

Answer = Callable[[Task, Any], Awaitable[Any]]


class RankServer:
    """Listens on the socket; a new agent takes it over from the one before."""

    def __init__(
        self, path: Path, servicer: RankServicer, supervisor: Supervisor, observe: Callable[..., None]
    ) -> None:
        self._path, self._supervisor, self._observe = path, supervisor, observe
        self._serving: set[asyncio.Task[None]] = set()
        self._servers: dict[Path, asyncio.Server] = {}
        self._connected: Counter[str] = Counter()  # by owner
        self._answers: dict[str, Answer] = {
            "get_restore": servicer.get_restore,
            "start_save": servicer.start_save,
            "finish_save": servicer.finish_save,
            "fail_save": servicer.fail_save,
            "confirm_intact": servicer.confirm_intact,
            "report_progress": servicer.report_progress,
            "report_steps": servicer.report_steps,
            "report_ray": servicer.report_ray,
        }

    async def start(self) -> None:
        """Binds and serves; only the agent's own user may connect, and the user of each task to that task's own socket."""
        self._servers[self._path] = await self._listen(self._path, "")
        for task in self._supervisor.holding():
            await self.open(task)

    async def open(self, task: Task) -> None:
        """Makes the socket of a task that runs as a user of its own; its group alone comes near. Raises OSError."""
        path = own_socket(self._path, task.work.task)
        if not task.meta.uid or path in self._servers:
            return
        path.parent.mkdir(mode=0o700, exist_ok=True)
        self._servers[path] = await self._listen(path, task.work.task)
        for place, mode in ((path, 0o660), (path.parent, 0o750)):
            os.chown(place, os.geteuid(), task.meta.gid)
            place.chmod(mode)

    async def close(self, task: Task) -> None:
        """Removes it."""
        path = own_socket(self._path, task.work.task)
        if (server := self._servers.pop(path, None)) is not None:
            server.close()
        if task.meta.uid:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    async def _listen(self, path: Path, owner: str) -> asyncio.Server:
        """`owner`: the task whose token alone is good there; "": that of any that runs as the agent."""
        path.unlink(missing_ok=True)
        serve = functools.partial(self._serve, owner)
        server = await asyncio.start_unix_server(serve, path, backlog=_MOST_CONNECTIONS)
        path.chmod(0o600)
        return server

    async def run(self) -> None:
        """Serves until cancelled; what is being answered then is given up, its callers ask the next agent."""
        try:
            await asyncio.Event().wait()
        finally:
            for server in self._servers.values():
                server.close()
            for serving in self._serving:
                serving.cancel()

    async def _serve(self, owner: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self._serving.add(serving)
        self._connected[owner] += 1
        try:
            while self._connected[owner] <= _MOST_CONNECTIONS:
                async with asyncio.timeout(_IDLE_S):
                    content = await _frame(reader)
                answer = (await self._answer(owner, content)).SerializeToString()
                writer.write(_LENGTH.pack(len(answer)) + answer)
                await writer.drain()
        except (OSError, EOFError, TimeoutError):
            return  # the caller has gone, or says nothing
        finally:
            self._serving.discard(serving)
            self._connected[owner] -= 1
            if not self._connected[owner]:
                del self._connected[owner]  # or one would stay of each task that ever ran
            writer.close()

    async def _answer(self, owner: str, content: bytes) -> agent_pb2.RankResponse:
        """Never raises: what was not done comes back as an error."""
        request = agent_pb2.RankRequest()
        try:
            request = _parsed(content)
            return await self._done(owner, request)
        except StatusError as error:
            if isinstance(error, Unauthenticated | PermissionDenied):
                self._tell(owner, request, error)
            return _error(error.code, error.reason, error.message)
        except Exception:
            _log.exception(Event.RANK_CALL_FAILED)
            return _error("INTERNAL", "INTERNAL", "the agent failed; its log says how")

    def _tell(self, owner: str, request: agent_pb2.RankRequest, refused: StatusError) -> None:
        """For the audit trail, which health_monitor keeps. `owner` is known where the task has a socket of its own."""
        task = self._supervisor.by_token(request.token)
        told = f"{request.WhichOneof('call') or 'nothing'} {refused.reason}: {refused.message} (socket of {owner or 'all tasks'})"
        self._observe(What.RANK_REFUSED, task, 0, told)

    async def _done(self, owner: str, request: agent_pb2.RankRequest) -> agent_pb2.RankResponse:
        call = request.WhichOneof("call")
        if call is None:
            raise InvalidArgument(FieldViolation("call", "is not set, or is not known to this agent"))
        task = self._supervisor.by_token(request.token)
        if task is None or owner != (task.work.task if task.meta.uid else ""):
            raise Unauthenticated("token: not the token of a task that runs here", reason=ErrorReason.TOKEN_UNKNOWN)
        limit_s = min(request.timeout_s or _DEFAULT_S, _LONGEST_S)
        try:
            async with asyncio.timeout(limit_s):
                with telemetry.attach(task.meta.traceparent):
                    answer = await self._answers[call](task, getattr(request, call))
        except TimeoutError:
            raise DeadlineExceeded(f"{call} did not finish within {limit_s:g} s") from None
        return agent_pb2.RankResponse(**{call: answer})


async def _frame(reader: asyncio.StreamReader) -> bytes:
    """The content of the next frame. Raises EOFError at the end, or when the frame is too long to be read."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > _MOST_BYTES:
        raise EOFError(f"a frame of {length} bytes, at most {_MOST_BYTES} are read")
    return await reader.readexactly(length)


def _parsed(content: bytes) -> agent_pb2.RankRequest:
    try:
        return agent_pb2.RankRequest.FromString(content)
    except DecodeError:
        raise InvalidArgument(FieldViolation("frame", "does not hold a RankRequest")) from None


def _error(code: str, reason: str, message: str) -> agent_pb2.RankResponse:
    return agent_pb2.RankResponse(error=agent_pb2.RankError(code=code, reason=reason, message=message))
