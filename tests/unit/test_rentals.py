"""Offers and leases as people ask for them: files, rpcs, what is refused and changes nothing."""

import asyncio
from datetime import timedelta

import pytest
from google.protobuf import timestamp_pb2

from tests.unit.test_inventory_service import FakeDependencies
from tests.unit.test_secrets_service import World as Secrets
from whaleflux import names
from whaleflux.clock import VirtualClock
from whaleflux.errors import AlreadyExists, FailedPrecondition, FieldViolation, InvalidArgument, NotFound
from whaleflux.events.publisher import EntryChange
from whaleflux.manifests.offer_file import offers_from_yaml
from whaleflux.reasons import ConditionType
from whaleflux.rpc import auth, pki
from whaleflux.store import Delete, Put, keys
from whaleflux.store.api import Fenced
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux.v1 import secrets_pb2, types_pb2
from whaleflux_inventory import lease_book, news
from whaleflux_inventory.lease_launch import FrontDoor, Launching
from whaleflux_inventory.lease_records import core_lease, core_offer
from whaleflux_inventory.providers.command import CommandKind
from whaleflux_inventory.providers.simulated import SimulatedKind
from whaleflux_inventory.providers.user_data import MAX_BYTES, user_data
from whaleflux_inventory.rented_nodes import InventoryNodes
from whaleflux_inventory.service import Renting, assemble, nodes_of

CA = pki.CertificateAuthority.create(VirtualClock().now(), "whaleflux")
FILE = """
offers:
- name: a
  provider: simulated
  machine: h200x8
  gpu: H200
  gpus: 8
  gpu_memory: 141 GB
  site: cloud
  market: spot
  price: 20 USD
  boot: 4 min
  billing_unit: 1 h
  max: 2
  options: {boot_s: 1-2}
"""


class World:
    def __init__(self, tmp_path, store=None, problem=None, why_not=""):
        self.store, self.clock = store or MemoryStore(), VirtualClock()
        kinds = {"simulated": SimulatedKind(tmp_path / "cloud", {}), "command": CommandKind(tmp_path)}
        more = [problem] if problem else []
        self.rpc = assemble(self.store, self.clock, CA, FakeDependencies(), *more, renting=Renting(kinds, why_not))

    async def call(self, method, request, role="operator", name="olga"):
        with auth.acting_as(auth.Identity(role, name)):
            return await getattr(self.rpc, method)(request, None)

    async def offer(self, offer_id="a", **more):
        offer = offers_from_yaml(FILE)[0].offer
        for field, value in more.items():
            getattr(offer, field).update(value) if isinstance(value, dict) else setattr(offer, field, value)
        return await self.call("CreateOffer", pb.CreateOfferRequest(offer_id=offer_id, offer=offer, request_id="r"))

    async def lease(self, *offers, **more):
        wanted = [f"offers/{one}" for one in offers or ("a",)]
        return await self.call("CreateLease", pb.CreateLeaseRequest(offers=wanted, **{"ttl_s": 3600, **more}))

    async def revision(self):
        return (await self.store.list("")).revision


@pytest.fixture
async def world(tmp_path):
    return World(tmp_path)


def test_a_file_says_all_of_an_offer():
    (one,) = offers_from_yaml(FILE)
    assert (one.offer_id, one.offer.site, one.offer.market) == ("a", "sites/cloud", types_pb2.PRICE_KIND_SPOT)
    assert (one.offer.usd_per_hour, one.offer.boot_s, one.offer.billing_unit_s) == (20.0, 240.0, 3600.0)
    assert one.offer.gpu_memory_bytes == 141 * 10**9 and dict(one.offer.options) == {"boot_s": "1-2"}


def test_every_mistake_of_a_file_is_named_with_its_line():
    wrong = FILE.replace("gpus: 8", "gpus: 0").replace("market: spot", "market: cheap").replace("price", "prize")
    with pytest.raises(InvalidArgument) as refused:
        offers_from_yaml(wrong + FILE.partition("\n")[2].partition("\n")[2])
    fields = [one.field.rpartition(".")[2] for one in refused.value.violations]
    assert {"gpus", "market", "price", "prize"} <= set(fields)
    assert "(line 7)" in str(refused.value) and "did you mean" in str(refused.value)
    with pytest.raises(InvalidArgument, match="there twice"):
        offers_from_yaml(FILE + "---\n" + FILE)


