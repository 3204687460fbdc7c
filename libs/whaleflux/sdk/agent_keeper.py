"""What a rank says to the agent that runs it: a Unix socket, a task token, never a wait that training would feel."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.message import DecodeError

from whaleflux.checkpoint_storage import found_storage
from whaleflux.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.sdk import frames
from whaleflux.sdk.errors import CheckpointError, RestoreFailed
from whaleflux.sdk.files import SavedPiece
from whaleflux.sdk.keeper import Loss, Refused, StepReport, Target
from whaleflux.sdk.resharding import Resharding
from whaleflux.usage_checks import MOST_LOSS
from whaleflux.v1 import agent_pb2, checkpoint_pb2, usage_pb2

log = logging.getLogger(__name__)

_CALL_S = 10.0
_PROGRESS_S = 1.0
PATIENCE_S, PAUSE_S = 600.0, 0.5
_STEPS_KEPT = 64  # reports, while the agent restarts
_UNKNOWN_CALL = "call: "  # how an older agent's refusal begins
_PASSING = (Unavailable.code, DeadlineExceeded.code)


class AgentError(CheckpointError):
    """The agent does not do what was asked. `code` is gRPC's name of the status."""

    def __init__(self, code: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class AgentKeeper:
    """Asks the agent. Every call has a deadline; progress goes from a thread that keeps only the newest value."""

    def __init__(self, socket: str, token: str, restore_timeout_s: float = 60.0) -> None:
        self._socket, self._token, self._restore_timeout_s = socket, token, restore_timeout_s
        self._folder: Path | None = None
        self._storage = ""  # that this job saves on
        self.every_steps = 0
        self._unsent: tuple[int, int, Loss | None] | None = None
        self._unsent_steps: deque[tuple[agent_pb2.ReportStepsRequest, Sequence[Loss]]] = deque(maxlen=_STEPS_KEPT)
        self._takes_steps, self._refused_steps = True, False
        self._wake, self._closing = threading.Condition(), False
        self._sender: threading.Thread | None = None

    def newest(self, refused: Sequence[Refused] = ()) -> Target | None:
        request = agent_pb2.GetRestoreRequest(refused=[_refused(one) for one in refused])
        try:
            answer = self._patiently(
                agent_pb2.RankRequest(get_restore=request), self._restore_timeout_s, self._restore_timeout_s
            ).get_restore
        except AgentError as error:
            if error.code == FailedPrecondition.code:
                self._storage = ""  # who starts over all the same saves on what is there
                raise RestoreFailed(str(error)) from error
            raise
        self.every_steps, self._folder = answer.every_steps, Path(answer.location)
        if not answer.HasField("checkpoint"):
            return None
        found = answer.checkpoint
        self._storage = found.storage
        pieces = tuple(SavedPiece(p.path, p.size_bytes, p.checksum) for p in found.pieces)
        lost = found.state == checkpoint_pb2.CHECKPOINT_STATE_LOST
        return Target(found.name, Path(found.location), pieces, found.storage, lost)

    def intact(self, target: Target) -> None:
        request = agent_pb2.ConfirmIntactRequest(checkpoint=target.name)
        self._patiently(agent_pb2.RankRequest(confirm_intact=request))

    def start(
        self, step: int, serial: int, layout: str, data_position: bytes, resharding: Resharding | None = None
    ) -> Target:
        if self._folder is None:
            self.newest()
        assert self._folder is not None
        storage = self._storage = found_storage(self._folder, self._storage)
        request = agent_pb2.StartSaveRequest(
            step=step,
            serial=serial,
            layout=layout,
            data_position=data_position,
            storage=storage,
            resharding=f"RESHARDING_{resharding.value}" if resharding else None,
        )
        answer = self._patiently(agent_pb2.RankRequest(start_save=request)).start_save
        return Target(answer.checkpoint, Path(answer.location), storage=storage)

    def finish(self, target: Target, rank: int, pieces: Sequence[SavedPiece]) -> None:
        listed = [
            checkpoint_pb2.Piece(rank=rank, path=p.path, size_bytes=p.size_bytes, checksum=p.checksum, tier="shared")
            for p in pieces
        ]
        request = agent_pb2.FinishSaveRequest(checkpoint=target.name, rank=rank, pieces=listed)
        self._patiently(agent_pb2.RankRequest(finish_save=request))

    def give_up(self, target: Target | None, step: int, why: str) -> None:
        request = agent_pb2.FailSaveRequest(checkpoint=target.name if target else "", step=step, message=why)
        self._ask(agent_pb2.RankRequest(fail_save=request), _CALL_S)

    def _patiently(
        self, request: agent_pb2.RankRequest, timeout_s: float = _CALL_S, patience_s: float | None = None
    ) -> agent_pb2.RankResponse:
        """Repeats while the agent restarts or waits for room on its disk: a save runs beside the training."""
        end_s = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
        while True:
            try:
                return self._ask(request, min(timeout_s, max(1.0, end_s - time.monotonic())))
            except AgentError as error:
                if error.code not in _PASSING or time.monotonic() > end_s:
                    raise
                log.warning("the agent does not answer yet: %s", error)
            time.sleep(PAUSE_S)

    def _ask(self, request: agent_pb2.RankRequest, timeout_s: float) -> agent_pb2.RankResponse:
        request.token = self._token
        try:
            answer = frames.call(self._socket, request, timeout_s)
        except (OSError, DecodeError) as error:
            raise AgentError(Unavailable.code, ErrorReason.SERVER_UNREACHABLE, f"{self._socket}: {error}") from error
        if answer.HasField("error"):
            raise AgentError(answer.error.code, answer.error.reason, answer.error.message)
        return answer

    def progress(self, rank: int, step: int, loss: Loss | None) -> None:
        with self._wake:
            self._unsent = rank, step, loss
            self._hurry()

    def steps(self, rank: int, report: StepReport) -> None:
        with self._wake:
            if self._takes_steps:
                self._unsent_steps.append((steps_request(rank, report), report.losses))
                self._hurry()

    def _hurry(self) -> None:
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_progress, name="whaleflux-progress", daemon=True)
            self._sender.start()
            atexit.register(self.close)  # see background.py; and the last step of a program is told of
        self._wake.notify()

    def close(self) -> None:
        atexit.unregister(self.close)
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._sender is not None:
            self._sender.join(timeout=2 * _CALL_S)

    def _send_progress(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._unsent is not None or self._unsent_steps or self._closing)
                unsent, self._unsent = self._unsent, None
                steps = list(self._unsent_steps)
                self._unsent_steps.clear()
            if unsent is None and not steps:
                return
            if unsent is not None:
                rank, step, loss = unsent
                report = agent_pb2.ReportProgressRequest(rank=rank, step=step, loss=_read(loss, step))
                with contextlib.suppress(AgentError):  # the agent restarts: the next report says the same and more
                    self._ask(agent_pb2.RankRequest(report_progress=report), _PROGRESS_S)
            for told, losses in steps:  # soon: losses on a GPU are kept for some steps only
                _add_losses(told, losses)
            self._send_steps([told for told, _ in steps])

    def _send_steps(self, steps: Sequence[agent_pb2.ReportStepsRequest]) -> None:
        """While the agent restarts they wait; one that cannot be true is left out; an agent that does not know the call is not told again."""
        for at, report in enumerate(steps):
            try:
                self._ask(agent_pb2.RankRequest(report_steps=report), _PROGRESS_S)
            except AgentError as error:
                if error.code == InvalidArgument.code and not str(error).startswith(_UNKNOWN_CALL):
                    log.log(logging.DEBUG if self._refused_steps else logging.WARNING, "times of steps: %s", error)
                    self._refused_steps = True
                    continue
                with self._wake:
                    self._takes_steps = error.code in _PASSING
                    if not self._takes_steps:
                        self._unsent_steps.clear()  # told meanwhile
                    elif not self._closing:
                        self._unsent_steps.extendleft((told, ()) for told in reversed(steps[at:]))
                if not self._takes_steps:
                    log.info("the agent takes no times of steps: %s", error)
                time.sleep(PAUSE_S)
                return


