"""Inventory's rpcs over the memory store, called as the boundary would call them."""

import asyncio
import contextlib
from datetime import timedelta

import pytest
from google.protobuf.duration_pb2 import Duration

from whaleflux.clock import VirtualClock
from whaleflux.convert import facts_to_proto, node_from_proto
from whaleflux.data import manifest
from whaleflux.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from whaleflux.events.publisher import EntryChange as Published
from whaleflux.fleet import Gpu, Link, LinkKind, Node, Price, PriceKind
from whaleflux.rpc import auth, pki
from whaleflux.store import Put, keys
from whaleflux.store.memory import MemoryStore
from whaleflux.trust import ownership
from whaleflux.trust.view import UNKNOWN
from whaleflux.v1 import events_pb2, scheduler_pb2
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import news
from whaleflux_inventory.service import assemble

N1 = "sites/a/nodes/n1"
N2 = "sites/a/nodes/n2"
DOMAIN_NODE = Node(
    N1, "a", (Gpu(0, "GPU-0", "H200", 141 << 30), Gpu(1, "GPU-1", "H200", 141 << 30)),
    (Link(0, 1, LinkKind.NVLINK, 4.5e11),), zone="z1", memory_bytes=1 << 40, labels=(("rack", "r1"),),
    price=Price(PriceKind.SPOT, 2.5), simulated=True,
)  # fmt: skip


class FakeDependencies:
    """Health and scheduler, as far as inventory asks them."""

    dead, held, boot = False, 0, ""

    async def unreachable(self, node):
        return self.dead

    async def gpus_held(self, node):
        return self.held

    async def connected_boot(self, node):
        return self.boot


class World:
    def __init__(self):
        self.store, self.clock, self.dependencies = MemoryStore(), VirtualClock(), FakeDependencies()
        self.ca = pki.CertificateAuthority.create(self.clock.now(), "whaleflux")
        self.rpc = assemble(self.store, self.clock, self.ca, self.dependencies)

    async def call(self, method, request, role="operator", name="olga", session=""):
        with auth.acting_as(auth.Identity(role, name, session=session)):
            return await getattr(self.rpc, method)(request, None)

    async def register(self, name=N1, boot="boot-1", agent="a/n1", **facts):
        request = pb.RegisterNodeRequest(name=name, facts=facts_to_proto(DOMAIN_NODE), boot_id=boot)
        for field, value in facts.items():
            setattr(request.facts, field, value)
        return await self.call("RegisterNode", request, "agent", agent)


@pytest.fixture
async def world():
    return World()


async def test_registration_creates_site_and_node_and_writes_only_changes(world):
    node = await world.register()
    assert node_from_proto(node) == DOMAIN_NODE
    assert (await world.call("ListSites", pb.ListSitesRequest())).sites[0].name == "sites/a"
    again = await world.register()
    assert again.etag == node.etag
    rebooted = await world.register(boot="boot-2")
    assert rebooted.etag != node.etag and rebooted.create_time == node.create_time


async def test_an_agent_registers_only_its_own_node(world):
    with pytest.raises(PermissionDenied) as refused:
        await world.register(agent="a/n2")
    assert refused.value.reason == "NOT_OWN_NODE"
    assert await world.store.get(keys.of_name(keys.NODES, N1)) is None


async def test_bad_facts_change_nothing(world):
    before = (await world.store.list("")).revision
    with pytest.raises(InvalidArgument):
        await world.register(memory_bytes=-1)
    with pytest.raises(InvalidArgument):
        await world.call("RegisterNode", pb.RegisterNodeRequest(name="nodes/x", boot_id="b"), "admin", "root")
    assert (await world.store.list("")).revision == before


