"""Who is admitted: certificates against the trust records, which are watched."""

import asyncio
import contextlib
from dataclasses import replace
from datetime import timedelta

import pytest

from whaleflux import names
from whaleflux.clock import VirtualClock
from whaleflux.errors import Unauthenticated, Unavailable
from whaleflux.rpc.auth import Identity
from whaleflux.store import keys
from whaleflux.store.api import Delete, Put
from whaleflux.store.memory import MemoryStore
from whaleflux.trust.ownership import Access
from whaleflux.trust.view import Records, TrustView
from whaleflux.v1 import scheduler_pb2, trust_pb2

SESSION, OTHER = names.ulid(1), names.ulid(2)
ANN = Identity("user", "ann")  # a certificate that was made beside the fleet
LOGGED_IN = Identity("user", "ann", session=SESSION)
AGENT = Identity("agent", "a/n1", session=SESSION)


class World:
    def __init__(self):
        self.store, self.clock = MemoryStore(), VirtualClock()
        self.view = TrustView(self.store, self.clock)

    async def put(self, key, message):
        """Stores it, and returns when the view has it."""
        await self.changes(Put(key, message if isinstance(message, bytes) else message.SerializeToString()))

    async def changes(self, write):
        revision = await self.store.commit(write)
        while self.view.revision < revision:
            await asyncio.sleep(0)

    def refuses(self, identity, match):
        return pytest.raises(Unauthenticated, match=match)


@contextlib.asynccontextmanager
async def world():
    made = World()
    async with made.view.running():
        await made.view.until_known()
        yield made


async def test_until_the_records_are_read_only_the_control_plane_is_admitted():
    view = TrustView(MemoryStore(), VirtualClock())
    assert view.admit(Identity("scheduler", "1")).is_service
    assert view.admit(Identity("frontdoor", "1")).role == "frontdoor"
    with pytest.raises(Unavailable, match="not known here yet"):
        view.admit(ANN)


async def test_a_view_that_cannot_go_on_ends_its_service(monkeypatch):
    """Standing still it would admit the revoked, and nobody would know."""
    with pytest.raises(BaseExceptionGroup):
        async with world() as w, asyncio.timeout(5):
            monkeypatch.setattr(Records, "apply", None)
            await w.store.commit(Put(keys.REVOKED + "user/ann", b""))
            await asyncio.Event().wait()


async def test_a_certificate_without_records_is_what_it_says():
    async with world() as w:
        assert (w.view.admit(ANN).groups, w.view.admit(ANN).queues) == (frozenset(), None)


async def test_who_is_revoked_is_refused_until_the_record_goes():
    subject = "user/ann"
    async with world() as w:
        assert w.view.admit(ANN)
        await w.put(keys.REVOKED + subject, trust_pb2.Revocation(subject=subject, reason="left"))
        with w.refuses(ANN, "was revoked: left"):
            w.view.admit(ANN)
        assert w.view.admit(Identity("user", "bob"))
        await w.changes(Delete(keys.REVOKED + subject))
        assert w.view.admit(ANN)


async def test_a_login_makes_nobody_look_at_all_streams_again():
    """Each look judges thousands of agents' streams; people log in all day."""
    async with world() as w:
        admitted, changed = w.view.admit(ANN), asyncio.create_task(w.view.changed())
        await w.put(keys.SESSIONS + SESSION, trust_pb2.Session(id=SESSION, principal="users/ann"))
        assert w.view.admit(LOGGED_IN)
        assert w.view.admit(ANN) is admitted and not changed.done()
        await w.changes(Delete(keys.SESSIONS + SESSION))
        async with asyncio.timeout(1):
            await changed
        with w.refuses(LOGGED_IN, "ended"):
            w.view.admit(LOGGED_IN)


async def test_one_session_is_revoked_alone():
    async with world() as w:
        await w.put(keys.REVOKED + SESSION, trust_pb2.Revocation(subject=SESSION))
        with w.refuses(AGENT, "revoked"):
            w.view.admit(AGENT)
        assert w.view.admit(Identity("agent", "a/n1", session=OTHER))


async def test_a_record_that_cannot_be_read_admits_nobody():
    async with world() as w:
        await w.put(keys.REVOKED + "user/ann", b"\xff")
        with w.refuses(ANN, "cannot be read"):
            w.view.admit(ANN)
        await w.put(keys.PRINCIPALS + "bob", b"\xff")
        with w.refuses(Identity("user", "bob"), "disabled"):
            w.view.admit(Identity("user", "bob"))


async def test_a_disabled_user_is_refused_whatever_the_role():
    async with world() as w:
        await w.put(keys.PRINCIPALS + "ann", trust_pb2.Principal(name="users/ann", disabled=True))
        for role in ("user", "admin", "viewer"):
            with w.refuses(Identity(role, "ann"), "disabled"):
                w.view.admit(Identity(role, "ann"))
        assert w.view.admit(Identity("agent", "a/ann"))
        await w.put(keys.PRINCIPALS + "ann", trust_pb2.Principal(name="users/ann"))
        assert w.view.admit(ANN)


