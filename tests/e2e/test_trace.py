"""One trace tells the story of the main job across the services: submitted, placed, lost, placed again, restored."""

from __future__ import annotations

import pytest

from tests.support.spans import SeenSpan

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]  # the first test of the folder waits for the run

JOB = "queues/default/jobs/gpt-stdlib"
CREATE = "whaleflux.v1.SchedulerService/CreateJob"


class Trace:
    """The spans of one trace, and how to find one's way in it."""

    def __init__(self, spans: list[SeenSpan], job: str) -> None:
        ids = {span.trace for span in spans if span.attributes.get("whaleflux.job") == job}
        assert len(ids) == 1, f"the job's spans are in {len(ids)} traces"
        self.spans = [span for span in spans if span.trace in ids]
        self._by_id = {span.id: span for span in self.spans}
        assert len(self._by_id) == len(self.spans), "a span id was used twice"

    def all(self, name: str, epoch: int = 0) -> list[SeenSpan]:
        return [
            span
            for span in self.spans
            if span.name == name and (not epoch or span.attributes.get("whaleflux.epoch") == epoch)
        ]

    def one(self, name: str, epoch: int = 0) -> SeenSpan:
        found = self.all(name, epoch)
        assert len(found) == 1, f"{len(found)} spans {name} of epoch {epoch or 'any'}"
        return found[0]

    def parent(self, span: SeenSpan) -> SeenSpan:
        assert span.parent in self._by_id, f"the parent of {span.name} is in no service's spans"
        return self._by_id[span.parent]

    def ancestors(self, span: SeenSpan) -> list[SeenSpan]:
        found = []
        while span.parent in self._by_id:
            span = self._by_id[span.parent]
            found.append(span)
        return found


@pytest.fixture(scope="module")
def trace(main_run) -> Trace:
    return Trace(main_run.spans, JOB)


def test_the_request_of_the_user_is_the_root(trace):
    create = trace.one(CREATE)
    assert create.service == "scheduler"
    assert trace.ancestors(create) == []
    assert not create.is_error


@pytest.mark.parametrize("epoch", [1, 2])
def test_each_attempt_is_decided_allocated_and_launched_on_its_nodes(trace, epoch):
    decide, allocate = trace.one("scheduler.decide", epoch), trace.one("scheduler.allocate", epoch)
    launches = trace.all("agent.launch", epoch)
    assert trace.parent(allocate) is decide
    assert [trace.parent(launch) for launch in launches] == [allocate, allocate]
    assert {span.service for span in (decide, allocate)} == {"scheduler"}
    assert {launch.service for launch in launches} == {"agent"}
    assert not any(span.is_error for span in (decide, allocate, *launches))


def test_the_first_attempt_is_decided_because_of_the_request(trace):
    assert trace.parent(trace.one("scheduler.decide", 1)) is trace.one(CREATE)


def test_the_failure_is_an_error_under_the_launch_that_it_hit(trace):
    failure = trace.one("health.failure")
    assert failure.service == "health_monitor"
    assert failure.is_error
    assert trace.parent(failure) in trace.all("agent.launch", 1)


def test_the_job_is_placed_again_because_of_the_failure(trace):
    recover = trace.one("scheduler.recover")
    assert trace.parent(recover) is trace.one("health.failure")
    assert trace.parent(trace.one("scheduler.decide", 2)) is recover


def test_the_checkpoint_service_is_asked_in_the_recovery(trace):
    asked = trace.all("whaleflux.v1.CheckpointService/FindRestorable")
    served = [span for span in asked if span.service == "checkpoint"]
    assert any(trace.one("scheduler.recover") in trace.ancestors(span) for span in served)


def test_the_second_attempt_restores_under_its_launch(trace):
    restores = trace.all("checkpoint.restore", 2)
    assert restores
    for restore in restores:
        assert restore.service == "agent"
        assert trace.parent(restore) in trace.all("agent.launch", 2)
        assert restore.attributes["whaleflux.checkpoint"].startswith(JOB)
    assert trace.all("checkpoint.restore", 1) == []  # there was nothing to restore


def test_nothing_begins_before_its_cause(trace):
    story = ["scheduler.decide", "scheduler.allocate", "agent.launch", "health.failure", "checkpoint.restore"]
    told = [span for span in trace.spans if span.name in story]
    assert {span.name for span in told} == set(story)
    early = [span.name for span in told if span.start_ns < trace.parent(span).start_ns - 1_000_000]
    assert not early, "clocks are read in microseconds"


def test_the_recovery_begins_with_the_fence(trace):
    """First the old attempt is fenced, then health_monitor is asked why it ended: its span begins a little later."""
    recover, failure = trace.one("scheduler.recover"), trace.one("health.failure")
    assert abs(recover.start_ns - failure.start_ns) < 20e9
    assert recover.end_ns >= failure.end_ns


def test_only_what_failed_is_an_error(trace):
    wrong = {span.name for span in trace.spans if span.is_error}
    assert "health.failure" in wrong
    assert wrong <= {"health.failure", "agent.exit"} | {name for name in wrong if "/" in name}