async def test_the_operator_overrides_survive_registrations_until_undone(world):
    await world.register()
    request = pb.UpdateNodeRequest(
        node=pb.Node(name=N1, labels={"team": "nlp"}), update_mask={"paths": ["labels", "price", "facts.zone"]}
    )
    request.node.price.usd_per_gpu_hour = 9.0
    request.node.facts.zone = "z9"
    await world.call("UpdateNode", request)
    seen = node_from_proto(await world.register(boot="boot-2"))
    assert (seen.zone, seen.price.usd_per_gpu_hour) == ("z9", 9.0)
    assert dict(seen.labels) == {"rack": "r1", "team": "nlp"}
    undo = pb.UpdateNodeRequest(node=pb.Node(name=N1), update_mask={"paths": ["price", "facts.zone"]})
    await world.call("UpdateNode", undo)
    seen = node_from_proto(await world.register(boot="boot-3"))
    assert (seen.zone, seen.price) == ("z1", DOMAIN_NODE.price)


async def test_updates_check_mask_values_and_etag(world):
    node = await world.register()
    bad = [
        pb.UpdateNodeRequest(node=pb.Node(name=N1)),
        pb.UpdateNodeRequest(node=pb.Node(name=N1), update_mask={"paths": ["intent"]}),
        pb.UpdateNodeRequest(node=pb.Node(name=N1, labels={"a b": ""}), update_mask={"paths": ["labels"]}),
        pb.UpdateNodeRequest(node=pb.Node(name=N1, facts={"zone": "Z Z"}), update_mask={"paths": ["facts.zone"]}),
        pb.UpdateNodeRequest(
            node=pb.Node(name=N1, price={"usd_per_gpu_hour": float("nan")}), update_mask={"paths": ["price"]}
        ),
    ]
    for request in bad:
        with pytest.raises(InvalidArgument):
            await world.call("UpdateNode", request)
    stale = pb.UpdateNodeRequest(
        node=pb.Node(name=N1, labels={"a": "b"}, etag='"1"'), update_mask={"paths": ["labels"]}
    )
    with pytest.raises(Aborted):
        await world.call("UpdateNode", stale)
    assert (await world.call("GetNode", pb.GetNodeRequest(name=N1))).etag == node.etag
    stale.node.etag = node.etag
    assert (await world.call("UpdateNode", stale)).labels["a"] == "b"


async def test_cordon_drain_uncordon_and_retire(world):
    await world.register()
    node = await world.call("CordonNode", pb.CordonNodeRequest(name=N1, reason="fan"))
    assert (node.intent, node.intent_reason) == (pb.NODE_INTENT_CORDONED, "fan")
    node = await world.call("DrainNode", pb.DrainNodeRequest(name=N1, reason="fan", etag=node.etag))
    node = await world.call("UncordonNode", pb.UncordonNodeRequest(name=N1))
    assert (node.intent, node.intent_reason) == (pb.NODE_INTENT_ACTIVE, "")
    with pytest.raises(FailedPrecondition):
        await world.call("RetireNode", pb.RetireNodeRequest(name=N1))
    await world.call("DrainNode", pb.DrainNodeRequest(name=N1))
    world.dependencies.held = 3
    with pytest.raises(FailedPrecondition) as refused:
        await world.call("RetireNode", pb.RetireNodeRequest(name=N1))
    assert refused.value.reason == "NODE_NOT_DRAINED"
    world.dependencies.held = 0
    await world.call("RetireNode", pb.RetireNodeRequest(name=N1))
    with pytest.raises(FailedPrecondition):
        await world.register(boot="boot-9")
    assert not (await world.call("ListNodes", pb.ListNodesRequest())).nodes
    assert (await world.call("ListNodes", pb.ListNodesRequest(show_retired=True))).nodes


async def test_an_unreachable_node_retires_though_it_held_gpus(world):
    await world.register()
    world.dependencies.dead, world.dependencies.held = True, 8
    node = await world.call("RetireNode", pb.RetireNodeRequest(name=N1))
    assert node.intent == pb.NODE_INTENT_RETIRED


async def test_listing_by_site_and_missing_nodes(world):
    for site in ("a", "b"):
        for n in range(3):
            await world.register(name=f"sites/{site}/nodes/n{n}", agent=f"{site}/n{n}")
    page = await world.call("ListNodes", pb.ListNodesRequest(parent="sites/b", page_size=2))
    rest = await world.call(
        "ListNodes", pb.ListNodesRequest(parent="sites/b", page_size=2, page_token=page.next_page_token)
    )
    assert [n.name for n in (*page.nodes, *rest.nodes)] == [f"sites/b/nodes/n{n}" for n in range(3)]
    assert len((await world.call("ListNodes", pb.ListNodesRequest(parent="sites/-"))).nodes) == 6
    with pytest.raises(NotFound):
        await world.call("GetNode", pb.GetNodeRequest(name="sites/a/nodes/none"))


