"""Where a model may run, when it is ready there and why: what is known is reckoned with, what is not is said."""

import contextlib

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.data import progress
from whaleflux.data.manifest import File, Manifest
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, NotFound, StatusError, Unavailable
from whaleflux.quantities import shown_bytes
from whaleflux.rpc import auth
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import inventory_pb2
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router.core import arrival
from whaleflux_inference_router.core.arrival import Card, Measured, Weights
from whaleflux_inference_router.core.starts import Start
from whaleflux_inference_router.deployments import Deployments
from whaleflux_inference_router.resolver import Resolver
from whaleflux_inference_router.routing_state import routing
from whaleflux_inference_router.servicer import Router

GB = 10**9
ANN = auth.Identity("user", "ann")


class TestArrival:
    def test_it_is_the_pull_and_the_engine_by_what_was_measured_there(self):
        found = arrival.arrival(Weights("datasets/w", GB, source="s3://models"), Measured(5e6, 0, 12))
        assert (found.seconds, found.why) == (212, "1 GB at 5 MB/s from s3://models, then engine 12 s")

    def test_a_node_of_the_site_that_has_them_counts_by_what_such_pulls_took(self):
        found = arrival.arrival(Weights("datasets/w", GB, here=True), Measured(5e6, 1e9, 12))
        assert found == arrival.Arrival(13, "1 GB at 1 GB/s from a node of the site, then engine 12 s")

    @pytest.mark.parametrize(
        ("weights", "measured", "why"),
        [
            (Weights("datasets/w", GB, source="/mnt"), Measured(engine_start_s=3), "how fast is not known yet"),
            (Weights("datasets/w", 0), Measured(5e6, 0, 3), "whose size is not known yet"),
            (Weights("datasets/w", GB, source="/mnt"), Measured(5e6), "how long the engine needs is not known yet"),
            (Weights(), Measured(), "how long the engine needs is not known yet"),
        ],
    )
    def test_what_is_not_known_is_said_and_no_number_is_made_up(self, weights, measured, why):
        found = arrival.arrival(weights, measured)
        assert found.seconds is None
        assert why in found.why

    def test_of_a_new_version_what_changed_counts_where_the_old_one_is(self):
        weights = Weights("datasets/w", GB, source="s3://models", had_bytes=900 * 10**6)
        found = arrival.arrival(weights, Measured(5e6, 0, 12))
        assert (weights.missing_bytes, found.seconds) == (10**8, 32)
        assert found.why.startswith("100 MB of 1 GB (the rest is in the version of before) at 5 MB/s")

    def test_a_pull_under_way_counts_as_it_goes(self):
        whole = arrival.Arrival(None, "")
        found = arrival.left(whole, Measured(engine_start_s=2), 4e8, 1e9, 1e8)
        assert (found.seconds, found.why) == (8, "600 MB of 1 GB left at 100 MB/s, then engine 2 s")

    def test_whether_it_fits_is_weights_and_room_for_requests_by_gpu(self):
        least = arrival.gpu_memory_bytes(80 * GB, 8 * GB, 2)
        assert least == 48 * GB
        assert arrival.misfit([Card("H200", 141 * GB, 8)], (), 2, least) == ""
        assert "RTX4090, has 24 GB" in arrival.misfit([Card("RTX4090", 24 * GB, 2)], (), 2, least)
        assert "no node with 2 of RTX4090" in arrival.misfit([Card("RTX4090", 24 * GB, 1)], (), 2, least)
        assert "has no H200; its GPUs are RTX4090" in arrival.misfit([Card("RTX4090", 24 * GB, 2)], ("H200",), 1, 0)
        assert arrival.misfit([], (), 2, least) == "", "no nodes: nothing is known"

    @pytest.mark.parametrize("done", [0, 999, 12_345_678, 3 * GB])
    @pytest.mark.parametrize("rate", [0.0, 5.5e6])
    def test_what_agents_say_of_a_pull_is_read_back(self, done, rate):
        found = progress.read(f"datasets/w {progress.words(done, 5 * GB, rate)} on sites/a/nodes/n")
        assert (shown_bytes(found.done_bytes), found.total_bytes, found.bytes_per_s) == (
            shown_bytes(done),
            5 * GB,
            rate,
        )
        assert progress.read("datasets/w") is None


