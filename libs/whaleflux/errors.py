"""Status errors as data: what went wrong, in which field, and what to do next.

A `StatusError` is raised by cores and servicers and becomes a `google.rpc.Status` with details at the boundary
(`whaleflux.rpc.boundary`). Callers match on the class or on `reason`, never on the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from whaleflux.reasons import ErrorReason

DOMAIN = "whaleflux.dev"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its path ("job.gpus", "nodes[2].name") and what would be right."""

    field: str
    description: str


class StatusError(Exception):
    """Something was asked for that cannot be done; nothing was changed.

    `code` is the gRPC status name, `reason` an UPPER_SNAKE identifier (AIP-193), `metadata` every changing part
    of the message, `retry_after_s` is set where trying again helps.
    """

    code: ClassVar[str] = "INTERNAL"
    default_reason: ClassVar[str] = ErrorReason.INTERNAL

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


class InvalidArgument(StatusError):
    """A field is wrong. `violations` names each with its limit and its fix."""

    code = "INVALID_ARGUMENT"
    default_reason = ErrorReason.FIELD_INVALID

    def __init__(self, violations: Sequence[FieldViolation] | FieldViolation, **more: str) -> None:
        self.violations = (violations,) if isinstance(violations, FieldViolation) else tuple(violations)
        text = "; ".join(f"{v.field}: {v.description}" for v in self.violations)
        metadata = {"fields": ",".join(v.field for v in self.violations), **more}
        super().__init__(text, metadata=metadata)


class NotFound(StatusError):
    """No such resource. `kind` is "node", "job", ...; `name` the full resource name."""

    code = "NOT_FOUND"

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(
            f"{kind} {name!r} does not exist" + (f"; {hint}" if hint else ""),
            reason=f"{kind.upper()}_NOT_FOUND",
            metadata={"kind": kind, "name": name},
        )
        self.kind, self.name = kind, name


class AlreadyExists(StatusError):
    """The name is taken, or the request_id was used before with other content."""

    code = "ALREADY_EXISTS"

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(
            f"{kind} {name!r} exists already" + (f"; {hint}" if hint else ""),
            reason=f"{kind.upper()}_EXISTS",
            metadata={"kind": kind, "name": name},
        )
        self.kind, self.name = kind, name


class Aborted(StatusError):
    """A compare-and-swap lost: the resource changed since it was read, or a fence moved on."""

    code = "ABORTED"
    default_reason = ErrorReason.ETAG_MISMATCH


class FailedPrecondition(StatusError):
    """The resource's state does not allow this (drain first, job already ended)."""

    code = "FAILED_PRECONDITION"
    default_reason = ErrorReason.WRONG_STATE


class ResourceExhausted(StatusError):
    """A quota, a rate or a size bound was reached."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = ErrorReason.QUOTA_EXCEEDED


class Unavailable(StatusError):
    """A dependency does not answer, or this replica does not lead; trying again helps."""

    code = "UNAVAILABLE"
    default_reason = ErrorReason.STORE_UNAVAILABLE

    def __init__(
        self, message: str, *, reason: str = "", metadata: Mapping[str, str] | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata, retry_after_s=retry_after_s)


class OutOfRange(StatusError):
    """What was asked for lies outside of what there is."""

    code = "OUT_OF_RANGE"
    default_reason = ErrorReason.OUT_OF_RANGE


class Compacted(OutOfRange):
    """A watch asked for history that is gone: list again and watch from the listing's revision."""

    default_reason = ErrorReason.REVISION_COMPACTED

    def __init__(self, revision: int) -> None:
        super().__init__(
            f"history before revision {revision} was compacted; list again and watch from that revision",
            metadata={"revision": str(revision)},
        )
        self.revision = revision


class PermissionDenied(StatusError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"
    default_reason = ErrorReason.ROLE_MISSING


class Unauthenticated(StatusError):
    """The caller showed no certificate or token, or one that is not valid."""

    code = "UNAUTHENTICATED"
    default_reason = ErrorReason.IDENTITY_MISSING


class DeadlineExceeded(StatusError):
    """The work did not finish in the caller's time."""

    code = "DEADLINE_EXCEEDED"
    default_reason = ErrorReason.DEADLINE_EXCEEDED


def node_name_taken(node: str, holder: str, machine: str) -> FailedPrecondition:
    """The refusal of a second machine under the name of a node whose agent is connected."""
    return FailedPrecondition(
        f"machine {holder[:12]} is connected as {node}; this is machine {machine[:12] or 'unnamed'}: give it another --node-id, "
        f"or stop the agent there, drain the node and run `whaleflux replace {node}`",
        reason=ErrorReason.NODE_NAME_TAKEN,
        metadata={"node": node, "holder": holder[:12], "machine": machine[:12]},
    )


def node_runs_twice(node: str, holder: str, boot: str) -> FailedPrecondition:
    """The refusal of the later of two machines that show one identity: their boots tell them apart."""
    return FailedPrecondition(
        f"{node} is connected from a machine that booted as {holder[:12]}; this one, of the same identity, booted as {boot[:12]}. If it has just "
        "been rebooted it is let in within half a minute; if its disk is a copy, stop this agent and join it as a node of its own: "
        "another --state-dir, another --node-id, and a token (whaleflux token create --site SITE)",
        reason=ErrorReason.NODE_RUNS_TWICE,
        metadata={"node": node, "holder": holder[:12], "boot": boot[:12]},
        retry_after_s=1.0,
    )
