"""Figures that Prometheus is shown: who leads, what the ledger knows, and the traces behind times."""

import urllib.request
from datetime import UTC, datetime

import pytest
from prometheus_client import REGISTRY

from tests.support.ledger_world import BEGIN_MS, leading
from tests.support.spans import traced, untraced
from tests.unit.test_ledger_answers import answering, close, fleet, hour
from whaleflux import telemetry
from whaleflux.store.election import lead
from whaleflux.store.memory import MemoryStore
from whaleflux.telemetry import Metric
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.figures import SPENDING_EVERY_S, Figures

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture(autouse=True)
def _as_before():
    yield
    untraced()


class At:
    """A clock that is set."""

    def __init__(self, now_ms):
        self.now_ms = now_ms

    def now(self):
        return datetime.fromtimestamp(self.now_ms / 1000, UTC)

    def monotonic(self):
        return self.now_ms / 1000


def shown(metric, **labels):
    return REGISTRY.get_sample_value(metric.value, labels)


async def test_a_leader_is_seen_while_it_leads():
    seen = []

    async def work(_):
        seen.append(shown(Metric.LEADER, name="seen-leading"))

    await lead(MemoryStore(), "seen-leading", "a", work)
    assert [*seen, shown(Metric.LEADER, name="seen-leading")] == [1, 0]


def test_a_counter_is_seen_before_its_first_event():
    """Else Prometheus takes the first event for where the counter begins, and no alert fires on it."""
    assert shown(Metric.CLAIMS_REFUSED, what="seen-early") is None
    telemetry.from_zero(Metric.CLAIMS_REFUSED, "seen-early")
    assert shown(Metric.CLAIMS_REFUSED, what="seen-early") == 0


async def test_spending_is_shown_by_class_and_asked_for_once_a_minute(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        await close(ledger, fleet(hour(0)))
        await ledger.advance(hour(1))
        clock = At(BEGIN_MS + HOUR_MS)
        async with answering(tmp_path, store) as answers:
            figures = Figures(answers, clock)
            await figures.show()
            assert shown(Metric.LEDGER_WATERMARK) == hour(1) / 1000
            assert shown(Metric.SPENDING, cost_class="useful") == 10
            assert shown(Metric.SPENDING, cost_class="lost") == 5
            assert shown(Metric.SPENDING, cost_class="data") == 0

            await close(ledger, fleet(hour(1)))
            await answers.follow()
            await figures.show()
            assert shown(Metric.SPENDING, cost_class="useful") == 10
            clock.now_ms += round(SPENDING_EVERY_S * 1000)
            await figures.show()
            assert shown(Metric.SPENDING, cost_class="useful") == 20

            clock.now_ms = hour(25)  # a day after the first hour
            await figures.show()
            assert shown(Metric.SPENDING, cost_class="useful") == 0


async def test_an_empty_ledger_shows_nothing(tmp_path):
    before = shown(Metric.LEDGER_WATERMARK)
    async with answering(tmp_path, MemoryStore()) as answers:
        await Figures(answers, At(BEGIN_MS)).show()
    assert shown(Metric.LEDGER_WATERMARK) == before


def page(port, accept):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


class TestExemplars:
    def test_a_time_leads_to_its_trace_for_who_asks_in_open_metrics(self):
        server = telemetry.start_metrics()
        try:
            with traced(), telemetry.span("slow"):
                trace_id = telemetry.current_trace_id()
                telemetry.histogram(Metric.RECOVERY_DURATION).observe(45.0, telemetry.exemplar())
            kind, text = page(server.port, OPEN_METRICS)
            assert kind.startswith("application/openmetrics-text")
            (line,) = [line for line in text.splitlines() if trace_id in line]
            assert line.startswith('whaleflux_recovery_duration_seconds_bucket{le="60.0"}')
            kind, text = page(server.port, "text/plain")
            assert kind.startswith("text/plain")
            assert "whaleflux_recovery_duration_seconds_bucket" in text
            assert trace_id not in text
        finally:
            server.close()

    def test_the_trace_of_a_job_is_named_by_its_context(self):
        with traced(), telemetry.span("submit"):
            job = telemetry.new_traceparent()
            trace_id = telemetry.current_trace_id()
        with traced():
            assert telemetry.exemplar(job) == {"trace_id": trace_id}
            assert telemetry.exemplar(job[:-2] + "00") is None, "not sampled"

    def test_where_nobody_collects_traces_none_is_named(self):
        with telemetry.span("unseen"):
            assert telemetry.exemplar() is None
            assert telemetry.exemplar(telemetry.current_traceparent()[:-2] + "01") is None
