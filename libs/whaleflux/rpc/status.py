"""Status errors on the wire: `StatusError` <-> `google.rpc.Status` with AIP-193 details.

Everything here is bounded: gRPC carries a status in trailers, which peers limit to 8 KiB (the message three bytes for
one when it is not ASCII, details four for three), and a status error that quotes a 10 MB name must still arrive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from whaleflux import errors
from whaleflux.errors import DOMAIN, StatusError
from whaleflux.reasons import ErrorReason

DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_BYTES = 1024
MAX_STATUS_BYTES = 3072  # message and details
_MAX_VALUE_BYTES = 256
_MAX_METADATA_BYTES = 1024
_MAX_VIOLATIONS_BYTES = 1024

Trailers = tuple[tuple[str, bytes], ...]


class ServerFailure(StatusError):
    """An answer that no status error explains: a bug in the server (`reason` INTERNAL), or a code we never send.

    `reason` is the gRPC status name. Whether anything was changed is unknown.
    """


_BY_CODE: dict[str, type[StatusError]] = {
    kind.code: kind
    for kind in (
        errors.InvalidArgument,
        errors.NotFound,
        errors.AlreadyExists,
        errors.Aborted,
        errors.FailedPrecondition,
        errors.ResourceExhausted,
        errors.Unavailable,
        errors.OutOfRange,
        errors.PermissionDenied,
        errors.Unauthenticated,
        errors.DeadlineExceeded,
    )
}
_BY_REASON: dict[tuple[str, str], type[StatusError]] = {
    (errors.Compacted.code, errors.Compacted.default_reason): errors.Compacted
}


def clip(text: str, limit_bytes: int) -> str:
    """`text`, shortened to `limit_bytes` of UTF-8 with its true length said."""
    raw = text[: limit_bytes + 1].encode("utf-8", "replace")
    if len(raw) <= limit_bytes:
        return raw.decode()
    note = f"... ({len(text)} characters)"
    return raw[: limit_bytes - len(note)].decode("utf-8", "ignore") + note


def on_the_wire(error: StatusError) -> tuple[grpc.StatusCode, str, Trailers]:
    """Code, message and trailers of a status error, as `context.abort` wants them."""
    status = to_status(error)
    code = grpc.StatusCode[error.code]
    return code, status.message, ((DETAILS_KEY, status.SerializeToString()),)


def to_status(error: StatusError) -> Any:
    """The `google.rpc.Status` of a status error; details that would not fit into trailers are left out, last first."""
    code: int = grpc.StatusCode[error.code].value[0]
    status = status_pb2.Status(code=code, message=clip(error.message, MAX_MESSAGE_BYTES))
    for detail in _details(error):
        packed = status.details.add()
        packed.Pack(detail)
        if status.ByteSize() > MAX_STATUS_BYTES:
            del status.details[-1]
    return status


def _details(error: StatusError) -> Iterator[Message]:
    metadata = _metadata(error)
    yield error_details_pb2.ErrorInfo(reason=error.reason[:63], domain=DOMAIN, metadata=metadata)
    text = clip(error.message, _MAX_VALUE_BYTES)
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        yield retry
    if isinstance(error, errors.InvalidArgument):
        yield _bad_request(error)
    elif isinstance(error, errors.NotFound | errors.AlreadyExists):
        yield error_details_pb2.ResourceInfo(
            resource_type=clip(error.kind, 64),
            resource_name=clip(error.name, _MAX_VALUE_BYTES),
            description=text,
        )
    elif isinstance(error, errors.FailedPrecondition):
        failed = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason, subject=metadata.get("name", ""), description=text
        )
        yield error_details_pb2.PreconditionFailure(violations=[failed])
    elif isinstance(error, errors.ResourceExhausted):
        over = error_details_pb2.QuotaFailure.Violation(subject=metadata.get("subject", ""), description=text)
        yield error_details_pb2.QuotaFailure(violations=[over])
    elif isinstance(error, errors.Compacted):
        link = error_details_pb2.Help.Link(description="list again and watch from the revision of that listing")
        yield error_details_pb2.Help(links=[link])


def _metadata(error: StatusError) -> dict[str, str]:
    """As much of the metadata, in its own order, as there is room for."""
    kept: dict[str, str] = {}
    room = _MAX_METADATA_BYTES
    for key, value in error.metadata.items():
        key, value = clip(key, 64), clip(str(value), _MAX_VALUE_BYTES)
        room -= len(key.encode()) + len(value.encode())
        if room < 0:
            break
        kept[key] = value
    return kept


def _bad_request(error: errors.InvalidArgument) -> Message:
    """As many of the violations as there is room for; the first is always there."""
    bad = error_details_pb2.BadRequest()
    for violation in error.violations:
        bad.field_violations.add(
            field=clip(violation.field, _MAX_VALUE_BYTES), description=clip(violation.description, _MAX_VALUE_BYTES)
        )
        if bad.ByteSize() > _MAX_VIOLATIONS_BYTES:
            del bad.field_violations[-1]
            break
    return bad  # type: ignore[no-any-return]  # google.rpc has no stubs


def from_status(status: Any) -> StatusError:
    """The status error that a `google.rpc.Status` was made of; a `ServerFailure` for codes that no status error has."""
    name = _code_name(status.code)
    info = _unpacked(status, error_details_pb2.ErrorInfo)
    retry = _unpacked(status, error_details_pb2.RetryInfo)
    reason = (info.reason if info else "") or name
    kind = _BY_REASON.get((name, reason), _BY_CODE.get(name, ServerFailure))
    error = kind.__new__(kind)
    StatusError.__init__(
        error,
        status.message,
        reason=reason,
        metadata=dict(info.metadata) if info else {},
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
    )
    _restore_fields(error, status)
    return error


def _restore_fields(error: StatusError, status: Any) -> None:
    """Sets what the constructor of each class would have set."""
    if isinstance(error, errors.InvalidArgument):
        bad = _unpacked(status, error_details_pb2.BadRequest)
        found = bad.field_violations if bad else ()
        error.violations = tuple(errors.FieldViolation(v.field, v.description) for v in found)
    elif isinstance(error, errors.NotFound | errors.AlreadyExists):
        about = _unpacked(status, error_details_pb2.ResourceInfo)
        error.kind = about.resource_type if about else ""
        error.name = about.resource_name if about else ""
    elif isinstance(error, errors.Compacted):
        revision = error.metadata.get("revision", "")
        error.revision = int(revision) if revision.isdigit() else 0


class _Failed(Protocol):
    """What `grpc.aio.AioRpcError` and the errors of synchronous calls have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def from_rpc_error(error: grpc.RpcError) -> StatusError:
    """The status error behind a failed call, from its details or, when the transport failed, from its code."""
    failed: _Failed = error  # type: ignore[assignment]  # the base class is declared empty
    for key, value in failed.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return from_status(status_pb2.Status.FromString(value))
            except DecodeError:
                break  # a peer of another make; its code still says enough
    return _from_code(failed.code(), failed.details() or "")


