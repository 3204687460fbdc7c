"""Status errors survive the wire: every class, with what it carries, within what trailers can hold."""

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
STATUS_ERRORS = [
    errors.InvalidArgument(VIOLATIONS),
    errors.NotFound("node", "sites/a/nodes/n1", "list them first"),
    errors.AlreadyExists("job", "queues/q/jobs/j"),
    errors.Aborted("changed meanwhile", metadata={"etag": '"7"'}, retry_after_s=0.25),
    errors.FailedPrecondition("drain it first", reason="NODE_NOT_DRAINED", metadata={"name": "sites/a/nodes/n1"}),
    errors.ResourceExhausted("4 of 4 GPUs used", metadata={"subject": "queues/q"}, retry_after_s=30.0),
    errors.Unavailable("no leader", reason="NOT_LEADER", retry_after_s=0.5),
    errors.OutOfRange("past the end"),
    errors.Compacted(41),
    errors.PermissionDenied("no", metadata={"role": "user"}),
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


def travelled(error):
    return status.from_rpc_error(Failed(*status.on_the_wire(error)))


def test_the_list_above_has_every_kind_of_status_error():
    def leaves(kind):
        found = kind.__subclasses__()
        return {kind} if not found else set().union(*(leaves(sub) for sub in found))

    ours = {kind for kind in leaves(errors.StatusError) if kind.__module__ == "whaleflux.errors"}
    direct = {kind for kind in errors.StatusError.__subclasses__() if kind.__module__ == "whaleflux.errors"}
    assert ours | direct <= {type(error) for error in STATUS_ERRORS}


@pytest.mark.parametrize("error", STATUS_ERRORS, ids=lambda error: type(error).__name__)
class TestRoundTrip:
    def test_nothing_is_lost(self, error):
        arrived = travelled(error)
        assert type(arrived) is type(error)
        assert str(arrived) == str(error)
        assert vars(arrived) == vars(error)

    def test_the_details_are_those_of_the_table(self, error):
        wire = status.to_status(error)
        kinds = [packed.TypeName().removeprefix("google.rpc.") for packed in wire.details]
        expected = {
            errors.InvalidArgument: "BadRequest",
            errors.NotFound: "ResourceInfo",
            errors.AlreadyExists: "ResourceInfo",
            errors.FailedPrecondition: "PreconditionFailure",
            errors.ResourceExhausted: "QuotaFailure",
            errors.Compacted: "Help",
        }.get(type(error))
        assert kinds[0] == "ErrorInfo"
        assert len(set(kinds)) == len(kinds), "at most one of each type (AIP-193)"
        assert expected is None or expected in kinds
        assert ("RetryInfo" in kinds) == (error.retry_after_s is not None)
        info = error_details_pb2.ErrorInfo()
        wire.details[0].Unpack(info)
        assert (info.domain, info.reason) == ("whaleflux.dev", error.reason)
        assert dict(info.metadata) == error.metadata


@given(st.text(max_size=200), st.integers(1, 5_000))
@settings(max_examples=30, deadline=None)
def test_a_status_error_that_quotes_megabytes_still_fits_into_trailers(unit, times):
    huge = unit * times
    for error in (
        errors.NotFound("node", huge),
        errors.InvalidArgument([errors.FieldViolation(huge, huge)] * 100),
        errors.FailedPrecondition(huge, metadata={huge: huge, "name": huge} | {f"k{i}": huge for i in range(100)}),
    ):
        _, message, ((_, packed),) = status.on_the_wire(error)
        on_the_line = len(packed) * 4 / 3 + 3 * len(message.encode())
        assert on_the_line <= 7500, "trailers hold 8192 bytes, and others need some"
        assert travelled(error).reason == error.reason


class TestWithoutDetails:
    """Answers of gRPC itself, of proxies, of other makes."""

    @pytest.mark.parametrize(
        ("code", "kind", "reason"),
        [
            (grpc.StatusCode.UNAVAILABLE, errors.Unavailable, "SERVER_UNREACHABLE"),
            (grpc.StatusCode.CANCELLED, errors.Unavailable, "CALL_CANCELLED"),
            (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded, "DEADLINE_EXCEEDED"),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ResourceExhausted, "RESOURCE_EXHAUSTED"),
            (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidArgument, "INVALID_ARGUMENT"),
            (grpc.StatusCode.NOT_FOUND, errors.NotFound, "NOT_FOUND"),
            (grpc.StatusCode.OUT_OF_RANGE, errors.OutOfRange, "OUT_OF_RANGE"),
            (grpc.StatusCode.UNIMPLEMENTED, status.ServerFailure, "UNIMPLEMENTED"),
            (grpc.StatusCode.UNKNOWN, status.ServerFailure, "UNKNOWN"),
        ],
    )
    def test_the_code_alone_gives_the_class(self, code, kind, reason):
        error = status.from_rpc_error(Failed(code, "as they say"))
        assert type(error) is kind
        assert error.reason == reason
        assert error.message

    @pytest.mark.parametrize(
        ("code", "text", "said"),
        [
            ("UNKNOWN", "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))", "connection to the server broke"),
            ("INTERNAL", "Received RST_STREAM with error code 2", "connection to the server broke"),
            ("UNAVAILABLE", "failed to connect to all addresses; last error: ipv4:127.0.0.1:1: Connection refused", "refuses the connection"),
            ("UNAVAILABLE", "upstream connect error or disconnect/reset before headers. reset reason: connection termination", "behind the front door"),
            ("UNAVAILABLE", "no healthy upstream", "behind the front door"),
            ("UNAVAILABLE", "anything", "does not answer"),
        ],
    )  # fmt: skip
    def test_a_broken_connection_is_told_in_words_and_may_be_tried_again(self, code, text, said):
        error = status.from_rpc_error(Failed(grpc.StatusCode[code], text))
        assert isinstance(error, errors.Unavailable)
        assert said in error.message
        assert error.metadata["transport"] == text

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