class TestStarts:
    def test_what_other_copies_on_the_node_gave_is_no_rate_of_the_source(self):
        start = Start(peer=False)
        start.pulls(0, 0, 0)
        start.pulls(1, 900 * 10**6, 0)  # from a copy of the version of before
        start.pulls(2, 900 * 10**6, 0)
        for second in range(3, 8):
            start.pulls(second, 900 * 10**6 + second * 5 * 10**6, 5e6)
        assert start.bytes_per_s == 5e6
        for second in range(8, 13):  # the source stands still
            start.pulls(second, 935 * 10**6, 0)
        assert start.bytes_per_s == 2.5e6

    def test_a_moment_says_nothing(self):
        start = Start(peer=False)
        start.pulls(0, 0, 5e6)
        start.pulls(0.4, 2 * 10**6, 5e6)
        assert start.bytes_per_s == 0


class Inventory:
    """Three sites with a node each, and a dataset; the edge has RTX4090s."""

    def __init__(self, size_bytes=GB):
        self.also, self.manifests, self.is_away, self.nodes = inventory_pb2.Dataset(), {}, False, 1
        self.weights = inventory_pb2.Dataset(
            name="datasets/w", uri="s3://models/w", size_bytes=size_bytes, owner="user/bob"
        )

    async def GetDataset(self, request, timeout):
        found = next((one for one in (self.weights, self.also) if one.name == request.name), None)
        if found is None:
            raise NotFound("dataset", request.name)
        return found

    async def GetDatasetManifest(self, request, timeout):
        return self.manifests[request.name]

    async def ListSites(self, request, timeout):
        if self.is_away:
            raise Unavailable("inventory is away")
        names = ("onprem", "cloud", "edge", "empty")
        return inventory_pb2.ListSitesResponse(sites=[inventory_pb2.Site(name=f"sites/{name}") for name in names])

    async def ListNodes(self, request, timeout):
        if request.page_size > 1000:
            raise InvalidArgument(FieldViolation("page_size", "is too large"))
        if request.parent == "sites/empty":
            return inventory_pb2.ListNodesResponse()
        first = int(request.page_token or 0)
        last = min(first + request.page_size, self.nodes)
        more = str(last) if last < self.nodes else ""
        nodes = [self._node(request.parent, number) for number in range(first, last)]
        return inventory_pb2.ListNodesResponse(nodes=nodes, next_page_token=more)

    def _node(self, site, number):
        node = inventory_pb2.Node(name=f"{site}/nodes/n{number or ''}")
        small = site == "sites/edge" or number != self.nodes - 1
        for _ in range(2):
            node.facts.gpus.add(model="RTX4090" if small else "H200", memory_bytes=(24 if small else 141) * GB)
        return node


@contextlib.asynccontextmanager
async def service(inventory=None, who=ANN):
    store, clock = MemoryStore(), VirtualClock()
    async with routing(store, clock) as current:
        with auth.acting_as(who):
            deployments = Deployments(inventory or Inventory())
            yield Router(store, clock, current, Resolver(clock), deployments=deployments), current


def model(*sites, weights="datasets/w", **engine):
    engine.setdefault("command", ["serve", "--port", "{port}"])
    made = pb.Model(engine=pb.Engine(weights=weights, **engine), replicas=pb.ReplicaCount(min=1))
    made.sites.extend(pb.ModelSite(site=f"sites/{site}") if isinstance(site, str) else site for site in sites)
    return made


async def create(router, wanted):
    return await router.CreateModel(pb.CreateModelRequest(model_id="m", model=wanted), None)


async def refused(wanted, inventory=None):
    async with service(inventory) as (router, current):
        answer = None
        try:
            await create(router, wanted)
        except StatusError as error:
            answer = error
        assert isinstance(answer, InvalidArgument)
        assert not current.models.values
        return {violation.field: violation.description for violation in answer.violations}


