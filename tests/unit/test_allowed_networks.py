"""Where the router and the front door may be made to dial: by a model's file, by what a name stands for later, by an agent's word."""

import asyncio
import contextlib
import ipaddress

import pytest
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2

from whaleflux import hostport
from whaleflux.clock import VirtualClock
from whaleflux.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unavailable
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router.convert import encode
from whaleflux_inference_router.core import allowed_networks
from whaleflux_inference_router.core.allowed_networks import AllowedNetworks
from whaleflux_inference_router.endpoints import Endpoints
from whaleflux_inference_router.resolver import KNOWN_S, Resolver
from whaleflux_inference_router.routing_state import routing
from whaleflux_inference_router.servicer import Router
from whaleflux_inference_router.settings import Settings

USER, ADMIN = auth.Identity("user", "ann"), auth.Identity("admin", "root")
ip = ipaddress.ip_address
REFUSED = (
    "127.0.0.1", "127.8.9.1", "0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.1.1", "224.0.0.1", "255.255.255.255", "240.0.0.1",
    "168.63.129.16", "100.100.100.200", "192.0.0.192", "::1", "::", "fe80::1", "fe80::1%eth0", "ff02::1", "fd00:ec2::254", "fd20:ce::254",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::7f00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "2001:0:4136:e378:8000:63bf:80ff:fffe",
)  # fmt: skip
TAKEN = ("10.0.0.5", "192.168.1.1", "172.16.0.1", "100.64.0.1", "8.8.8.8", "fd12::1", "2001:db8::1", "::ffff:10.0.0.5")


class Names:
    """A name server that tests play."""

    def __init__(self, **known):
        self.known, self.asked = known, 0

    async def __call__(self, host, port):
        self.asked += 1
        if host not in self.known:
            raise OSError("Name or service not known")
        return self.known[host]


class TestJudgement:
    @pytest.mark.parametrize("address", REFUSED)
    def test_what_is_special_is_refused_in_every_form(self, address):
        assert AllowedNetworks().refusal(ip(address), 80)

    @pytest.mark.parametrize("address", TAKEN)
    def test_servers_of_one_s_own_are_ordinary(self, address):
        assert not AllowedNetworks().refusal(ip(address), 80)

    def test_a_list_of_networks_leaves_out_all_others_unless_it_says_ordinary(self):
        only = allowed_networks.parse("10.20.0.0/16")
        assert not only.refusal(ip("10.20.3.4"), 80)
        assert only.refusal(ip("10.21.3.4"), 80)
        both = allowed_networks.parse("ordinary, 127.0.0.0/8")
        assert not both.refusal(ip("127.0.0.1"), 80)
        assert not both.refusal(ip("10.21.3.4"), 80)
        assert both.refusal(ip("::1"), 80), "the other loopback was not named"

    def test_a_metadata_service_is_allowed_by_its_own_name_only(self):
        assert allowed_networks.parse("169.254.0.0/16").refusal(ip("169.254.169.254"), 80)
        assert not allowed_networks.parse("169.254.169.254/32").refusal(ip("169.254.169.254"), 80)

    def test_the_control_plane_s_own_ports_are_refused_whatever_network_is_allowed(self):
        control = frozenset({(ip("127.0.0.1"), 2379), (ip("10.0.0.1"), 7000), (ip("0.0.0.0"), 7010)})
        networks = AllowedNetworks((ipaddress.ip_network("127.0.0.0/8"),), ordinary=True, control=control)
        for address, port in (
            ("127.0.0.1", 2379),
            ("127.0.0.2", 2379),
            ("::ffff:127.0.0.1", 2379),
            ("10.0.0.1", 7000),
            ("127.0.0.1", 7010),
        ):
            assert networks.refusal(ip(address), port) == "is the control plane's own"
        assert not networks.refusal(ip("127.0.0.1"), 8000)
        assert not networks.refusal(ip("10.0.0.1"), 8000)
        assert not networks.refusal(ip("10.0.0.1"), 7000, ("10.0.0.1:7000",)), "an operator said so"

    @pytest.mark.parametrize("text", ["10.0.0.5/8", "everything", "10.0.0.0/33", "ordinary,::x"])
    def test_a_setting_that_is_no_network_is_named(self, text):
        with pytest.raises(InvalidArgument, match="model_networks"):
            allowed_networks.parse(text)

    @pytest.mark.parametrize("host", ["0x7f.1", "0x7f000001", "2130706433", "017700000001", "a.b.1", "x.0x1."])
    async def test_numbers_in_disguise_are_not_looked_up(self, host):
        names = Names()
        with pytest.raises((Unavailable, InvalidArgument)):
            await Resolver(VirtualClock(), names).dialled(f"{host}:80")
        assert names.asked == 0


