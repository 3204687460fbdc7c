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

from whaleflux_inference_router.routing import Routing

CLUSTER = "replicas"
REMEMBERED = 16
TYPE_URL = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


class Endpoints(eds_pb2_grpc.EndpointDiscoveryServiceServicer):  # type: ignore[misc]  # generated without types
    """EndpointDiscoveryService for any number of front doors."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
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
                if known is not None and not request.HasField("error_detail"):
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
        """All replicas with an address, READY or not: the policy decides, this only makes them known early."""
        return frozenset(r.address for r in self._routing.replicas.values.values() if r.address)

    def _acknowledge(self, stream: int, addresses: frozenset[str]) -> None:
        self._acknowledged[stream] = addresses
        self._tell()

    def _tell(self) -> None:
        """What every connected front door knows; None while none is connected."""
        known = list(self._acknowledged.values())
        self._routing.reachable = frozenset.intersection(*known) if known else None


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
    host, _, port = address.rpartition(":")
    return address_pb2.Address(socket_address=address_pb2.SocketAddress(address=host.strip("[]"), port_value=int(port)))