@pytest.mark.parametrize(
    ("line", "instead", "words"),
    [
        ("price: 20 USD", "price: 0 USD", "price: is 0 USD; give 0.0001 USD to 100000 USD"),
        ("boot: 4 min", "boot: 3 h", "boot: is 3 h; give 1 s to 2 h"),
        ("boot: 4 min", "boot: 0", "boot: is 0; give 1 s to 2 h"),
        ("billing_unit: 1 h", "billing_unit: 32 d", "billing_unit: is 32 d; give 1 s to 31 d"),
        ("max: 2", "max: 1001", "max: must be a whole number, 1 to 1000"),
        ("gpus: 8", "gpus: 65", "gpus: must be a whole number, 1 to 64"),
        ("gpu_memory: 141 GB", "gpu_memory: 5 TiB", "gpu_memory: is 5 TiB; give 1 MiB to 4 TiB"),
        ("gpu_memory: 141 GB", "gpu_memory: 141", "gpu_memory: is 141; give 1 MiB to 4 TiB"),
    ],
)
def test_limits_are_said_in_the_units_of_the_file(line, instead, words):
    with pytest.raises(InvalidArgument) as refused:
        offers_from_yaml(FILE.replace(line, instead))
    assert f"offers[0].{words}" in str(refused.value)


def test_what_inventory_refuses_is_named_as_in_the_file():
    refused = InvalidArgument(
        [
            FieldViolation("offer.machine_type", "is wrong"),
            FieldViolation("offer.options.faults", "is wrong"),
            FieldViolation("offer_id", "is wrong"),
        ]
    )
    second = offers_from_yaml(f"{FILE}{FILE.partition('offers:')[2].replace('name: a', 'name: b')}")[1]
    assert [one.field for one in second.as_in_file(refused).violations] == [
        "offers[1].machine",
        "offers[1].options.faults",
        "offers[1].name",
    ]
    (alone,) = offers_from_yaml("{name: a, provider: x, machine: m, gpu: H200, site: cloud, price: 1 USD}")
    assert alone.as_in_file(refused).violations[0].field == "machine"


def test_a_file_without_offers_declares_none_and_says_so():
    with pytest.raises(InvalidArgument, match="offers: is empty"):
        offers_from_yaml("offers: []")


async def test_a_name_that_is_taken_is_refused_when_it_is_only_checked(world):
    await world.offer()
    other = offers_from_yaml(FILE)[0].offer
    other.usd_per_hour = 4
    with pytest.raises(AlreadyExists, match="offers rm"):
        await world.call("CreateOffer", pb.CreateOfferRequest(offer_id="a", offer=other, validate_only=True))


