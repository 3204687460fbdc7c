"""What is repeated, how often and when."""

from dataclasses import dataclass

import pytest

from whaleflux import errors
from whaleflux.retry import Backoff
from whaleflux.rpc.retry_policy import CallPolicy, channel_options, repeatable

POLICY = CallPolicy(attempts=4, backoff=Backoff(0.1, 2.0))
BROKEN = errors.Unavailable("broken", reason="SERVER_UNREACHABLE", retry_after_s=0.0)


def pause(error=BROKEN, attempt=1, again=True, left_s=60.0, chance=1.0):
    return POLICY.pause_s(attempt, error, again, left_s, chance)


@dataclass
class Request:
    request_id: str = ""
    validate_only: bool = False


@pytest.mark.parametrize(
    ("method", "request_", "expected"),
    [
        ("/whaleflux.v1.InventoryService/GetNode", Request(), True),
        ("/whaleflux.v1.InventoryService/ListNodes", object(), True),
        ("/whaleflux.v1.SchedulerService/CreateJob", Request(), False),
        ("/whaleflux.v1.SchedulerService/CreateJob", Request(request_id="01j"), True),
        ("/whaleflux.v1.SchedulerService/CreateJob", Request(validate_only=True), True),
        ("/whaleflux.v1.GetterService/Delete", Request(), False),
    ],
)
def test_reads_dry_runs_and_identified_requests_may_be_repeated(method, request_, expected):
    assert repeatable(method, request_) is expected


def test_pauses_double_up_to_the_longest():
    policy = CallPolicy(attempts=10, backoff=Backoff(0.1, 0.5))
    pauses = [policy.pause_s(n, BROKEN, True, 60, 1.0) for n in range(1, 6)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])


def test_chance_spreads_a_pause_over_its_upper_half():
    assert pause(chance=0.0) == pytest.approx(0.05)
    assert pause(chance=0.5) == pytest.approx(0.075)


def test_the_servers_wish_counts_but_not_beyond_the_longest_pause():
    assert pause(errors.Unavailable("x", retry_after_s=1.5)) == pytest.approx(1.5)
    assert pause(errors.Unavailable("x", retry_after_s=600.0)) == pytest.approx(2.0)


def test_it_ends_with_the_attempts_and_with_the_time():
    assert pause(attempt=3) is not None
    assert pause(attempt=4) is None
    assert pause(left_s=0.05) is None


@pytest.mark.parametrize("error", [errors.NotFound("node", "n"), errors.Aborted("x"), errors.ResourceExhausted("x")])
def test_other_status_errors_are_answers(error):
    assert pause(error) is None


def test_a_mutation_is_repeated_only_when_the_server_said_that_it_did_nothing():
    assert pause(again=False) is None
    assert pause(errors.Unavailable("x", reason="COMMIT_UNKNOWN"), again=False) is None
    assert pause(errors.Unavailable("x", reason="NOT_LEADER"), again=False) is not None
    assert pause(errors.Unavailable("x", reason="DRAINING"), again=False) is not None


def test_a_server_name_replaces_the_host_in_the_certificate_check():
    assert ("grpc.ssl_target_name_override", "scheduler.whaleflux") in channel_options("scheduler.whaleflux")
    assert "grpc.ssl_target_name_override" not in dict(channel_options(""))
