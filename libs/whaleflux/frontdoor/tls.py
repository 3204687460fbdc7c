"""Certificates on both sides, read again from their files when they are renewed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from whaleflux.frontdoor.bounds import seconds
from whaleflux.frontdoor.model import FrontDoor
from whaleflux.frontdoor.parts import TYPE, URL
from whaleflux.rpc.pki import server_name
from whaleflux.rpc.tls_files import TlsFiles


def downstream_tls(front: FrontDoor) -> dict[str, Any]:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            TYPE: URL + "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            # Join has no certificate yet; whoever shows one must show one of ours.
            "require_client_certificate": False,
            "common_tls_context": _common_tls(front, {}),
        },
    }


def public_tls(front: FrontDoor) -> dict[str, Any]:
    """Of the inference API, whose clients show a key and no certificate; {} where it is plain."""
    if front.public is None:
        return {}
    context = {**_shown(front.public, front.public_secrets, "public"), "alpn_protocols": ["h2", "http/1.1"]}
    kind = URL + "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
    socket = {"name": "envoy.transport_sockets.tls", "typed_config": {TYPE: kind, "common_tls_context": context}}
    return {"transport_socket": socket, "transport_socket_connect_timeout": seconds(front.limits.headers_s)}


def upstream_tls(front: FrontDoor, role: str, *, alpn: str = "h2") -> dict[str, Any]:
    expected = server_name(role, trust_domain=front.trust_domain)
    names = {"match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": expected}}]}
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            TYPE: URL + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": expected,
            "common_tls_context": {**_common_tls(front, names), "alpn_protocols": [alpn]},
        },
    }


def _common_tls(front: FrontDoor, verify: dict[str, Any]) -> dict[str, Any]:
    return {
        **_shown(front.tls, front.secrets, "identity"),
        "validation_context": {"trusted_ca": {"filename": str(front.tls.roots)}, **verify},
        "alpn_protocols": ["h2"],
    }


def _shown(files: TlsFiles, secrets: str, name: str) -> dict[str, Any]:
    """Which certificate is shown: from a file of secrets, which is watched, or read once."""
    if secrets:
        source = {"path": secrets, "watched_directory": {"path": os.path.dirname(secrets)}}
        config = {"resource_api_version": "V3", "path_config_source": source}
        return {"tls_certificate_sds_secret_configs": [{"name": name, "sds_config": config}]}
    return {"tls_certificates": [certificate(files)]}


def certificate(files: TlsFiles) -> dict[str, Any]:
    return {
        "certificate_chain": {"filename": str(files.chain)},
        "private_key": {"filename": str(files.key)},
        "watched_directory": _folder(files.chain),
    }


def _folder(file: Path) -> dict[str, str]:
    return {"path": os.path.dirname(file)}
