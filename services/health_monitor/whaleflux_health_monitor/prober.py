"""Dials an agent's own port: the agent answers, its host refuses, or nothing comes back."""

from __future__ import annotations

import asyncio
import contextlib

from whaleflux import hostport, names
from whaleflux.errors import InvalidArgument, StatusError
from whaleflux.rpc.channel import connect
from whaleflux.rpc.pki import TlsFiles, server_name
from whaleflux.v1 import agent_pb2, agent_pb2_grpc
from whaleflux_health_monitor.core.evidence import Probe

CONNECT_S = 0.5
ANSWER_S = 0.8  # TLS included: on a loaded host that alone takes a few tenths of a second


class Prober:
    """Probes with this service's identity, and believes only the node's own certificate."""

    def __init__(self, tls: TlsFiles, trust_domain: str) -> None:
        self._tls, self._trust_domain = tls, trust_domain

    async def probe(self, node: str, address: str) -> Probe:
        """Within 1.3 s: TCP tells at once whether somebody listens, the rpc whether it is the agent and answers."""
        if (outcome := await _dial(address)) is not Probe.CONNECTS:
            return outcome
        site, node_id = names.split(node, "sites", "nodes")
        expected = server_name("agent", f"{site}/{node_id}", self._trust_domain)
        try:
            async with connect(address, self._tls, server=expected) as channel:
                stub = agent_pb2_grpc.NodeServiceStub(channel)
                answer = await stub.Probe(agent_pb2.ProbeRequest(), timeout=ANSWER_S)
        except StatusError:
            return Probe.CONNECTS
        return Probe.ANSWERED if answer.node == node else Probe.CONNECTS


async def _dial(address: str) -> Probe:
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(*hostport.parse(address))
    except ConnectionRefusedError:
        return Probe.REFUSED
    except (OSError, TimeoutError, InvalidArgument):
        return Probe.NO_ROUTE
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return Probe.CONNECTS