async def test_groups_follow_their_members():
    async with world() as w:
        await w.put(keys.GROUPS + "research", trust_pb2.Group(members=["users/ann", "users/bob"]))
        await w.put(keys.GROUPS + "prod", trust_pb2.Group(members=["users/ann"]))
        assert w.view.admit(ANN).groups == {"research", "prod"}
        await w.put(keys.GROUPS + "research", trust_pb2.Group(members=["users/bob"]))
        assert w.view.admit(ANN).groups == {"prod"}
        await w.changes(Delete(keys.GROUPS + "prod"))
        assert w.view.admit(ANN).groups == frozenset()


def session(w, **more):
    made = trust_pb2.Session(id=SESSION, principal="users/ann", **more)
    made.expire_time.FromDatetime(w.clock.now() + timedelta(seconds=10))
    return made


async def test_a_session_adds_groups_narrows_queues_and_ends_by_time():
    async with world() as w:
        await w.put(keys.SESSIONS + SESSION, session(w, groups=["idp"], queues=["queues/ci"]))
        principal = w.view.admit(LOGGED_IN)
        assert (principal.groups, principal.queues) == ({"idp"}, {"ci"})
        await w.clock.advance(10)
        with w.refuses(LOGGED_IN, "has ended.*whaleflux login"):
            w.view.admit(LOGGED_IN)


@pytest.mark.parametrize("role", ["user", "app"])
async def test_a_login_that_was_ended_admits_nobody(role):
    async with world() as w:
        await w.put(keys.SESSIONS + SESSION, session(w))
        assert w.view.admit(replace(LOGGED_IN, role=role))
        await w.changes(Delete(keys.SESSIONS + SESSION))
        with w.refuses(LOGGED_IN, "was ended.*whaleflux login"):
            w.view.admit(replace(LOGGED_IN, role=role))


async def test_a_login_of_this_moment_may_not_be_known_yet_which_is_no_end():
    async with world() as w:
        young = replace(LOGGED_IN, session=names.ulid(w.clock.now().timestamp()))
        with pytest.raises(Unavailable, match="so young"):
            w.view.admit(young)
        await w.clock.advance(4)
        with w.refuses(young, "was ended"):
            w.view.admit(young)


@pytest.mark.parametrize(("says", "most", "admitted"), [
    ("user", "user", True), ("user", "admin", True), ("viewer", "user", True), ("app", "user", True),
    ("admin", "operator", False), ("operator", "user", False), ("user", "viewer", False), ("app", "viewer", False), ("viewer", "app", False),
])  # fmt: skip
async def test_a_certificate_with_more_than_its_user_has_by_now_admits_nobody(says, most, admitted):
    async with world() as w:
        await w.put(keys.PRINCIPALS + "ann", trust_pb2.Principal(name="users/ann", role=most))
        who = Identity(says, "ann")
        if admitted:
            assert w.view.admit(who).role == says
        else:
            with w.refuses(who, f"ann is {most} by now"):
                w.view.admit(who)


async def test_whom_a_queue_is_for_follows_its_record_and_an_unknown_one_is_for_nobody():
    async with world() as w:
        ann = w.view.admit(ANN)
        assert w.view.queue_access("q").members and not w.view.queue_access("q").max_priority
        queue = scheduler_pb2.Queue(name="queues/q", members=["groups/research"], max_priority=7)
        await w.store.commit(Put(keys.QUEUES + "q", queue.SerializeToString()))
        await w.put(keys.GROUPS + "x", trust_pb2.Group())  # a later change: the queue's is in by now
        assert w.view.queue_access("q") == Access(frozenset({"groups/research"}), 7)
        assert "research" not in ann.groups


async def test_who_a_record_names_is_who_they_are_today():
    async with world() as w:
        assert w.view.known("operator/ann").role == "operator"
        await w.put(keys.GROUPS + "research", trust_pb2.Group(members=["users/ann"]))
        assert w.view.known("user/ann").groups == {"research"}
        for most, named, role in (
            ("admin", "user", "user"),
            ("user", "operator", "user"),
            ("viewer", "user", "viewer"),
        ):
            await w.put(keys.PRINCIPALS + "ann", trust_pb2.Principal(name="users/ann", role=most))
            assert w.view.known(f"{named}/ann").role == role, (most, named)
        await w.put(keys.PRINCIPALS + "ann", trust_pb2.Principal(name="users/ann", role="user", disabled=True))
        assert w.view.known("user/ann") is None
    with pytest.raises(Unavailable):
        TrustView(MemoryStore(), VirtualClock()).known("user/ann")
