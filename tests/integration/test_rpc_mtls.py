"""mTLS on loopback: who gets a connection, who is believed, and what a renewed certificate changes."""

import asyncio
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support.toy_rpc import CA, NAME, TABLE, Stub, Toy, add_toy, dial, serving, text
from whaleflux import errors
from whaleflux.rpc import auth, pki
from whaleflux.rpc.channel import connect
from whaleflux.rpc.pki import CertificateAuthority, TlsFiles, server_name
from whaleflux.rpc.retry_policy import CallPolicy
from whaleflux.rpc.server import Server
from whaleflux.services import REFLECTION

ONCE = CallPolicy(attempts=1, timeout_s=15)


def now():
    return datetime.now(UTC)


async def who(request, context):
    return text(f"{auth.caller().role}/{auth.caller().name}")


async def touch(request, context):
    auth.require_own_node(request.value)
    return text("touched")


TOY = Toy({"GetWho": who, "Join": who, "Administer": who, "AccessLog": who, "Touch": touch})


def channel_with(server, tls, role="scheduler"):
    return connect(f"127.0.0.1:{server.port}", tls, server=server_name(role), policy=ONCE)


class TestConnections:
    async def test_a_certificate_of_our_authority_is_let_in(self):
        async with serving(TOY) as server, dial(server, "agent", "onprem/n1") as channel:
            assert (await Stub(channel).unary("GetWho")(text())).value == "agent/onprem/n1"

    async def test_a_certificate_of_another_authority_is_not(self):
        stranger = CertificateAuthority.create(now()).issue("admin", "root", now())
        tls = pki.Tls(stranger.key, stranger.chain, CA.certificate_pem)
        async with serving(TOY) as server, channel_with(server, tls) as channel:
            with pytest.raises(errors.Unavailable):
                await Stub(channel).unary("GetWho")(text())

    async def test_an_expired_certificate_is_not(self):
        tls = CA.issue("admin", "root", now() - timedelta(days=2))
        async with serving(TOY) as server, channel_with(server, tls) as channel:
            with pytest.raises(errors.Unavailable):
                await Stub(channel).unary("GetWho")(text())

    async def test_none_at_all_is_not(self):
        credentials = grpc.ssl_channel_credentials(CA.certificate_pem)
        options = (("grpc.ssl_target_name_override", "scheduler.whaleflux"),)
        async with serving(TOY) as server:
            async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", credentials, options) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(f"/{NAME}/Join")(b"", timeout=15)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    async def test_a_client_refuses_a_server_that_is_not_whom_it_wants(self):
        """An agent's stolen key cannot play the scheduler, wherever it listens."""
        async with serving(TOY) as server:
            tls = CA.issue("user", "ann", now())
            async with channel_with(server, tls, "inventory") as channel:
                with pytest.raises(errors.Unavailable, match="its certificate has another name"):
                    await Stub(channel).unary("GetWho")(text())

    async def test_a_taken_port_is_told(self):
        async with serving(TOY) as server:
            second = Server(CA.issue("scheduler", "2", now()), auth.Authority(table=TABLE))
            with pytest.raises(errors.InvalidArgument, match="is the port taken"):
                second.bind(f"127.0.0.1:{server.port}")


class TestRoles:
    async def test_the_table_decides(self):
        async with serving(TOY) as server, dial(server, "user") as ann, dial(server, "admin", "root") as root:
            assert (await Stub(root).unary("Administer")(text())).value == "admin/root"
            with pytest.raises(errors.PermissionDenied, match="role 'user' may not call"):
                await Stub(ann).unary("Administer")(text())

    async def test_an_agent_is_confined_to_its_node(self):
        async with serving(TOY) as server, dial(server, "agent", "onprem/n1") as channel:
            await Stub(channel).unary("Touch")(text("sites/onprem/nodes/n1"))
            with pytest.raises(errors.PermissionDenied) as caught:
                await Stub(channel).unary("Touch")(text("sites/onprem/nodes/n2"))
        assert caught.value.reason == "NOT_OWN_NODE"

    async def test_a_forwarded_certificate_counts_only_from_the_front_door(self):
        forged = (("x-forwarded-client-cert", "Hash=0;URI=spiffe://whaleflux/admin/root"),)
        async with serving(TOY) as server:
            async with dial(server, "user") as ann, dial(server, "frontdoor", "1") as door:
                assert (await Stub(ann).unary("GetWho")(text(), metadata=forged)).value == "user/ann"
                with pytest.raises(errors.PermissionDenied):
                    await Stub(ann).unary("Administer")(text(), metadata=forged)
                assert (await Stub(door).unary("Administer")(text(), metadata=forged)).value == "admin/root"

    async def test_behind_the_front_door_without_a_certificate_one_may_only_join(self):
        async with serving(TOY) as server, dial(server, "frontdoor", "1") as door:
            assert (await Stub(door).unary("Join")(text())).value == "anonymous/-"
            with pytest.raises(errors.Unauthenticated, match="nodes join by a token"):
                await Stub(door).unary("GetWho")(text())
            assert (await Stub(door).unary("AccessLog")(text())).value == "frontdoor/1"

    async def test_a_stream_is_checked_too(self):
        async def watch(request, context):
            yield text("secret")

        toy = Toy(stream={"Administer": watch})
        async with serving(toy) as server, dial(server, "user") as channel:
            with pytest.raises(errors.PermissionDenied):
                await anext(Stub(channel).stream("Administer")(text()))


