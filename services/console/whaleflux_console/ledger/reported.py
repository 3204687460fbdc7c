"""What agents put onto the stream, as the ledger's columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa
from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux.events.api import StoredEvent
from whaleflux.v1 import usage_pb2 as pb
from whaleflux_console.ledger.ledger import Reports
from whaleflux_console.ledger.schemas import SAMPLES, STEPS

_SAID = tuple(
    name for name in SAMPLES.names if name in pb.GpuUsage.DESCRIPTOR.fields_by_name and name not in {"device", "source"}
)
_TIMES = tuple(
    name for name in STEPS.names if name in pb.StepTimes.DESCRIPTOR.fields_by_name
)  # each a column of its name
_ALWAYS = {"first_step", "last_step"}
_LOSS = tuple(field.name for field in pb.StepLosses.DESCRIPTOR.fields)
_MS = timedelta(milliseconds=1)
_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")


def reports_of(events: Sequence[StoredEvent]) -> Reports:
    """Events in the order of the stream, at least one; the intake lets none through that cannot be read."""
    samples: dict[str, list[Any]] = defaultdict(list)
    steps: dict[str, list[Any]] = defaultdict(list)
    for event in events:
        batch = pb.UsageBatch.FromString(event.data)
        _add_samples(samples, batch)
        _add_steps(steps, batch)
    last = events[-1]
    return Reports(
        pa.table({name: samples[name] for name in SAMPLES.names}, schema=SAMPLES),
        pa.table({name: steps[name] for name in STEPS.names}, schema=STEPS),
        events[0].sequence,
        last.sequence,
        last.id,
        instant_ms(last.timestamp),
    )


def instant_ms(instant: datetime) -> int:
    return (instant - _EPOCH) // _MS


def _add_samples(columns: dict[str, list[Any]], batch: pb.UsageBatch) -> None:
    seen = batch.gpus
    _add_same(columns, batch, len(seen))
    columns["start_ms"] += [_ms(batch.start_time)] * len(seen)
    columns["end_ms"] += [_ms(batch.end_time)] * len(seen)
    columns["device"] += [gpu.device for gpu in seen]
    columns["source"] += [gpu.source for gpu in seen]
    for name in _SAID:
        columns[name] += [getattr(gpu, name) if gpu.HasField(name) else None for gpu in seen]


def _add_steps(columns: dict[str, list[Any]], batch: pb.UsageBatch) -> None:
    done = batch.steps
    _add_same(columns, batch, len(done))
    columns["uid"] += [each.job_uid for each in done]
    columns["attempt"] += [each.epoch for each in done]
    columns["rank"] += [each.rank for each in done]
    columns["device"] += [each.device for each in done]
    columns["start_ms"] += [_ms(each.start_time) for each in done]
    columns["end_ms"] += [_ms(each.end_time) for each in done]
    for name in _TIMES:
        columns[name] += [
            getattr(each.times, name) if name in _ALWAYS or each.times.HasField(name) else None for each in done
        ]
    for name in _LOSS:
        columns[f"loss_{name}"] += [
            getattr(each.times.loss, name) if each.times.HasField("loss") else None for each in done
        ]


def _add_same(columns: dict[str, list[Any]], batch: pb.UsageBatch, count: int) -> None:
    columns["node"] += [batch.node] * count
    columns["reporter"] += [f"{batch.boot_id}/{batch.start}"] * count
    columns["sequence"] += [batch.sequence] * count


def _ms(instant: Timestamp) -> int:
    return instant.seconds * 1000 + instant.nanos // 1_000_000