async def test_watching_nodes(world):
    await world.register()
    async with contextlib.aclosing(world.rpc.WatchNodes(pb.WatchNodesRequest(), None)) as watch:
        first, mark = await anext(watch), await anext(watch)
        assert first.added.name == N1 and mark.WhichOneof("event") == "bookmark"
        await world.call("CordonNode", pb.CordonNodeRequest(name=N1))
        async with asyncio.timeout(5):
            change = await anext(watch)
        assert change.modified.intent == pb.NODE_INTENT_CORDONED
        assert change.modified.etag == f'"{change.resource_version}"'


async def join(world, token, node_id="n1", csr=None):
    csr = csr or pki.new_key_and_request()[1].decode()
    request = pb.JoinRequest(token=token, node_id=node_id, certificate_request_pem=csr, addresses=["10.0.0.1"])
    return csr, await world.call("Join", request, "anonymous", "-")


async def test_joining_once_with_a_token_gives_the_identity_of_an_agent(world):
    token = await world.call("CreateJoinToken", pb.CreateJoinTokenRequest(site="sites/a"))
    csr, joined = await join(world, token.secret)
    assert joined.node == N1
    identity = pki.identity_of(joined.certificate_pem.encode())
    assert (identity.subject, identity.node) == ("agent/a/n1", N1) and identity.session
    assert joined.authority_pem.encode() == world.ca.certificate_pem
    assert (await join(world, token.secret, csr=csr))[1].node == N1  # the first answer was lost
    for again in ({"csr": None}, {"csr": csr, "node_id": "n2"}):
        with pytest.raises(Unauthenticated) as refused:
            await join(world, token.secret, **again)
        assert refused.value.reason == "TOKEN_REFUSED"
    [listed] = (await world.call("ListJoinTokens", pb.ListJoinTokensRequest())).join_tokens
    assert (listed.used_by, listed.secret) == (N1, "")


async def test_the_secret_is_nowhere_in_the_store(world):
    token = await world.call("CreateJoinToken", pb.CreateJoinTokenRequest(site="sites/a"))
    secret = token.secret.partition(".")[2].encode()
    assert all(secret not in entry.value for entry in (await world.store.list("")).entries)


async def test_racing_joins_with_one_token_admit_one_node(world):
    token = await world.call("CreateJoinToken", pb.CreateJoinTokenRequest(site="sites/a"))
    results = await asyncio.gather(*(join(world, token.secret, f"n{i}") for i in range(8)), return_exceptions=True)
    assert sum(isinstance(r, tuple) for r in results) == 1
    assert sum(isinstance(r, Unauthenticated) for r in results) == 7


async def test_expired_revoked_and_malformed_tokens_are_refused_and_bad_requests_use_up_nothing(world):
    token = await world.call("CreateJoinToken", pb.CreateJoinTokenRequest(site="sites/a", ttl_s=60))
    for bad in ("no csr", "x" * 10_000):
        with pytest.raises(InvalidArgument):
            await join(world, token.secret, csr=bad)
    with pytest.raises(InvalidArgument):
        await join(world, token.secret, node_id="Not An Id")
    await world.clock.advance(60 + 300)  # clocks of replicas may differ by five minutes
    for text in (token.secret, "", "x.y", "x" * 10**6):
        with pytest.raises(Unauthenticated):
            await join(world, text)
    fresh = await world.call("CreateJoinToken", pb.CreateJoinTokenRequest(site="sites/a"))
    await world.call("DeleteJoinToken", pb.DeleteJoinTokenRequest(name=fresh.name))
    with pytest.raises(Unauthenticated):
        await join(world, fresh.secret)


