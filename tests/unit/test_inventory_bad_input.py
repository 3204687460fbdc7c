"""Whatever is sent to inventory, it answers or refuses with a reason; what it refuses changes nothing."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import virtual_time
from whaleflux.clock import VirtualClock
from whaleflux.convert import node_from_proto
from whaleflux.errors import StatusError
from whaleflux.rpc import auth, pki
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory.service import assemble

CLOCK = VirtualClock()
CA = pki.CertificateAuthority.create(CLOCK.now(), "whaleflux")

INT32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 8)
INT64 = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, 10**9, 141 << 30])
DOUBLE = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 1.5, 4.5e11])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.sampled_from(
    ["", "a", "leaf-1", "x" * 10_000]
)
NAME = TEXT | st.sampled_from(
    ["sites/a/nodes/n1", "sites/hub/nodes/n", "sites/a", "datasets/d", "sites/A/nodes/n", "joinTokens/x"]
)
ETAG = st.sampled_from(["", '"1"', '"999"', "x"]) | TEXT
LABELS = st.dictionaries(TEXT, TEXT, max_size=3)

gpu = st.builds(
    lambda **f: f, index=INT32, uuid=TEXT, model=TEXT, memory_bytes=INT64, compute_capability_major=INT32,
    numa_node=INT32, mig_profiles=st.lists(TEXT, max_size=9),
)  # fmt: skip
link = st.builds(lambda **f: f, a=INT32, b=INT32, kind=st.integers(0, 9), bandwidth_bytes_per_s=DOUBLE)
disk = st.builds(lambda **f: f, mount=TEXT, capacity_bytes=INT64)
price = st.builds(lambda **f: f, kind=st.integers(0, 9), usd_per_gpu_hour=DOUBLE)
facts = st.builds(
    pb.NodeFacts, gpus=st.lists(gpu, max_size=3), links=st.lists(link, max_size=3), zone=TEXT, spine=TEXT,
    leaf=TEXT, cpu_millicores=INT64, memory_bytes=INT64, disks=st.lists(disk, max_size=2), network_bytes_per_s=DOUBLE,
    labels=LABELS, price=price, address=TEXT, host_address=TEXT, driver_version=TEXT, runtimes=st.lists(TEXT, max_size=3),
)  # fmt: skip
node = st.builds(pb.Node, name=NAME, labels=LABELS, price=price, facts=facts, etag=ETAG)
paths = st.lists(st.sampled_from(["labels", "price", "facts.zone", "intent", "", "facts"]) | TEXT, max_size=4)

REQUESTS = st.one_of(
    st.tuples(st.just("RegisterNode"), st.builds(pb.RegisterNodeRequest, name=NAME, facts=facts, boot_id=TEXT)),
    st.tuples(
        st.just("UpdateNode"),
        st.builds(lambda node, paths: pb.UpdateNodeRequest(node=node, update_mask={"paths": paths}), node, paths),
    ),
    st.tuples(st.just("CordonNode"), st.builds(pb.CordonNodeRequest, name=NAME, reason=TEXT, etag=ETAG)),
    st.tuples(st.just("DrainNode"), st.builds(pb.DrainNodeRequest, name=NAME, reason=TEXT, etag=ETAG)),
    st.tuples(st.just("RetireNode"), st.builds(pb.RetireNodeRequest, name=NAME, reason=TEXT, etag=ETAG)),
    st.tuples(st.just("GetNode"), st.builds(pb.GetNodeRequest, name=NAME)),
    st.tuples(
        st.just("ListNodes"), st.builds(pb.ListNodesRequest, parent=NAME, page_size=INT32, page_token=TEXT)
    ),
    st.tuples(
        st.just("CreateSite"),
        st.builds(lambda i, d, r: pb.CreateSiteRequest(site_id=i, site={"display_name": d}, request_id=r), TEXT, TEXT, TEXT),
    ),
    st.tuples(st.just("CreateJoinToken"), st.builds(pb.CreateJoinTokenRequest, site=NAME, ttl_s=INT64)),
    st.tuples(
        st.just("Join"),
        st.builds(
            pb.JoinRequest, token=TEXT | st.just("a." + "b" * 43), node_id=TEXT, certificate_request_pem=TEXT,
            addresses=st.lists(TEXT, max_size=20),
        ),
    ),
    st.tuples(
        st.just("CreateDataset"),
        st.builds(
            lambda i, u, s: pb.CreateDatasetRequest(dataset_id=i, dataset={"uri": u, "size_bytes": s}), TEXT, TEXT, INT64
        ),
    ),
    st.tuples(st.just("DeleteDataset"), st.builds(pb.DeleteDatasetRequest, name=NAME, etag=ETAG)),
    st.tuples(
        st.just("ReportCachedDataset"),
        st.builds(
            lambda d, n, b: pb.ReportCachedDatasetRequest(dataset=d, copy={"node": n, "present_bytes": b}), NAME, NAME, INT64
        ),
    ),
)  # fmt: skip


class Nobody:
    async def unreachable(self, node):
        return False

    async def gpus_held(self, node):
        return 0


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(REQUESTS, min_size=1, max_size=4))
def test_nothing_that_can_be_sent_breaks_inventory(requests):
    async def send_all():
        store = MemoryStore()
        rpc = assemble(store, CLOCK, CA, Nobody())
        good = pb.RegisterNodeRequest(name="sites/a/nodes/n1", boot_id="b")
        with auth.acting_as(auth.Identity("admin", "root")):
            await rpc.RegisterNode(good, None)
            for method, request in requests:
                before = (await store.list("")).revision
                try:
                    answer = await getattr(rpc, method)(request, None)
                except StatusError as error:
                    assert error.code != "INTERNAL" and error.reason
                    assert (await store.list("")).revision == before
                else:
                    if isinstance(answer, pb.Node):
                        node_from_proto(answer)  # whatever was accepted, placement can read

    virtual_time.run(send_all())