class TestSites:
    async def test_a_site_whose_gpus_cannot_hold_it_is_refused_with_the_numbers(self):
        wrong = await refused(model("onprem", "edge"), Inventory(size_bytes=40 * GB))
        assert list(wrong) == ["model.sites[1]"]
        assert "each of 1 GPU(s) needs 46 GB" in wrong["model.sites[1]"]
        assert "RTX4090, has 24 GB" in wrong["model.sites[1]"]

    async def test_with_two_gpus_or_other_types_there_it_is_not(self):
        async with service(Inventory(size_bytes=40 * GB)) as (router, _):
            made = await create(router, model("onprem", "edge", gpus=2))
            assert made.engine.gpu_memory_bytes == 23 * GB
            assert made.version == 1

    async def test_a_site_that_is_none_is_refused_and_one_without_nodes_waits_for_some(self):
        assert "is no site of the fleet" in (await refused(model("nowhere")))["model.sites[0].site"]
        async with service() as (router, _):
            await create(router, model("empty"))
            found = await router.EstimateDeployment(pb.EstimateDeploymentRequest(name="models/m"), None)
            assert found.sites[0].problem == "it has no nodes with GPUs now"

    async def test_a_type_that_the_site_has_none_of_is_refused(self):
        only = pb.ModelSite(site="sites/edge", gpu_models=["H200"])
        assert "has no H200; its GPUs are RTX4090" in (await refused(model(only)))["model.sites[0]"]

    async def test_all_nodes_of_a_site_are_looked_at_a_page_at_a_time(self):
        inventory = Inventory(size_bytes=40 * GB)
        inventory.nodes = 450  # of which the last one alone can hold it
        async with service(inventory) as (router, _):
            await create(router, model("onprem"))

    async def test_other_counts_are_changed_while_inventory_is_away_and_another_site_is_not(self):
        inventory = Inventory()
        async with service(inventory) as (router, _):
            made = await create(router, model("onprem", "cloud"))
            inventory.is_away = True
            made.sites[0].replicas = 3
            fewer = await router.UpdateModel(pb.UpdateModelRequest(model=made), None)
            assert (fewer.sites[0].replicas, fewer.engine.gpu_memory_bytes) == (3, made.engine.gpu_memory_bytes)
            fewer.sites.add(site="sites/edge", replicas=1)
            with pytest.raises(Unavailable):
                await router.UpdateModel(pb.UpdateModelRequest(model=fewer), None)

    async def test_a_site_does_not_set_in_clear_what_a_secret_is_given_as(self):
        wanted = model(pb.ModelSite(site="sites/onprem", environment={"HF_TOKEN": "x"}))
        wanted.engine.secrets.add(secret="secrets/hf", variable="HF_TOKEN")
        assert "set in environment too" in (await refused(wanted))["model.engine.secrets[0].variable"]


class TestWeights:
    async def test_what_is_not_there_for_the_caller_is_not_there(self):
        assert "is not declared" in (await refused(model(weights="datasets/none")))["model.engine.weights"]
        gated = Inventory()
        gated.weights.members.append("groups/research")
        assert "is not declared" in (await refused(model("onprem"), gated))["model.engine.weights"]

    @pytest.mark.parametrize("secret", [False, True])
    async def test_gated_ones_travel_to_sites_that_are_named_and_nowhere_else(self, secret):
        gated = Inventory()
        if secret:
            gated.weights.credentials.secret = "secrets/hf"
        else:
            gated.weights.members.append("users/ann")
        assert "name the sites to which it may travel" in (await refused(model(), gated))["model.sites"]
        async with service(gated) as (router, _):
            await create(router, model("onprem"))


