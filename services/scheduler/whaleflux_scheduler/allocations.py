"""ListAllocations: the tasks that hold GPUs, in the order of jobs, so that a page costs what is on it and not what is held in all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.rpc.paging import page_size, page_token, parse_token
from whaleflux.trust.sight import Sight
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert, job_privacy
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core import cost
from whaleflux_scheduler.core.model import Attempt, Task
from whaleflux_scheduler.jobs import Jobs

_SCOPE = "tasks:"
_BEHIND = re.compile(r"(\S+) ([0-9]{1,18}) ([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a page ended: behind this task of the job with this key."""

    job: str = ""
    epoch: int = 0
    group_rank: int = -1

    @classmethod
    def of(cls, token: str) -> _Place:
        text, _ = parse_token(token, _SCOPE)
        if not text:
            return cls()
        found = _BEHIND.fullmatch(text.removeprefix(_SCOPE))
        if found is None:
            raise InvalidArgument(
                FieldViolation("page_token", "is of no listing of allocations; list again without it")
            )
        return cls(found[1], int(found[2]), int(found[3]))

    def __str__(self) -> str:
        return f"{_SCOPE}{self.job} {self.epoch} {self.group_rank}"


async def page(jobs: Jobs, request: pb.ListAllocationsRequest, sight: Sight) -> pb.ListAllocationsResponse:
    """What is not there for the caller is left out."""
    size, begin = page_size(request.page_size, default=500, most=5000), _Place.of(request.page_token)
    await jobs.current()
    response = pb.ListAllocationsResponse(resource_version=jobs.cache.revision)
    last, prices = begin, dict[tuple[str, int], float]()
    for place, stored, attempt, task in _behind(jobs, begin, sight):
        if len(response.allocations) == size:
            response.next_page_token = page_token(str(last), jobs.cache.revision)
            break
        if (of := (place.job, place.epoch)) not in prices:
            prices[of] = cost.usd_per_gpu_hour(attempt)
        response.allocations.append(_allocation(stored, attempt, task, sight, prices[of]))
        last = place
    if not request.page_token:
        response.unreadable.extend(filter(sight.sees_named, jobs.of_unknown_holdings()))
    return response


def _behind(jobs: Jobs, begin: _Place, sight: Sight) -> Iterator[tuple[_Place, StoredJob, Attempt, Task]]:
    values = jobs.cache.values
    for key in sorted(key for key in values if key >= begin.job):
        stored = values[key]
        if jobs.access.hides(stored, sight):
            continue
        for attempt, task in stored.value.holding():
            place = _Place(key, attempt.epoch, task.group_rank)
            if key != begin.job or (place.epoch, place.group_rank) > (begin.epoch, begin.group_rank):
                yield place, stored, attempt, task


def _allocation(stored: StoredJob, attempt: Attempt, task: Task, sight: Sight, usd: float) -> pb.Allocation:
    message = convert.task_message(task)
    reads = sight.reads(stored.value.queue, stored.message.submitter)
    return pb.Allocation(
        job=stored.value.name,
        epoch=attempt.epoch,
        task=message if reads else job_privacy.shown_task(message),
        allocate_time=convert.timestamp(attempt.allocate_time),
        usd_per_gpu_hour=usd,
    )