class TestReflection:
    async def test_it_lists_the_services_to_those_with_a_certificate(self):
        async def ask():
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        async with serving(TOY) as server, dial(server) as channel, dial(server, "frontdoor", "1") as door:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            (answer,) = [message async for message in stub.ServerReflectionInfo(ask())]
            listed = [service.name for service in answer.list_services_response.service]
            assert listed == sorted(["grpc.health.v1.Health", *REFLECTION, NAME])
            with pytest.raises(errors.Unauthenticated):
                await anext(reflection_pb2_grpc.ServerReflectionStub(door).ServerReflectionInfo(ask()))


class TestRenewal:
    async def test_server_and_stubs_go_on_with_renewed_files_and_open_streams_stay(self, tmp_path, monkeypatch):
        monkeypatch.setattr("whaleflux.rpc.connection_pool.STAMP_EVERY_S", 0.0)
        release = asyncio.Event()

        async def watch(request, context):
            yield text(auth.caller().name)
            await release.wait()
            yield text(auth.caller().name)

        served, shown = TlsFiles.under(tmp_path, "scheduler"), TlsFiles.under(tmp_path, "client")
        served.save(CA.issue("scheduler", "1", now(), lifetime=timedelta(minutes=1)))
        shown.save(CA.issue("user", "before", now()))
        server = Server(served, auth.Authority(table=TABLE))
        server.add(add_toy, Toy({"GetWho": who}, {"Watch": watch}), NAME)
        server.bind("127.0.0.1:0")
        await server.start()
        try:
            async with channel_with(server, shown) as channel:
                stub = Stub(channel)
                ask, open_stream = stub.unary("GetWho"), stub.stream("Watch")(text())
                assert (await ask(text())).value == "user/before"
                assert (await anext(open_stream)).value == "before"
                first = await peer_serial(server.port)

                served.save(CA.issue("scheduler", "1", now()))
                shown.save(CA.issue("user", "after", now()))
                assert (await ask(text())).value == "user/after", "the same stub, a new connection"
                assert await peer_serial(server.port) != first, "the server shows its new certificate"

                release.set()
                assert [message.value async for message in open_stream] == ["before"], "the stream was not cut"
        finally:
            await server.drain(0)

    async def test_half_replaced_files_change_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr("whaleflux.rpc.connection_pool.STAMP_EVERY_S", 0.0)
        served, shown = TlsFiles.under(tmp_path, "scheduler"), TlsFiles.under(tmp_path, "client")
        served.save(CA.issue("scheduler", "1", now()))
        shown.save(CA.issue("user", "ann", now()))
        server = Server(served, auth.Authority(table=TABLE))
        server.add(add_toy, Toy({"GetWho": who}), NAME)
        server.bind("127.0.0.1:0")
        await server.start()
        try:
            async with channel_with(server, shown) as channel:
                ask = Stub(channel).unary("GetWho")
                await ask(text())
                for files in (served, shown):
                    pki.write_private(files.key, CA.issue("user", "other", now()).key)
                assert (await ask(text())).value == "user/ann"
            async with channel_with(server, CA.issue("user", "bob", now())) as fresh:
                assert (await Stub(fresh).unary("GetWho")(text())).value == "user/bob"
        finally:
            await server.drain(0)


async def peer_serial(port):
    """Serial number of the certificate that the server shows to a new connection."""
    import ssl

    from cryptography import x509

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    async with asyncio.timeout(30):
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(der).serial_number