class TestEstimate:
    async def test_what_was_measured_at_a_site_is_reckoned_with_and_nothing_else(self):
        async with service() as (router, current):
            made = await create(router, model("onprem", "cloud"))
            made.measures.add(site="sites/cloud", source_bytes_per_s=5_000_000, engine_start_s=12)
            await router.UpdateModel(pb.UpdateModelRequest(model=made), None)
            found = await router.EstimateDeployment(pb.EstimateDeploymentRequest(name="models/m"), None)
            assert not any(one.HasField("ready_in") for one in found.sites), "nobody else says what was measured"
            stored = current.models.values["/whaleflux/v1/models/m"]
            stored.measures.add(site="sites/cloud", source_bytes_per_s=5_000_000, engine_start_s=12)
            onprem, cloud = (await router.EstimateDeployment(pb.EstimateDeploymentRequest(model=stored), None)).sites
            assert not onprem.HasField("ready_in")
            assert cloud.ready_in.seconds == 212
            assert (cloud.missing_bytes, cloud.replicas) == (GB, 1)
            assert "1 GB at 5 MB/s from s3://models, then engine 12 s" in cloud.why

    @pytest.mark.parametrize(
        ("wanted", "field"),
        [
            (model(weights="w"), "model.engine.weights"),
            (model(command=["serve", "{weights}", "{port}"], weights=""), "model.engine.weights"),
            (model(pb.ModelSite(site="edge")), "model.sites[0].site"),
            (model("edge", "edge"), "model.sites"),
            (model(pb.ModelSite(site="sites/edge", replicas=-1)), "model.sites[0].replicas"),
            (model(pb.ModelSite(site="sites/edge", replicas=1001)), "model.sites[0].replicas"),
            (model(pb.ModelSite(site="sites/edge", environment={"A B": "x"})), "model.sites[0].environment[A B]"),
            (model(*(f"s{i}" for i in range(101))), "model.sites"),
            (model(kv_memory_bytes=-1), "model.engine.kv_memory_bytes"),
            (model(command=["bash", "-euo", "pipefail", "-c", "a {port}\nb"]), ""),
        ],
    )
    async def test_bad_input_names_its_field_for_both_rpcs(self, wanted, field):
        if not field:
            wanted.sites.add(site="sites/edge", args=["--more"])
            field = "model.sites[0].args"
        assert field in await refused(wanted)
        async with service() as (router, _):
            with pytest.raises(InvalidArgument) as raised:
                await router.EstimateDeployment(pb.EstimateDeploymentRequest(model=wanted), None)
            assert field in {violation.field for violation in raised.value.violations}

    @pytest.mark.parametrize(
        ("policy", "field"),
        [
            ({"canary_percent": 51}, "canary_percent"),
            ({"canary_percent": -1}, "canary_percent"),
            ({"watch": {"nanos": 1}}, "watch"),
            ({"ready_within": {"seconds": 8 * 86_400}}, "ready_within"),
        ],
    )
    async def test_a_rollout_that_cannot_be_is_refused(self, policy, field):
        wanted = model("onprem")
        wanted.rollout_policy.MergeFrom(pb.RolloutPolicy(**policy))
        assert f"model.rollout_policy.{field}" in await refused(wanted)


class TestVersions:
    async def test_what_a_site_has_of_the_version_of_before_is_not_missing(self):
        inventory = Inventory()
        old = Manifest(8 << 20, (File("w", 32 << 20, tuple(bytes([i]) * 32 for i in range(4))),))
        new = Manifest(8 << 20, (File("w2", 32 << 20, tuple(bytes([i]) * 32 for i in (0, 9, 2, 3))),))
        inventory.also = inventory_pb2.Dataset(
            name="datasets/w2", uri="/mnt/w2", size_bytes=32 << 20, manifest_digest="b"
        )
        inventory.weights.manifest_digest = "a"
        inventory.weights.copies.add(node="sites/cloud/nodes/n", state=inventory_pb2.DATASET_COPY_STATE_READY)
        inventory.manifests = {"datasets/w": old.to_proto(), "datasets/w2": new.to_proto()}
        async with service(inventory) as (router, _):
            made = await create(router, model("onprem", "cloud"))
            made.engine.weights = "datasets/w2"
            rolled = await router.UpdateModel(pb.UpdateModelRequest(model=made), None)
            assert list(rolled.rollout.order) == ["sites/cloud", "sites/onprem"]
            found = await router.EstimateDeployment(pb.EstimateDeploymentRequest(name="models/m"), None)
            assert [one.missing_bytes >> 20 for one in found.sites] == [32, 8]


