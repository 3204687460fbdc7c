"""What ranks said of their steps since the last batch: reports that follow one another become one, so that a batch is bounded."""

from __future__ import annotations

from dataclasses import dataclass, field

from whaleflux.usage_checks import wrong_steps
from whaleflux.v1 import agent_pb2, usage_pb2
from whaleflux_agent.core.work import Work

MOST_RECORDS = 1024  # of an interval
_SUMS = ("data_us", "host_us", "save_us", "comm_in_node_us", "comm_cross_us", "tokens", "flops")


@dataclass(slots=True)
class StepLog:
    """One event loop."""

    _records: list[usage_pb2.StepUsage] = field(default_factory=list)
    _newest: dict[tuple[str, int, int], usage_pb2.StepUsage] = field(default_factory=dict)  # by job, epoch, rank
    _dropped: int = 0

    def add(self, work: Work, request: agent_pb2.ReportStepsRequest) -> None:
        """Notes a report that `wrong` finds nothing wrong with."""
        key = (work.job, work.epoch, request.rank)
        last = self._newest.get(key)
        if last is not None and _follows(last, request):
            _join(last, request)
            return
        if len(self._records) >= MOST_RECORDS:
            self._dropped += 1
            return
        record = usage_pb2.StepUsage(
            job=work.job,
            job_uid=work.job_uid,
            epoch=work.epoch,
            rank=request.rank,
            device=_device_of(work, request.rank),
            start_time=request.start_time,
            end_time=request.end_time,
            times=request.times,
        )
        self._records.append(record)
        self._newest[key] = record

    def take(self) -> tuple[list[usage_pb2.StepUsage], int]:
        """What came since the last call, and how many records found no room."""
        taken, dropped = self._records, self._dropped
        self._records, self._newest, self._dropped = [], {}, 0
        return taken, dropped


def wrong(request: agent_pb2.ReportStepsRequest) -> str:
    """What cannot be true of a report; empty: nothing."""
    return wrong_steps(request.times, took_us(request))


def took_us(request: agent_pb2.ReportStepsRequest | usage_pb2.StepUsage) -> int:
    """From its first step's begin to its last one's end."""
    return (request.end_time.ToNanoseconds() - request.start_time.ToNanoseconds()) // 1000


def _follows(last: usage_pb2.StepUsage, request: agent_pb2.ReportStepsRequest) -> bool:
    """Nothing lies between, and both say the same kinds of things: a sum of what is known and what is not would be neither."""
    times = request.times
    return (
        last.end_time == request.start_time
        and last.times.last_step + 1 == times.first_step
        and all(last.times.HasField(name) == times.HasField(name) for name in _SUMS)
    )


def _join(last: usage_pb2.StepUsage, request: agent_pb2.ReportStepsRequest) -> None:
    last.end_time.CopyFrom(request.end_time)
    last.times.last_step = request.times.last_step
    for name in _SUMS:
        if request.times.HasField(name):
            setattr(last.times, name, getattr(last.times, name) + getattr(request.times, name))
    if request.times.HasField("loss"):
        _join_losses(last.times, request.times.loss)


def _join_losses(times: usage_pb2.StepTimes, more: usage_pb2.StepLosses) -> None:
    """Not every step has a loss: one without is no gap."""
    if not times.loss.count:
        times.loss.min, times.loss.max = more.min, more.max
    elif more.count:
        times.loss.min, times.loss.max = min(times.loss.min, more.min), max(times.loss.max, more.max)
    times.loss.count += more.count
    times.loss.sum += more.sum
    times.loss.not_finite += more.not_finite


def _device_of(work: Work, rank: int) -> str:
    """Where a launcher numbers the ranks itself, nobody here knows whose device is whose."""
    if work.spec.launch_once or rank not in work.ranks:
        return ""
    return work.gpu_uuids[work.ranks.index(rank)] if work.gpu_uuids else ""
