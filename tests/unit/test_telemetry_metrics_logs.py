"""Metrics by registered name, and logs that carry trace ids and no secrets."""

import io
import json
import logging
import re

import pytest
import structlog
from prometheus_client import REGISTRY

from whaleflux import telemetry
from whaleflux.telemetry import Attribute, Event, Metric, UnregisteredName
from whaleflux.telemetry.registry import METRICS

MAKERS = {"counter": telemetry.counter, "gauge": telemetry.gauge, "histogram": telemetry.histogram}


class TestMetrics:
    @pytest.mark.parametrize("metric", list(Metric))
    def test_every_name_is_described_and_makes_its_metric_once(self, metric):
        spec = METRICS[metric]
        assert MAKERS[spec.kind](metric) is MAKERS[spec.kind](metric.value)
        assert spec.help.endswith(".")
        assert metric.endswith("_total") == (spec.kind == "counter")
        assert bool(spec.buckets) == (spec.kind == "histogram")

    @pytest.mark.parametrize("make", MAKERS.values())
    def test_another_name_is_refused(self, make):
        with pytest.raises(UnregisteredName, match="is not in"):
            make("whaleflux_rpc_request_total")

    def test_another_kind_is_refused(self):
        with pytest.raises(UnregisteredName, match="registered as a counter"):
            telemetry.gauge(Metric.RPC_REQUESTS)

    def test_what_is_counted_is_shown(self):
        labels = {"what": "unit-test", "outcome": "handled"}
        telemetry.counter(Metric.EVENTS_CONSUMED).labels(**labels).inc(3)
        assert REGISTRY.get_sample_value("whaleflux_events_consumed_total", labels) == 3


@pytest.mark.parametrize("event", list(Event))
def test_event_names_are_snake_case_and_say_themselves(event):
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", event)
    assert event.name.lower() == event.value


def test_attribute_names_are_unique_dotted_lower_case():
    assert all(re.fullmatch(r"(rpc|whaleflux)(\.[a-z_]+)+", attribute) for attribute in Attribute)


MADE_BEFORE = telemetry.get_logger("whaleflux.rpc")


@pytest.fixture
def lines():
    """Configured logging; afterwards as it was."""
    root, config = logging.getLogger(), structlog.get_config()
    before = (root.handlers[:], root.level)
    out = io.StringIO()
    telemetry.setup_logging("scheduler", level="info", stream=out)
    yield lambda: [json.loads(line) for line in out.getvalue().splitlines()]
    root.handlers[:], _ = before
    root.setLevel(before[1])
    structlog.configure(**config)


class TestLogs:
    def test_a_line_is_one_json_object_with_event_fields_time_and_service(self, lines):
        telemetry.get_logger().info(Event.NODE_DRAINED, node="sites/a/nodes/n1")
        (line,) = lines()
        assert line.pop("time").endswith("Z")
        assert line == {"event": "node_drained", "level": "info", "node": "sites/a/nodes/n1", "service": "scheduler"}

    def test_a_line_inside_a_span_has_its_trace_id(self, lines):
        with telemetry.span("step"):
            telemetry.get_logger().warning(Event.NODE_SUSPECTED)
            trace_id = telemetry.current_trace_id()
        assert lines()[0]["trace_id"] == trace_id

    def test_lines_of_libraries_take_the_same_form(self, lines):
        logging.getLogger("nats.aio").warning("slow %s", "consumer")
        (line,) = lines()
        assert (line["event"], line["level"], line["service"]) == ("slow consumer", "warning", "scheduler")

    def test_secrets_are_masked_by_their_names(self, lines):
        telemetry.get_logger().info(
            Event.NODE_JOINED, join_token="s3cret", password="s3cret", api_key="s3cret", token_count=5, key="jobs/j"
        )
        (line,) = lines()
        assert "s3cret" not in json.dumps(line)
        assert (line["token_count"], line["key"]) == (5, "jobs/j")

    def test_less_severe_lines_are_left_out(self, lines):
        telemetry.get_logger().debug(Event.JOB_PLACED)
        logging.getLogger("x").debug("no")
        assert lines() == []

    def test_an_exception_is_shown_with_its_frames_as_data(self, lines):
        try:
            raise KeyError("x")
        except KeyError as bug:
            telemetry.get_logger().error(Event.RPC_FAILED, exc_info=bug)
        (line,) = lines()
        assert line["exception"][0]["exc_type"] == "KeyError"

    def test_locals_of_a_failed_frame_stay_out(self, lines):
        def fail():
            private_thing = "hunter2"
            raise KeyError(len(private_thing))

        try:
            fail()
        except KeyError as bug:
            telemetry.get_logger().error(Event.RPC_FAILED, exc_info=bug)
        assert "hunter2" not in json.dumps(lines())

    def test_a_logger_made_before_the_set_up_follows_it(self, lines):
        MADE_BEFORE.error(Event.RPC_FAILED)
        assert lines()[0]["service"] == "scheduler"


def test_what_an_event_quotes_does_not_command_a_terminal(lines):
    """`lines` puts logging back afterwards."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    telemetry.setup_logging("scheduler", level="info", stream=terminal)
    hostile = "\x1b]0;owned\x07\x1b[2J"
    telemetry.get_logger().info(Event.JOB_FAILED, job=hostile, reason=f"it said {hostile}")
    logging.getLogger("library").warning("%s", hostile)
    shown = terminal.getvalue()
    assert shown.count("owned") == 3
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown
