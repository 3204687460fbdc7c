"""The whole configuration, put together."""

from __future__ import annotations

import json

from whaleflux import hostport
from whaleflux.frontdoor.bounds import overload
from whaleflux.frontdoor.clusters import policy_cluster, replicas_cluster, service_cluster
from whaleflux.frontdoor.grpc_listener import grpc_listener
from whaleflux.frontdoor.http_listener import http_listener
from whaleflux.frontdoor.model import KEY_NEEDED, FrontDoor
from whaleflux.frontdoor.parts import TYPE, URL, address_of
from whaleflux.frontdoor.tls import certificate
from whaleflux.rpc.tls_files import TlsFiles
from whaleflux.services import ROLES

_RUNTIME = {"re2.max_program_size.error_level": 4096, "http.max_requests_per_io_cycle": 8}

# Whoever is on the machine reaches the admin port, a rank beside a suite too: it has no other switches and tells no configuration.
_ADMIN_PATHS = [{"exact": "/ready"}, {"prefix": "/stats"}]
_DRAIN = {"prefix": "/drain_listeners"}  # deploy/envoy/drain.sh


def render(front: FrontDoor) -> str:
    """The whole configuration, as JSON (which is YAML)."""
    runtime = {**_RUNTIME, KEY_NEEDED: 0 if front.open_access else 100}
    config = {
        "admin": {
            "address": address_of(hostport.join(front.admin_host, front.admin_port)),
            "allow_paths": [*_ADMIN_PATHS, *([_DRAIN] if front.drains else [])],
        },
        "node": {"id": "frontdoor", "cluster": "whaleflux"},
        "static_resources": {
            "listeners": [grpc_listener(front), http_listener(front)],
            "clusters": [
                *(service_cluster(front, role) for role in sorted(ROLES)),
                replicas_cluster(),
                policy_cluster(front),
            ],
        },
        **overload(front.limits),
        # The pattern of headers that are stripped is long; each request is worked on in turns with others of its connection.
        "layered_runtime": {"layers": [{"name": "static", "static_layer": runtime}]},
    }  # fmt: skip
    return json.dumps(config, indent=1) + "\n"


def render_secrets(front: FrontDoor) -> str:
    """The file that `secrets` names: only certificates that come by such a file (SDS) are watched and read again."""
    return _secrets("identity", front.tls)


def render_public_secrets(front: FrontDoor) -> str:
    """The same for `public_secrets`; one file holds one certificate."""
    return _secrets("public", front.public or front.tls)


def _secrets(name: str, files: TlsFiles) -> str:
    kind = URL + "envoy.extensions.transport_sockets.tls.v3.Secret"
    secret = {TYPE: kind, "name": name, "tls_certificate": certificate(files)}
    return json.dumps({"resources": [secret]}, indent=1) + "\n"
