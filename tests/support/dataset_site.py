"""Agents of a site, as far as datasets go: real servers with their own certificates on loopback, one inventory in memory."""

from collections import Counter
from datetime import UTC, datetime

from tests.support.toy_rpc import CA
from whaleflux.clock import SystemClock
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.server import Server
from whaleflux.v1 import agent_pb2_grpc
from whaleflux_agent.dataset_peers import Peers
from whaleflux_agent.datasets import DatasetCache
from whaleflux_agent.piece_servicer import PieceServicer


class Later(SystemClock):
    """The real clock, and `later_s` more."""

    later_s = 0.0

    def monotonic(self):
        return super().monotonic() + self.later_s


class Heard(PieceServicer):
    """Notes how often each node asked what is here."""

    def __init__(self, *how):
        super().__init__(*how)
        self.asked = Counter()

    async def ListPieces(self, request, context):
        self.asked[request.node] += 1
        return await super().ListPieces(request, context)


class Agent:
    """One node, with an empty cache below `root`."""

    def __init__(self, inventory, root, name="n1", site="lab", room=1 << 30, **more):
        self.node, self.inventory = f"sites/{site}/nodes/{name}", inventory
        self.tls = CA.issue("agent", f"{site}/{name}", datetime.now(UTC))
        self.server = Server(self.tls, Authority())
        self.address = f"127.0.0.1:{self.server.bind('127.0.0.1:0')}"
        peers = Peers(self.node, self.tls, "whaleflux", inventory)
        self.cache = DatasetCache(
            root / site / name, room, self.node, inventory, frozenset, address=self.address, peers=peers, **more
        )
        self.clock, self.peers = Later(), peers
        self.readers = set()  # (node, dataset, job), as the scheduler would say
        self.servicer = Heard(self.node, self.cache.held, inventory, self.clock, self._reads)

    async def _reads(self, node, dataset, job):
        return (node, dataset, job) in self.readers

    def forget_what_inventory_said(self):
        """So long ago that it is asked again."""
        self.clock.later_s += 3600.0

    async def __aenter__(self):
        self.server.add(agent_pb2_grpc.add_PieceServiceServicer_to_server, self.servicer, "whaleflux.v1.PieceService")
        await self.server.start()
        return self

    async def __aexit__(self, *_):
        await self.cache.close()
        await self.server.drain(0)