async def test_an_offer_is_declared_once_listed_and_forgotten(world):
    made = await world.offer(refusals=7, owner="user/mallory")
    assert (made.owner, made.refusals, made.trust) == ("operator/olga", 0, 1.0)
    assert await world.offer(refusals=7, owner="user/mallory") == made  # the same request again
    with pytest.raises(AlreadyExists):
        await world.offer(usd_per_hour=4)
    assert [one.name for one in (await world.call("ListOffers", pb.ListOffersRequest())).offers] == ["offers/a"]
    await world.call("DeleteOffer", pb.DeleteOfferRequest(name="offers/a"))
    assert not (await world.call("ListOffers", pb.ListOffersRequest())).offers


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({"provider": "gcp"}, "offer.provider"),
        ({"machine_type": "h999x8"}, "offer.machine_type"),
        ({"machine_type": ""}, "offer.machine_type"),
        ({"gpus": 0}, "offer.gpus"),
        ({"usd_per_hour": float("nan")}, "offer.usd_per_hour"),
        ({"usd_per_hour": 0.0}, "offer.usd_per_hour"),
        ({"billing_unit_s": 1e9}, "offer.billing_unit_s"),
        ({"boot_s": -1.0}, "offer.boot_s"),
        ({"site": "cloud"}, "offer.site"),
        ({"market": types_pb2.PRICE_KIND_OWNED}, "offer.market"),
        ({"secret": "secrets/none"}, "offer.secret"),
        ({"max_machines": -1}, "offer.max_machines"),
        ({"options": {"faults": "fire"}}, "offer.options.faults"),
        ({"options": {"Boot": "1"}}, "offer.options"),
        ({"provider": "command", "options": {"command": "../../bin/sh"}}, "offer.options.command"),
        ({"provider": "command", "options": {"api_key": "abc"}}, "offer.options.api_key"),
        ({"provider": "command", "options": {"token": "abc"}}, "offer.options.token"),
        ({"options": {"whose": "AKIAIOSFODNN7EXAMPLE"}}, "offer.options.whose"),
        ({"options": {"whose": "-----BEGIN PRIVATE KEY-----"}}, "offer.options.whose"),
        ({"gpus": 10**9}, "offer.gpus"),
        ({"usd_per_hour": float("nan")}, "offer.usd_per_hour"),
        ({"usd_per_hour": -1.0}, "offer.usd_per_hour"),
        ({"boot_s": float("nan")}, "offer.boot_s"),
        ({"billing_unit_s": float("inf")}, "offer.billing_unit_s"),
        ({"max_machines": 10**6}, "offer.max_machines"),
        ({"provider": "azure"}, "offer.provider"),
    ],
)
async def test_bad_offers_name_the_field_and_change_nothing(world, how, field):
    before = await world.revision()
    with pytest.raises(InvalidArgument) as refused:
        await world.offer(**how)
    assert field in [one.field for one in refused.value.violations]
    assert await world.revision() == before


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"gpu_type": "B200"}, "offer.gpu_type: is B200, but h200x8 has 8 x H200; say H200"),
        ({"gpus": 4}, "offer.gpus: is 4, but h200x8 has 8 x H200; say 8"),
        (
            {"machine_type": "h200x4+a100x4pcie", "gpus": 8},
            "offer.gpus: is 8, but h200x4+a100x4pcie has 4 x H200, 4 x A100-80GB; say 4",
        ),
    ],
)
async def test_machines_that_are_played_have_the_gpus_of_their_profile(world, how, words):
    before = await world.revision()
    with pytest.raises(InvalidArgument) as refused:
        await world.offer(**how)
    assert words in str(refused.value)
    assert await world.revision() == before


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({"ttl_s": 59}, "ttl_s"),
        ({"ttl_s": 10**9}, "ttl_s"),
        ({"cost_cap_usd": -1.0}, "cost_cap_usd"),
        ({"cost_cap_usd": 0.0}, "cost_cap_usd"),
        ({"cost_cap_usd": float("inf")}, "cost_cap_usd"),
        ({"queue": "default"}, "queue"),
        ({"reason": "x" * 501}, "reason"),
    ],
)
async def test_bad_leases_name_the_field_and_change_nothing(world, how, field):
    await world.offer()
    before = await world.revision()
    with pytest.raises(InvalidArgument) as refused:
        await world.lease(**how)
    assert field in [one.field for one in refused.value.violations]
    assert await world.revision() == before


async def test_a_lease_is_an_intent_with_an_end_and_a_cap(world):
    await world.offer()
    made = await world.lease(queue="queues/research", reason="a rush", request_id="once")
    assert await world.lease(queue="queues/research", reason="a rush", request_id="once") == made
    assert (made.state, made.cost_cap_usd, made.owner) == (pb.LEASE_STATE_INTENT, 20.0, "operator/olga")
    assert made.node.startswith("sites/cloud/nodes/") and made.hard_end_time.seconds - made.create_time.seconds == 3600
    with pytest.raises(NotFound):
        await world.lease("b")
    with pytest.raises(FailedPrecondition, match="leases end"):
        await world.call("DeleteOffer", pb.DeleteOfferRequest(name="offers/a"))
    ended = await world.call("EndLease", pb.EndLeaseRequest(name=made.name, reason="enough"))
    again = await world.call("EndLease", pb.EndLeaseRequest(name=made.name, reason="more"))
    assert ended.end_reason == again.end_reason == "enough" and again.etag == ended.etag


async def test_no_more_machines_than_the_offer_has_and_none_right_after_a_refusal(world):
    await world.offer()
    await world.lease(request_id="1")
    await world.lease(request_id="2")
    with pytest.raises(FailedPrecondition, match="2 of 2 rented"):
        await world.lease(request_id="3")
    entry = await world.store.get(keys.OFFERS + "a")
    await world.offer("b")
    refused = pb.Offer.FromString(entry.value)
    refused.name, refused.refusals = "offers/b", 1
    refused.refused_time.FromDatetime(world.clock.now())
    await world.store.commit(Put(keys.OFFERS + "b", refused.SerializeToString()))
    with pytest.raises(FailedPrecondition, match="refused 0 s ago"):
        await world.lease("b")


class Slow(MemoryStore):
    """Others get their turn before what was listed is looked at."""

    async def list(self, *how, **more):
        found = await super().list(*how, **more)
        await asyncio.sleep(0)
        return found


