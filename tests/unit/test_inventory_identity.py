"""One name, one machine: who gets a node's name, who is refused, and what a refusal costs."""

import asyncio
import copy
from datetime import UTC, timedelta

import pytest
from cryptography import x509

from tests.unit.test_inventory_service import World
from whaleflux.errors import FailedPrecondition, InvalidArgument, Unauthenticated
from whaleflux.rpc import pki
from whaleflux.store import keys
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux.v1 import trust_pb2

N1 = "sites/a/nodes/n1"
FIRST, SECOND, THIRD = "1" * 32, "2" * 32, "3" * 32


@pytest.fixture
async def world():
    return World()


async def token(world, site="sites/a", **more):
    return await world.call("CreateJoinToken", pb.CreateJoinTokenRequest(site=site, **more))


class Machine:
    """What a machine keeps: its id, its key with the request that proves it, and the certificate that it got."""

    def __init__(self, id_=FIRST, node_id="n1"):
        self.id, self.node_id = id_, node_id
        self.key, self.csr = (pem.decode() for pem in pki.new_key_and_request())
        self.certificate, self.session = "", ""

    async def join(self, world, secret="", *, site="", **more):
        request = pb.JoinRequest(
            token=secret, node_id=self.node_id, certificate_request_pem=self.csr, machine_id=self.id, site=site, **more
        )
        return self._got(await world.call("Join", request, "anonymous", "-"))

    async def come_back(self, world, **more):
        return await self.join(world, certificate_pem=more.pop("certificate", self.certificate), **more)

    async def register(self, world, boot="boot-1", **more):
        request = pb.RegisterNodeRequest(name=N1, boot_id=boot, machine_id=self.id, **more)
        return await world.call("RegisterNode", request, "agent", "a/n1", self.session)

    async def renew(self, world):
        key, csr = (pem.decode() for pem in pki.new_key_and_request())
        request = pb.RenewCertificateRequest(certificate_request_pem=csr, machine_id=self.id)
        answer = self._got(await world.call("RenewCertificate", request, "agent", "a/n1", self.session))
        self.key, self.csr = key, csr
        return answer

    def _got(self, answer):
        self.certificate = answer.certificate_pem
        self.session = pki.identity_of(self.certificate.encode()).session
        return answer

    def copy(self, **changes):
        """The same disk elsewhere, or this machine with something else of it."""
        made = copy.copy(self)
        for name, value in changes.items():
            setattr(made, name, value)
        return made


async def joined(world, machine=None):
    """A machine that has the name."""
    machine = machine or Machine()
    await machine.join(world, (await token(world)).secret)
    await machine.register(world)
    return machine


def refused(caught):
    assert caught.value.reason == "NODE_NAME_TAKEN"
    return str(caught.value)


async def test_a_second_machine_with_a_token_of_its_own_does_not_get_a_live_nodes_name(world):
    first, second = await token(world), await token(world)
    await Machine().join(world, first.secret, addresses=["10.0.0.5"])
    other = Machine(SECOND)
    with pytest.raises(FailedPrecondition) as caught:
        await other.join(world, second.secret, addresses=["10.9.9.9"])
    said = refused(caught)
    assert FIRST[:12] in said and SECOND[:12] in said and first.name in said and "2026-01-01 00:00:00 UTC" in said
    assert "10.0.0.5" in said and "10.9.9.9" in said
    assert "--node-id" in said and "whaleflux replace" in said
    assert FIRST not in f"{said} {caught.value.metadata}"  # the whole id is the first machine's own
    for call in (other.register, other.renew):
        with pytest.raises(FailedPrecondition) as caught:
            await call(world)
        refused(caught)
    assert (await Machine(SECOND, "n2").join(world, second.secret)).node == "sites/a/nodes/n2"  # it cost no token


async def test_who_only_says_to_be_the_machine_does_not_get_its_name(world):
    """A1: the machine's id is no secret, its key is."""
    first = await joined(world)
    mine = await token(world)
    with pytest.raises(FailedPrecondition) as caught:
        await Machine(FIRST).join(world, mine.secret)
    assert "another key" in refused(caught)
    assert (await first.copy().join(world, mine.secret)).node == N1  # its own key is enough, and it cost no token


async def test_a_machine_that_does_not_say_which_it_is_has_its_name_by_its_key(world):
    first = await joined(world, Machine(""))
    with pytest.raises(FailedPrecondition):
        await Machine("").join(world, (await token(world)).secret)
    said_later = first.copy(id=FIRST)
    await said_later.register(world)
    with pytest.raises(FailedPrecondition):
        await first.copy(id=SECOND).register(world)
    await said_later.renew(world)


async def test_the_machine_itself_may_boot_renew_and_join_again(world):
    first = await joined(world)
    await first.register(world, boot="boot-2")
    admission = first.session
    for _ in range(5):
        await first.renew(world)
    await first.join(world, (await token(world)).secret)
    assert first.session == admission