async def test_tokens_that_ended_a_day_ago_are_forgotten(world):
    await world.call("CreateJoinToken", pb.CreateJoinTokenRequest(site="sites/a", ttl_s=60))
    await world.clock.advance(90_000)
    fresh = await world.call("CreateJoinToken", pb.CreateJoinTokenRequest(site="sites/a"))
    listed = (await world.call("ListJoinTokens", pb.ListJoinTokensRequest())).join_tokens
    assert [t.name for t in listed] == [fresh.name]


async def test_renewal_keeps_the_identity_and_ends_with_the_node(world):
    await world.register()
    request = pb.RenewCertificateRequest(certificate_request_pem=pki.new_key_and_request()[1].decode())
    renewed = await world.call("RenewCertificate", request, "agent", "a/n1")
    assert pki.identity_of(renewed.certificate_pem.encode()).node == N1
    world.dependencies.dead = True
    await world.call("RetireNode", pb.RetireNodeRequest(name=N1))
    with pytest.raises(FailedPrecondition):
        await world.call("RenewCertificate", request, "agent", "a/n1")


async def test_without_an_authority_nobody_joins_and_no_token_is_used_up(world):
    token = await world.call("CreateJoinToken", pb.CreateJoinTokenRequest(site="sites/a"))
    world.rpc = assemble(world.store, world.clock, None, world.dependencies)
    with pytest.raises(FailedPrecondition) as refused:
        await join(world, token.secret)
    assert refused.value.reason == "NO_AUTHORITY"
    world.rpc = assemble(world.store, world.clock, world.ca, world.dependencies)
    await join(world, token.secret)


async def test_creating_is_idempotent_by_request_id_only(world):
    for method, request in (
        ("CreateSite", pb.CreateSiteRequest(site_id="s", site={"display_name": "S"}, request_id="r1")),
        ("CreateDataset", pb.CreateDatasetRequest(dataset_id="d", dataset={"uri": "/d"}, request_id="r1")),
    ):
        first = await world.call(method, request)
        assert await world.call(method, request) == first
        for other in ("", "r2"):
            request.request_id = other
            with pytest.raises(AlreadyExists):
                await world.call(method, request)


async def test_the_control_planes_own_name_is_no_site(world):
    with pytest.raises(InvalidArgument):
        await world.call("CreateSite", pb.CreateSiteRequest(site_id="hub"))
    with pytest.raises(InvalidArgument):
        await world.call("CreateJoinToken", pb.CreateJoinTokenRequest(site="sites/hub"))


async def test_datasets_and_their_copies(world):
    await world.call(
        "CreateDataset", pb.CreateDatasetRequest(dataset_id="c4", dataset={"uri": "https://data/c4", "size_bytes": 10})
    )
    report = pb.ReportCachedDatasetRequest(
        dataset="datasets/c4", copy={"node": N1, "present_bytes": 10, "pinned": True}
    )
    dataset = await world.call("ReportCachedDataset", report, "agent", "a/n1")
    assert dataset.copies[0].pinned
    with pytest.raises(PermissionDenied):
        await world.call("ReportCachedDataset", report, "agent", "a/n2")
    for wrong in ("unix:/run/secret.sock", "no port", "x" * 300 + ":1"):
        report.copy.address = wrong
        with pytest.raises(InvalidArgument, match=r"copy\.address"):
            await world.call("ReportCachedDataset", report, "agent", "a/n1")
    report.copy.address = "10.0.0.1:7000"
    report.copy.present_bytes = 0
    assert not (await world.call("ReportCachedDataset", report, "agent", "a/n1")).copies
    with pytest.raises(Aborted):
        await world.call("DeleteDataset", pb.DeleteDatasetRequest(name="datasets/c4", etag=dataset.etag))
    await world.call("DeleteDataset", pb.DeleteDatasetRequest(name="datasets/c4"))
    with pytest.raises(NotFound):
        await world.call("GetDataset", pb.GetDatasetRequest(name="datasets/c4"))
    for bad in ({"uri": ""}, {"uri": "/x", "size_bytes": -1}, {"uri": "x" * 3000}):
        with pytest.raises(InvalidArgument):
            await world.call("CreateDataset", pb.CreateDatasetRequest(dataset_id="d", dataset=bad))


def found(*sizes):
    made = manifest.draft((f"part-{i}", size) for i, size in enumerate(sizes))
    return made.known([bytes([i]) * 32 for i in range(made.chunk_count)])


