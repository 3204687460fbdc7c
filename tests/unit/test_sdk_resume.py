"""When a broken stream is opened again, for how long, and behind what it goes on."""

import pytest

from whaleflux.errors import FieldViolation, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.sdk.resume import AGENTS_S, FIRST_S, OUTAGE_S, LogReading, Patience
from whaleflux.v1 import scheduler_pb2 as pb

NOT_LEADER = Unavailable("it does not lead", reason=ErrorReason.NOT_LEADER, retry_after_s=0.2)
AWAY = Unavailable("connection refused", reason=ErrorReason.SERVER_UNREACHABLE)
NO_AGENT = Unavailable("no agent is connected", reason=ErrorReason.NODES_UNREACHABLE, retry_after_s=1.0)
SLOW = ResourceExhausted("too slow", reason=ErrorReason.READER_TOO_SLOW, retry_after_s=1.0)


def tried_s(patience, error, start_s=0.0):
    """How long it goes on when each try fails at once."""
    now_s, tries = start_s, 0
    while (pause_s := patience.pause_s(error, now_s, 0.5)) is not None:
        assert pause_s > 0
        now_s += pause_s
        tries += 1
        assert tries < 1000
    return now_s - start_s


@pytest.mark.parametrize(
    ("error", "limit_s"), [(NOT_LEADER, OUTAGE_S), (AWAY, FIRST_S), (NO_AGENT, AGENTS_S), (SLOW, OUTAGE_S)]
)
def test_it_is_tried_again_for_as_long_as_that_may_help(error, limit_s):
    assert limit_s / 2 < tried_s(Patience(), error) <= limit_s


def test_a_server_that_answered_before_may_be_away_for_longer():
    patience = Patience()
    patience.received()
    assert tried_s(patience, AWAY) > OUTAGE_S / 2


def test_what_was_received_in_between_makes_patience_whole_again():
    patience = Patience()
    tried_s(patience, NOT_LEADER)
    patience.received()
    assert tried_s(patience, NOT_LEADER, start_s=1e6) > OUTAGE_S / 2


@pytest.mark.parametrize(
    "error", [NotFound("job", "j"), InvalidArgument(FieldViolation("name", "bad")), ResourceExhausted("full")]
)
def test_what_repeating_does_not_change_is_not_repeated(error):
    assert Patience().pause_s(error, 0.0) is None


def test_the_next_request_goes_on_behind_what_was_received():
    reading = LogReading(pb.StreamLogsRequest(name="j", follow=True, tail_lines=5))
    assert not reading.request().after
    reading.received(pb.StreamLogsResponse(rank=1, epoch=1, data=b"abc\n", next_offset=13))
    reading.received(pb.StreamLogsResponse(rank=0, epoch=2, data=b"d\n", next_offset=2))
    reading.received(pb.StreamLogsResponse(rank=1, epoch=1, data=b"f\n", next_offset=14))
    request = reading.request()
    assert (request.name, request.follow, request.tail_lines) == ("j", True, 5)
    assert [(known.rank, known.epoch, known.offset) for known in request.after] == [(0, 2, 2), (1, 1, 14)]