def _read(loss: Loss | None, step: int) -> float | None:
    """What a step's loss is. One that a failed GPU cannot give is none: the step itself, and those after it, are still told of."""
    try:
        return None if loss is None else loss()
    except Exception as error:  # whatever the framework raises for its device
        log.warning("the loss of step %d could not be read: %s", step, error)
        return None


def _add_losses(request: agent_pb2.ReportStepsRequest, losses: Sequence[Loss]) -> None:
    """What can be read of them."""
    for loss in losses:
        try:
            value = loss()
        except (
            Exception
        ) as error:  # whatever the framework raises for its device; the step itself is told of all the same
            log.debug("a loss could not be read: %s", error)
            continue
        noted = request.times.loss
        if not abs(value) <= MOST_LOSS:
            noted.not_finite += 1
            continue
        noted.min = min(noted.min, value) if noted.count else value
        noted.max = max(noted.max, value) if noted.count else value
        noted.sum += value
        noted.count += 1


def steps_request(rank: int, report: StepReport) -> agent_pb2.ReportStepsRequest:
    """In whole microseconds: parts that fit into their steps still do when each is rounded."""
    start_us, end_us = round(report.start_s * 1e6), round(report.end_s * 1e6)
    left_us = end_us - start_us
    times = usage_pb2.StepTimes(
        first_step=report.first_step, last_step=report.last_step, tokens=report.tokens, flops=report.flops
    )
    for name in ("data", "save", "comm_in_node", "comm_cross", "host"):
        if (seconds := getattr(report, f"{name}_s")) is not None:
            part_us = min(int(seconds * 1e6), left_us)
            setattr(times, f"{name}_us", part_us)
            left_us -= part_us
    request = agent_pb2.ReportStepsRequest(rank=rank, times=times)
    request.start_time.FromMicroseconds(start_us)
    request.end_time.FromMicroseconds(end_us)
    return request


def _refused(one: Refused) -> agent_pb2.RefusedCheckpoint:
    said = agent_pb2.RefusedCheckpoint(checkpoint=one.name, message=one.fault.message)
    if (read := one.fault.read) is not None:
        said.read.CopyFrom(checkpoint_pb2.Piece(path=read.path, size_bytes=read.size_bytes, checksum=read.checksum))
    return said
