"""The agent's certificate and its state directory: renewed in time, of one node, of one agent."""

import asyncio
import contextlib
import errno
from datetime import timedelta

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import FailedPrecondition, InvalidArgument, Unavailable
from whaleflux.login.oidc_client import Client
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.pki import CertificateAuthority, Tls, TlsFiles, identity_of, new_key_and_request, request_for
from whaleflux.v1 import inventory_pb2
from whaleflux_agent.identity import JoinParameters, Renewal, files, kept_identity, known_identity, require_node
from whaleflux_agent.revocation import Revocation
from whaleflux_agent.state import exclusive
from whaleflux_inference_router.request_authorizer import Asked


class Inventory:
    """Renews; `failures` answers get lost, of which it knows the keys."""

    def __init__(self, authority, clock, failures=1):
        self.authority, self.clock, self.failures, self.asked, self.renewed = authority, clock, failures, [], False

    async def RenewCertificate(self, request, timeout):
        self.asked.append(request.certificate_request_pem)
        if self.failures:
            self.failures -= 1
            raise Unavailable("away")
        self.renewed = True
        pem = self.authority.sign(request.certificate_request_pem.encode(), "agent", "s/n", self.clock.now())
        return inventory_pb2.RenewCertificateResponse(
            certificate_pem=pem.decode(), authority_pem=self.authority.certificate_pem.decode()
        )


class Node:
    """An agent's identity that is renewed while it runs."""

    def __init__(self, folder, failures=1):
        self.clock = VirtualClock()
        self.authority = CertificateAuthority.create(self.clock.now())
        self.tls = files(folder)
        self.tls.save(self.authority.issue("agent", "s/n", self.clock.now(), lifetime=timedelta(hours=3)))
        self.inventory, self.came_back = Inventory(self.authority, self.clock, failures), []
        self.first = self.tls.load()
        self.refused = []

    async def come_back(self, kept):
        self.came_back.append(kept)
        pem = self.authority.sign(request_for(kept.key), "agent", "s/n", self.clock.now())
        self.tls.save(Tls(kept.key, pem, kept.roots))

    @contextlib.asynccontextmanager
    async def running(self):
        renewal = Renewal(self.tls, self.inventory, self.clock, "m", self.come_back, self.refused.append)
        task = asyncio.create_task(renewal.run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def replaced(self):
        """The certificate on disk is another one; it is replaced last, by a thread."""
        async with asyncio.timeout(10):
            while self.tls.chain.read_bytes() == self.first.chain:
                await asyncio.sleep(0.001)


async def test_a_certificate_is_renewed_in_its_last_third_and_tried_until_it_works(tmp_path):
    node = Node(tmp_path)
    async with node.running():
        await node.clock.advance(3600)
        assert node.tls.load() == node.first
        while node.inventory.failures or not node.inventory.renewed:
            await node.clock.advance(600)
            await asyncio.sleep(1.0)  # virtual: until its thread has written
            assert node.clock.monotonic() < 3 * 3600
        await node.replaced()
    assert node.tls.load().key != node.first.key
    assert identity_of(node.tls.load().chain).node == "sites/s/nodes/n"
    assert len(set(node.inventory.asked)) == 1, "a renewal whose answer was lost goes on with its key"
    assert not node.came_back


async def test_who_slept_through_the_end_of_its_certificate_comes_back_by_its_key(tmp_path):
    node = Node(tmp_path)
    await node.clock.advance(7 * 86_400)  # of which no timer of the agent took notice
    async with node.running():
        await node.replaced()
    assert [kept.node for kept in node.came_back] == ["sites/s/nodes/n"]
    assert node.tls.load().key == node.first.key and not node.inventory.asked


async def test_who_was_retired_while_it_slept_hears_of_it(tmp_path):
    """Its certificate has ended: no handshake of its streams gets as far as the word that it is revoked."""
    node, revocation = Node(tmp_path), Revocation()
    retired = FailedPrecondition("sites/s/nodes/n was retired", reason=ErrorReason.NODE_RETIRED)

    async def come_back(kept):
        raise retired

    node.come_back = come_back
    await node.clock.advance(7 * 86_400)
    async with node.running():
        await node.clock.advance(10)
    assert node.refused[0] is retired
    revocation.look_at(retired)
    assert revocation.error is retired


async def test_a_clock_that_is_behind_does_not_keep_a_node_from_coming_back(tmp_path):
    """By its own clock the certificate is good; by that of the front door, which refuses it, it has ended."""
    node = Node(tmp_path, failures=100)
    async with node.running():
        await node.clock.advance(2 * 3600 + 60)
        while not node.came_back:
            await node.clock.advance(10)
            await asyncio.sleep(1.0)
            assert node.clock.monotonic() < 3 * 3600
        await node.replaced()


async def test_a_disk_that_is_full_for_a_while_does_not_end_renewal(tmp_path, monkeypatch):
    node = Node(tmp_path, failures=0)
    save, full = TlsFiles.save, asyncio.Event()

    def no_room(files, tls):
        if not full.is_set():
            full.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        save(files, tls)

    monkeypatch.setattr(TlsFiles, "save", no_room)
    async with node.running():
        while node.tls.load() == node.first:
            await node.clock.advance(600)
            await asyncio.sleep(1.0)
            assert node.clock.monotonic() < 3 * 3600
    assert full.is_set() and len(set(node.inventory.asked)) == 1


def test_what_a_renewal_left_unfinished_is_an_identity_still(tmp_path):
    """The agent died between the new key and its certificate: by the key that is there, the node comes back."""
    node = Node(tmp_path)
    key, _ = new_key_and_request()
    node.tls.key.write_bytes(key)
    assert known_identity(node.tls, node.clock.now()) == ""
    kept = kept_identity(node.tls)
    assert (kept.node, kept.key, kept.chain) == ("sites/s/nodes/n", key, node.first.chain)
    assert key.decode() not in repr(kept)
    node.tls.chain.write_text("no certificate")
    assert kept_identity(node.tls) is None


def test_what_is_shown_to_others_shows_itself_to_no_log():
    assert "canary" not in repr(JoinParameters("h:1", "", b"", "canary", "n"))
    assert "canary" not in repr(Asked("POST", "/", b"canary", "Bearer canary"))
    assert "canary" not in repr(Client("https://issuer", "id", "canary"))


def test_an_ended_certificate_is_no_identity(tmp_path):
    clock = VirtualClock()
    tls = files(tmp_path)
    authority = CertificateAuthority.create(clock.now())
    assert known_identity(tls, clock.now()) == ""
    tls.save(authority.issue("agent", "s/n", clock.now(), lifetime=timedelta(hours=1)))
    assert known_identity(tls, clock.now()) == "sites/s/nodes/n"
    assert known_identity(tls, clock.now() + timedelta(hours=2)) == ""


def test_a_state_directory_of_another_node_is_refused():
    require_node("sites/s/nodes/n", "", "")
    require_node("sites/s/nodes/n", "s", "n")
    with pytest.raises(InvalidArgument, match="belongs to"):
        require_node("sites/s/nodes/n", "s", "m")


def test_two_agents_never_share_a_state_directory(tmp_path):
    with exclusive(tmp_path / "state"):
        with pytest.raises(InvalidArgument, match="in use"), exclusive(tmp_path / "state", wait_s=0.0):
            pass
    with exclusive(tmp_path / "state", wait_s=0.0):
        pass