async def test_what_the_first_node_found_a_dataset_to_be_counts(world):
    await world.call("CreateDataset", pb.CreateDatasetRequest(dataset_id="c4", dataset={"uri": "s3://data/c4"}))
    asked = pb.GetDatasetManifestRequest(name="datasets/c4")
    assert not (await world.call("GetDatasetManifest", asked)).files
    first, second = found(10, 20), found(11)
    say = pb.SetDatasetManifestRequest(dataset="datasets/c4", node=N1, manifest=first.to_proto())
    known = await world.call("SetDatasetManifest", say, "agent", "a/n1")
    assert (known.manifest_digest, known.size_bytes, known.file_count) == (first.digest, 30, 2)
    assert known.manifest_author == "agent/a/n1"
    say = pb.SetDatasetManifestRequest(dataset="datasets/c4", node=N2, manifest=second.to_proto())
    assert (await world.call("SetDatasetManifest", say, "agent", "a/n2")).manifest_digest == first.digest
    assert manifest.from_proto(await world.call("GetDatasetManifest", asked)) == first
    await world.call("DeleteDataset", pb.DeleteDatasetRequest(name="datasets/c4"))
    assert not (await world.store.list(keys.DATASET_MANIFESTS)).entries
    with pytest.raises(NotFound):
        await world.call("GetDatasetManifest", asked)


async def test_who_has_read_all_of_a_dataset_may_declare_it_with_its_manifest(world):
    first = found(10, 20)
    request = pb.CreateDatasetRequest(
        dataset_id="c4", dataset={"uri": "s3://data/c4"}, request_id="r1", manifest=first.to_proto()
    )
    made = await world.call("CreateDataset", request)
    assert (made.manifest_digest, made.size_bytes, made.file_count) == (first.digest, 30, 2)
    assert made.manifest_author == made.owner
    assert await world.call("CreateDataset", request) == made
    known = await world.call("GetDatasetManifest", pb.GetDatasetManifestRequest(name="datasets/c4"))
    assert manifest.from_proto(known) == first
    say = pb.SetDatasetManifestRequest(dataset="datasets/c4", node=N1, manifest=found(11).to_proto())
    assert (await world.call("SetDatasetManifest", say, "agent", "a/n1")).manifest_digest == first.digest
    request.manifest.CopyFrom(found(12).to_proto())
    with pytest.raises(AlreadyExists):
        await world.call("CreateDataset", request)


async def test_what_was_read_of_an_earlier_dataset_of_the_name_is_not_recorded_for_a_later_one(world):
    declare = pb.CreateDatasetRequest(dataset_id="c4", dataset={"uri": "s3://data/c4"})
    earlier = await world.call("CreateDataset", declare)
    await world.call("DeleteDataset", pb.DeleteDatasetRequest(name="datasets/c4"))
    await world.clock.advance(1)
    later = await world.call("CreateDataset", declare)
    say = pb.SetDatasetManifestRequest(dataset="datasets/c4", node=N1, manifest=found(10).to_proto())
    say.dataset_create_time.CopyFrom(earlier.create_time)
    with pytest.raises(FailedPrecondition, match="declared anew while it was read"):
        await world.call("SetDatasetManifest", say, "agent", "a/n1")
    say.dataset_create_time.CopyFrom(later.create_time)
    assert (await world.call("SetDatasetManifest", say, "agent", "a/n1")).manifest_digest == found(10).digest


async def test_a_dataset_declared_with_a_manifest_that_cannot_be_is_not_declared(world):
    before = (await world.store.list("/")).revision
    wrong = found(10).to_proto()
    wrong.files[0].chunk_sha256 = b"short"
    request = pb.CreateDatasetRequest(dataset_id="c4", dataset={"uri": "s3://data/c4"}, manifest=wrong)
    with pytest.raises(InvalidArgument, match="manifest: 'part-0' has not one SHA-256 for each chunk"):
        await world.call("CreateDataset", request)
    assert (await world.store.list("/")).revision == before


