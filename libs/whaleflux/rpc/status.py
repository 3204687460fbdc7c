"""Refusals on the wire: `Refusal` <-> `google.rpc.Status` with AIP-193 details.

Everything here is bounded: gRPC carries a status in trailers, which peers limit to 8 KiB (the message three bytes for
one when it is not ASCII, details four for three), and a refusal that quotes a 10 MB name must still arrive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from whaleflux import errors
from whaleflux.errors import DOMAIN, Refusal

DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_BYTES = 1024
MAX_STATUS_BYTES = 3072  # message and details
_MAX_VALUE_BYTES = 256
_MAX_METADATA_BYTES = 1024
_MAX_VIOLATIONS_BYTES = 1024

Trailers = tuple[tuple[str, bytes], ...]


class ServerFailure(Refusal):
    """An answer that no refusal explains: a bug in the server (`reason` INTERNAL), or a code we never send.

    `reason` is the gRPC status name. Whether anything was changed is unknown.
    """


_BY_CODE: dict[str, type[Refusal]] = {
    kind.code: kind
    for kind in (
        errors.Invalid,
        errors.NotFound,
        errors.AlreadyExists,
        errors.Conflict,
        errors.WrongState,
        errors.OverLimit,
        errors.Unavailable,
        errors.Compacted,
        errors.Denied,
        errors.Unauthenticated,
        errors.DeadlineExceeded,
    )
}


def clip(text: str, limit_bytes: int) -> str:
    """`text`, shortened to `limit_bytes` of UTF-8 with its true length said."""
    raw = text[: limit_bytes + 1].encode("utf-8", "replace")
    if len(raw) <= limit_bytes:
        return raw.decode()
    note = f"... ({len(text)} characters)"
    return raw[: limit_bytes - len(note)].decode("utf-8", "ignore") + note


def on_the_wire(refusal: Refusal) -> tuple[grpc.StatusCode, str, Trailers]:
    """Code, message and trailers of a refusal, as `context.abort` wants them."""
    status = to_status(refusal)
    code = grpc.StatusCode[refusal.code]
    return code, status.message, ((DETAILS_KEY, status.SerializeToString()),)


def to_status(refusal: Refusal) -> Any:
    """The `google.rpc.Status` of a refusal; details that would not fit into trailers are left out, last first."""
    code: int = grpc.StatusCode[refusal.code].value[0]
    status = status_pb2.Status(code=code, message=clip(refusal.message, MAX_MESSAGE_BYTES))
    for detail in _details(refusal):
        packed = status.details.add()
        packed.Pack(detail)
        if status.ByteSize() > MAX_STATUS_BYTES:
            del status.details[-1]
    return status


def _details(refusal: Refusal) -> Iterator[Message]:
    metadata = _metadata(refusal)
    yield error_details_pb2.ErrorInfo(reason=refusal.reason[:63], domain=DOMAIN, metadata=metadata)
    text = clip(refusal.message, _MAX_VALUE_BYTES)
    if refusal.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(refusal.retry_after_s * 1e9))
        yield retry
    if isinstance(refusal, errors.Invalid):
        yield _bad_request(refusal)
    elif isinstance(refusal, errors.NotFound | errors.AlreadyExists):
        yield error_details_pb2.ResourceInfo(
            resource_type=clip(refusal.kind, 64),
            resource_name=clip(refusal.name, _MAX_VALUE_BYTES),
            description=text,
        )
    elif isinstance(refusal, errors.WrongState):
        failed = error_details_pb2.PreconditionFailure.Violation(
            type=refusal.reason, subject=metadata.get("name", ""), description=text
        )
        yield error_details_pb2.PreconditionFailure(violations=[failed])
    elif isinstance(refusal, errors.OverLimit):
        over = error_details_pb2.QuotaFailure.Violation(subject=metadata.get("subject", ""), description=text)
        yield error_details_pb2.QuotaFailure(violations=[over])
    elif isinstance(refusal, errors.Compacted):
        link = error_details_pb2.Help.Link(description="list again and watch from the revision of that listing")
        yield error_details_pb2.Help(links=[link])


def _metadata(refusal: Refusal) -> dict[str, str]:
    """As much of the metadata, in its own order, as there is room for."""
    kept: dict[str, str] = {}
    room = _MAX_METADATA_BYTES
    for key, value in refusal.metadata.items():
        key, value = clip(key, 64), clip(str(value), _MAX_VALUE_BYTES)
        room -= len(key.encode()) + len(value.encode())
        if room < 0:
            break
        kept[key] = value
    return kept


def _bad_request(refusal: errors.Invalid) -> Message:
    """As many of the violations as there is room for; the first is always there."""
    bad = error_details_pb2.BadRequest()
    for violation in refusal.violations:
        bad.field_violations.add(
            field=clip(violation.field, _MAX_VALUE_BYTES), description=clip(violation.description, _MAX_VALUE_BYTES)
        )
        if bad.ByteSize() > _MAX_VIOLATIONS_BYTES:
            del bad.field_violations[-1]
            break
    return bad  # type: ignore[no-any-return]  # google.rpc has no stubs


def from_status(status: Any) -> Refusal:
    """The refusal that a `google.rpc.Status` was made of; a `ServerFailure` for codes that no refusal has."""
    name = _code_name(status.code)
    info = _unpacked(status, error_details_pb2.ErrorInfo)
    retry = _unpacked(status, error_details_pb2.RetryInfo)
    kind = _BY_CODE.get(name, ServerFailure)
    refusal = kind.__new__(kind)
    Refusal.__init__(
        refusal,
        status.message,
        reason=(info.reason if info else "") or name,
        metadata=dict(info.metadata) if info else {},
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
    )
    _restore_fields(refusal, status)
    return refusal


def _restore_fields(refusal: Refusal, status: Any) -> None:
    """Sets what the constructor of each class would have set."""
    if isinstance(refusal, errors.Invalid):
        bad = _unpacked(status, error_details_pb2.BadRequest)
        found = bad.field_violations if bad else ()
        refusal.violations = tuple(errors.FieldViolation(v.field, v.description) for v in found)
    elif isinstance(refusal, errors.NotFound | errors.AlreadyExists):
        about = _unpacked(status, error_details_pb2.ResourceInfo)
        refusal.kind = about.resource_type if about else ""
        refusal.name = about.resource_name if about else ""
    elif isinstance(refusal, errors.Compacted):
        revision = refusal.metadata.get("revision", "")
        refusal.revision = int(revision) if revision.isdigit() else 0


class _Failed(Protocol):
    """What `grpc.aio.AioRpcError` and the errors of synchronous calls have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def from_rpc_error(error: grpc.RpcError) -> Refusal:
    """The refusal behind a failed call, from its details or, when the transport failed, from its code."""
    failed: _Failed = error  # type: ignore[assignment]  # the base class is declared empty
    for key, value in failed.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return from_status(status_pb2.Status.FromString(value))
            except DecodeError:
                break  # a peer of another make; its code still says enough
    return _from_code(failed.code(), failed.details() or "")


def _from_code(code: grpc.StatusCode, text: str) -> Refusal:
    if code is grpc.StatusCode.CANCELLED:  # by the server or a proxy: our own cancelling raises CancelledError
        return errors.Unavailable(text or "the server ended the call", reason="CALL_CANCELLED", retry_after_s=0.1)
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.Unavailable(text or "the server does not answer", reason="SERVER_UNREACHABLE", retry_after_s=0.1)
    return from_status(status_pb2.Status(code=code.value[0], message=text or code.name))


def _unpacked(status: Any, kind: Any) -> Any:
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None


_NAMES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


def _code_name(number: int) -> str:
    return _NAMES.get(number, grpc.StatusCode.UNKNOWN.name)
