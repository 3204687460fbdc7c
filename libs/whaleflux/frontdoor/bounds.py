"""What bounds the front door: connections, headers, time and memory, whoever calls. The figures are `model.FrontDoorLimits`."""

from __future__ import annotations

from typing import Any

from whaleflux.frontdoor.model import FrontDoorLimits
from whaleflux.frontdoor.parts import TYPE, URL

_MONITORS = "envoy.resource_monitors."
_HEAP, _CONNECTIONS = f"{_MONITORS}fixed_heap", f"{_MONITORS}global_downstream_max_connections"


def seconds(value: float) -> str:
    return f"{value:g}s"


def connection_bounds(limits: FrontDoorLimits) -> dict[str, Any]:
    """Of a listener."""
    return {"per_connection_buffer_limit_bytes": limits.connection_buffer_bytes}


def connection_limit(name: str, most: int) -> dict[str, Any]:
    """The filter that closes what is one connection too many of this listener."""
    kind = URL + "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit"
    return {
        "name": "envoy.filters.network.connection_limit",
        "typed_config": {TYPE: kind, "stat_prefix": name, "max_connections": most},
    }


def header_bounds(limits: FrontDoorLimits) -> dict[str, Any]:
    return {"max_headers_count": limits.header_count, "headers_with_underscores_action": "REJECT_REQUEST"}


def http2(streams: int, *, stream_window_bytes: int = 64 << 10) -> dict[str, Any]:
    """A connection's windows bound what its streams may send before somebody takes it."""
    return {
        "max_concurrent_streams": streams,
        "initial_stream_window_size": stream_window_bytes,
        "initial_connection_window_size": 1 << 20,
    }


def overload(limits: FrontDoorLimits) -> dict[str, Any]:
    """A front door that stalls, or is killed for its memory, is worse than one that refuses."""
    connections = limits.http_connections + limits.grpc_connections
    monitors = [
        _monitor(_HEAP, "fixed_heap.v3.FixedHeapConfig", max_heap_size_bytes=limits.heap_bytes),
        _monitor(
            _CONNECTIONS, "downstream_connections.v3.DownstreamConnectionsConfig", max_active_downstream_connections=connections
        ),
    ]  # fmt: skip
    actions = [
        _action("shrink_heap", _above(0.80)),
        _action("reduce_timeouts", _between(0.80, 0.95), typed_config=_SHORTER),
        # The streams that hold the most are ended first.
        _action("reset_high_memory_stream", _between(0.88, 0.98)),
        _action("stop_accepting_requests", _above(0.95)),
        _action("stop_accepting_connections", _above(0.98)),
    ]
    return {
        "overload_manager": {
            "refresh_interval": "0.1s",
            "resource_monitors": monitors,
            "actions": actions,
            "buffer_factory_config": {"minimum_account_to_track_power_of_two": 20},  # streams that hold 1 MiB or more
        }
    }


_SHORTER: dict[str, Any] = {
    TYPE: URL + "envoy.config.overload.v3.ScaleTimersOverloadActionConfig",
    "timer_scale_factors": [
        {"timer": "HTTP_DOWNSTREAM_CONNECTION_IDLE", "min_timeout": "2s"},
        {"timer": "TRANSPORT_SOCKET_CONNECT", "min_timeout": "1s"},
    ],
}


def _monitor(name: str, kind: str, **config: int) -> dict[str, Any]:
    return {"name": name, "typed_config": {TYPE: f"{URL}envoy.extensions.resource_monitors.{kind}", **config}}


def _action(name: str, trigger: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": f"envoy.overload_actions.{name}", "triggers": [{"name": _HEAP, **trigger}], **more}


def _above(value: float) -> dict[str, Any]:
    return {"threshold": {"value": value}}


def _between(begin: float, saturated: float) -> dict[str, Any]:
    return {"scaled": {"scaling_threshold": begin, "saturation_threshold": saturated}}