class TestResolution:
    async def test_a_name_that_stands_for_something_else_later_is_refused_then(self):
        clock, names = VirtualClock(), Names(engine=["10.0.0.7"])
        resolver = Resolver(clock, names)
        assert (await resolver.dialled("engine:80")).address == "10.0.0.7:80"
        names.known["engine"] = ["127.0.0.1"]
        await clock.advance(KNOWN_S + 1)
        with pytest.raises(FailedPrecondition, match="80 is loopback"):
            await resolver.dialled("ENGINE.:80")

    async def test_of_several_addresses_only_allowed_ones_are_dialled_and_the_others_are_told(self):
        resolver = Resolver(VirtualClock(), Names(engine=["169.254.169.254", "10.0.0.7", "10.0.0.8"]))
        found = await resolver.dialled("engine:80")
        assert (found.address, found.note) == (
            "10.0.0.7:80",
            "left out: 169.254.169.254:80 is a cloud's metadata service",
        )

    async def test_names_of_the_control_plane_are_followed(self):
        clock, names = VirtualClock(), Names(etcd=["10.1.1.1"], sneaky=["10.1.1.1"])
        resolver = Resolver(clock, names, control=[hostport.parse("etcd:2379")])
        with pytest.raises(FailedPrecondition, match="control plane"):
            await resolver.dialled("sneaky:2379")
        assert not resolver.may_dial("10.1.1.1:2379")
        names.known["etcd"] = ["10.1.1.2"]
        await clock.advance(KNOWN_S + 1)
        assert (await resolver.dialled("sneaky:2379")).address == "10.1.1.1:2379"
        del names.known["etcd"]
        await clock.advance(KNOWN_S + 1)
        with pytest.raises(FailedPrecondition):
            await resolver.dialled("10.1.1.2:2379")

    def test_the_router_knows_its_own_fleet_from_its_settings(self):
        told = Settings(
            store="http://etcd-0:2379,https://etcd-1:2379", nats="nats://u:p@nats:4222", scheduler="sched:7000", listen=":7000",
            otlp_endpoint="http://collector:4317/", control_addresses="envoy:9901", metrics_listen="127.0.0.1:0",
        ).own_addresses()  # fmt: skip
        wanted = {
            "etcd-0:2379",
            "etcd-1:2379",
            "nats:4222",
            "sched:7000",
            "0.0.0.0:7000",
            "collector:4317",
            "envoy:9901",
        }
        assert wanted <= {str(one) for one in told}


def model(*addresses, allowed=()):
    return pb.Model(engine=pb.Engine(addresses=addresses), replicas=pb.ReplicaCount(min=1), allowed_addresses=allowed)


class TestModels:
    async def test_what_a_model_may_not_name_is_refused_by_field_and_nothing_is_stored(self):
        store, clock = MemoryStore(), VirtualClock()
        names = Names(good=["10.0.0.7"], bad=["127.0.0.1"])
        async with routing(store, clock) as current:
            router = Router(store, clock, current, Resolver(clock, names, control=[hostport.parse("10.9.9.9:2379")]))
            with auth.acting_as(USER):
                named = model("good:80", "bad:80", "unknown:80", "[::1]:9901", "10.9.9.9:2379", "10.9.9.9:80")
                for validate_only in (True, False):
                    request = pb.CreateModelRequest(model_id="m", model=named, validate_only=validate_only)
                    with pytest.raises(InvalidArgument) as refused:
                        await router.CreateModel(request, None)
                    fields = [one.field for one in refused.value.violations]
                    assert fields == [f"model.engine.addresses[{i}]" for i in (1, 3, 4)]
                    assert "--allow-address" in refused.value.violations[0].description
                assert not (await store.list(keys.MODELS)).entries
                made = await router.CreateModel(pb.CreateModelRequest(model_id="m", model=model("good:80")), None)
                made.engine.addresses.append("127.0.0.1:9901")
                with pytest.raises(InvalidArgument, match=r"addresses\[1\]"):
                    await router.UpdateModel(pb.UpdateModelRequest(model=made), None)

    async def test_operators_allow_single_addresses_and_nobody_else_does(self):
        store, clock = MemoryStore(), VirtualClock()
        async with routing(store, clock) as current:
            router = Router(store, clock, current, Resolver(clock, Names(bad=["127.0.0.1"])))
            request = pb.CreateModelRequest(model_id="m", model=model("bad:8000", allowed=["127.0.0.1:8000"]))
            with auth.acting_as(USER), pytest.raises(PermissionDenied, match="operator"):
                await router.CreateModel(request, None)
            with auth.acting_as(ADMIN):
                with pytest.raises(InvalidArgument, match="is a name"):
                    named = model("bad:8000", allowed=["bad:8000"])
                    await router.CreateModel(pb.CreateModelRequest(model_id="m", model=named), None)
                made = await router.CreateModel(request, None)
            with auth.acting_as(auth.Identity("user", "root")):  # its owner, who is no operator any more
                made.replicas.min = 1
                made.context_window_tokens = 10
                made = await router.UpdateModel(pb.UpdateModelRequest(model=made), None)
                made.allowed_addresses[:] = ["127.0.0.1:2379"]
                with pytest.raises(PermissionDenied):
                    await router.UpdateModel(pb.UpdateModelRequest(model=made), None)

    async def test_the_front_door_is_told_no_address_that_is_refused_whatever_a_record_says(self):
        store, clock = MemoryStore(), VirtualClock()
        for name, address, allowed in (
            ("a", "127.0.0.1:9901", ()),
            ("b", "10.0.0.1:1", ()),
            ("c", "127.0.0.1:8", ["127.0.0.1:8"]),
        ):
            replica = pb.Replica(name=f"models/{name}/replicas/r", address=address)
            stored = model(address, allowed=allowed)
            stored.name = f"models/{name}"
            await store.commit(
                Put(f"{keys.MODELS}{name}", encode(stored)), Put(f"{keys.REPLICAS}{name}/r", encode(replica))
            )
        async with routing(store, clock) as current:
            stream = Endpoints(current, Resolver(clock, Names())).StreamEndpoints(listening(), None)
            async with contextlib.aclosing(stream):
                (packed,) = (await anext(stream)).resources
            found = endpoint_pb2.ClusterLoadAssignment.FromString(packed.value).endpoints[0].lb_endpoints
            sockets = [one.endpoint.address.socket_address for one in found]
            assert [(one.address, one.port_value) for one in sockets] == [("10.0.0.1", 1), ("127.0.0.1", 8)]


async def listening():
    """A front door's side of the stream."""
    yield discovery_pb2.DiscoveryRequest()
    await asyncio.Event().wait()