async def test_a_manifest_that_cannot_be_changes_nothing(world):
    await world.call("CreateDataset", pb.CreateDatasetRequest(dataset_id="c4", dataset={"uri": "s3://data/c4"}))
    before = (await world.store.list("/")).revision
    wrong = found(10).to_proto()
    wrong.files[0].path = "../../etc/passwd"
    for bad, said in (
        (wrong, r"manifest: '\.\./\.\./etc/passwd' leads out"),
        (pb.DatasetManifest(), "manifest: has chunks of 0"),
    ):
        request = pb.SetDatasetManifestRequest(dataset="datasets/c4", node=N1, manifest=bad)
        with pytest.raises(InvalidArgument, match=said):
            await world.call("SetDatasetManifest", request, "agent", "a/n1")
    with pytest.raises(PermissionDenied):
        await world.call("SetDatasetManifest", request, "agent", "a/n2")
    assert (await world.store.list("/")).revision == before


async def pinnable(world, size=10, **nodes):
    for name, cache_bytes in nodes.items():
        await world.register(f"sites/a/nodes/{name}", agent=f"a/{name}", dataset_cache_bytes=cache_bytes)
    for name in ("c4", "other"):
        dataset = {"uri": "/d", "size_bytes": size}
        await world.call("CreateDataset", pb.CreateDatasetRequest(dataset_id=name, dataset=dataset))


async def passing(clock, doing):
    """Time passes until it is done."""
    while not doing.done():
        await clock.advance(1)


def pin(dataset="c4", **how):
    return pb.PinDatasetRequest(name=f"datasets/{dataset}", **how)


async def test_pins_go_to_rented_nodes_last_unless_the_lease_outlives_them(world):
    await pinnable(world, n1=15, n2=30)
    lease = pb.Lease(name="leases/x", node=N2, state=pb.LEASE_STATE_JOINED)
    lease.hard_end_time.FromDatetime(world.clock.now() + timedelta(hours=1))
    await world.store.commit(Put(keys.of_name(keys.LEASES, lease.name), lease.SerializeToString()))

    async def chosen(**how):
        pins = (await world.call("PinDataset", pin(copies=1, **how))).pins
        await world.call("UnpinDataset", pb.UnpinDatasetRequest(name="datasets/c4"))
        return [one.node for one in pins]

    assert await chosen() == [N1], "without an end it outlives every lease"
    assert await chosen(ttl=Duration(seconds=7200)) == [N1]
    assert await chosen(ttl=Duration(seconds=600)) == [N2], "it has more room, and stays as long as the pin"
    assert len((await world.call("PinDataset", pin(copies=2))).pins) == 2, "rented is better than nowhere"


async def test_pins_go_where_there_is_room_and_end_in_time(world):
    await pinnable(world, n1=15, n2=30, n3=5)
    pinned = await world.call("PinDataset", pin(copies=2, ttl=Duration(seconds=60)))
    assert [one.node for one in pinned.pins] == [N1, N2]
    await world.call("PinDataset", pin("other", nodes=[N2]))
    asked = pb.ListNodePinsRequest(node=N2)
    here = await world.call("ListNodePins", asked, "agent", "a/n2")
    assert [one.name for one in here.datasets] == ["datasets/c4", "datasets/other"]
    await world.clock.advance(61)
    here = await world.call("ListNodePins", asked, "agent", "a/n2")
    assert [one.name for one in here.datasets] == ["datasets/other"]
    assert not (await world.call("UnpinDataset", pb.UnpinDatasetRequest(name="datasets/other"))).pins
    with pytest.raises(PermissionDenied):
        await world.call("ListNodePins", asked, "agent", "a/n1")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"nodes": [N1]}, "10 B of it pinned to others: 5 B are missing"),
        ({"copies": 3}, "3 copies are asked for, and 1 of 3 nodes have room"),
        ({"nodes": [N2], "copies": 1}, "one of the two"),
        ({}, "one of the two"),
        ({"copies": -1}, "copies"),
        ({"nodes": ["sites/a/nodes/none"]}, "no node that takes work"),
        ({"nodes": ["n1"]}, r"nodes\[0\]"),
        ({"copies": 1, "ttl": Duration(seconds=-1)}, "ttl: is not above 0"),
    ],
)
async def test_a_pin_that_cannot_be_is_refused_and_changes_nothing(world, how, said):
    await pinnable(world, n1=15, n2=30, n3=5)
    await world.call("PinDataset", pin("other", nodes=[N1]))
    before = (await world.store.list("/")).revision
    with pytest.raises((InvalidArgument, FailedPrecondition), match=said):
        await world.call("PinDataset", pin(**how))
    assert (await world.store.list("/")).revision == before