async def test_a_lost_answer_is_asked_for_again_by_the_machine_that_got_the_name(world):
    mine, first = await token(world), Machine()
    await first.join(world, mine.secret)
    before = first.session
    assert (await first.join(world, mine.secret)).node == N1
    assert first.session == before


async def test_of_machines_that_join_at_once_with_tokens_of_their_own_one_gets_the_name(world):
    secrets = [(await token(world)).secret for _ in range(6)]
    machines = [Machine(str(i) * 32) for i in range(6)]
    joins = (machine.join(world, secret) for machine, secret in zip(machines, secrets, strict=True))
    results = await asyncio.gather(*joins, return_exceptions=True)
    assert sum(isinstance(result, pb.JoinResponse) for result in results) == 1
    assert {type(result) for result in results} == {pb.JoinResponse, FailedPrecondition}
    unused = [t for t in (await world.call("ListJoinTokens", pb.ListJoinTokensRequest())).join_tokens if not t.used_by]
    assert len(unused) == 5


async def test_where_certificates_come_from_elsewhere_the_first_registration_gets_the_name(world):
    await Machine(FIRST).register(world)
    for other in (SECOND, ""):
        with pytest.raises(FailedPrecondition):
            await Machine(other).register(world)
    await Machine(FIRST).register(world)


async def test_a_wrong_site_or_node_costs_no_token(world):
    mine = await token(world, node=N1)
    for machine, site, reason in ((Machine(), "b", "WRONG_SITE"), (Machine(FIRST, "n2"), "", "WRONG_NODE")):
        with pytest.raises(FailedPrecondition) as caught:
            await machine.join(world, mine.secret, site=site)
        assert caught.value.reason == reason
    assert "--node-id n1" in str(caught.value)
    assert not (await world.store.list(keys.NODE_IDENTITIES)).entries
    assert (await Machine().join(world, mine.secret, site="a")).node == N1
    shown = (await world.call("ListJoinTokens", pb.ListJoinTokensRequest())).join_tokens
    assert [(t.node, t.used_by) for t in shown] == [(N1, N1)]


@pytest.mark.parametrize("node", ["sites/b/nodes/n1", "n1", "sites/a/nodes/No"])
async def test_a_token_names_a_node_of_its_site_or_none(world, node):
    with pytest.raises(InvalidArgument) as caught:
        await token(world, node=node)
    assert "node" in caught.value.violations[0].field
    assert not (await world.store.list("")).entries


async def test_the_token_is_used_up_in_the_transaction_that_binds_the_name(world):
    await Machine().join(world, (await token(world)).secret)
    [identity] = (await world.store.list(keys.NODE_IDENTITIES)).entries
    [used] = (await world.store.list(keys.JOIN_TOKENS)).entries
    assert identity.revision == used.revision


async def test_a_live_node_is_not_replaced(world):
    first = await joined(world)
    for held in (3, 0):
        world.dependencies.held = held
        with pytest.raises(FailedPrecondition) as caught:
            await world.call("ReplaceNode", pb.ReplaceNodeRequest(name=N1))
        assert caught.value.reason == "NODE_NOT_DRAINED"
    await first.register(world)


@pytest.mark.parametrize("how", ["drained", "unreachable"])
async def test_a_replaced_machine_is_refused_and_the_next_one_gets_the_name(world, how):
    first = await joined(world)
    if how == "drained":
        await world.call("DrainNode", pb.DrainNodeRequest(name=N1))
    world.dependencies.dead = how == "unreachable"
    await world.call("ReplaceNode", pb.ReplaceNodeRequest(name=N1))
    [revoked] = (await world.store.list(keys.REVOKED)).entries
    [identity] = (await world.store.list(keys.NODE_IDENTITIES)).entries
    assert (revoked.key, revoked.revision) == (keys.REVOKED + first.session, identity.revision)
    again, second, third = await token(world), Machine(SECOND), Machine(THIRD)
    renamed = first.copy(id=THIRD)  # with its old key
    for call in (
        first.register,
        first.renew,
        lambda w: first.join(w, again.secret),
        lambda w: renamed.join(w, again.secret),
    ):
        with pytest.raises(FailedPrecondition) as caught:
            await call(world)
        assert "operator replaced it" in refused(caught)
    with pytest.raises(FailedPrecondition):
        await first.come_back(world)
    assert (await second.join(world, again.secret)).node == N1
    assert second.session != first.session
    await second.register(world)
    for other in (first, third, first.copy(id=SECOND)):  # also one that says to be the new machine
        with pytest.raises(FailedPrecondition):
            await other.register(world)


