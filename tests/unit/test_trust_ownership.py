"""The owner rules as a table: who may see, use, read, change a job in a queue."""

import pytest

from whaleflux.errors import NotFound, PermissionDenied
from whaleflux.rpc.auth import Identity, Principal
from whaleflux.trust import ownership
from whaleflux.trust.ownership import OPEN, Access

TEAM = Access(frozenset({"groups/research", "users/carl"}))


def who(role, name="x", groups=(), queues=None):
    return Principal(Identity(role, name), frozenset(groups), queues)


OWNER, MATE, NAMED = who("user", "ann"), who("user", "bob", ["research"]), who("user", "carl")
STRANGER, OPERATOR, ADMIN = who("user", "eve", ["other"]), who("operator"), who("admin")
VIEWER, SERVICE, AGENT = who("viewer"), who("scheduler"), who("agent", "a/n1")


@pytest.mark.parametrize(
    ("principal", "access", "sees", "uses", "reads", "changes"),
    [
        (OWNER, OPEN, True, True, True, True),
        (STRANGER, OPEN, True, True, False, False),
        (OWNER, TEAM, False, False, True, True),  # left the team: what is there stays theirs, by name
        (MATE, TEAM, True, True, True, True),
        (NAMED, TEAM, True, True, False, False),
        (STRANGER, TEAM, False, False, False, False),
        (OPERATOR, TEAM, True, True, True, True),
        (ADMIN, TEAM, True, True, True, True),
        (SERVICE, TEAM, True, True, True, True),
        (VIEWER, TEAM, True, False, False, False),
        (AGENT, TEAM, False, False, False, False),
    ],
)
def test_what_each_may_do_with_anns_job(principal, access, sees, uses, reads, changes):
    assert ownership.may_see(principal, access) == sees
    assert ownership.may_use(principal, "q", access) == uses
    assert ownership.may_read(principal, "user/ann", access) == reads
    assert ownership.may_change(principal, "user/ann", access) == changes


def test_a_new_role_takes_nobodys_jobs_away_and_roles_of_machines_are_no_names():
    assert ownership.is_owner(who("operator", "ann"), "user/ann")
    assert not ownership.is_owner(who("agent", "ann"), "user/ann")
    assert not ownership.is_owner(who("user", "scheduler"), "inference_router/scheduler")
    assert not ownership.is_owner(who("user", ""), "")


def test_whom_a_queue_is_for_is_asked_without_going_through_its_members():
    """Each request at the inference API and each job of a listing asks."""

    class Members(frozenset):
        def __iter__(self):
            raise AssertionError("one after another")

    access = Access(Members({"users/carl", "groups/research", *(f"users/u{i}" for i in range(1000))}))
    assert ownership.may_see(NAMED, access) and ownership.may_see(MATE, access)
    assert not ownership.may_see(STRANGER, access)


def test_a_token_for_some_queues_submits_to_no_other():
    scoped = who("user", "ci", queues=frozenset({"ci"}))
    assert ownership.may_use(scoped, "ci", OPEN)
    assert not ownership.may_use(scoped, "default", OPEN)


def test_what_may_not_be_seen_is_not_found_and_what_may_not_be_changed_names_the_owner():
    with pytest.raises(NotFound, match="job 'j' does not exist; see"):
        ownership.require_seen(STRANGER, TEAM, "job", "j", "see: whaleflux jobs")
    with pytest.raises(PermissionDenied, match="belongs to user/ann; ask them") as caught:
        ownership.require_change(STRANGER, "user/ann", OPEN, "j")
    assert caught.value.reason == "NOT_OWNER"


@pytest.mark.parametrize(
    "question",
    [
        lambda: ownership.may_see(ADMIN, OPEN),
        lambda: ownership.may_use(who("user", queues=frozenset()), "q", OPEN),
        lambda: ownership.may_read(OWNER, "", OPEN),
        lambda: ownership.may_change(OWNER, "", OPEN),
    ],
)
def test_each_question_is_noted(question):
    asked = ownership.watch_questions()
    assert not asked.yes
    question()
    assert asked.yes
