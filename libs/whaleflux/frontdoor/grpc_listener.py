"""Where the CLI, the SDK and agents call: TLS, the caller's identity, and the service that the path names."""

from __future__ import annotations

from typing import Any

from whaleflux import hostport
from whaleflux.frontdoor.bounds import connection_bounds, connection_limit, header_bounds, http2, seconds
from whaleflux.frontdoor.headers import grpc_headers
from whaleflux.frontdoor.model import FrontDoor
from whaleflux.frontdoor.parts import address_of, connection_manager, network_filter, router_filter
from whaleflux.frontdoor.tls import downstream_tls
from whaleflux.services import BY_GRPC, REFLECTING, REFLECTION


def grpc_listener(front: FrontDoor) -> dict[str, Any]:
    limits = front.limits
    served = {f"whaleflux.v1.{name}": service for name, service in BY_GRPC.items()}
    served |= dict.fromkeys(REFLECTION, REFLECTING)
    routes = [
        {
            "match": {"prefix": f"/{name}/"},
            # Streams live for months: neither the route nor its idleness ends them, keepalive tells dead peers.
            "route": {"cluster": service.role, "timeout": "0s", "idle_timeout": "0s", "max_stream_duration": {"max_stream_duration": "0s"}},
        }
        for name, service in served.items()
    ]  # fmt: skip
    manager = {
        **connection_manager("grpc", routes, limits),
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "forward_client_cert_details": "SANITIZE_SET",
        "set_current_client_cert_details": {"uri": True},
        "http2_protocol_options": {
            **http2(limits.grpc_streams, stream_window_bytes=256 << 10),
            "connection_keepalive": {"interval": "5s", "timeout": "5s"},
        },
        # A connection without calls is kept by the pings of a live agent or client, and not for longer.
        "common_http_protocol_options": {**header_bounds(limits), "idle_timeout": "3600s"},
        "http_filters": [grpc_headers(), router_filter()],
    }
    return {
        "name": "grpc",
        "address": address_of(hostport.join(front.listen_host, front.grpc_port)),
        **connection_bounds(limits),
        "filter_chains": [
            {
                "filters": [connection_limit("grpc", limits.grpc_connections), network_filter(manager)],
                "transport_socket": downstream_tls(front),
                "transport_socket_connect_timeout": seconds(limits.headers_s),
            }
        ],
    }