async def test_a_retired_node_is_revoked_in_the_transaction_that_retires_it(world):
    first = await joined(world)
    world.dependencies.dead = True
    await world.call("RetireNode", pb.RetireNodeRequest(name=N1, reason="too old"))
    [revoked] = (await world.store.list(keys.REVOKED)).entries
    [node] = (await world.store.list(keys.NODES)).entries
    assert (revoked.key, revoked.revision) == (f"{keys.REVOKED}agent/a/n1", node.revision)
    record = trust_pb2.Revocation.FromString(revoked.value)
    assert "retired (too old)" in record.reason and "--node-id" in record.reason
    lasts = record.expire_time.ToDatetime() - record.revoke_time.ToDatetime()
    assert lasts > pki.LEAF_LIFETIME + pki.CLOCK_SKEW  # until every certificate of it has ended
    for call in (first.register, first.renew, first.come_back):
        with pytest.raises(FailedPrecondition) as caught:
            await call(world)
        assert caught.value.reason == "NODE_RETIRED"


async def asleep(world, days):
    await world.clock.advance(days * 86_400)


@pytest.mark.parametrize("days", [0, 7, 30.9])
async def test_a_node_that_slept_comes_back_by_its_key_without_a_token(world, days):
    first = await joined(world)
    await asleep(world, days)
    admission = first.session
    assert (await first.come_back(world)).node == N1
    assert first.session == admission
    assert pki.expiry(first.certificate.encode()) > world.clock.now()
    await first.renew(world)


async def test_a_node_whose_renewal_got_lost_comes_back_with_the_key_it_has(world):
    first = await joined(world)
    lost = first.copy()
    await lost.renew(world)  # the answer never came: the node has its first key and certificate
    await asleep(world, 7)
    await first.come_back(world)
    with pytest.raises(Unauthenticated):
        stolen = Machine(FIRST)
        await stolen.come_back(world, certificate=first.certificate)


async def test_a_key_that_was_replaced_long_ago_brings_nobody_back(world):
    """A copy of the disk from before some renewals."""
    first = await joined(world)
    old = first.copy()
    for _ in range(3):
        await first.renew(world)
    with pytest.raises(Unauthenticated) as caught:
        await old.come_back(world)
    assert caught.value.reason == "CERTIFICATE_REFUSED" and "token create" in str(caught.value)


async def test_who_slept_too_long_needs_a_token_and_its_key_is_enough_then(world):
    first = await joined(world)
    await asleep(world, 32)
    with pytest.raises(Unauthenticated) as caught:
        await first.come_back(world)
    assert "ended 31 days ago" in str(caught.value)
    await first.join(world, (await token(world)).secret)


async def test_nobody_comes_back_by_what_is_no_certificate_of_the_node(world):
    first = await joined(world)
    before = (await world.store.list("")).revision
    other = pki.CertificateAuthority.create(world.clock.now())
    session = {"session": first.session}
    forged = other.sign(first.csr.encode(), "agent", "a/n1", world.clock.now(), **session).decode()
    service = world.ca.sign(first.csr.encode(), "scheduler", "1", world.clock.now()).decode()
    for certificate in ("", "x", "x" * 10**5, forged, service, world.ca.certificate_pem.decode()):
        with pytest.raises(Unauthenticated):
            await first.come_back(world, certificate=certificate)
    with pytest.raises(FailedPrecondition):
        await first.copy(id=SECOND).come_back(world)
    with pytest.raises(InvalidArgument):
        await first.copy(node_id="n2").come_back(world)
    assert (await world.store.list("")).revision == before


async def test_a_copy_of_a_machine_does_not_register_beside_it(world):
    """Cloned disks: one machine's id, one key, two boots; the one that is connected is the node."""
    first = await joined(world)
    world.dependencies.boot = "boot-1"
    with pytest.raises(FailedPrecondition) as caught:
        await first.copy().register(world, boot="boot-of-the-copy")
    assert caught.value.reason == "NODE_RUNS_TWICE"
    assert "boot-1" in str(caught.value) and "boot-of-the" in str(caught.value) and "--state-dir" in str(caught.value)
    world.dependencies.boot = ""  # it was this machine, which was rebooted: its old agent gives no sign any more
    await first.register(world, boot="boot-2")


@pytest.mark.parametrize("minutes", [-5, 5])
async def test_certificates_are_good_where_the_clock_is_five_minutes_wrong(world, minutes):
    """Any of them: the one that signs, the one that is shown the certificate, the one that asks."""
    first = await joined(world)
    certificate = x509.load_pem_x509_certificate(first.certificate.encode())
    there = world.clock.now() + timedelta(minutes=minutes)
    assert certificate.not_valid_before_utc <= there < certificate.not_valid_after_utc
    answer = await first.join(world, (await token(world)).secret)
    assert answer.time.ToDatetime(tzinfo=UTC) == world.clock.now()
