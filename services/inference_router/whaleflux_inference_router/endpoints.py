"""Which addresses the front door may send to (EDS, state of the world).

It sends only to what it was told here, so the policy in turn names only what it has acknowledged.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

from envoy.config.core.v3 import address_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.endpoint.v3 import eds_pb2_grpc
from google.protobuf import any_pb2

from whaleflux import hostport, names, telemetry
from whaleflux.telemetry import Event, Metric
from whaleflux_inference_router import convert
from whaleflux_inference_router.resolver import Resolver
from whaleflux_inference_router.routing_state import RoutingState

CLUSTER = "replicas"
REMEMBERED = 16
_log = telemetry.get_logger(__name__)
TYPE_URL = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


class Endpoints(eds_pb2_grpc.EndpointDiscoveryServiceServicer):  # type: ignore[misc]  # generated without types
    """EndpointDiscoveryService for any number of front doors."""

    def __init__(self, routing: RoutingState, resolver: Resolver | None = None) -> None:
        self._routing, self._resolver = routing, resolver or Resolver(routing.clock)
        self._acknowledged: dict[int, frozenset[str]] = {}  # by stream
        self._streams = itertools.count()

    async def StreamEndpoints(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        stream = next(self._streams)
        sent: dict[str, frozenset[str]] = {}  # by nonce; the last few, as nobody acknowledges older ones
        nonces = map(str, itertools.count(1))
        wake = asyncio.Event()

        async def read() -> None:
            async for request in requests:
                known = sent.get(request.response_nonce)
                if request.HasField("error_detail"):
                    _alarm(request.error_detail.message)
                elif known is not None:
                    self._acknowledge(stream, known)
                wake.set()

        reading = asyncio.create_task(read())
        try:
            last: frozenset[str] | None = None
            await wake.wait()  # the first request
            while not reading.done():
                changed, addresses = self._routing.changed, self._addresses()
                if addresses != last:
                    nonce, last = next(nonces), addresses
                    sent[nonce] = addresses
                    if len(sent) > REMEMBERED:
                        del sent[next(iter(sent))]
                    yield _response(addresses, nonce)
                await _first(changed.wait(), reading)
        finally:
            reading.cancel()
            self._acknowledged.pop(stream, None)
            self._tell()

    def _addresses(self) -> frozenset[str]:
        """All replicas with an address, READY or not: the policy decides, this only makes them known early.

        Only addresses that may be dialled (whatever a record says), and can be as they are: one that the front door refuses would keep it
        from learning any.
        """
        models = {model.name: convert.exempt(model) for model in self._routing.models.values.values()}
        replicas = self._routing.replicas.values.values()
        return frozenset(
            r.address
            for r in replicas
            if r.address and self._resolver.may_dial(r.address, models.get(names.model(convert.model_of(r.name)), ()))
        )

    def _acknowledge(self, stream: int, addresses: frozenset[str]) -> None:
        self._acknowledged[stream] = addresses
        self._tell()

    def _tell(self) -> None:
        """What every connected front door knows; None while none is connected."""
        known = list(self._acknowledged.values())
        self._routing.reachable = frozenset.intersection(*known) if known else None


def _alarm(why: str) -> None:
    """A refused update freezes the addresses of all models, so it must not go unseen: it is a bug of ours, never a user's."""
    telemetry.counter(Metric.ENDPOINTS_REFUSED).inc()
    _log.error(Event.ENDPOINTS_REFUSED, reason=why[:1000])


async def _first(waiting: Any, other: asyncio.Task[None]) -> None:
    """Until either is done; what is left of `waiting` is cancelled."""
    task = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait({task, other}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()


def _response(addresses: frozenset[str], nonce: str) -> Any:
    endpoints = [
        endpoint_components_pb2.LbEndpoint(endpoint=endpoint_components_pb2.Endpoint(address=_address(address)))
        for address in sorted(addresses)
    ]
    assignment = endpoint_pb2.ClusterLoadAssignment(
        cluster_name=CLUSTER, endpoints=[endpoint_components_pb2.LocalityLbEndpoints(lb_endpoints=endpoints)]
    )
    packed = any_pb2.Any(type_url=TYPE_URL, value=assignment.SerializeToString())
    return discovery_pb2.DiscoveryResponse(version_info=nonce, nonce=nonce, type_url=TYPE_URL, resources=[packed])


def _address(address: str) -> Any:
    host, port = hostport.parse(address)
    return address_pb2.Address(socket_address=address_pb2.SocketAddress(address=host, port_value=port))
