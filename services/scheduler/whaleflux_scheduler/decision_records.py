"""What was decided about a job, between the contract and the core. A kind that this version does not know is kept as no kind."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from google.protobuf.message import DecodeError

from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core.decision_history import DecisionKind, Noted

_KINDS = frozenset(int(kind) for kind in DecisionKind)


def read(value: bytes, uid: str) -> tuple[Noted, ...]:
    """Of a stored record; nothing of one that is of an earlier job of the same name, or cannot be read."""
    try:
        record = pb.JobDecisions.FromString(value)
    except DecodeError:
        return ()
    return tuple(map(noted_of, record.decisions)) if record.job_uid == uid else ()


def write(uid: str, decisions: Iterable[Noted]) -> bytes:
    record = pb.JobDecisions(job_uid=uid, decisions=map(message_of, decisions))
    return record.SerializeToString(deterministic=True)


def noted_of(message: pb.JobDecision) -> Noted:
    kind = DecisionKind(message.kind) if message.kind in _KINDS else DecisionKind.UNSPECIFIED
    time = convert.instant(message, "time") or datetime.fromtimestamp(0, UTC)
    return Noted(time, kind, message.message, message.attempt, message.position, message.gpus)


def message_of(noted: Noted) -> pb.JobDecision:
    return pb.JobDecision(
        time=convert.timestamp(noted.time),
        kind=noted.kind.value,  # type: ignore[arg-type]  # a test compares the enums
        message=noted.message,
        attempt=noted.attempt,
        position=noted.position,
        gpus=noted.gpus,
    )
