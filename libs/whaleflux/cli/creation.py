"""Planned jobs into the fleet: folders first, then job after job, arrays side by side; and in place of jobs that are there."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from whaleflux.cli import output, sending, workdir
from whaleflux.cli.submission import Submission, job_there, same_content

if TYPE_CHECKING:
    from whaleflux.errors import StatusError

_REPLACE_S = 900.0  # longest grace of a job is an hour; who gives that repeats the command
_LOOK_AGAIN_S = 0.5
_SHOWN = 5
_UNDER_WAY_S = 5.0  # after Ctrl-C, for the answers to what was sent already
_AT_ONCE = 16  # members of an array that are submitted side by side


def create_all(client: Any, jobs: Sequence[Submission]) -> list[Any]:
    """Sends folders, then jobs; returns them as they are stored. What is there already when it breaks off is said."""
    for parcel in {id(one.parcel): one.parcel for one in jobs if one.parcel}.values():
        workdir.send(client, parcel)
    made: list[Any] = []
    try:
        for old in (
            [one for one in jobs if one.replaced and not one.replaced.HasField("end_time")] if len(jobs) > 1 else []
        ):
            _cancel(client, old.name)  # all at once, they end side by side
            old.cancelled = True
        for group in _groups(jobs):
            _create(client, group, made)
            _say_progress(len(made), len(jobs))
    except (KeyboardInterrupt, Exception):
        _say_how_far(made, jobs)
        raise
    return made


def _groups(jobs: Sequence[Submission]) -> list[list[Submission]]:
    """In their order; members of an array side by side, since they do not wait for one another."""
    found: list[list[Submission]] = []
    for one in jobs:
        array = one.request.job.spec.array.name
        alike = found and array and found[-1][-1].request.job.spec.array.name == array
        if alike and len(found[-1]) < _AT_ONCE:
            found[-1].append(one)
        else:
            found.append([one])
    return found


def _create(client: Any, group: Sequence[Submission], made: list[Any]) -> None:
    """Adds to `made` what is stored. Raises the first error once all have been answered."""
    if len(group) == 1:
        made.append(_made(client, group[0]))
        return
    from concurrent.futures import ThreadPoolExecutor, wait

    pool = ThreadPoolExecutor(len(group))
    asked = [pool.submit(_made, client, one) for one in group]
    try:
        wait(asked)
    except KeyboardInterrupt:
        wait(asked, timeout=_UNDER_WAY_S)
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        made += [one.result() for one in asked if one.done() and not one.cancelled() and one.exception() is None]
    for one in asked:
        one.result()


def _made(client: Any, one: Submission) -> Any:
    if one.kept is not None:
        return one.kept
    _same_again(one)
    return _replacing(client, one) if one.replaced else _created(client, one)


def _created(client: Any, one: Submission) -> Any:
    """A member of an array that is there already with the same content is the one, whichever command made it: one with --replace, too."""
    from whaleflux.errors import AlreadyExists

    try:
        return sending.created(client, one.request)
    except AlreadyExists:
        there = job_there(client, one.name) if one.request.job.spec.array.name else None
        if there is None or not same_content(there, one.request.job.spec):
            raise
        return there


def _same_again(one: Submission) -> None:
    """Of an array's member the request has an id of its content: the same command again goes on where it broke off, without duplicates."""
    if one.request.job.spec.array.name and not one.replaced:
        content = one.request.job.spec.SerializeToString(deterministic=True)
        one.request.request_id = hashlib.sha256(one.name.encode() + b"\0" + content).hexdigest()[:32]


def was_there(job: Any, one: Submission) -> bool:
    """Whether an earlier command has made it: it is older than the plan."""
    return bool(job.create_time.ToNanoseconds() < one.planned.create_time.ToNanoseconds())


def _replacing(client: Any, one: Submission) -> Any:
    """Ends the old job, waits until its GPUs are free, and lets the new one take its record's place in one step.

    Until then the old record is there, from then on the new one: whatever breaks, one of them is.
    """
    from whaleflux.errors import Aborted, AlreadyExists, FailedPrecondition

    deadline, told = time.monotonic() + _REPLACE_S, False
    while True:
        old = job_there(client, one.name)
        try:
            if old is not None and not old.HasField("end_time"):
                _cancel(client, one.name)
                one.cancelled = True
            one.request.replaces = old.etag if old is not None else ""
            return sending.created(client, one.request)
        except (FailedPrecondition, Aborted, AlreadyExists) as busy:
            if not _passes(busy) or time.monotonic() >= deadline:
                raise
            if not told:
                output.note(
                    f"waits until {one.name} has ended and its GPUs are free; Ctrl-C and the same command again is safe"
                )
            told = True
        time.sleep(_LOOK_AGAIN_S)


def _cancel(client: Any, name: str) -> None:
    from whaleflux.errors import FailedPrecondition
    from whaleflux.reasons import ErrorReason
    from whaleflux.v1 import scheduler_pb2

    try:
        client.scheduler.CancelJob(scheduler_pb2.CancelJobRequest(name=name, reason="replaced"), timeout=20)
    except FailedPrecondition as refused:
        if refused.reason != ErrorReason.JOB_ENDED:
            raise


def _passes(error: StatusError) -> bool:
    """Whether the old job is on its way out, or changed just now."""
    from whaleflux.reasons import ErrorReason

    ending = {ErrorReason.JOB_NOT_ENDED, ErrorReason.GPUS_HELD, ErrorReason.ETAG_MISMATCH}
    return error.reason in ending


def _say_progress(done: int, total: int) -> None:
    if total > _AT_ONCE and sys.stderr.isatty():
        output.progress(f"submitted {done} of {total}" if done < total else "")


def _say_how_far(made: Sequence[Any], jobs: Sequence[Submission]) -> None:
    there = {job.name for job in made}
    left = [one for one in jobs if one.name not in there]
    ended = [one.title for one in left if one.cancelled]
    if len(jobs) < 2:
        if ended:
            output.note(f"{ended[0]} is cancelled, and nothing has its place yet; the same command again goes on")
        return
    repeatable = all(one.request.job.spec.array.name and not one.replaced for one in jobs)
    again = "; the same command again submits the rest" if repeatable else ""
    rest = f"; not submitted: {_some([one.title for one in left])}{again}" if left else ""
    lost = f"; of these cancelled already: {_some(ended)}" if ended else ""
    restart = "; the same command again replaces those that are submitted, too: leave them out" if made and lost else ""
    output.note(f"{len(made)} of {len(jobs)} jobs are submitted{rest}{lost}{restart}")


def _some(listed: Sequence[str]) -> str:
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