async def test_the_same_request_twice_at_once_is_one_lease_and_the_last_machine_is_rented_once(tmp_path):
    world = World(tmp_path, Slow())
    await world.offer(max_machines=1)
    both = await asyncio.gather(*(world.lease(request_id="once") for _ in range(2)))
    assert both[0].name == both[1].name
    await world.offer("b", max_machines=1)
    ends = await asyncio.gather(*(world.lease("b", request_id=str(n)) for n in range(2)), return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["FailedPrecondition", "Lease"]


async def test_who_cannot_rent_says_why(tmp_path):
    world = World(tmp_path, why_not="no address is known")
    await world.offer()
    with pytest.raises(FailedPrecondition, match="no address"):
        await world.lease()


async def test_keys_are_opened_only_while_the_offers_owner_may_use_them(tmp_path):
    secrets = Secrets(tmp_path)
    await secrets.add("cloud", b'{"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}')
    world = World(tmp_path, secrets.store, secrets.rpc.problem)
    with pytest.raises(InvalidArgument, match=r"offer\.secret"):
        await world.offer(secret="secrets/cloud")  # olga's it is not
    opened = await secrets.rpc.credentials("secrets/cloud", "user/ann")
    assert opened["AWS_ACCESS_KEY_ID"] == "x"
    with pytest.raises(FailedPrecondition):
        await secrets.rpc.credentials("secrets/cloud", "operator/olga")
    secrets.known.disabled.add("ann")
    with pytest.raises(FailedPrecondition, match="disabled"):
        await secrets.rpc.credentials("secrets/cloud", "user/ann")
    assert await secrets.rpc.credentials("secrets/cloud", "") == opened  # what was rented can be ended


async def test_keys_stay_as_long_as_something_is_rented_by_them(tmp_path):
    secrets = Secrets(tmp_path)
    await secrets.add("cloud", b'{"KEY": "x"}', "olga", role="operator")
    world = World(tmp_path, secrets.store, secrets.rpc.problem)
    await world.offer(secret="secrets/cloud")
    lease = await world.lease()
    rm = secrets_pb2.DeleteSecretRequest(name="secrets/cloud")
    with pytest.raises(FailedPrecondition, match=f"whaleflux leases end {names.last(lease.name)}"):
        await secrets.call("DeleteSecret", rm, "olga", "operator")
    await put_away(world, lease.name)
    await secrets.call("DeleteSecret", rm, "olga", "operator")


async def test_a_repeated_request_is_the_same_to_the_letter_and_nothing_secret_is_stored(world):
    await world.offer()
    record = await world.lease()
    lease, offer = core_lease(record), core_offer(record.offer)
    launching = Launching(FrontDoor("fleet.example:7443"), CA, 1800.0)
    first, second = (user_data(launching.request(lease, offer, "fleet-1")) for _ in range(2))
    assert first == second and len(first) < MAX_BYTES and "shutdown -h now" in first
    secret = launching.request(lease, offer, "f").environment["WHALEFLUX_JOIN_TOKEN"].partition(".")[2]
    assert len(secret) == 43 and secret.encode() not in launching.admission(lease, offer).value
    stored = pb.JoinTokenRecord.FromString(launching.admission(lease, offer).value)
    assert stored.token.node == record.node


async def test_a_machine_dials_a_front_door_that_has_an_ipv6_address(world):
    await world.offer()
    record = await world.lease()
    launching = Launching(FrontDoor("[2001:db8::1]:7443"), CA, 1800.0)
    script = user_data(launching.request(core_lease(record), core_offer(record.offer), "fleet-1"))
    assert "/dev/tcp/2001:db8::1/7443" in script  # else it hears nobody, and ends itself


async def test_what_became_of_a_lease_is_told(world):
    await world.offer()
    record = await world.lease(reason="a rush")
    old = await world.store.get(keys.of_name(keys.LEASES, record.name))
    record = pb.Lease.FromString(old.value)
    record.state, record.end_reason, record.spent_usd = pb.LEASE_STATE_GONE, "its time is over", 3.5
    new = type(old)(old.key, record.SerializeToString(), old.revision + 1, old.created)
    assert news.of_lease(EntryChange(old.key, old, None, new.revision), world.clock.now()) is None
    told = news.of_lease(EntryChange(away := keys.LEASES_OVER + "l", None, new, new.revision), world.clock.now())
    assert b"is over: its time is over; 3.50 USD" in told.data and b"a rush" not in told.data
    assert news.of_lease(EntryChange(away, new, None, new.revision), world.clock.now()) is not None


async def put_away(world, name):
    entry = await world.store.get(keys.of_name(keys.LEASES, name))
    record = pb.Lease.FromString(entry.value)
    record.state = pb.LEASE_STATE_GONE
    await world.store.commit(*lease_book.put_away(entry, record.SerializeToString()))


async def test_a_lease_that_is_over_is_read_listed_and_not_rented_again_by_its_request(world):
    await world.offer()
    first = await world.lease(request_id="once")
    await put_away(world, first.name)
    again = await world.lease(request_id="once")
    assert (again.name, again.state) == (first.name, pb.LEASE_STATE_GONE)
    live = await world.lease()
    assert (await world.call("GetLease", pb.GetLeaseRequest(name=first.name))).state == pb.LEASE_STATE_GONE
    ended = await world.call("EndLease", pb.EndLeaseRequest(name=first.name, reason="again"))
    assert ended.state == pb.LEASE_STATE_GONE and not ended.end_reason
    assert await listed(world) == [live.name]
    assert await listed(world, show_gone=True) == [live.name, first.name]
    page = await world.call("ListLeases", pb.ListLeasesRequest(show_gone=True))
    assert [one.name for one in page.leases] == [live.name, first.name] and not page.next_page_token
    since = timestamp_pb2.Timestamp()
    since.FromDatetime(world.clock.now() + timedelta(seconds=1))
    assert await listed(world, show_gone=True, gone_since=since) == [live.name]
    since.FromDatetime(world.clock.now())
    assert await listed(world, show_gone=True, gone_since=since) == [live.name, first.name]


async def listed(world, **how):
    found, token = [], ""
    while True:
        page = await world.call("ListLeases", pb.ListLeasesRequest(page_size=1, page_token=token, **how))
        found += [one.name for one in page.leases]
        token = page.next_page_token
        if not token:
            return found


async def test_leases_that_cannot_be_read_are_not_none(world):
    offer = await world.offer()
    await world.store.commit(Put(f"{keys.LEASES}newer", b"\xff\xff\xff"))
    for asked in (world.lease(), world.call("DeleteOffer", pb.DeleteOfferRequest(name=offer.name))):
        with pytest.raises(FailedPrecondition, match="newer cannot be read, so nobody knows what is rented"):
            await asked
    assert [one.name for one in (await world.call("ListOffers", pb.ListOffersRequest())).offers] == [offer.name]


async def test_a_node_is_drained_and_retired_by_whoever_leads(world):
    """A leader that was replaced without knowing it does nothing to nodes any more."""
    async with elect(world.store, "leases", "old") as leader:
        nodes = nodes_of(world.store, VirtualClock(), FakeDependencies(), own_certificates=True)
        rented = InventoryNodes(world.store, nodes, FakeDependencies(), leader.held)
        node = pb.Node(name="sites/s/nodes/n", intent=pb.NODE_INTENT_ACTIVE)
        await world.store.commit(Put(keys.of_name(keys.NODES, node.name), node.SerializeToString()))
        await world.store.commit(Delete(leader.key))
        for done in (rented.drain(node.name, "ends"), rented.retire(node.name, "gone")):
            with pytest.raises(Fenced):
                await done
        assert (await nodes.get(node.name)).intent == pb.NODE_INTENT_ACTIVE


async def test_what_an_agent_has_heard_of_its_machine_is_read_of_its_node(world):
    async with elect(world.store, "leases", "a") as leader:
        nodes = nodes_of(world.store, VirtualClock(), FakeDependencies(), own_certificates=True)
        rented = InventoryNodes(world.store, nodes, FakeDependencies(), leader.held)
        node = pb.Node(name="sites/s/nodes/n", intent=pb.NODE_INTENT_ACTIVE)
        assert await rented.announced(node.name) is None
        await world.store.commit(Put(keys.of_name(keys.NODES, node.name), node.SerializeToString()))
        assert await rented.announced(node.name) is None
        node.facts.taken_time.FromSeconds(5000)
        node.facts.conditions.add(type=ConditionType.MACHINE_STAYS, reason="SPOT_TAKEN", message="it goes")
        await world.store.commit(Put(keys.of_name(keys.NODES, node.name), node.SerializeToString()))
        assert await rented.announced(node.name) == (5000.0, "it goes")
        await world.store.commit(Put(keys.of_name(keys.NODES, node.name), b"\xff\xff\xff"))
        assert await rented.announced(node.name) is None  # nobody knows
        await rented.drain(node.name, "its lease ends all the same")
