"""Streams that outlive a change of leader: when a broken one is opened again, and behind what it goes on. Pure."""

from __future__ import annotations

from whaleflux.errors import NotFound, ResourceExhausted, StatusError, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.retry import Backoff
from whaleflux.v1 import scheduler_pb2 as pb

OUTAGE_S = 30.0  # a leader is elected within seconds; a replica is started again within half a minute
FOLLOW_OUTAGE_S = 600.0  # who waits for work of hours sits out an upgrade of the control plane
FIRST_S = 3.0  # of a server that never answered: a wrong address should be told soon
AGENTS_S = 5.0  # in which agents find the new leader
_AGAIN = Backoff(first_s=0.2, longest_s=2.0)


class Patience:
    """How long to go on trying after failures in a row; what was received in between makes it whole again."""

    def __init__(self, outage_s: float = OUTAGE_S) -> None:
        self._outage_s = outage_s
        self._failures = 0
        self._since_s: float | None = None
        self._answered = False

    def received(self) -> None:
        """The stream works."""
        self._failures, self._since_s, self._answered = 0, None, True

    def pause_s(self, error: StatusError, now_s: float, chance: float | None = None) -> float | None:
        """Seconds until the next try, or None: give up."""
        if not isinstance(error, Unavailable) and error.reason != ErrorReason.READER_TOO_SLOW:
            return None
        self._since_s = now_s if self._since_s is None else self._since_s
        self._failures += 1
        pause = _AGAIN.pause_s(self._failures, chance, asked_s=error.retry_after_s or 0.0)
        return pause if now_s - self._since_s + pause <= self._limit_s(error) else None

    def _limit_s(self, error: StatusError) -> float:
        if error.reason == ErrorReason.NODES_UNREACHABLE:
            return AGENTS_S
        answers = self._answered or error.reason in (ErrorReason.NOT_LEADER, ErrorReason.DRAINING)
        return self._outage_s if answers or isinstance(error, ResourceExhausted) else FIRST_S


class JobFollowing:
    """A job's changes, read over streams that each begin with the job as it is: each state once."""

    def __init__(self, name: str) -> None:
        self._name, self._etag, self._listed = name, "", False

    def opened(self) -> None:
        """A stream begins."""
        self._listed = False

    def received(self, change: pb.WatchJobsResponse) -> pb.Job | None:
        """The job where it is news. Raises NotFound when there is no such job, or none any more."""
        which = change.WhichOneof("event")
        if which in {"added", "modified"}:
            job: pb.Job = getattr(change, which)
            before, self._etag, self._listed = self._etag, job.etag, True
            return job if job.etag != before else None
        if which == "deleted" and change.deleted == self._name:
            raise NotFound("job", self._name, "its record was deleted")
        if which == "bookmark" and not self._listed:  # the listing is over
            raise NotFound("job", self._name, "list what exists with: whaleflux jobs -a")
        return None


class LogReading:
    """The output of a job, read over broken streams: each byte once."""

    def __init__(self, asked: pb.StreamLogsRequest) -> None:
        self._asked = asked
        self._known: dict[tuple[int, int], int] = {}  # rank and epoch -> offset behind what was received

    def request(self) -> pb.StreamLogsRequest:
        """What to ask for next."""
        request = pb.StreamLogsRequest()
        request.CopyFrom(self._asked)
        for (rank, epoch), offset in sorted(self._known.items()):
            request.after.add(rank=rank, epoch=epoch, offset=offset)
        return request

    def received(self, chunk: pb.StreamLogsResponse) -> None:
        """The next request goes on behind this chunk."""
        self._known[chunk.rank, chunk.epoch] = chunk.next_offset
