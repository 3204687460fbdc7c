"""Refusals as data: what went wrong, in which field, and what to do next.

A `Refusal` is raised by cores and servicers and becomes a `google.rpc.Status` with details at the boundary
(`whaleflux.rpc.boundary`). Callers match on the class or on `reason`, never on the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

DOMAIN = "whaleflux.dev"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its path ("job.gpus", "nodes[2].name") and what would be right."""

    field: str
    description: str


class Refusal(Exception):
    """Something was asked for that cannot be done; nothing was changed.

    `code` is the gRPC status name, `reason` an UPPER_SNAKE identifier (AIP-193), `metadata` every changing part
    of the message, `retry_after_s` is set where trying again helps.
    """

    code: ClassVar[str] = "INTERNAL"
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retry_after_s = retry_after_s


class Invalid(Refusal):
    """A field is wrong. `violations` names each with its limit and its fix."""

    code = "INVALID_ARGUMENT"
    default_reason = "FIELD_INVALID"

    def __init__(self, violations: Sequence[FieldViolation] | FieldViolation, **more: str) -> None:
        self.violations = (violations,) if isinstance(violations, FieldViolation) else tuple(violations)
        text = "; ".join(f"{v.field}: {v.description}" for v in self.violations)
        metadata = {"fields": ",".join(v.field for v in self.violations), **more}
        super().__init__(text, metadata=metadata)


class NotFound(Refusal):
    """No such resource. `kind` is "node", "job", ...; `name` the full resource name."""

    code = "NOT_FOUND"

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(
            f"{kind} {name!r} does not exist" + (f"; {hint}" if hint else ""),
            reason=f"{kind.upper()}_NOT_FOUND",
            metadata={"kind": kind, "name": name},
        )
        self.kind, self.name = kind, name


class AlreadyExists(Refusal):
    """The name is taken, or the request_id was used before with other content."""

    code = "ALREADY_EXISTS"

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(
            f"{kind} {name!r} exists already" + (f"; {hint}" if hint else ""),
            reason=f"{kind.upper()}_EXISTS",
            metadata={"kind": kind, "name": name},
        )
        self.kind, self.name = kind, name


class Conflict(Refusal):
    """A compare-and-swap lost: the resource changed since it was read, or a fence moved on."""

    code = "ABORTED"
    default_reason = "ETAG_MISMATCH"


class WrongState(Refusal):
    """The resource's state does not allow this (drain first, job already ended)."""

    code = "FAILED_PRECONDITION"
    default_reason = "WRONG_STATE"


class OverLimit(Refusal):
    """A quota, a rate or a size bound was reached."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "QUOTA_EXCEEDED"


class Unavailable(Refusal):
    """A dependency does not answer, or this replica does not lead; trying again helps."""

    code = "UNAVAILABLE"
    default_reason = "STORE_UNAVAILABLE"

    def __init__(
        self, message: str, *, reason: str = "", metadata: Mapping[str, str] | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata, retry_after_s=retry_after_s)


class Compacted(Refusal):
    """A watch asked for history that is gone: list again and watch from the listing's revision."""

    code = "OUT_OF_RANGE"
    default_reason = "REVISION_COMPACTED"

    def __init__(self, revision: int) -> None:
        super().__init__(
            f"history before revision {revision} was compacted; list again and watch from that revision",
            metadata={"revision": str(revision)},
        )
        self.revision = revision


class Denied(Refusal):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"
    default_reason = "ROLE_MISSING"


class Unauthenticated(Refusal):
    """The caller showed no certificate or token, or one that is not valid."""

    code = "UNAUTHENTICATED"
    default_reason = "IDENTITY_MISSING"


class DeadlineExceeded(Refusal):
    """The work did not finish in the caller's time."""

    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"
