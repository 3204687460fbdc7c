"""An agent as its ranks see it: a socket, frames, and answers that a test chooses."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whaleflux import names
from whaleflux.sdk.frames import LENGTH
from whaleflux.v1 import agent_pb2, checkpoint_pb2

JOB = "queues/q/jobs/j"
_COMMITTED = checkpoint_pb2.CHECKPOINT_STATE_COMMITTED


class FakeAgent:
    """Commits a checkpoint when all ranks have finished it; restores the newest that is not refused.

    `refuse` is asked first: what it returns (code, reason, message) is answered instead.
    """

    def __init__(self, folder: Path, world_size: int = 1, epoch: int = 1) -> None:
        self.socket, self.folder = folder / "rank.sock", folder / "checkpoints"
        self.world_size, self.epoch, self.every_steps = world_size, epoch, 0
        self.calls: list[agent_pb2.RankRequest] = []
        self.checkpoints: dict[str, checkpoint_pb2.Checkpoint] = {}
        self.refuse: Callable[[agent_pb2.RankRequest], tuple[str, str, str] | None] = lambda _: None
        self._finished: dict[str, set[int]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> FakeAgent:
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while head := self.rfile.read(LENGTH.size):
                    request = agent_pb2.RankRequest.FromString(self.rfile.read(*LENGTH.unpack(head)))
                    answer = outer.answer(request).SerializeToString()
                    self.wfile.write(LENGTH.pack(len(answer)) + answer)

        self.socket.parent.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        self._server = socketserver.ThreadingUnixStreamServer(str(self.socket), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What a rank needs to find it."""
        return {"WHALEFLUX_AGENT_SOCKET": str(self.socket), "WHALEFLUX_TASK_TOKEN": "token"}

    def named(self, call: str) -> list[Any]:
        """The calls of one kind so far."""
        return [getattr(request, call) for request in self.calls if request.WhichOneof("call") == call]

    def committed(self) -> list[checkpoint_pb2.Checkpoint]:
        """Oldest first."""
        return [c for c in self.checkpoints.values() if c.state == _COMMITTED]

    def answer(self, request: agent_pb2.RankRequest) -> agent_pb2.RankResponse:
        with self._lock:
            self.calls.append(request)
            if (error := self.refuse(request)) is not None:
                code, reason, message = error
                return agent_pb2.RankResponse(error=agent_pb2.RankError(code=code, reason=reason, message=message))
            call = request.WhichOneof("call")
            return getattr(self, f"_{call}")(getattr(request, call))

    def _get_restore(self, request: agent_pb2.GetRestoreRequest) -> agent_pb2.RankResponse:
        for one in request.refused:
            if one.HasField("read"):
                self.checkpoints[one.checkpoint].state = checkpoint_pb2.CHECKPOINT_STATE_LOST
        refused = {one.checkpoint for one in request.refused}
        lost = checkpoint_pb2.CHECKPOINT_STATE_LOST
        known = [c for c in self.checkpoints.values() if c.state in (_COMMITTED, lost)]
        left = [c for c in known if c.name not in refused]
        if known and not left:
            error = agent_pb2.RankError(
                code="FAILED_PRECONDITION", reason="CHECKPOINT_UNREACHABLE", message="none can be restored from here"
            )
            return agent_pb2.RankResponse(error=error)
        answer = agent_pb2.GetRestoreResponse(location=str(self.folder), every_steps=self.every_steps)
        if left:
            answer.checkpoint.CopyFrom(max(left, key=lambda c: (c.state == _COMMITTED, c.step)))
        return agent_pb2.RankResponse(get_restore=answer)

    def _start_save(self, request: agent_pb2.StartSaveRequest) -> agent_pb2.RankResponse:
        id_ = names.checkpoint_id(request.step, self.epoch, request.serial)
        name, location = f"{JOB}/checkpoints/{id_}", str(self.folder / id_)
        self.checkpoints[name] = checkpoint_pb2.Checkpoint(
            name=name,
            step=request.step,
            location=location,
            storage=request.storage,
            state=1,
            resharding=request.resharding,
        )
        return agent_pb2.RankResponse(start_save=agent_pb2.StartSaveResponse(checkpoint=name, location=location))

    def _finish_save(self, request: agent_pb2.FinishSaveRequest) -> agent_pb2.RankResponse:
        saved = self.checkpoints[request.checkpoint]
        done = self._finished.setdefault(request.checkpoint, set())
        done.add(request.rank)
        saved.pieces.extend(request.pieces)
        if len(done) == self.world_size:
            saved.state = _COMMITTED
        return agent_pb2.RankResponse(finish_save=agent_pb2.FinishSaveResponse())

    def _report_steps(self, request: agent_pb2.ReportStepsRequest) -> agent_pb2.RankResponse:
        return agent_pb2.RankResponse(report_steps=agent_pb2.ReportStepsResponse())

    def _fail_save(self, request: agent_pb2.FailSaveRequest) -> agent_pb2.RankResponse:
        if request.checkpoint:
            self.checkpoints[request.checkpoint].state = checkpoint_pb2.CHECKPOINT_STATE_ABANDONED
        return agent_pb2.RankResponse(fail_save=agent_pb2.FailSaveResponse())

    def _confirm_intact(self, request: agent_pb2.ConfirmIntactRequest) -> agent_pb2.RankResponse:
        self.checkpoints[request.checkpoint].state = _COMMITTED
        return agent_pb2.RankResponse(confirm_intact=agent_pb2.ConfirmIntactResponse())

    def _report_progress(self, request: agent_pb2.ReportProgressRequest) -> agent_pb2.RankResponse:
        return agent_pb2.RankResponse(report_progress=agent_pb2.ReportProgressResponse())