class TestChange:
    async def test_a_changed_engine_begins_a_rollout_and_another_count_does_not(self):
        inventory = Inventory()
        async with service(inventory) as (router, _):
            made = await create(router, model("onprem", "cloud"))
            made.sites[0].replicas = 3
            same = await router.UpdateModel(pb.UpdateModelRequest(model=made), None)
            assert (same.version, same.rollout.state) == (1, pb.ROLLOUT_STATE_UNSPECIFIED)
            inventory.weights.copies.add(node="sites/cloud/nodes/n", state=inventory_pb2.DATASET_COPY_STATE_READY)
            same.engine.environment["A"] = "1"
            rolled = await router.UpdateModel(pb.UpdateModelRequest(model=same), None)
            assert (rolled.version, rolled.rollout.state) == (2, pb.ROLLOUT_STATE_SURGING)
            assert list(rolled.rollout.order) == ["sites/cloud", "sites/onprem"], "who misses least bytes comes first"
            assert not rolled.rollout.from_engine.environment
            rolled.engine.environment["A"] = "2"
            with pytest.raises(FailedPrecondition, match="rollout undo m"):
                await router.UpdateModel(pb.UpdateModelRequest(model=rolled), None)

    async def test_a_rollback_restores_the_engine_and_one_of_nothing_is_refused(self):
        async with service() as (router, _):
            made = await create(router, model("onprem"))
            with pytest.raises(FailedPrecondition, match="no engine of before"):
                await router.RollBackModel(pb.RollBackModelRequest(name="models/m"), None)
            made.engine.environment["A"] = "1"
            rolled = await router.UpdateModel(pb.UpdateModelRequest(model=made), None)
            back = await router.RollBackModel(pb.RollBackModelRequest(name="models/m", etag=rolled.etag), None)
            assert (back.version, back.rollout.state) == (1, pb.ROLLOUT_STATE_ROLLED_BACK)
            assert "user/ann" in back.rollout.message
            assert not back.engine.environment
            again = await router.UpdateModel(pb.UpdateModelRequest(model=_like(rolled, back)), None)
            assert again.version == 3, "a version is never used twice"

    async def test_a_rollback_restores_what_goes_with_the_engine_and_no_counts(self):
        async with service() as (router, _):
            wanted = model(pb.ModelSite(site="sites/onprem", replicas=1, args=["--old"]), "cloud")
            wanted.context_window_tokens = 8192
            wanted.classes.add(gpu_models=["H200"])
            changed = await create(router, wanted)
            changed.context_window_tokens, changed.replicas.min = 32_768, 3
            changed.objective.first_token.FromSeconds(1)
            changed.classes[0].gpu_models[:] = ["RTX4090"]
            changed.sites[0].args[:] = ["--new"]
            rolled = await router.UpdateModel(pb.UpdateModelRequest(model=changed), None)
            assert rolled.rollout.state == pb.ROLLOUT_STATE_SURGING
            rolled.sites[0].replicas = 5
            more = await router.UpdateModel(pb.UpdateModelRequest(model=rolled), None)
            back = await router.RollBackModel(pb.RollBackModelRequest(name="models/m", etag=more.etag), None)
            assert (back.context_window_tokens, list(back.classes[0].gpu_models)) == (8192, ["H200"])
            assert not back.HasField("objective")
            assert [(one.site, one.replicas, list(one.args)) for one in back.sites] == [
                ("sites/onprem", 5, ["--old"]),
                ("sites/cloud", 0, []),
            ]
            assert back.replicas.min == 3, "how many there are is no part of it"

    async def test_sites_that_were_the_change_go_back_as_well(self):
        async with service() as (router, _):
            moved = await create(router, model("onprem"))
            moved.sites[0].site = "sites/cloud"
            await router.UpdateModel(pb.UpdateModelRequest(model=moved), None)
            back = await router.RollBackModel(pb.RollBackModelRequest(name="models/m"), None)
            assert [one.site for one in back.sites] == ["sites/onprem"]

    async def test_who_does_not_change_it_rolls_nothing_back(self):
        async with service() as (router, _):
            await create(router, model("onprem"))
            with auth.acting_as(auth.Identity("user", "eve")):
                with pytest.raises(StatusError):
                    await router.RollBackModel(pb.RollBackModelRequest(name="models/m"), None)
                with pytest.raises(StatusError):
                    await router.EstimateDeployment(pb.EstimateDeploymentRequest(name="models/m"), None)


def _like(wanted, current):
    made = pb.Model()
    made.CopyFrom(wanted)
    made.etag = current.etag
    return made
