"""`whaleflux rebalance apply`: what does not hold any more is said before anybody is asked."""

import contextlib
import json

import pytest
from typer.testing import CliRunner

from whaleflux.cli import rebalance_commands, state
from whaleflux.cli.__main__ import app
from whaleflux.errors import Aborted
from whaleflux.v1 import scheduler_pb2 as pb

RUN = CliRunner()
PLAN = pb.RebalancePlan(etag="5f", proposals=[pb.RebalanceProposal(moves=[pb.RebalanceMove(job="queues/q/jobs/a")])])


class Service:
    """Answers like SchedulerService with one plan, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def PlanRebalance(self, request, timeout):
        return PLAN

    def ApplyRebalance(self, request, timeout):
        self.asked.append(request)
        if request.etag != PLAN.etag:
            raise Aborted("plan 'bad' does not hold any more")
        return PLAN


@pytest.fixture
def service(monkeypatch):
    found = Service()
    client = type("Client", (), {"scheduler": found})()
    monkeypatch.setattr(rebalance_commands, "fleet", lambda: contextlib.nullcontext(client))
    return found


def test_a_plan_that_does_not_hold_is_refused_before_anybody_is_asked(service):
    done = RUN.invoke(app, ["rebalance", "apply", "bad"])
    assert isinstance(done.exception, Aborted) and "move these jobs?" not in done.output
    assert [one.validate_only for one in service.asked] == [True]


def test_the_plan_is_shown_before_it_is_carried_out(service, monkeypatch):
    monkeypatch.setattr(rebalance_commands, "confirm", lambda question, yes: print(question))
    done = RUN.invoke(app, ["rebalance", "apply", "5f"])
    assert done.exit_code == 0 and done.output.index("queues/q/jobs/a") < done.output.index("move these jobs?")
    assert [one.validate_only for one in service.asked] == [True, False]


@pytest.mark.parametrize("words", [["5f"], []])
def test_programs_get_the_plan_that_is_carried_out_alone(service, words):
    done = RUN.invoke(app, ["rebalance", "apply", *words, "--yes", "-o", "json"])
    assert json.loads(done.stdout)["etag"] == "5f" and [one.validate_only for one in service.asked] == [False]
    assert state.confirm is rebalance_commands.confirm