async def test_pins_of_a_dataset_are_its_owners(world):
    await pinnable(world, n1=15)
    with pytest.raises(PermissionDenied):
        await world.call("PinDataset", pin(copies=1), "user", "eve")
    with pytest.raises(PermissionDenied):
        await world.call("UnpinDataset", pb.UnpinDatasetRequest(name="datasets/c4"), "user", "eve")


class TestDataQuotas:
    """Pins are charged to a queue, whose quota and those above bound them before a byte is written."""

    @pytest.fixture
    async def fleet(self, world):
        await pinnable(world, n1=100, n2=100)
        world.held = {"queues/team": 15, "queues/top": 15}

        async def held(queue):
            if world.held[queue] is None:
                raise Unavailable("nobody counts")
            return world.held[queue]

        for name, parent, most in (("default", "", 0), ("team", "queues/top", 30), ("top", "", 50)):
            queue = scheduler_pb2.Queue(name=f"queues/{name}", parent=parent, data_quota_bytes=most)
            await world.store.commit(Put(keys.of_name(keys.QUEUES, queue.name), queue.SerializeToString()))
        access = {"team": ownership.Access(frozenset({"users/olga", "users/ann"})), "default": ownership.OPEN}
        world.rpc = assemble(
            world.store,
            world.clock,
            world.ca,
            world.dependencies,
            queue_access=lambda name: access.get(name, UNKNOWN),
            data_held=held,
        )
        return world

    async def test_what_is_beyond_is_refused_with_the_numbers_and_changes_nothing(self, fleet):
        before = (await fleet.store.list("/")).revision
        with pytest.raises(
            FailedPrecondition, match="may hold 30 B of data on nodes and holds 15 B: of 20 B more 5 B are too"
        ) as no:
            await fleet.call("PinDataset", pin(nodes=[N1, N2], queue="queues/team"))
        assert no.value.reason == "DATA_QUOTA"
        fleet.held["queues/top"] = 45
        with pytest.raises(FailedPrecondition, match="queues/top may hold 50 B"):
            await fleet.call("PinDataset", pin(nodes=[N1], queue="queues/team"))
        assert (await fleet.store.list("/")).revision == before

    async def test_pins_of_the_last_while_count_until_the_scheduler_has_heard_of_them(self, fleet):
        made = await fleet.call("PinDataset", pin(nodes=[N1], queue="queues/team"))
        assert [one.queue for one in made.pins] == ["queues/team"]
        with pytest.raises(FailedPrecondition, match="holds 25 B"):
            await fleet.call("PinDataset", pin("other", nodes=[N1], queue="queues/team"))
        await fleet.call(
            "PinDataset", pin(nodes=[N1], queue="queues/team", ttl=Duration(seconds=900))
        )  # it is charged already
        await fleet.clock.advance(60)
        fleet.held["queues/team"] = 20
        await fleet.call("PinDataset", pin("other", nodes=[N1], queue="queues/team"))

    async def test_two_at_once_do_not_count_the_same_room(self, fleet):
        calls = [fleet.call("PinDataset", pin(name, nodes=[N1], queue="queues/team")) for name in ("c4", "other")]
        answers = asyncio.gather(*calls, return_exceptions=True)
        await passing(fleet.clock, answers)
        assert sorted(type(answer).__name__ for answer in await answers) == ["Dataset", "FailedPrecondition"]

    async def test_a_queue_that_is_not_there_holds_nothing(self, fleet):
        before = (await fleet.store.list("/")).revision
        with pytest.raises(InvalidArgument, match="queues/nope") as refused:
            await fleet.call("PinDataset", pin(nodes=[N1], queue="queues/nope"), "admin", "root")
        assert [one.field for one in refused.value.violations] == ["queue"]
        assert (await fleet.store.list("/")).revision == before

    async def test_what_agents_report_all_the_time_keeps_nobody_from_pinning(self, fleet):
        listing, reports = fleet.store.list, 0

        async def beside(prefix, *more, **how):
            nonlocal reports
            found = await listing(prefix, *more, **how)
            if prefix == keys.DATASETS:
                reports += 1
                copy = {"node": N2, "present_bytes": reports}
                report = pb.ReportCachedDatasetRequest(dataset="datasets/other", copy=copy)
                await fleet.call("ReportCachedDataset", report, "agent", "a/n2")
            return found

        fleet.store.list = beside
        made = await fleet.call("PinDataset", pin(nodes=[N1], queue="queues/team"))
        assert [one.node for one in made.pins] == [N1]
        assert reports == 1

    async def test_nobody_who_counts_is_no_yes_and_without_a_limit_nobody_is_asked(self, fleet):
        fleet.held = dict.fromkeys(fleet.held)
        with pytest.raises(Unavailable):
            await fleet.call("PinDataset", pin(nodes=[N1], queue="queues/team"))
        made = await fleet.call("PinDataset", pin(nodes=[N1]))
        assert [one.queue for one in made.pins] == ["queues/default"]

    @pytest.mark.parametrize("queue", ["team", "queues/absent", "queues/team/jobs/x"])
    async def test_a_queue_that_cannot_be_is_refused_by_name(self, fleet, queue):
        await fleet.call(
            "CreateDataset", pb.CreateDatasetRequest(dataset_id="hers", dataset={"uri": "/d"}), "user", "eve"
        )
        with pytest.raises(InvalidArgument) as refused:
            await fleet.call("PinDataset", pin("hers", nodes=[N1], queue=queue), "user", "eve")
        assert refused.value.violations[0].field == "queue"


