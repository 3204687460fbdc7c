"""ListJobHistory: what is over, from what the bus keeps, and what is not, from the records. Each question is bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument, Unavailable
from whaleflux.events.accounting import account_pattern
from whaleflux.events.api import Bus
from whaleflux.events.newest import newest
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.paging import page_size, page_token, parse_token
from whaleflux.trust.sight import Sight
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import accounts, job_privacy
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core import accounting
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.jobs import Jobs

READ_AT_ONCE = 500
MOST_READINGS = 4  # of one page: what is searched and does not match is bounded too
SKEW = timedelta(minutes=5)  # by which our clock may be ahead of the bus
LATELY = timedelta(minutes=2)  # what ended so shortly ago may not be told yet, and is taken from its record
MOST_USER = 100
_SCOPE = "history:"


class JobHistory:
    """`bus` None: this fleet publishes nothing."""

    def __init__(self, bus: Bus | None, jobs: Jobs, clock: Clock) -> None:
        self._bus, self._jobs, self._clock = bus, jobs, clock

    async def page(self, request: pb.ListJobHistoryRequest, sight: Sight) -> pb.ListJobHistoryResponse:
        """See the contract; what is not there for the caller is left out."""
        wanted, size = replace(_wanted(request), sight=sight), page_size(request.page_size)
        key, begun_s = parse_token(request.page_token, _SCOPE)
        at, begun_s = key.removeprefix(_SCOPE), begun_s or int(self._clock.now().timestamp())
        lately = datetime.fromtimestamp(begun_s, UTC) - LATELY  # the same for all pages
        await self._jobs.current()
        records, following = ([], "") if at.isdecimal() else self._current(wanted, size, at, lately)
        if not following:
            over, before = await self._over(wanted, size, int(at) if at.isdecimal() else 0, self._told(lately))
            records, following = [*records, *over], str(before or "")
        token = page_token(f"{_SCOPE}{following}", begun_s) if following else ""
        shown = (job_privacy.shown_account(record, sight, names.top(record.job)) for record in records)
        return pb.ListJobHistoryResponse(records=shown, next_page_token=token)

    def _current(self, wanted: _Wanted, size: int, after: str, lately: datetime) -> tuple[list[pb.AccountRecord], str]:
        """One page of what is not over, and what has just ended, newest first; and where the next begins, "": there is none."""
        now, found, last = self._clock.now(), list[pb.AccountRecord](), ""
        jobs = (one for one in self._jobs.cache.values.values() if wanted.concerns(one.value))
        for position, _, one in sorted((_position(one), one.value.name, one) for one in jobs):
            if position <= after:
                continue
            if len(found) >= size:
                return found, last
            found += filter(wanted.admits, _live(one, now, lately))
            last = position
        return found, ""

    def _told(self, lately: datetime) -> set[tuple[str, int]]:
        """Uid and attempt of what has just ended: these records are on the first pages."""
        ended = (one.value for one in self._jobs.cache.values.values() if _ended_since(one.value, lately))
        return {(account.uid, account.attempt) for job in ended for account in accounting.over(job)}

    async def _over(
        self, wanted: _Wanted, size: int, before: int, told: set[tuple[str, int]]
    ) -> tuple[list[pb.AccountRecord], int]:
        """One page, and the sequence before which the next lies; 0: there is none."""
        if self._bus is None:
            raise Unavailable(
                "this fleet keeps no history: its services were started without nats",
                reason=ErrorReason.BUS_UNAVAILABLE,
            )
        found: list[pb.AccountRecord] = []
        for _ in range(MOST_READINGS):
            read = await newest(self._bus, [wanted.pattern], before=before, limit=READ_AT_ONCE)
            for stored in read:
                if wanted.since is not None and stored.timestamp < wanted.since - SKEW:
                    return found, 0
                before = stored.sequence
                new = (record for record in _records(stored.data) if (record.uid, record.attempt) not in told)
                found += filter(wanted.admits, new)
                if len(found) >= size:
                    return found, before
            if len(read) < READ_AT_ONCE:
                return found, 0
        return found, before


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked for, and the subjects under which the server finds it."""

    pattern: str
    queue: str
    job: str
    user: str
    states: frozenset[int]
    since: datetime | None
    until: datetime | None
    node: str
    attempts: bool
    sight: Sight | None = None

    def concerns(self, job: Job) -> bool:
        """Whether records of the job may be asked for; cheap."""
        return self.queue in ("", job.queue) and self.job in ("", job.name)

    def admits(self, record: pb.AccountRecord) -> bool:
        """Whether it is all that was asked for."""
        end = record.end_time.ToDatetime(tzinfo=UTC) if record.HasField("end_time") else None
        return (
            (self.attempts or not record.attempt)
            and self.queue in ("", names.top(record.job))
            and self.job in ("", record.job)
            and self.user.lower() in record.submitter.lower()
            and (not self.states or record.state in self.states)
            and (self.since is None or end is None or end >= self.since)
            and (self.until is None or record.create_time.ToDatetime(tzinfo=UTC) < self.until)
            and (not self.node or self.node in record.nodes)
            and (self.sight is None or self.sight.sees(names.top(record.job), record.submitter))
        )


def _wanted(request: pb.ListJobHistoryRequest) -> _Wanted:
    queue, job = "", ""
    if request.parent not in ("", "queues/-"):
        (queue,) = names.split(request.parent, "queues", field="parent")
    if request.job:
        queue_of_job, job = names.split(request.job, "queues", "jobs", field="job")
        if queue not in ("", queue_of_job):
            raise InvalidArgument(FieldViolation("job", f"{request.job} is not in {request.parent}"))
        queue = queue_of_job
    if request.node:
        names.split(request.node, "sites", "nodes", field="node")
    if len(request.user) > MOST_USER:
        raise InvalidArgument(FieldViolation("user", f"{len(request.user)} characters; use at most {MOST_USER}"))
    since, until = _instant(request, "since", request.since), _instant(request, "until", request.until)
    if since is not None and until is not None and since >= until:
        raise InvalidArgument(FieldViolation("until", "is not after since"))
    whole_name = request.user if "/" in request.user.strip("/") else ""
    pattern = account_pattern(queue or "*", whole_name, job or "*")
    states = frozenset(request.states)
    return _Wanted(pattern, queue, request.job, request.user, states, since, until, request.node, request.show_attempts)


def _instant(request: pb.ListJobHistoryRequest, field: str, stamp: Timestamp) -> datetime | None:
    try:
        return stamp.ToDatetime(tzinfo=UTC) if request.HasField(field) else None
    except (ValueError, OverflowError):
        raise InvalidArgument(FieldViolation(field, "is no time between the years 1 and 9999")) from None


def _position(stored: StoredJob) -> str:
    """Text that sorts the newest first, and is no number."""
    age_us = 10**17 - int(stored.value.create_time.timestamp() * 1_000_000)
    return f"live/{age_us:017d}/{stored.value.name}"


def _ended_since(job: Job, lately: datetime) -> bool:
    return job.readable and job.end_time is not None and job.end_time > lately


def _live(stored: StoredJob, now: datetime, lately: datetime) -> Iterator[pb.AccountRecord]:
    job = stored.value
    if not job.readable:
        return
    for account in accounting.over(job) if _ended_since(job, lately) else accounting.unfinished(job, now):
        yield accounts.message_of(account, stored.message.submitter)


def _records(data: bytes) -> Iterable[pb.AccountRecord]:
    try:
        return (pb.AccountRecord.FromString(data),)
    except DecodeError:  # of a version that tells it otherwise
        return ()
