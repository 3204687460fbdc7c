"""Takes what agents saw of their GPUs onto the event bus, where it stays until the ledger has read it. Any replica may.

A record that cannot be true, or speaks of work that is not placed on its node, is left out and told of: the rest of a batch counts. Of an
attempt that a later one has followed nobody knows here any more where it was: its last words come after it ended, and are taken. The
ledger has every attempt's devices and times, and takes what is said of a device for whoever held it then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, timedelta
from typing import Protocol

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux import names, telemetry
from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.events.api import Bus
from whaleflux.events.subjects import usage_id, usage_subject
from whaleflux.store.placements import Placement
from whaleflux.telemetry import Metric
from whaleflux.usage_checks import MOST_INTERVAL_S, wrong_device, wrong_network, wrong_steps
from whaleflux.v1 import usage_pb2 as pb
from whaleflux.v1.usage_pb2_grpc import UsageServiceServicer
from whaleflux_console.asked_times import is_instant

MOST_BATCHES, MOST_BYTES = 64, 512 << 10
MOST_GPUS, MOST_STEPS, MOST_HOLDERS = 64, 4096, 64
OLDEST_S = 30 * 86_400.0
_MOST_AHEAD_S = 5.0  # by the node's own clock
_MOST_BOOT_CHARS = 100


class Placed(Protocol):
    """Where attempts are, by the records beside their fences."""

    async def of(self, job: str, epoch: int) -> Placement | None:
        """Of that attempt, or of the newest if that is another one."""
        ...


@dataclass(slots=True)
class _Refused:
    """What was left out of a request."""

    count: int = 0
    first: str = ""

    def add(self, why: str) -> None:
        self.count += 1
        self.first = self.first or why
        telemetry.counter(Metric.CLAIMS_REFUSED).labels("usage").inc()


class UsageIntake(UsageServiceServicer):
    """See UsageService in the contract."""

    def __init__(self, bus: Bus, placed: Placed, clock: Clock) -> None:
        self._bus, self._placed, self._clock = bus, placed, clock

    async def ReportUsage(
        self,
        request: pb.ReportUsageRequest,
        context: grpc.aio.ServicerContext[pb.ReportUsageRequest, pb.ReportUsageResponse],
    ) -> pb.ReportUsageResponse:
        """Answers when the bus has all batches."""
        check(request)
        behind = timedelta(seconds=round((self._clock.now() - request.time.ToDatetime(tzinfo=UTC)).total_seconds()))
        refused = _Refused()
        for batch in request.batches:
            kept = _dated(await self._true_of(batch, refused), behind)
            own_id = usage_id(kept.node, kept.boot_id, kept.start, kept.sequence)
            await self._bus.publish(usage_subject(kept.node, kept.start), kept.SerializeToString(), id=own_id)
        return pb.ReportUsageResponse(refused_records=refused.count, refused_reason=refused.first)

    async def _true_of(self, batch: pb.UsageBatch, refused: _Refused) -> pb.UsageBatch:
        """What can be true of a batch."""
        interval_s = _seconds_between(batch.start_time, batch.end_time)
        kept = pb.UsageBatch()
        kept.CopyFrom(batch)
        del kept.gpus[:], kept.steps[:]
        for seen in batch.gpus:
            if why := wrong_device(seen, interval_s):
                refused.add(why)
            else:
                kept.gpus.append(await self._held(seen, batch.node, refused))
        for steps in batch.steps:
            if why := _wrong_times(steps, batch) or await self._misplaced(steps, batch.node):
                refused.add(why)
            else:
                kept.steps.append(steps)
        if why := wrong_network(batch.network, interval_s):
            refused.add(why)
            kept.ClearField("network")
        return kept

    async def _held(self, seen: pb.GpuUsage, node: str, refused: _Refused) -> pb.GpuUsage:
        """Without holders that are not placed there: what the device did counts all the same."""
        kept = pb.GpuUsage()
        kept.CopyFrom(seen)
        del kept.holders[:]
        for holder in seen.holders[:MOST_HOLDERS]:
            if why := await self._misplaced(holder, node):
                refused.add(why)
            else:
                kept.holders.append(holder)
        return kept

    async def _misplaced(self, claim: pb.UsageHolder | pb.StepUsage, node: str) -> str:
        """Why a node does not speak for an attempt; empty: it does, or the attempt is over."""
        try:
            names.split(claim.job, "queues", "jobs", field="job")
        except InvalidArgument as error:
            return error.message
        placed = await self._placed.of(claim.job, claim.epoch)
        if placed is None or claim.epoch < placed.epoch:
            return ""
        if claim.epoch == placed.epoch and node in placed.nodes and claim.job_uid == placed.job_uid:
            return ""
        return f"job: attempt {claim.epoch} of {claim.job} is not placed on {node}"


def check(request: pb.ReportUsageRequest) -> None:
    """Refuses a request that no agent makes. Raises InvalidArgument."""
    names.split(request.node, "sites", "nodes", field="node")
    if not request.HasField("time"):
        raise _wrong("time", "is not set; use the time that the node's clock shows")
    _check_instant("time", request.time)
    if not 1 <= len(request.batches) <= MOST_BATCHES:
        raise _wrong("batches", f"{len(request.batches)} batches; use 1 to {MOST_BATCHES}")
    if request.ByteSize() > MOST_BYTES:
        raise _wrong("batches", f"{request.ByteSize()} bytes; at most {MOST_BYTES}, send fewer batches at a time")
    for at, batch in enumerate(request.batches):
        _check_batch(f"batches[{at}]", batch, request)


def _check_batch(field: str, batch: pb.UsageBatch, request: pb.ReportUsageRequest) -> None:
    if batch.node != request.node:
        raise _wrong(f"{field}.node", f"is {batch.node[:100]!r}; use {request.node}, the node that reports")
    names.check_id(f"{field}.start", batch.start)
    if not 0 < len(batch.boot_id) <= _MOST_BOOT_CHARS or not batch.boot_id.isascii() or not batch.boot_id.isprintable():
        raise _wrong(f"{field}.boot_id", f"use 1 to {_MOST_BOOT_CHARS} printable ASCII characters: the host's boot id")
    for name, least in (("sequence", 1), ("dropped_batches", 0), ("dropped_steps", 0)):
        if getattr(batch, name) < least:
            raise _wrong(f"{field}.{name}", f"is {getattr(batch, name)}; use {least} or more")
    _check_sizes(field, batch)
    _check_times(field, batch, request.time)


def _check_sizes(field: str, batch: pb.UsageBatch) -> None:
    sizes: tuple[tuple[str, Sequence[object], int], ...] = (
        ("gpus", batch.gpus, MOST_GPUS),
        ("steps", batch.steps, MOST_STEPS),
    )
    for name, records, most in sizes:
        if len(records) > most:
            raise _wrong(f"{field}.{name}", f"{len(records)} records; at most {most}")


def _check_times(field: str, batch: pb.UsageBatch, now: Timestamp) -> None:
    _check_instant(f"{field}.start_time", batch.start_time)
    _check_instant(f"{field}.end_time", batch.end_time)
    took_s = _seconds_between(batch.start_time, batch.end_time)
    if not 0 <= took_s <= MOST_INTERVAL_S:
        raise _wrong(f"{field}.end_time", f"is {took_s:g} s behind start_time; use 0 to {MOST_INTERVAL_S:g} s")
    age_s = _seconds_between(batch.end_time, now)
    if not -_MOST_AHEAD_S <= age_s <= OLDEST_S:
        raise _wrong(f"{field}.end_time", f"is {age_s:g} s before `time`; use {-_MOST_AHEAD_S:g} to {OLDEST_S:g} s")


def _check_instant(field: str, at: Timestamp) -> None:
    if not is_instant(at):
        raise _wrong(field, "is no instant of 1970 to 2100; use the time that the node's clock shows")


def _wrong_times(steps: pb.StepUsage, batch: pb.UsageBatch) -> str:
    """What cannot be true of when they were done, and of what they say of that time."""
    if not (is_instant(steps.start_time) and is_instant(steps.end_time)):
        return "start_time and end_time are no instants of 1970 to 2100; use the times that the node's clock shows"
    age_s = _seconds_between(steps.end_time, batch.end_time)
    if not -_MOST_AHEAD_S <= age_s <= MOST_INTERVAL_S:
        return f"end_time is {age_s:g} s before the batch's; use {-_MOST_AHEAD_S:g} to {MOST_INTERVAL_S:g} s"
    return wrong_steps(steps.times, round(_seconds_between(steps.start_time, steps.end_time) * 1e6))


def _dated(batch: pb.UsageBatch, behind: timedelta) -> pb.UsageBatch:
    """By this process' clock, where the node's differs by a second or more."""
    if behind:
        times = [batch.start_time, batch.end_time]
        times += [time for steps in batch.steps for time in (steps.start_time, steps.end_time)]
        for time in times:
            time.FromDatetime(time.ToDatetime(tzinfo=UTC) + behind)
    return batch


def _seconds_between(start: Timestamp, end: Timestamp) -> float:
    return (end.ToNanoseconds() - start.ToNanoseconds()) / 1e9


def _wrong(field: str, why: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation(field, why))
