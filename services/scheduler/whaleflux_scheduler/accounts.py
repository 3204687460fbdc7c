"""Accounting as it is published and kept: one record for each ended attempt and job, written by the jobs' publisher."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from whaleflux import names
from whaleflux.events.accounting import account_subject
from whaleflux.events.publisher import OutgoingEvent
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import accounting
from whaleflux_scheduler.core.accounting import Account

_ENDED = frozenset({pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED})


def of_change(old: pb.Job | None, new: pb.Job | None) -> Iterator[OutgoingEvent]:
    """Records of what is over now and was not, or was otherwise."""
    if new is None or not (new.attempt.HasField("end_time") or new.past_attempts or new.state in _ENDED):
        return
    if old is not None and _goes_on(old, new):
        return
    known = old if old is not None and (old.attempt.HasField("end_time") or old.past_attempts) else None
    before = (
        {account.attempt: account for account in accounting.over(convert.job_of(known))} if known is not None else {}
    )
    for account in accounting.over(convert.job_of(new)):
        if before.get(account.attempt) != account:
            yield _told(message_of(account, new.submitter))


def _goes_on(old: pb.Job, new: pb.Job) -> bool:
    """Whether nothing ended, and what had ended is as it was: the usual change of a job that runs, whose record may be large."""
    same = old.uid == new.uid and old.state == new.state and new.state not in _ENDED
    on = not old.attempt.HasField("end_time") and not new.attempt.HasField("end_time")
    return same and on and old.past_attempts == new.past_attempts


def message_of(account: Account, submitter: str) -> pb.AccountRecord:
    """As it is kept and listed."""
    message = pb.AccountRecord(
        job=account.job,
        uid=account.uid,
        attempt=account.attempt,
        state=account.state.value,  # type: ignore[arg-type]
        submitter=submitter,
        end_reason=account.end_reason,
        exit_code=account.exit_code,
        gpus=account.gpus,
        gpus_by_model=dict(account.gpus_by_model),
        nodes=account.nodes,
        node_count=account.node_count,
        step=account.step,
        gpu_s=account.gpu_s,
        cost_usd=account.cost_usd,
        attempts=account.attempts,
        incident=account.incident,
    )
    if account.loss is not None:
        message.loss = account.loss
    for field in ("create_time", "start_time", "run_time", "end_time"):
        if (at := getattr(account, field)) is not None:
            getattr(message, field).FromDatetime(at)
    return message


def _told(record: pb.AccountRecord) -> OutgoingEvent:
    """Under an id that is the same for the same content, however often it is told."""
    data = record.SerializeToString(deterministic=True)
    key = f"{record.uid or 'unknown'}-{record.attempt}"
    subject = account_subject(names.top(record.job), record.submitter, names.last(record.job), key)
    return OutgoingEvent(subject, data, id=f"{subject}-{zlib.crc32(data):08x}")