async def test_news_of_a_node(world):
    await world.register()
    key = keys.of_name(keys.NODES, N1)
    born = await world.store.get(key)
    await world.call("DrainNode", pb.DrainNodeRequest(name=N1, reason="fan"))
    drained = await world.store.get(key)
    told = [
        news.of_node(Published(key, None, born, born.revision), world.clock.now()),
        news.of_node(Published(key, born, drained, drained.revision), world.clock.now()),
    ]
    assert [t.subject for t in told] == ["wf.v1.hub.node.a_n1.created", "wf.v1.hub.node.a_n1.intent"]
    event = events_pb2.Event.FromString(told[1].data)
    assert (event.what, event.previous, event.site, event.revision) == (
        "DRAINING", "ACTIVE", "a", drained.revision,
    )  # fmt: skip
    assert "fan" in event.message


async def test_a_token_that_cannot_be_read_holds_up_no_other(world):
    await world.store.commit(Put(keys.JOIN_TOKENS + "01x", b"\xff garbage"))
    made = await world.call("CreateJoinToken", pb.CreateJoinTokenRequest(site="sites/a"))
    listed = await world.call("ListJoinTokens", pb.ListJoinTokensRequest())
    assert ([token.name for token in listed.join_tokens], list(listed.unreadable)) == ([made.name], ["joinTokens/01x"])


@pytest.mark.parametrize(
    "uri", ["", "data/c4", "s3://", "ftp://data/c4", "file://data", "file://host/c4", "https:///c4", "http://[x"]
)
async def test_a_dataset_that_no_agent_could_read_is_refused(world, uri):
    with pytest.raises(InvalidArgument, match=r"dataset\.uri"):
        await world.call("CreateDataset", pb.CreateDatasetRequest(dataset_id="c4", dataset={"uri": uri}))


@pytest.mark.parametrize("uri", ["https://ann:pw@data/c4.tar", "http://pw@data/c4"])
async def test_a_password_in_the_source_of_a_dataset_is_refused_and_not_repeated(world, uri):
    with pytest.raises(
        InvalidArgument, match=r"dataset\.uri: has a user or password in it.*whaleflux secrets add"
    ) as refused:
        await world.call("CreateDataset", pb.CreateDatasetRequest(dataset_id="c4", dataset={"uri": uri}))
    assert "pw" not in str(refused.value)
