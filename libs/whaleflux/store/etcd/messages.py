"""Between the store's dataclasses and etcd's messages. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aetcd import rpc

from whaleflux.store.api import (
    Absent,
    Condition,
    ConditionFailed,
    Entry,
    Equals,
    Held,
    KeyEvent,
    NoneCreated,
    Present,
    Put,
    Unchanged,
    Write,
    conflict,
    holds,
)


def text_of(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")  # a stranger's key must not break a listing


def raw_of(key: str) -> bytes:
    return key.encode(errors="surrogateescape")


def entry_of(kv: Any) -> Entry:
    return Entry(text_of(kv.key), kv.value, kv.mod_revision, kv.create_revision, kv.version)


_DELETED = rpc.Event.EventType.DELETE


def event_of(event: Any) -> KeyEvent:
    if event.type == _DELETED:
        return KeyEvent(text_of(event.kv.key), None)
    entry = entry_of(event.kv)
    return KeyEvent(entry.key, entry)


def range_of(prefix: str) -> tuple[bytes, bytes]:
    """First key and end of a prefix's range. UTF-8 never ends in 0xff, so one more than the last byte exists."""
    raw = raw_of(prefix)
    return (raw, raw[:-1] + bytes([raw[-1] + 1])) if raw else (b"\0", b"\0")


def transaction(writes: Sequence[Write], when: Sequence[Condition]) -> Any:
    """Filled in place: parts made apart are copied into it, and this runs for every commit.

    The compared keys are read when the comparison fails, to tell afterwards which condition failed.
    """
    request = rpc.TxnRequest()
    for write in writes:
        operation = request.success.add()
        if isinstance(write, Put):
            put = operation.request_put
            put.key, put.value = raw_of(write.key), write.value
            if write.lease:
                put.lease = write.lease.id
        else:
            operation.request_delete_range.key = raw_of(write.key)
    for condition in when:
        _compare(condition, request.compare.add())
        look = request.failure.add().request_range
        look.key, look.keys_only = raw_of(condition.key), not isinstance(condition, Equals)
        if isinstance(condition, NoneCreated):
            look.key, look.range_end = range_of(condition.prefix)
            look.limit = 1
            if condition.or_written:
                look.min_mod_revision = condition.after + 1
            else:
                look.min_create_revision = condition.after + 1
    return request


_CREATED, _CHANGED, _VALUE = rpc.Compare.CREATE, rpc.Compare.MOD, rpc.Compare.VALUE
_EQUAL, _GREATER, _LESS = rpc.Compare.EQUAL, rpc.Compare.GREATER, rpc.Compare.LESS


def _compare(condition: Condition, compare: Any) -> None:
    compare.key, compare.result, compare.target = raw_of(condition.key), _EQUAL, _CREATED
    match condition:
        case Absent():
            compare.create_revision = 0
        case Present():
            compare.create_revision, compare.result = 0, _GREATER
        case Unchanged(entry):
            compare.mod_revision, compare.target = entry.revision, _CHANGED
        case Equals(_, value):
            compare.value, compare.target = value, _VALUE
        case NoneCreated(prefix, after, or_written):  # of an empty range etcd compares revision 0
            compare.key, compare.range_end = range_of(prefix)
            compare.result = _LESS
            if or_written:
                compare.mod_revision, compare.target = after + 1, _CHANGED
            else:
                compare.create_revision = after + 1
        case Held(leader):
            compare.create_revision = leader.created


def condition_failed(when: Sequence[Condition], answer: Any) -> ConditionFailed:
    found = [response.response_range.kvs for response in answer.responses]
    entries = [entry_of(kvs[0]) if kvs else None for kvs in found]
    return conflict([c for c, entry in zip(when, entries, strict=True) if not holds(c, entry)])
