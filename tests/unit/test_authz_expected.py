"""The matrix of permissions asks about every method, and its expectations come from the two tables."""

import pytest

from benchmarks.authz import http
from benchmarks.authz.contract import methods
from benchmarks.authz.expected import Answer, Caller, Relation, expected
from benchmarks.authz.fleet import Thing
from benchmarks.authz.probes import PROBES
from whaleflux.frontdoor.http_paths import HTTP_PATHS

SCHEDULER = "/whaleflux.v1.SchedulerService/"
ANN = Caller("owner", "user", "ann")
BOB = Caller("mate", "user", "bob", frozenset({"research"}))
EVE = Caller("stranger", "user", "eve")
OLGA, VERA = Caller("operator", "operator", "olga"), Caller("viewer", "viewer", "vera")
AGENT = Caller("agent", "agent", "a/n1")
NOBODY = Caller("nobody", "anonymous", "-")
HIDDEN_JOB = Thing("queues/r/jobs/j", "ann", frozenset({"groups/research"}), node="a/n1")
OPEN_JOB = Thing("queues/o/jobs/j", "ann", node="b/n2")


def test_each_method_is_asked_and_no_other():
    assert set(PROBES) == {method.path for method in methods()}
    for method in methods():
        assert isinstance(PROBES[method.path].build("queues/q/jobs/j"), method.request)


@pytest.mark.parametrize(
    ("caller", "hidden", "seen"),
    [
        (ANN, Relation.OWN, Relation.OWN),
        (BOB, Relation.OWN, Relation.SEEN),
        (EVE, Relation.HIDDEN, Relation.SEEN),
        (VERA, Relation.SEEN, Relation.SEEN),
        (OLGA, Relation.SEEN, Relation.SEEN),
        (AGENT, Relation.OWN, Relation.HIDDEN),
    ],
)
def test_what_a_job_is_to_somebody(caller, hidden, seen):
    assert (HIDDEN_JOB.to(caller), OPEN_JOB.to(caller)) == (hidden, seen)


@pytest.mark.parametrize(
    ("method", "caller", "relation", "answer"),
    [
        ("CancelJob", ANN, Relation.OWN, Answer.ADMITTED),
        ("CancelJob", EVE, Relation.SEEN, Answer.DENIED),
        ("CancelJob", EVE, Relation.HIDDEN, Answer.NOT_THERE),
        ("CancelJob", OLGA, Relation.SEEN, Answer.ADMITTED),
        ("CancelJob", VERA, Relation.SEEN, Answer.DENIED),
        ("CancelJob", NOBODY, Relation.SEEN, Answer.NOBODY),
        ("CancelJob", AGENT, Relation.OWN, Answer.DENIED),
        ("GetJob", EVE, Relation.SEEN, Answer.ADMITTED),
        ("GetJob", EVE, Relation.ABSENT, Answer.NOT_THERE),
        ("DeleteQueue", EVE, Relation.SEEN, Answer.DENIED),
    ],
)
def test_the_right_answer(method, caller, relation, answer):
    assert expected(SCHEDULER + method, caller, relation) == {answer}


def test_http_paths_take_the_key_of_whoever_may_use_the_model():
    chat = next(row for row in HTTP_PATHS if row.path.endswith("chat/completions"))
    assert http.wanted(chat, "own") == {200}
    assert 200 not in http.wanted(chat, "other model") | http.wanted(chat, "wrong") | http.wanted(None, "own")
