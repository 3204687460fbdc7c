"""What a service listens on beside gRPC: the routing policy and the figures, and whom they answer."""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import Mock

import pytest

from whaleflux import telemetry
from whaleflux.errors import Unauthenticated
from whaleflux.rpc.auth import Principal
from whaleflux.rpc.peers import who_reads_figures
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.rpc.tls_files import TlsFiles, server_context
from whaleflux_inference_router.policy_server import serving
from whaleflux_inference_router.request_authorizer import Answer

pytestmark = pytest.mark.integration
NOW = datetime.now(UTC)
CA, STRANGER = CertificateAuthority.create(NOW), CertificateAuthority.create(NOW)
NAMES = {"agent": "a/n1"}


def files(folder: Path, role: str, authority: CertificateAuthority = CA) -> TlsFiles:
    found = TlsFiles.under(folder / ("ours" if authority is CA else "theirs"), role)
    found.save(authority.issue(role, NAMES.get(role, "x"), NOW, hosts=["127.0.0.1"]))
    return found


def client(folder: Path, role: str = "", authority: CertificateAuthority = CA) -> ssl.SSLContext:
    """Of somebody who believes the server."""
    context = ssl.create_default_context(cadata=CA.certificate_pem.decode())
    if role:
        shown = files(folder, role, authority)
        context.load_cert_chain(shown.chain, shown.key)
    return context


def asked(port: int, path: str, context: ssl.SSLContext | None) -> int:
    """The status, 0 when nobody answered."""
    kind = http.client.HTTPSConnection if context else http.client.HTTPConnection
    connection = kind("127.0.0.1", port, timeout=3, **({"context": context} if context else {}))
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def test_figures_beyond_loopback_are_for_scrapers_and_operators_and_probes_for_all(tmp_path):
    admit = Mock(side_effect=Principal)
    may_read = who_reads_figures(admit, "whaleflux")
    tls = telemetry.MetricsTls(server_context(files(tmp_path, "scheduler"), everybody=True), may_read)
    server = telemetry.start_metrics(tls=tls)
    try:
        silent = socket.create_connection(
            ("127.0.0.1", server.port), timeout=3
        )  # says nothing: its handshake holds nobody up
        for path in ("/healthz", "/readyz"):
            assert asked(server.port, path, client(tmp_path)) == 200
        answers = {
            role: asked(server.port, "/metrics", client(tmp_path, role)) for role in ("", "agent", "user", "scheduler")
        }
        assert answers == dict.fromkeys(answers, 403)
        assert {
            asked(server.port, "/metrics", client(tmp_path, role)) for role in ("scraper", "operator", "admin")
        } == {200}
        admit.side_effect = Unauthenticated("revoked")
        assert asked(server.port, "/metrics", client(tmp_path, "operator")) == 403
        assert asked(server.port, "/healthz", client(tmp_path, "scraper", STRANGER)) == 0
        assert asked(server.port, "/healthz", None) == 0, "it is not plain"
        silent.close()
    finally:
        server.close()


@dataclass
class Authorizer:
    """Lets everybody in whom the wire lets in."""

    asked: int = 0

    def answer(self, _: object) -> Answer:
        self.asked += 1
        return Answer(200, (), b"")


async def test_the_policy_answers_the_front_door_alone(tmp_path):
    authorizer = Authorizer()
    async with serving(authorizer, "127.0.0.1:0", files(tmp_path, "inference_router")) as port:
        answers = {
            who: await asyncio.to_thread(asked, port, "/v1/models", context)
            for who, context in {
                "frontdoor": client(tmp_path, "frontdoor"),
                "another service": client(tmp_path, "scheduler"),
                "an agent": client(tmp_path, "agent"),
                "a front door of another authority": client(tmp_path, "frontdoor", STRANGER),
                "nobody": client(tmp_path),
                "plain": None,
            }.items()
        }
    assert answers == {**dict.fromkeys(answers, 0), "frontdoor": 200}
    assert authorizer.asked == 1
