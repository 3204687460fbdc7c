"""Pieces of Envoy's configuration that listeners and clusters share."""

from __future__ import annotations

from typing import Any

from whaleflux import hostport
from whaleflux.frontdoor.model import FrontDoorLimits

TYPE = "@type"
URL = "type.googleapis.com/"


def connection_manager(name: str, routes: list[dict[str, Any]], limits: FrontDoorLimits) -> dict[str, Any]:
    return {
        TYPE: URL + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "route_config": {"virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]},
        # Slow or large headers, before anything is known of who sends them.
        "request_headers_timeout": f"{limits.headers_s:g}s",
        "max_request_headers_kb": limits.header_kib,
        # Who dialled is the peer of the connection, not what it says of itself; behind load balancers, the last so many say it.
        "use_remote_address": True,
        "xff_num_trusted_hops": limits.trusted_hops,
    }


def network_filter(manager: dict[str, Any]) -> dict[str, Any]:
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}


def router_filter(**more: Any) -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {TYPE: URL + "envoy.extensions.filters.http.router.v3.Router", **more},
    }


def router_stream() -> dict[str, Any]:
    """A gRPC stream to the router that is soon there again when the router is (the default waits for up to 30 s)."""
    backoff = {"retry_back_off": {"base_interval": "0.1s", "max_interval": "0.5s"}}
    return {"envoy_grpc": {"cluster_name": "inference_router", "retry_policy": backoff}}


def address_of(address: str) -> dict[str, Any]:
    host, port = hostport.parse(address)
    return {"socket_address": {"address": host, "port_value": port}}
