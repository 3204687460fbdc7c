"""Refusals survive the wire: every class, with what it carries, within what trailers can hold."""

import grpc
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux import errors
from whaleflux.rpc import status

VIOLATIONS = (
    errors.FieldViolation("job.gpus", "is 0; use 1 to 16384"),
    errors.FieldViolation("job.name", "is empty; give one"),
)
REFUSALS = [
    errors.Invalid(VIOLATIONS),
    errors.NotFound("node", "sites/a/nodes/n1", "list them first"),
    errors.AlreadyExists("job", "queues/q/jobs/j"),
    errors.Conflict("changed meanwhile", metadata={"etag": '"7"'}, retry_after_s=0.25),
    errors.WrongState("drain it first", reason="NODE_NOT_DRAINED", metadata={"name": "sites/a/nodes/n1"}),
    errors.OverLimit("4 of 4 GPUs used", metadata={"subject": "queues/q"}, retry_after_s=30.0),
    errors.Unavailable("no leader", reason="NOT_LEADER", retry_after_s=0.5),
    errors.Compacted(41),
    errors.Denied("no", metadata={"role": "user"}),
    errors.Unauthenticated("who?"),
    errors.DeadlineExceeded("late"),
]


class Failed(grpc.RpcError):
    """What grpc raises, as far as `from_rpc_error` looks."""

    def __init__(self, code, details="", trailers=()):
        self._answer = code, details, trailers

    def code(self):
        return self._answer[0]

    def details(self):
        return self._answer[1]

    def trailing_metadata(self):
        return self._answer[2]


def travelled(refusal):
    return status.from_rpc_error(Failed(*status.on_the_wire(refusal)))


def test_the_list_above_has_every_kind_of_refusal():
    def leaves(kind):
        found = kind.__subclasses__()
        return {kind} if not found else set().union(*(leaves(sub) for sub in found))

    ours = {kind for kind in leaves(errors.Refusal) if kind.__module__ == "whaleflux.errors"}
    direct = {kind for kind in errors.Refusal.__subclasses__() if kind.__module__ == "whaleflux.errors"}
    assert ours | direct <= {type(refusal) for refusal in REFUSALS}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: type(refusal).__name__)
class TestRoundTrip:
    def test_nothing_is_lost(self, refusal):
        arrived = travelled(refusal)
        assert type(arrived) is type(refusal)
        assert str(arrived) == str(refusal)
        assert vars(arrived) == vars(refusal)

    def test_the_details_are_those_of_the_table(self, refusal):
        wire = status.to_status(refusal)
        kinds = [packed.TypeName().removeprefix("google.rpc.") for packed in wire.details]
        expected = {
            errors.Invalid: "BadRequest",
            errors.NotFound: "ResourceInfo",
            errors.AlreadyExists: "ResourceInfo",
            errors.WrongState: "PreconditionFailure",
            errors.OverLimit: "QuotaFailure",
            errors.Compacted: "Help",
        }.get(type(refusal))
        assert kinds[0] == "ErrorInfo"
        assert len(set(kinds)) == len(kinds), "at most one of each type (AIP-193)"
        assert expected is None or expected in kinds
        assert ("RetryInfo" in kinds) == (refusal.retry_after_s is not None)
        info = error_details_pb2.ErrorInfo()
        wire.details[0].Unpack(info)
        assert (info.domain, info.reason) == ("whaleflux.dev", refusal.reason)
        assert dict(info.metadata) == refusal.metadata


@given(st.text(max_size=200), st.integers(1, 5_000))
@settings(max_examples=30, deadline=None)
def test_a_refusal_that_quotes_megabytes_still_fits_into_trailers(unit, times):
    huge = unit * times
    for refusal in (
        errors.NotFound("node", huge),
        errors.Invalid([errors.FieldViolation(huge, huge)] * 100),
        errors.WrongState(huge, metadata={huge: huge, "name": huge} | {f"k{i}": huge for i in range(100)}),
    ):
        _, message, ((_, packed),) = status.on_the_wire(refusal)
        on_the_line = len(packed) * 4 / 3 + 3 * len(message.encode())
        assert on_the_line <= 7500, "trailers hold 8192 bytes, and others need some"
        assert travelled(refusal).reason == refusal.reason


class TestWithoutDetails:
    """Answers of gRPC itself, of proxies, of other makes."""

    @pytest.mark.parametrize(
        ("code", "kind", "reason"),
        [
            (grpc.StatusCode.UNAVAILABLE, errors.Unavailable, "SERVER_UNREACHABLE"),
            (grpc.StatusCode.CANCELLED, errors.Unavailable, "CALL_CANCELLED"),
            (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded, "DEADLINE_EXCEEDED"),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.OverLimit, "RESOURCE_EXHAUSTED"),
            (grpc.StatusCode.INVALID_ARGUMENT, errors.Invalid, "INVALID_ARGUMENT"),
            (grpc.StatusCode.NOT_FOUND, errors.NotFound, "NOT_FOUND"),
            (grpc.StatusCode.OUT_OF_RANGE, errors.Compacted, "OUT_OF_RANGE"),
            (grpc.StatusCode.UNIMPLEMENTED, status.ServerFailure, "UNIMPLEMENTED"),
            (grpc.StatusCode.UNKNOWN, status.ServerFailure, "UNKNOWN"),
        ],
    )
    def test_the_code_alone_gives_the_class(self, code, kind, reason):
        refusal = status.from_rpc_error(Failed(code, "as they say"))
        assert type(refusal) is kind
        assert (refusal.reason, refusal.message) == (reason, "as they say")

    def test_garbage_instead_of_details_is_ignored(self):
        failed = Failed(grpc.StatusCode.NOT_FOUND, "gone", ((status.DETAILS_KEY, b"\xff\xff"),))
        assert isinstance(status.from_rpc_error(failed), errors.NotFound)

    def test_details_of_a_strangers_type_are_skipped(self):
        stranger = status_pb2.Status(code=5, message="gone")
        stranger.details.append(Packed(type_url="type.googleapis.com/other.Thing", value=b"\x01"))
        arrived = status.from_status(stranger)
        assert isinstance(arrived, errors.NotFound)
        assert arrived.name == ""

    def test_a_code_of_the_future_is_a_failure_of_the_server(self):
        assert status.from_status(status_pb2.Status(code=99, message="?")).reason == "UNKNOWN"
