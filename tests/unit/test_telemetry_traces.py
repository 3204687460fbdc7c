"""Spans across processes and time: parents, chosen ids, errors, and what is not recorded."""

from datetime import UTC, datetime, timedelta

import pytest
from opentelemetry.trace import StatusCode

from tests.support.spans import traced, untraced
from whaleflux import errors, telemetry
from whaleflux.rpc import propagation
from whaleflux.telemetry import Attribute, UnregisteredName

T0 = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    untraced()


@pytest.fixture
def spans():
    with traced() as kept:
        yield kept


def ids(traceparent):
    _, trace_id, span_id, _ = traceparent.split("-")
    return int(trace_id, 16), int(span_id, 16)


def named(spans, name):
    (found,) = [span for span in spans.get_finished_spans() if span.name == name]
    return found


class TestJob:
    """The one trace of a job, as its services write it."""

    def test_steps_are_children_of_a_span_that_is_written_when_the_job_ends(self, spans):
        with telemetry.span("SubmitJob"):
            submitted = telemetry.current_traceparent()
            job = telemetry.new_traceparent()
        with telemetry.span_from(job, "decide", {Attribute.JOB: "queues/q/jobs/j"}):
            decided = telemetry.current_traceparent()
        with telemetry.span_from(decided, "start"):
            pass
        own = telemetry.emit_span("job", T0, T0 + timedelta(hours=2), traceparent=job, parent=submitted)
        whole = named(spans, "job")
        assert own == job
        assert (whole.context.trace_id, whole.context.span_id) == ids(job)
        assert whole.parent.span_id == named(spans, "SubmitJob").context.span_id
        assert named(spans, "decide").parent.span_id == whole.context.span_id
        assert named(spans, "start").parent.span_id == named(spans, "decide").context.span_id
        assert len({span.context.trace_id for span in spans.get_finished_spans()}) == 1
        assert (whole.end_time - whole.start_time) == 7200 * 10**9
        assert whole.start_time == int(T0.timestamp()) * 10**9

    def test_a_root_may_have_a_chosen_id_too(self, spans):
        job = telemetry.new_traceparent()
        assert telemetry.emit_span("job", T0, T0, traceparent=job) == job
        assert named(spans, "job").parent is None

    def test_a_failed_job_is_an_error(self, spans):
        telemetry.emit_span("job", T0, T0, error="no capacity", attributes={Attribute.EPOCH: 3})
        span = named(spans, "job")
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "no capacity")
        assert span.attributes["whaleflux.epoch"] == 3

    def test_what_runs_now_does_not_leak_into_a_stored_trace(self, spans):
        stored = telemetry.new_traceparent()
        with telemetry.span("the loop's own"), telemetry.span_from(stored, "step"):
            pass
        assert named(spans, "step").context.trace_id == ids(stored)[0]
        assert named(spans, "the loop's own").context.trace_id != ids(stored)[0]

    @pytest.mark.parametrize("stored", ["", "garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
    def test_a_job_without_a_usable_context_gets_a_new_trace(self, spans, stored):
        with telemetry.span_from(stored, "step"):
            assert telemetry.current_traceparent()
        assert named(spans, "step").parent is None
        assert telemetry.new_traceparent(stored)


class TestErrors:
    def test_a_status_error_is_noted_and_no_error(self, spans):
        with pytest.raises(errors.NotFound), telemetry.span("step"):
            raise errors.NotFound("node", "n")
        span = named(spans, "step")
        assert span.status.status_code is StatusCode.UNSET
        assert span.attributes["whaleflux.reason"] == "NODE_NOT_FOUND"

    def test_any_other_exception_is_an_error_with_one_event(self, spans):
        with pytest.raises(KeyError), telemetry.span("step"):
            raise KeyError("x")
        span = named(spans, "step")
        assert span.status.status_code is StatusCode.ERROR
        assert [event.name for event in span.events] == ["exception"]

    def test_an_attribute_must_be_registered(self, spans):
        for bad in ("job", "whaleflux.jbo", "JOB"):
            with pytest.raises(UnregisteredName, match="is not in"), telemetry.span("step", {bad: "x"}):
                pytest.fail("the span was started")
            with pytest.raises(UnregisteredName):
                telemetry.emit_span("step", T0, T0, attributes={bad: "x"})


class TestPropagation:
    def test_outgoing_calls_carry_the_client_span(self, spans):
        with telemetry.span("cause"), propagation.outgoing("/t.T/Get", streaming=False) as headers:
            inside = telemetry.current_traceparent()
        assert dict(headers)["traceparent"] == inside
        assert named(spans, "t.T/Get").parent.span_id == named(spans, "cause").context.span_id

    def test_a_failed_call_is_an_error_of_the_client(self, spans):
        with pytest.raises(errors.NotFound), propagation.outgoing("/t.T/Get", streaming=False):
            raise errors.NotFound("node", "n")
        assert named(spans, "t.T/Get").status.status_code is StatusCode.ERROR

    def test_a_stream_carries_the_running_span_and_makes_none(self, spans):
        with telemetry.span("cause"), propagation.outgoing("/t.T/Watch", streaming=True) as headers:
            assert dict(headers)["traceparent"] == telemetry.current_traceparent()
        assert [span.name for span in spans.get_finished_spans()] == ["cause"]

    def test_attach_makes_later_spans_children_and_ends_with_its_block(self, spans):
        stored = telemetry.new_traceparent()
        with telemetry.attach(stored):
            assert telemetry.current_traceparent() == stored
        assert telemetry.current_traceparent() == ""


def test_without_an_exporter_ids_are_made_and_nothing_is_recorded():
    telemetry.setup_tracing("test")
    with telemetry.span("step") as span:
        assert not span.is_recording()
        assert len(telemetry.current_trace_id()) == 32
        assert telemetry.new_traceparent().split("-")[1] == telemetry.current_trace_id()
    assert telemetry.current_trace_id() == ""


def test_a_process_without_an_exporter_keeps_the_callers_wish_to_record(spans):
    sampled = telemetry.new_traceparent()
    assert sampled.endswith("-01")
    telemetry.setup_tracing("test")
    with telemetry.span_from(sampled, "step"):
        assert telemetry.current_traceparent().endswith("-01")
    assert telemetry.new_traceparent(sampled).endswith("-01")
