"""Who may say and hear what on the bus: by the table of services, and for sites."""

import pytest

from whaleflux.events import permissions
from whaleflux.events.accounting import account_subject
from whaleflux.events.subjects import Subject, audit_subject, matches, usage_subject
from whaleflux.services import ROLES

# What each service's publishers tell of: `news` of the service, by the names of their resources.
TOLD = {
    "inventory": ("sites/a", "sites/a/nodes/n", "datasets/d", "joinTokens/t"),
    "health_monitor": ("sites/a/nodes/n", "incidents/i"),
    "checkpoint": ("queues/q/jobs/j/checkpoints/c",),
    "scheduler": ("queues/q", "queues/q/jobs/j"),
    "console": ("prices/p", "adjustments/a", "budgets/b", "recommendations/r"),
    "inference_router": ("models/m", "models/m/replicas/r", "apiKeys/k"),
}


def may(patterns, subject):
    """As nats-server judges: `>` takes one token or more, `*` exactly one."""
    return any(matches(pattern, subject) for pattern in patterns)


@pytest.mark.parametrize("role", ROLES)
def test_a_service_says_what_it_owns_and_nothing_that_another_one_does(role):
    allowed = permissions.of_service(role)
    said = {str(Subject.of(name, "changed")) for name in TOLD[role]}
    assert all(may(allowed.publish, subject) for subject in said)
    kinds = {Subject.of(name, "x").kind for name in TOLD[role]}
    for other in ROLES:
        for name in TOLD[other]:
            subject = Subject.of(name, "changed")
            assert may(allowed.publish, str(subject)) == (subject.kind in kinds)
            assert not may(allowed.publish, str(Subject.of(name, "changed", site="a"))), "that is for agents to say"
    assert may(allowed.publish, account_subject("q", "u", "j", "r")) == (role == "scheduler")
    assert may(allowed.publish, audit_subject(role, "1", "s"))
    assert may(allowed.publish, usage_subject("sites/a/nodes/n", "s")) == (role == "console")
    assert may(allowed.publish, "$JS.API.CONSUMER.MSG.NEXT.USAGE.ledger") == (role == "console")
    assert allowed.subscribe == (f"_INBOX.{role}.>",)


def test_nobody_deletes_what_is_kept_and_inventory_alone_changes_it():
    for role in ROLES:
        allowed = permissions.of_service(role, ["a"]).publish
        for stream in ("EVENTS", "ACCOUNTING", "AUDIT", "USAGE"):
            for call in ("STREAM.DELETE", "STREAM.PURGE", "STREAM.MSG.DELETE", "STREAM.RESTORE"):
                assert not may(allowed, f"$JS.API.{call}.{stream}")
            assert may(allowed, f"$JS.API.STREAM.UPDATE.{stream}") == (role == "inventory")
        assert may(allowed, "$JS.API.STREAM.PURGE.CODE") == may(allowed, "code.x.record") == (role == "scheduler")
        assert may(allowed, "$JS.a.API.STREAM.UPDATE.EVENTS") == (role == "inventory")
        assert not may(allowed, "$JS.a.API.STREAM.DELETE.EVENTS")


def test_a_site_s_server_says_its_events_to_its_own_account_and_hears_questions_about_its_own_streams():
    allowed = permissions.of_leaf("a")
    for subject in (
        "wf.v1.a.node.n.x",
        "wf.v1.b.node.n.x",
        "$JS.API.STREAM.INFO.EVENTS",
        "from.b.S.x",
        "_INBOX.inventory.x",
    ):
        assert not may(allowed.publish, subject)
    for subject in ("wf.v1.b.node.n.x", "$JS.b.API.INFO", "_INBOX.inventory.x", "taken.a.S.x"):
        assert not may(allowed.subscribe, subject)
    assert permissions.of_agents("a").publish == ("wf.v1.a.node.>",)
