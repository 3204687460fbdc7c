"""Who waits for an answer is told for what, and in the end who did not answer."""

import contextlib
import threading

import pytest

from whaleflux.cli import log_reading, next_step
from whaleflux.cli.waiting import Waiting, no_answer, service_of
from whaleflux.errors import DeadlineExceeded, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import sync
from whaleflux.rpc.pki import Tls
from whaleflux.sdk.client import Client
from whaleflux.services import SERVICES
from whaleflux.v1 import scheduler_pb2 as pb

CREATE = "/whaleflux.v1.SchedulerService/CreateQueue"
LIST = "/whaleflux.v1.SchedulerService/ListQueues"


def heard():
    """What is said, and an event that something was."""
    lines, came = [], threading.Event()

    def say(line):
        lines.append(line)
        came.set()

    return lines, came, say


def test_what_is_waited_for_is_said_while_it_lasts():
    lines, came, say = heard()
    with Waiting(say, after_s=0.01).call(CREATE):
        assert came.wait(30)
    assert lines[0].startswith("waits for scheduler: no answer to CreateQueue for 0 s; Ctrl-C")


def test_what_was_heard_last_is_why():
    lines, came, say = heard()
    with Waiting(say, after_s=0.01).call(CREATE) as failed:
        failed(Unavailable("the store does not answer"))
        assert came.wait(30)
    assert lines[0] == "waits for scheduler: the store does not answer; Ctrl-C ends the wait"


def test_calls_side_by_side_say_it_once():
    lines, came, say = heard()
    waiting = Waiting(say, after_s=0.01, apart_s=1e6)
    with contextlib.ExitStack() as calls:
        for _ in range(20):
            calls.enter_context(waiting.call(CREATE))
        assert came.wait(30)
    assert len(lines) == 1


def test_nothing_is_said_of_a_call_that_is_answered():
    lines, _, say = heard()
    with Waiting(say, after_s=60.0).call(LIST):
        pass
    assert lines == []


def test_no_answer_names_who_did_not_give_it_and_what_to_look_at():
    late = DeadlineExceeded("the server did not answer in time")
    with pytest.raises(DeadlineExceeded) as found, Waiting(print).call(CREATE) as failed:
        failed(late)
        raise late
    assert "scheduler did not answer CreateQueue within 0 s; whether it was done is not known" in found.value.message
    advice = next_step.after(found.value, ["queue", "create"])
    assert "logs of scheduler, etcd and NATS" in advice and next_step.exit_code(found.value) == 3
    assert no_answer(LIST, 20.0, ["busy"]) == "scheduler did not answer ListQueues within 20 s, and said last: busy"


@pytest.mark.parametrize("service", [pytest.param((one.role, name), id=name) for one in SERVICES for name in one.grpc])
def test_every_service_of_the_contract_is_known_by_who_answers_for_it(service):
    assert service_of(f"/whaleflux.v1.{service[1]}/List") == service[0]


class Streams:
    """A scheduler whose streams say what a script says; `wait` in one ends when the test has heard something."""

    def __init__(self, came, *scripts):
        self.came, self.scripts = came, list(scripts)

    def WatchJobs(self, request):
        for said in self.scripts.pop(0):
            if said == "wait":
                assert self.came.wait(30)
                self.came.clear()
            elif isinstance(said, Exception):
                raise said
            else:
                yield said


def followed(scripts, after_s):
    lines, came, say = heard()
    channel = sync.connect("127.0.0.1:1", Tls(b"", b"", b""))
    channel.beside = Waiting(say, after_s=after_s, apart_s=0.0).call
    with Client(channel) as client:
        client.scheduler = Streams(came, *scripts)
        return [job.etag for job in client.follow_job("queues/default/jobs/j")], lines


def added(etag, state=pb.JOB_STATE_RUNNING):
    return pb.WatchJobsResponse(added=pb.Job(name="queues/default/jobs/j", etag=etag, state=state))


ENDS = added("2", pb.JOB_STATE_SUCCEEDED)


def test_a_stream_that_has_not_begun_is_waited_for_in_words():
    told, lines = followed([["wait", added("1"), ENDS]], 0.01)
    assert told == ["1", "2"]
    assert lines[0].startswith("waits for scheduler: no answer to WatchJobs for 0 s; Ctrl-C")


def test_a_stream_that_broke_says_why_until_the_next_one_begins():
    away = Unavailable("the leader is away", reason=ErrorReason.NOT_LEADER)
    told, lines = followed([[added("1"), away], ["wait", added("1"), ENDS]], 0.5)
    assert told == ["1", "2"]
    assert lines[0] == "waits for scheduler: the leader is away; Ctrl-C ends the wait"


def test_nothing_is_said_of_a_stream_that_is_quiet_once_it_has_begun():
    assert followed([[added("1"), ENDS]], 60.0) == (["1", "2"], [])


def test_who_reads_output_is_told_what_the_job_does_that_has_printed_nothing():
    lines, came, say = heard()

    def chunks():
        assert came.wait(30)
        yield "first"

    assert list(log_reading.first_awaited(chunks(), lambda: say("why"), 0.01)) == ["first"]
    assert list(log_reading.first_awaited(iter(["at once"]), lambda: say("never"), 60.0)) == ["at once"]
    assert lines == ["why"]


def test_each_failed_attempt_of_a_call_is_told():
    class Broken:
        def unary_unary(self, method, *_):
            def call(request, timeout, metadata):
                raise answers.pop(0)

            return call

    told = []
    answers = [_RpcError(), _RpcError()]
    channel = sync.SyncChannel(Broken(), sync.CallPolicy(attempts=2))
    channel.beside = lambda method: contextlib.nullcontext(lambda error: told.append((method, type(error))))
    with pytest.raises(Unavailable):
        channel.unary_unary(LIST)(object())
    assert told == [(LIST, Unavailable)] * 2


class _RpcError(sync.grpc.RpcError):
    def code(self):
        return sync.grpc.StatusCode.UNAVAILABLE

    def details(self):
        return "Connection refused"

    def trailing_metadata(self):
        return ()
