"""Reading the output of a job, or of each member of an array: one after another, or with `follow` all at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from whaleflux import names
from whaleflux.cli import arrays, output
from whaleflux.cli.following import attempt_number
from whaleflux.cli.waiting import SAY_AFTER_S
from whaleflux.errors import FieldViolation, InvalidArgument, NotFound, StatusError
from whaleflux.v1 import scheduler_pb2

MOST_FOLLOWED = 32  # members at once: each is a reader, of which the scheduler takes a limited number
_FLAGS = {"rank": "--rank", "attempt": "--attempt", "tail_lines": "--tail"}  # by the contract's field
_JOIN_S = 0.5  # so that Ctrl-C is met


def read(client: Any, request: Any, screen: Any, *, previous: bool = False) -> bool:
    """Shows what StreamLogsRequest `request` asks for, of the attempt before the newest with `previous`.

    Returns whether all of it could be read. Raises NotFound where there is neither such a job nor such an array, InvalidArgument for a
    rank or attempt that is not there.
    """
    try:
        _one(client, request, screen, previous=previous)
        return True
    except NotFound:
        members = [member.name for member in arrays.members(client, request.name)]
        if not members:
            raise
    if request.follow and len(members) > MOST_FOLLOWED:
        limit = f"{request.name} has {len(members)} members, and {MOST_FOLLOWED} can be followed at once"
        raise InvalidArgument(FieldViolation("--follow", f"{limit}; name one of them: whaleflux logs -f {members[0]}"))
    return _Members(client, request, screen, previous).read(members)


class _Members:
    """Reads jobs of an array; what is wrong with one does not keep the others back."""

    def __init__(self, client: Any, request: Any, screen: Any, previous: bool) -> None:
        self._client, self._request, self._screen, self._previous = client, request, screen, previous
        self._failed: list[str] = []
        self._broken: list[Exception] = []  # there is nobody to read for any more, such as `| head`

    def read(self, members: Sequence[str]) -> bool:
        if not self._request.follow:
            for name in members:
                self._member(name)
            return not self._failed
        threads = [threading.Thread(target=self._beside, args=(name,), daemon=True) for name in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not self._broken:
                thread.join(_JOIN_S)
        if self._broken:
            raise self._broken[0]
        return not self._failed

    def _beside(self, name: str) -> None:
        try:
            self._member(name)
        except Exception as error:
            self._broken.append(error)

    def _member(self, name: str) -> None:
        request = scheduler_pb2.StreamLogsRequest()
        request.CopyFrom(self._request)
        request.name = name
        try:
            _one(self._client, request, self._screen, previous=self._previous, member=True)
        except StatusError as error:
            self._failed.append(name)
            self._screen.state(f"{names.last(name)}: {error.message}")


def _one(client: Any, request: Any, screen: Any, *, previous: bool, member: bool = False) -> None:
    if previous:
        request.attempt = _previous(client, request.name)
    if not _show(client, request, screen, member=member):
        output.note(_nothing(client, request))


def _show(client: Any, request: Any, screen: Any, *, member: bool) -> bool:
    """Whether there was anything to show."""
    shown, some = 0, False
    chunks = client.read_logs(request)
    if request.follow and not member:
        chunks = first_awaited(chunks, lambda: output.note(_why_nothing_yet(client, request.name)))
    try:
        for chunk in chunks:
            if shown and chunk.attempt > shown:
                screen.state((f"{names.last(request.name)}: " if member else "") + f"attempt {chunk.attempt}")
            shown = max(shown, chunk.attempt)
            screen.lines(chunk, request.name, named=member)
            some = True
        return some
    except InvalidArgument as error:
        raise InvalidArgument(
            [FieldViolation(_FLAGS.get(wrong.field, wrong.field), wrong.description) for wrong in error.violations]
        ) from None


def first_awaited(chunks: Iterator[Any], say: Callable[[], None], after_s: float = SAY_AFTER_S) -> Iterator[Any]:
    """The same chunks; says once what is waited for when none comes for a while."""
    over = threading.Event()

    def wait() -> None:
        if not over.wait(after_s):
            with contextlib.suppress(StatusError):  # who reads is told of it
                say()

    threading.Thread(target=wait, daemon=True).start()
    try:
        for chunk in chunks:
            over.set()
            yield chunk
    finally:
        over.set()


def _why_nothing_yet(client: Any, name: str) -> str:
    """What the job is doing that has printed nothing so far; "" of one that has ended by now."""
    job = client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=10)
    if job.end_time.seconds:
        return ""
    why = f": {job.state_message}" if job.state_message else ""
    return f"waits for the first output of {name}, which is {output.job_state(job)}{why}; Ctrl-C ends the wait"


def _nothing(client: Any, request: Any) -> str:
    """Why there is nothing to show, beside the output."""
    job = client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=request.name), timeout=10)
    asked = " of what was asked for" if request.HasField("since_time") or request.attempt or request.rank else ""
    advice = "" if job.end_time.seconds else f"; see why: whaleflux explain {job.name}"
    return f"{job.name} is {output.job_state(job)} and has printed nothing{asked}{advice}"


def _previous(client: Any, name: str) -> int:
    """The number of the attempt before the newest. Raises InvalidArgument when there is none."""
    newest = attempt_number(client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=10))
    if newest < 2:
        there = "one attempt, 1" if newest else "not had any attempt yet"
        raise InvalidArgument(FieldViolation("--previous", f"{name} has {there}; see it with: whaleflux logs {name}"))
    return newest - 1