def _from_code(code: grpc.StatusCode, text: str) -> StatusError:
    """What the transport (or a proxy) says, which has no details; its text is kept beside ours, for logs."""
    raw = {"transport": clip(text, _MAX_VALUE_BYTES)} if text else {}
    if code is grpc.StatusCode.CANCELLED:  # by the server or a proxy: our own cancelling raises CancelledError
        return errors.Unavailable(
            "the server ended the call", reason=ErrorReason.CALL_CANCELLED, metadata=raw, retry_after_s=0.1
        )
    if code is grpc.StatusCode.UNAVAILABLE or (code in _BROKEN_CODES and _said(text, _BROKEN)):
        return errors.Unavailable(
            transport_words(text), reason=ErrorReason.SERVER_UNREACHABLE, metadata=raw, retry_after_s=0.1
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded("the server did not answer in time", metadata=raw)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        text = "the server does not know this call; it is of another version than this client"
    return from_status(status_pb2.Status(code=code.value[0], message=text or code.name))


_BROKEN_CODES = (
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
)  # of a server that was killed in the middle of a stream
_BROKEN = ("RST_STREAM", "Stream removed", "Socket closed", "reset by peer", "GOAWAY", "recvmsg", "connection closed")
_TRANSPORT_WORDS = (
    (("Connection refused",), "the server refuses the connection"),
    (("Name resolution", "DNS", "resolve"), "the server's name is not known here"),
    (("no healthy upstream", "upstream connect error"), "the service behind the front door does not answer"),
    (("Hostname Verification",), "whoever answers there is another server: its certificate has another name"),
    (("handshake", "CERTIFICATE", "SSL"), "the server does not accept this certificate, or shows one that is not trusted"),
    (("keepalive", "ping timeout", "timed out", "Deadline"), "the server fell silent"),
    (_BROKEN, "the connection to the server broke"),
)  # fmt: skip


def transport_words(text: str) -> str:
    """What a text of gRPC's or Envoy's about a connection means to people."""
    return next((words for marks, words in _TRANSPORT_WORDS if _said(text, marks)), "the server does not answer")


def _said(text: str, marks: tuple[str, ...]) -> bool:
    return any(mark.lower() in text.lower() for mark in marks)


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
